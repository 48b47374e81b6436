"""Devices, precision, random numbers, learning-rate schedules and the optimizer's step."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.support.cli import InputError
from rlhf.support.runtime import (
    autocast,
    check_finite,
    cosine_schedule,
    linear_schedule,
    make_generator,
    make_optimizer,
    optimizer_step,
    pick_amp,
    pick_device,
    set_lr,
    setup,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- device, precision, random numbers ----


@pytest.mark.parametrize(("available", "expected"), [(False, "cpu"), (True, "cuda")])
def test_pick_device_auto_takes_a_gpu_if_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto").type == expected


def test_pick_device_rejects_a_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA GPU"):
        pick_device("cuda")


def test_pick_amp_reads_the_flag():
    assert pick_amp("off", CUDA) is None
    assert (pick_amp("bf16", CPU), pick_amp("fp16", CUDA)) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, None)])
def test_pick_amp_auto_takes_bf16_only_on_a_gpu_that_has_it(monkeypatch, has_bf16, expected):
    """Emulated bfloat16 does not count."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    assert pick_amp("auto", CUDA) == expected
    assert pick_amp("auto", CPU) is None


@pytest.mark.parametrize(("amp", "dtype", "scales"), [
    ("off", None, False), ("auto", None, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)])
def test_setup_scales_gradients_only_in_float16(amp, dtype, scales):
    device, got, scaler = setup("cpu", amp)
    assert device == CPU and got == dtype and scaler.is_enabled() == scales


@pytest.mark.parametrize(("amp", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_autocast_casts_matrix_products(amp, expected):
    x = torch.randn(4, 4)
    with autocast(CPU, amp):
        assert (x @ x).dtype == expected


def test_make_generator_follows_from_its_key():
    def draw(*key):
        return tuple(torch.rand(4, generator=make_generator("cpu", *key)).tolist())

    assert draw(0, "rollout", 3) == draw(0, "rollout", 3)
    draws = [draw(0, "rollout", 3), draw(1, "rollout", 3), draw(0, "update", 3), draw(0, "rollout", 4)]
    assert len(set(draws)) == 4


# ---- the optimizer ----


def test_cosine_schedule_matches_hand_computation():
    """12 steps, 2 of warm-up: 1/2, 1, 1 at first, 0.55 half-way in step 7, 0.1 after the last."""
    assert [cosine_schedule(s, 12, 2) for s in (0, 1, 2)] == [0.5, 1, 1]
    assert cosine_schedule(7, 12, 2) == pytest.approx(0.55) and cosine_schedule(12, 12, 2) == pytest.approx(0.1)


def test_linear_schedule_matches_hand_computation():
    """12 steps, 2 of warm-up: 1/2, 1, then 10/10, 9/10, ... 1/10 in the last step. 4 steps without warm-up: 4/4 to
    1/4."""
    assert [linear_schedule(s, 12, 2) for s in (0, 1, 2, 3, 11)] == pytest.approx([0.5, 1, 1, 0.9, 0.1])
    assert [linear_schedule(s, 4, 0) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
def test_schedule_may_be_warm_up_only(schedule):
    assert [schedule(s, 2, 2) for s in range(2)] == [0.5, 1]


def test_make_optimizer_decays_only_matrices():
    optimizer = make_optimizer(GPT(GPTConfig(11, 8, 1, 2, 8)), lr=0.1, weight_decay=0.3)
    for group, (decay, dims) in zip(optimizer.param_groups, ((0.3, {2}), (0.0, {1}))):
        assert group["weight_decay"] == decay and {p.dim() for p in group["params"]} == dims


def test_make_optimizer_takes_only_trained_parameters():
    gpt = GPT(GPTConfig(11, 8, 1, 2, 8))
    gpt.wte.requires_grad_(False)
    given = {id(p) for group in make_optimizer(gpt, 0.1, 0.0).param_groups for p in group["params"]}
    assert given == {id(p) for p in gpt.parameters()} - {id(gpt.wte.weight)}


def test_set_lr_sets_the_rate_of_all_groups():
    optimizer = make_optimizer(GPT(GPTConfig(11, 8, 1, 2, 8)), lr=0.1, weight_decay=0.3)
    assert set_lr(optimizer, 0.2) == 0.2 and [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_optimizer_step_clips_the_unscaled_gradient(amp):
    """Loss 3 w0 + 4 w1 at (1, 1): gradient (3, 4) of norm 5, clipped to norm 1: (0.6, 0.8). A step with rate 1 leaves
    (0.4, 0.2). In float16 the scaler has multiplied the loss by 65536. The norm and the clipping are of the gradient
    without this factor."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = setup("cpu", amp)[2]
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
    norm = optimizer_step(model, torch.optim.SGD(model.parameters(), lr=1.0), setup("cpu", "off")[2], 6.0)
    assert norm.item() == 5 and model.weight.tolist() == [[-2, -3]]


def test_optimizer_step_in_float16_skips_an_infinite_gradient():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = setup("cpu", "fp16")[2]
    scaler.scale(model(torch.tensor([math.inf])).sum()).backward()
    optimizer_step(model, optimizer, scaler, 1.0)
    assert model.weight.item() == before and scaler.get_scale() < 65536


def test_optimizer_step_in_float16_gives_up_after_17_infinite_gradients():
    """The scale is 2**16 at first and is halved each time: after 17 it is 1/2. One finite gradient between them does
    not raise it."""
    model = nn.Linear(1, 1, bias=False)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), setup("cpu", "fp16")[2]

    def step(x):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([x])).sum()).backward()
        optimizer_step(model, optimizer, scaler, 1.0)

    for x in [math.inf] * 9 + [1.0] + [math.inf] * 7:
        step(x)
    assert scaler.get_scale() == 1
    with pytest.raises(InputError, match="no gradient is finite any more"):
        step(math.nan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_rejects_weights_buffers_and_numbers_that_are_not_finite(value):
    def model():
        return RewardModel(GPT(GPTConfig(11, 8, 1, 2, 8)))

    broken = [(model(), [value]), (model(), [1.0, torch.tensor([0.0, value])]), (model(), []), (model(), [])]
    check_finite(model(), 3, 0.5, None, torch.tensor([1.0, 2.0]))
    broken[2][0].gpt.wte.weight.data[2, 1] = value
    broken[3][0].mean.fill_(value)
    for one, numbers in broken:
        with pytest.raises(InputError, match="step 3: .* are not finite: the run has diverged"):
            check_finite(one, 3, *numbers)
