"""The pretraining mix: what train_ppo.py --ptx-coef adds to the gradient, and from which
demonstrations."""

from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf import data
from rlhf.data import Demonstration
from rlhf.methods import ptx
from rlhf.methods.ptx import PretrainingMix
from rlhf.run.device import setup
from tests.helpers import Digits
from train_ppo import PPOConfig

NO_SCALE = SimpleNamespace(scale=lambda loss: loss)
# Prompts of 2 tokens and responses of 3, 1, 6, 2 and 4.
DEMONSTRATIONS = [
    Demonstration([1 + (i + t) % 10 for t in range(2 + n)], 2)
    for i, n in enumerate((3, 1, 6, 2, 4))
]


class Batch(NamedTuple):
    """The arguments of one call of batch_indices."""

    count: int
    batch_size: int
    number: int
    seed: int


@pytest.fixture
def batches(monkeypatch):
    """The batches that were asked for. Each holds demonstrations 4, 1 and 2, in that order."""
    asked = []

    def batch_indices(*args):
        asked.append(Batch(*args))
        return [4, 1, 2]

    monkeypatch.setattr(ptx, "load_demonstrations", lambda *where, share: DEMONSTRATIONS)
    monkeypatch.setattr(data, "batch_indices", batch_indices)
    return asked


def make_mix(amp="off", **settings):
    cfg = PPOConfig(ptx_coef=0.5, **settings)
    return PretrainingMix(cfg, Digits(), 16, setup("cpu", amp))


def expected_gradient(gpt):
    """Of half the mean of -log p over the 4 + 1 + 6 response tokens of demonstrations 4, 1 and 2.
    Each row goes through the model by itself, so there is nothing to pad."""
    total = 0.0
    for i in (4, 1, 2):
        tokens = DEMONSTRATIONS[i].tokens
        logprobs = gpt(torch.tensor([tokens]))[0].log_softmax(dim=1)
        for t in range(2, len(tokens)):
            total = total - logprobs[t - 1, tokens[t]]
    return torch.autograd.grad(0.5 * total / 11, list(gpt.parameters()))


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2, 3])
def test_ptx_gradient_is_coefficient_times_that_of_the_sft_loss(gpt, batches, micro_batch_size):
    """Micro-batches do not change it, although their responses differ in length: 1 and 4 and then 6
    tokens."""
    expected = expected_gradient(gpt)
    make_mix(micro_batch_size=micro_batch_size).backward(gpt, NO_SCALE, 0, 0)
    assert_close([p.grad for p in gpt.parameters()], list(expected), atol=1e-10, rtol=1e-6)


def test_ptx_gradient_is_added_to_the_gradient_so_far(gpt, batches):
    expected = expected_gradient(gpt)
    for parameter in gpt.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    make_mix().backward(gpt, NO_SCALE, 0, 0)
    assert_close(
        [p.grad for p in gpt.parameters()], [3 + x for x in expected], atol=1e-10, rtol=1e-6
    )


@pytest.mark.parametrize("micro_batch_size", [0, 1])
def test_ptx_loss_is_multiplied_by_the_gradient_scaler(gpt, batches, micro_batch_size):
    """A scaler of 64 makes the gradient 64 times as large; optimizer_step divides it again."""
    expected = expected_gradient(gpt)
    make_mix(micro_batch_size=micro_batch_size).backward(
        gpt, SimpleNamespace(scale=lambda loss: 64 * loss), 0, 0
    )
    assert_close(
        [p.grad for p in gpt.parameters()], [64 * x for x in expected], atol=1e-8, rtol=1e-6
    )


def test_ptx_batch_number_counts_gradient_steps(gpt, batches):
    """3 inner epochs of 4 / 2 = 2 minibatches are 6 gradient steps per PPO step. Two PPO steps take
    batches 0 to 11, and gradient step 4 of PPO step 7 takes batch 7 * 6 + 4 = 46. Each is a
    minibatch of the 5 demonstrations."""
    mix = make_mix(batch_size=4, minibatch_size=2, inner_epochs=3, seed=9)
    for step, gradient_step in [*product((0, 1), range(6)), (7, 4)]:
        mix.backward(gpt, NO_SCALE, step, gradient_step)
    assert [batch.number for batch in batches] == [*range(12), 46]
    assert {batch._replace(number=0) for batch in batches} == {
        Batch(count=5, batch_size=2, number=0, seed=9)
    }


def test_ptx_micro_batches_take_one_batch(gpt, batches):
    make_mix(batch_size=6, minibatch_size=3, inner_epochs=1, micro_batch_size=1).backward(
        gpt, NO_SCALE, 2, 1
    )
    assert batches == [Batch(count=5, batch_size=3, number=5, seed=0)]


def test_ptx_reads_demonstrations_of_the_data_set(monkeypatch):
    """The training file, with the data set's tokenizer, and no row longer than the context."""
    asked = []
    tokenizer = Digits()
    monkeypatch.setattr(
        ptx, "load_demonstrations", lambda *where, **options: asked.append((where, options))
    )
    PretrainingMix(
        PPOConfig(ptx_coef=1.0, data="here", heldout=0.2), tokenizer, 16, setup("cpu", "off")
    )
    assert asked == [(("here", tokenizer, 16), {"share": 0.2})]


class Forward(NamedTuple):
    autocast: bool
    dtype: torch.dtype


class Recorder(nn.Module):
    """A GPT that keeps the precision of each forward pass."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.seen = gpt, []

    def hidden(self, tokens):
        return self.gpt.hidden(tokens)

    def logits(self, hidden):
        logits = self.gpt.logits(hidden)
        self.seen.append(Forward(torch.is_autocast_enabled("cpu"), logits.dtype))
        return logits


@pytest.mark.parametrize(
    ("amp", "expected"),
    [("off", Forward(False, torch.float32)), ("bf16", Forward(True, torch.bfloat16))],
)
def test_ptx_forward_passes_use_mixed_precision(gpt, batches, amp, expected):
    """The gradient is in float32 all the same, and finite."""
    recorder = Recorder(gpt.float())
    make_mix(amp, micro_batch_size=2).backward(recorder, NO_SCALE, 0, 0)
    assert recorder.seen == [expected] * 2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in gpt.parameters())
