"""What any training program needs besides its loss: device, precision, random numbers, the optimizer and its step."""

import contextlib
import hashlib
import math

import torch
from torch import Tensor, nn

from rlhf.support.cli import InputError

# ---- device, precision, random numbers ----


def setup(device: str, amp: str) -> tuple[torch.device, torch.dtype | None, torch.amp.GradScaler]:
    """Device, the dtype of autocast (None: float32 throughout) and the gradient scaler, from --device and --amp.

    The scaler multiplies the loss in float16, whose small gradients would round to zero. Otherwise it does nothing.
    """
    where = pick_device(device)
    dtype = pick_amp(amp, where)
    # "high" is TF32: with --amp on a GPU, the products left in float32 may round their factors to 10 bits as well.
    torch.set_float32_matmul_precision("high" if where.type == "cuda" and dtype else "highest")
    return where, dtype, torch.amp.GradScaler(where.type, enabled=dtype == torch.float16)


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda. auto takes a CUDA GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA GPU here; use --device cpu")
    return torch.device(name)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under autocast; None for float32 throughout.

    auto: bfloat16 on a CUDA GPU that has it, else off.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, amp: torch.dtype | None):
    """Context for forward passes. Losses are computed outside of it, in float32."""
    return torch.autocast(device.type, dtype=amp) if amp else contextlib.nullcontext()


def make_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A stream of random numbers that follows from its key only, such as (seed, "rollout", step).

    Nothing random carries over from one step to the next. A run that resumes at step 40 draws what the uninterrupted
    run drew there, and no generator's state needs saving.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# ---- the optimizer ----


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only, not on biases and LayerNorm gains.

    beta2 is 0.95 instead of 0.999, as for GPT-3: runs of a few hundred steps are too short for an average over a
    thousand.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate: linear warm-up over `warmup` steps, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)  # warmup <= step < steps
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate: linear warm-up over `warmup` steps, then linear decay towards 0."""
    return min((step + 1) / warmup if warmup else 1.0, (steps - step) / max(1, steps - warmup))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler, max_grad_norm: float) -> Tensor:
    """Clip the gradient, step. Returns the norm of the gradient before clipping.

    In float16 the gradient has been multiplied by the scaler, so it is divided again before its norm is taken. A step
    whose gradient is not finite is skipped. Raises InputError if that happens again and again.
    """
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() < 1:  # 2**16 at first, halved by each gradient that is not finite; 1 without a scaler
        raise InputError("no gradient is finite any more: the run has diverged; lower --lr, or use --amp bf16")
    return grad_norm


def check_finite(model: nn.Module, step: int, *numbers: Tensor | float | None) -> None:
    """Raise InputError if a trained weight, a buffer, or one of the numbers (losses, scores) is NaN or infinite.

    In float16 the scaler skips a step whose gradient is not finite. So the weights stay finite even if every loss is
    NaN.
    """
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad] + [*model.buffers()]
    tensors += [torch.as_tensor(number, device=tensors[0].device) for number in numbers if number is not None]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise InputError(f"step {step}: weights, losses or scores are not finite: the run has diverged; lower --lr")
