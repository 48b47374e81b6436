"""Facts that hold in every training run. If one fails, the run ends, or says so."""

import math

import torch
from torch import Tensor, nn

from rlhf.run.errors import InputError


def check_numbers(step: int, *numbers: float | None) -> None:
    """Raise InputError if one of the numbers (losses, scores) is NaN or infinite."""
    if not all(math.isfinite(number) for number in numbers if number is not None):
        raise InputError(
            f"step {step}: gradients, weights, losses or scores are not finite: the run has "
            f"diverged; lower --lr, or a coefficient of the loss"
        )


def check_finite(model: nn.Module, step: int, *numbers: float | None) -> None:
    """Raise InputError if a trained weight, a buffer, or one of the numbers is NaN or infinite.

    A gradient that is not finite makes weights NaN (optimizer_step). In float16 the scaler skips
    the step, so the weights stay finite even if every loss is NaN.
    """
    tensors = [p for p in model.parameters() if p.requires_grad]
    tensors += model.buffers()
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    check_numbers(step, *numbers, 0.0 if finite else math.nan)


def check_first_step(
    model: nn.Module, step: int, metrics: dict[str, float | None], amp: torch.dtype | None
) -> None:
    """Facts that hold whatever the data: kl_ref is 0 at step 0, and the ratio is 1 in the first
    minibatch of each step. If one fails, two of the forward passes disagree.

    Raises RuntimeError in float32. In half precision, of autocast or of the model's weights, an
    unlikely token may be off by this much, so it is a warning. A kl_ref below -1 is a warning too.
    """
    kl_ref = metrics["kl_ref"]
    first_log_ratio = metrics["first_log_ratio"]
    half = amp is not None or any(p.dtype == torch.bfloat16 for p in model.parameters())
    tolerance = 0.1 if half else 1e-4
    kl_start = kl_ref if step == 0 else 0.0
    agrees = abs(kl_start) <= tolerance and first_log_ratio <= tolerance  # False if one is NaN
    if not agrees:
        fault = (
            f"kl_ref is {kl_start} before the first update, and the log ratio {first_log_ratio} in "
            f"the first minibatch; both must be 0: two of the forward passes disagree"
        )
        if not half:
            raise RuntimeError(fault)
        print(f"warning: {fault}")
    if kl_ref < -1:
        print(
            f"warning: kl_ref is {kl_ref:.2f} nats; a KL this negative means that sampler and "
            f"scorer disagree"
        )


def check_spread(margins: Tensor, scores: Tensor) -> str:
    """Raise InputError if a reward model's scores differ by noise only, which the division by their
    standard deviation would blow up.

    Args: margins: of the comparisons that it learned from, in log-odds of the votes; scores: of all
        their responses.
    Returns: a warning if the margins are small, or "".
    """
    margin = margins.square().mean().sqrt().item()  # the scores deviate by half of it at least
    mean = scores.mean().item()
    std = scores.std(correction=0).item()
    found = f"the two scores of a comparison differ by {margin:.1e} (root mean square)"
    if margin < max(1e-4, 1e-5 * abs(mean)):  # of the order of rounding
        raise InputError(
            f"the reward model learned nothing: {found}; raise --lr or --steps, with --overwrite"
        )
    # sigmoid(0.01) is 0.5025: hardly a vote was learned, or little but the prompt is read
    if margin < max(0.01, 0.01 * std):
        return f"{found}, all scores by {std:.1e}: PPO would follow noise; raise --lr or --steps"
    return ""
