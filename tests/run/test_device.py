"""Devices, precision, random numbers."""

import pytest
import torch

from rlhf.run.device import autocast, make_generator, pick_amp, pick_device, setup
from rlhf.run.errors import InputError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


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
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bf16 or including_emulation,
    )
    assert pick_amp("auto", CUDA) == expected
    assert pick_amp("auto", CPU) is None


@pytest.mark.parametrize(
    ("amp", "dtype", "scales"),
    [
        ("off", None, False),
        ("auto", None, False),
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, True),
    ],
)
def test_setup_scales_gradients_only_in_float16(amp, dtype, scales):
    compute = setup("cpu", amp)
    assert compute.device == CPU and compute.amp == dtype
    assert compute.scaler.is_enabled() == scales


def test_setup_keeps_float32_products_whole_on_the_cpu():
    torch.set_float32_matmul_precision("high")
    setup("cpu", "bf16")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("amp", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_autocast_casts_matrix_products(amp, expected):
    x = torch.randn(4, 4)
    with autocast(CPU, amp):
        assert (x @ x).dtype == expected
    compute = setup("cpu", "off")._replace(amp=amp)
    with compute.autocast():
        assert (x @ x).dtype == expected


def test_make_generator_follows_from_its_key():
    def draw(*key):
        return tuple(torch.rand(4, generator=make_generator("cpu", *key)).tolist())

    assert draw(0, "rollout", 3) == draw(0, "rollout", 3)
    keys = [(0, "rollout", 3), (1, "rollout", 3), (0, "update", 3), (0, "rollout", 4)]
    draws = [draw(*key) for key in keys]
    assert len(set(draws)) == 4
