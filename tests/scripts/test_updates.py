"""The gradient steps of train_sft.py and train_reward.py: micro-batches, and how often the host
waits for the device. Those of train_ppo.py are in tests/core/test_ppo.py."""

import pytest
import torch
from torch.testing import assert_close

import train_reward
import train_sft
from rlhf.run.flags import parse_cli
from tests.helpers import Waits, tiny


class Stop(Exception):
    pass


def first_gradient(module, config, name, *flags):
    """The gradient that a script's main has computed when it is about to make its first step."""
    gradient = {}

    def spy(model, *rest):
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient[parameter_name] = parameter.grad.clone()
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "optimizer_step", spy)
        with pytest.raises(Stop):
            module.main(parse_cli(config, tiny(name, *flags)))
    return gradient


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_sft_micro_batches_sum_to_the_batch(trained, tmp_path, double, size):
    """Eight responses of different lengths: a mean of the micro-batches' means would be another
    gradient."""
    arguments = (train_sft, train_sft.SFTConfig, "sft", "--data", trained[0], "--out", tmp_path)
    whole = first_gradient(*arguments)
    parts = first_gradient(*arguments, "--micro-batch-size", size)
    assert len(whole) > 10
    assert_close(parts, whole, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_reward_micro_batches_sum_to_the_batch(trained, tmp_path, double, size):
    data, out, _ = trained
    flags = ["--data", data, "--out", tmp_path, "--sft", out / "sft.pt"]
    arguments = (train_reward, train_reward.RewardConfig, "reward", *flags)
    whole = first_gradient(*arguments)
    parts = first_gradient(*arguments, "--micro-batch-size", size)
    assert whole["head.weight"].abs().max() > 0
    assert_close(parts, whole, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("module", "config", "name"),
    [(train_sft, train_sft.SFTConfig, "sft"), (train_reward, train_reward.RewardConfig, "reward")],
)
def test_a_gradient_step_waits_twice(trained, tmp_path, module, config, name):
    """In a run of 4 more steps, without lines of metrics: 8 more waits."""
    data, out, _ = trained
    start = ["--sft", out / "sft.pt"] if name == "reward" else []
    no_metrics = ["--log-every", 100, "--eval-every", 100]
    flags = tiny(name, "--data", data, "--out", tmp_path, *no_metrics, *start, "--overwrite")
    counts = []
    for steps in ("2", "6"):
        with Waits() as waits:
            module.main(parse_cli(config, [*flags, "--steps", steps]))
        counts.append(waits.counts.total())
    assert counts[1] - counts[0] == 8
