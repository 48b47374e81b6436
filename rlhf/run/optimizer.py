"""AdamW, learning rate schedules, and one optimizer step."""

import math

import torch
from torch import Tensor, nn

from rlhf.run.errors import InputError
from rlhf.run.processes import sum_gradients


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only, not on biases and
    LayerNorm gains.

    beta2 is 0.95 instead of 0.999, as for GPT-3: runs of a few hundred steps are too short for an
    average over a thousand.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate: linear warm-up over `warmup` steps, but at most two thirds
    of all, then half a cosine down to a tenth."""
    warmup = min(warmup, 2 * steps // 3)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)  # warmup <= step < steps
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate: linear warm-up over `warmup` steps, but at most two thirds
    of all, then linear decay towards 0."""
    warmup = min(warmup, 2 * steps // 3)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of all parameters, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler, max_grad_norm: float
) -> Tensor:
    """Sum the gradient over processes, clip it, step. Returns its norm before clipping.

    A norm that is not finite makes weights NaN, which stops the run (check_finite). For clipping
    divides by the norm: if it is infinite, every gradient is 0 and nothing is learned. To raise an
    error here, the host would have to wait for the device.

    In float16 the gradient has been multiplied by the scaler, so it is divided again before its
    norm is taken. A step whose gradient is not finite is skipped, and the weights stay.

    Raises InputError if that has happened so often that the scaler's factor is below 1.
    """
    sum_gradients(model)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    first_gradient = next(p.grad for p in model.parameters() if p.grad is not None)
    first_gradient += torch.where(grad_norm.isfinite(), 0.0, torch.nan)
    scaler.step(optimizer)
    scaler.update()
    # 2**16 at first, and halved by each gradient that is not finite; 1 if the scaler is off.
    if scaler.get_scale() < 1:
        raise InputError(
            "no gradient is finite any more: the run has diverged; lower --lr, or use --amp bf16"
        )
    return grad_norm


def check_trained(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError if every step was skipped, as it may be in float16."""
    taken = [state["step"] for state in optimizer.state.values()]
    if taken and not torch.stack(taken).any():
        raise InputError(
            "every gradient step was skipped, as no gradient was finite: nothing was learned; give "
            "more --steps, or use --amp bf16"
        )
