"""The optimizer and its one step, the same in all three scripts."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices alone, not biases and LayerNorm gains. A beta2 of 0.95 in
    place of 0.999, as for GPT-3: runs of a few hundred steps are too short for an average over a thousand."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps)


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate: up in a line over `warmup` steps, then down half a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)  # warmup <= step < steps
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate: up in a line over `warmup` steps, then down in a line towards 0."""
    return min((step + 1) / warmup if warmup else 1.0, (steps - step) / max(1, steps - warmup))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(
    losses: Iterable[Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """Backward, clip, step. Returns the sum of the losses and the norm of their gradient before clipping.

    losses are parts of one loss, such as those of the micro-batches of a batch that does not fit in memory, each
    weighed already by its share of the batch. From a generator, each part's graph is freed before the next is made.

    The scaler does nothing but in float16. There it has multiplied the loss so that small gradients survive, and the
    norm means nothing until they are divided again.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return total, grad_norm
