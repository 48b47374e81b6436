"""The micro-batches of train_sft.py and train_reward.py. Those of train_ppo.py are in
tests/core/test_ppo.py."""

import pytest
import torch
from torch.testing import assert_close

import train_reward
import train_sft
from rlhf.run.flags import parse_cli
from tests.helpers import tiny


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
