"""Device, mixed precision, random numbers."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.run.errors import InputError

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Compute(NamedTuple):
    """The device, the dtype of autocast and the gradient scaler.

    amp: None for float32 throughout. The scaler multiplies the loss in float16, whose small
    gradients would round to zero. Otherwise it does nothing.
    """

    device: torch.device
    amp: torch.dtype | None
    scaler: torch.amp.GradScaler

    def autocast(self):
        """`autocast` for this device and dtype."""
        return autocast(self.device, self.amp)


def setup(device_name: str, amp_name: str) -> Compute:
    """The device, precision and scaler that --device and --amp name."""
    device = pick_device(device_name)
    amp = pick_amp(amp_name, device)
    # "high" is TF32: with --amp on a GPU, the products left in float32 may round their factors to
    # 10 bits as well.
    tf32 = device.type == "cuda" and amp is not None
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    return Compute(device, amp, scaler)


def pick_device(name: str) -> torch.device:
    """The device of this name: auto, cpu or cuda. auto: a CUDA GPU if there is one.

    Raises InputError if there is none for cuda.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA GPU here; use --device cpu")
    return torch.device(name)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under autocast; None for float32 throughout.

    auto: bfloat16 on a CUDA GPU that has it, else off.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None


def autocast(device: torch.device, amp: torch.dtype | None):
    """Context for forward passes. Log-probabilities are float32 in it too (masked.log_softmax)."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def read(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU, in one copy: the host waits for a GPU once."""
    together = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors)]


def make_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator seeded by the hash of its key, such as (seed, "rollout", step).

    Nothing random carries over from one step to the next. A run that resumes at step 40 draws what
    the uninterrupted run drew there, and no generator's state needs saving.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
