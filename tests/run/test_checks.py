"""Facts that hold in every training run."""

import math
import re

import pytest
import torch

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.run.checks import check_finite, check_first_step, check_spread
from rlhf.run.errors import InputError


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_rejects_weights_buffers_and_numbers_that_are_not_finite(value):
    def model():
        return RewardModel(GPT(GPTConfig(11, 8, 1, 2, 8)))

    broken = [
        (model(), [value]),
        (model(), [1.0, value]),
        (model(), []),
        (model(), []),
    ]
    check_finite(model(), 3, 0.5, None)
    broken[2][0].gpt.wte.weight.data[2, 1] = value
    broken[3][0].mean.fill_(value)
    for network, numbers in broken:
        with pytest.raises(InputError, match="step 3: .* are not finite: the run has diverged"):
            check_finite(network, 3, *numbers)


def test_check_first_step_stops_a_run_whose_forward_passes_disagree(capsys):
    """kl_ref before any update and the first log ratio of each step are 0 up to rounding. In half
    precision, of autocast or of the weights, there is more rounding: a warning."""

    def check(step, kl_ref, log_ratio, amp, weights=torch.float32):
        metrics = {"kl_ref": kl_ref, "first_log_ratio": log_ratio}
        check_first_step(torch.nn.Linear(1, 1, dtype=weights), step, metrics, amp)

    check(0, 0.0, 9e-5, None)
    check(3, 2.0, 9e-5, None)
    check(0, 0.09, 0.09, torch.bfloat16)
    check(0, 0.09, 0.09, None, torch.bfloat16)
    assert capsys.readouterr().out == ""
    for step, kl_ref, log_ratio in (
        (0, 2e-4, 0.0),
        (0, -2e-4, 0.0),
        (0, math.nan, 0.0),
        (0, 0.0, 2e-4),
        (3, 2.0, 2e-4),
        (3, 2.0, math.nan),
    ):
        with pytest.raises(RuntimeError):
            check(step, kl_ref, log_ratio, None)
    for arguments in (
        (0, 0.0, 0.2, torch.bfloat16),
        (0, 0.0, 0.2, None, torch.bfloat16),
        (3, -1.1, 0.0, None),
    ):
        check(*arguments)
        assert capsys.readouterr().out.startswith("warning")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([1e-8, 0.0], [0.0, 1e-8]),
        ([9e-5, 0.5], [0.0, 0.50009]),
        ([3e4, 3e4], [3e4 + 0.1, 3e4 - 0.1]),  # 50 times the rounding of float32
    ],
)
def test_check_spread_rejects_scores_that_differ_by_noise(chosen, rejected):
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    with pytest.raises(InputError, match="learned nothing"):
        check_spread(chosen - rejected, torch.cat([chosen, rejected]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([0.009, 0.5], [0.0, 0.491], "differ by 9.0e-03 .*: PPO would follow noise"),
        ([50.0, -50.0], [49.9, -50.1], "differ by 1.0e-01 .*, all scores by 5.0e.01"),
    ],
)
def test_check_spread_warns_of_small_margins(chosen, rejected, message):
    """Log-odds of 0.009 are 50.2 %. Margins of 0.1 are little beside prompts 100 apart."""
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    assert re.search(message, check_spread(chosen - rejected, torch.cat([chosen, rejected])))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [([0.011, 0.5], [0.0, 0.489]), ([9.0, 9.0], [-9.0, -9.0]), ([0.02], [0.0])],
)
def test_check_spread_accepts_small_and_saturated_margins(chosen, rejected):
    """Also of equal chosen sides, whose own deviation is 0, and of a single comparison."""
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    assert check_spread(chosen - rejected, torch.cat([chosen, rejected])) == ""
