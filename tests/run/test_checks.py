"""Facts that hold in every training run."""

import math

import pytest
import torch

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.run.checks import check_finite, check_first_step
from rlhf.run.errors import InputError


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_rejects_weights_buffers_and_numbers_that_are_not_finite(value):
    def model():
        return RewardModel(GPT(GPTConfig(11, 8, 1, 2, 8)))

    broken = [
        (model(), [value]),
        (model(), [1.0, torch.tensor([0.0, value])]),
        (model(), []),
        (model(), []),
    ]
    check_finite(model(), 3, 0.5, None, torch.tensor([1.0, 2.0]))
    broken[2][0].gpt.wte.weight.data[2, 1] = value
    broken[3][0].mean.fill_(value)
    for network, numbers in broken:
        with pytest.raises(InputError, match="step 3: .* are not finite: the run has diverged"):
            check_finite(network, 3, *numbers)


def test_check_first_step_stops_a_run_whose_forward_passes_disagree(capsys):
    """kl_ref before any update and the first log ratio of each step are 0 up to rounding. In half
    precision there is more rounding: a warning."""
    check = check_first_step
    check(0, 0.0, 9e-5, None)
    check(3, 2.0, 9e-5, None)
    check(0, 0.09, 0.09, torch.bfloat16)
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
    for arguments in ((0, 0.0, 0.2, torch.bfloat16), (3, -1.1, 0.0, None)):
        check(*arguments)
        assert capsys.readouterr().out.startswith("warning")
