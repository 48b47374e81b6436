"""AdamW, learning-rate schedules and the optimizer's step."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf.model import GPT, GPTConfig
from rlhf.run.device import setup
from rlhf.run.errors import InputError
from rlhf.run.optimizer import (
    check_trained,
    cosine_schedule,
    linear_schedule,
    make_optimizer,
    optimizer_step,
    set_lr,
)


def test_cosine_schedule_matches_hand_computation():
    """12 steps, 2 of warm-up: 1/2, 1, 1 at first, 0.55 half-way in step 7, 0.1 after the last."""
    assert [cosine_schedule(s, 12, 2) for s in (0, 1, 2)] == [0.5, 1, 1]
    assert cosine_schedule(7, 12, 2) == pytest.approx(0.55)
    assert cosine_schedule(12, 12, 2) == pytest.approx(0.1)


def test_linear_schedule_matches_hand_computation():
    """12 steps, 2 of warm-up: 1/2, 1, then 10/10, 9/10, ... 1/10 in the last step. 4 steps without
    warm-up: 4/4 to 1/4."""
    factors = [linear_schedule(s, 12, 2) for s in (0, 1, 2, 3, 11)]
    assert factors == pytest.approx([0.5, 1, 1, 0.9, 0.1])
    assert [linear_schedule(s, 4, 0) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
def test_warm_up_takes_at_most_two_thirds_of_the_steps(schedule):
    """So the rate reaches its peak: in step 4 of 6, whatever the warm-up. One step has none."""
    for warmup in (4, 6, 20):
        factors = [schedule(step, 6, warmup) for step in range(6)]
        assert factors[:4] == [0.25, 0.5, 0.75, 1] and factors[5] < 1
    assert schedule(0, 1, 20) == 1


def test_make_optimizer_decays_only_matrices():
    optimizer = make_optimizer(GPT(GPTConfig(11, 8, 1, 2, 8)), lr=0.1, weight_decay=0.3)
    for group, (decay, dims) in zip(optimizer.param_groups, ((0.3, {2}), (0.0, {1}))):
        assert group["weight_decay"] == decay and {p.dim() for p in group["params"]} == dims


def test_make_optimizer_takes_only_trained_parameters():
    gpt = GPT(GPTConfig(11, 8, 1, 2, 8))
    gpt.wte.requires_grad_(False)
    matrices, vectors = make_optimizer(gpt, 0.1, 0.0).param_groups
    given = {id(p) for p in matrices["params"] + vectors["params"]}
    assert given == {id(p) for p in gpt.parameters()} - {id(gpt.wte.weight)}


def test_set_lr_sets_the_rate_of_all_groups():
    optimizer = make_optimizer(GPT(GPTConfig(11, 8, 1, 2, 8)), lr=0.1, weight_decay=0.3)
    assert set_lr(optimizer, 0.2) == 0.2
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_optimizer_step_clips_the_unscaled_gradient(amp):
    """Loss 3 w0 + 4 w1 at (1, 1): gradient (3, 4) of norm 5, clipped to norm 1: (0.6, 0.8). A step
    with rate 1 leaves (0.4, 0.2). In float16 the scaler has multiplied the loss by 65536. The norm
    and the clipping are of the gradient without this factor."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = setup("cpu", amp).scaler
    for x in ([3.0, 0.0], [0.0, 4.0]):  # two micro-batches, whose gradients add up
        scaler.scale(model(torch.tensor(x)).sum()).backward()
    norm = optimizer_step(model, optimizer, scaler, max_grad_norm=1.0)
    assert norm.item() == pytest.approx(5.0, rel=1e-5)
    assert_close(model.weight.data, torch.tensor([[0.4, 0.2]]), atol=1e-5, rtol=0)


def test_optimizer_step_leaves_a_small_gradient_as_it_is():
    """Gradient (3, 4) has norm 5, below 6: (1, 1) becomes (-2, -3)."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    model(torch.tensor([3.0, 4.0])).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norm = optimizer_step(model, optimizer, setup("cpu", "off").scaler, 6.0)
    assert norm.item() == 5 and model.weight.tolist() == [[-2, -3]]


def test_optimizer_step_in_float16_skips_an_infinite_gradient():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = setup("cpu", "fp16").scaler
    scaler.scale(model(torch.tensor([math.inf])).sum()).backward()
    optimizer_step(model, optimizer, scaler, 1.0)
    assert model.weight.item() == before and scaler.get_scale() < 65536


def test_optimizer_step_in_float16_gives_up_after_17_infinite_gradients():
    """The scale is 2**16 at first and is halved each time: after 17 it is 1/2. One finite gradient
    between them does not raise it."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = setup("cpu", "fp16").scaler

    def step(x):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([x])).sum()).backward()
        optimizer_step(model, optimizer, scaler, 1.0)

    for x in [math.inf] * 9 + [1.0] + [math.inf] * 7:
        step(x)
    assert scaler.get_scale() == 1
    with pytest.raises(InputError, match="no gradient is finite any more"):
        step(math.nan)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("gradient", [1e30, math.inf, math.nan])
def test_optimizer_step_makes_weights_nan_if_the_norm_is_not_finite(amp, gradient):
    """1e30 squared overflows in float32: each gradient is finite, their norm is not. Clipping would
    make them 0, the weights would stay, and the run go on for ever."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.0)
    model(torch.tensor([gradient, 1.0])).sum().backward()
    norm = optimizer_step(model, optimizer, setup("cpu", amp).scaler, 1.0)
    assert not norm.isfinite() and model.weight.isnan().any()


def test_check_trained_rejects_a_run_in_which_every_step_was_skipped():
    """In float16. The counts are the optimizer's own, so a checkpoint keeps them."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.0)
    scaler = setup("cpu", "fp16").scaler

    def step(x):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([x])).sum()).backward()
        optimizer_step(model, optimizer, scaler, 1.0)

    check_trained(optimizer)  # nothing was skipped so far
    for _ in range(3):
        step(math.inf)
        with pytest.raises(InputError, match="every gradient step was skipped"):
            check_trained(optimizer)
    step(1.0)
    step(math.nan)
    check_trained(optimizer)
