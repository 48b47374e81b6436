"""Means over real tokens, and the alignment of logits with tokens: the only place in the project for either.

Masks are bool, and True counts. Masked entries are removed with `where` and never multiplied by zero: a pad may hold
NaN or infinity, and NaN * 0 is NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse silent broadcasting: (B,) times (B, 1) is a (B, B) that no error would mention."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, got {shapes}")
    mask = tensors.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over ALL True entries of the batch: sum(x where mask) / count(mask).

    Every token weighs the same. (The mean of each row's mean would weigh tokens of short responses more.)

    Args: x, mask: the same shape, any.  Returns: scalar.  Raises ValueError if no entry is True.

    >>> masked_mean(torch.tensor([[1., 1., 1.], [5., 0., 0.]]),
    ...             torch.tensor([[True, True, True], [True, False, False]]))
    tensor(2.)
    """
    check_same_shape(x=x, mask=mask)
    if not mask.any():
        raise ValueError("the mask has no True entry: there is nothing to take the mean of")
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the True entries; 0 elsewhere.

        (x - mean) / sqrt(var + 1e-8),  var = mean of (x - mean)^2   (biased, as in OpenAI's lm-human-preferences)

    Args: x, mask: the same shape, any.  Returns: the same shape as x.

    >>> masked_whiten(torch.tensor([1., 3., 9.]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(var + 1e-8), 0.0)


def action_logprobs(logits: Tensor, mask: Tensor) -> Tensor:
    """log softmax of the logits that choose an action: logits (B, T, V), mask (B, T-1) -> (True slots, V).

    This is the shift of the project: slot t reads column t of logits, and the last column has no action.

    The softmax is taken in float32 at least, whatever autocast made of the logits: in bfloat16 a log-probability of
    -8 is known to 0.03, which is as large as the changes that PPO's ratio has to measure. (What the logits themselves
    lost in half precision stays lost; it is the same loss in both passes of a ratio.)
    """
    if logits.dim() != 3 or mask.shape != (logits.size(0), logits.size(1) - 1):
        raise ValueError(f"expected logits (B, T, V) and mask (B, T-1), got {tuple(logits.shape)} and "
                         f"{tuple(mask.shape)}")
    check_same_shape(mask=mask)
    logits = logits[:, :-1][mask]  # (True slots, V)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def unpack(x: Tensor, mask: Tensor) -> Tensor:
    """(True slots,) -> the shape of mask, with 0 where it is False."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probability of each token given those before it.

        out[:, t] = log softmax(logits[:, t])[tokens[:, t+1]]

    Args: logits: (B, T, V); tokens: (B, T); mask: (B, T-1), the slots to compute, all if it is not given. The
        others are left out of the softmax and its gradient, and hold 0.
    Returns: (B, T-1), nats.
    """
    if logits.dim() != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(f"expected logits (B, T, V) and tokens (B, T), got {tuple(logits.shape)} and "
                         f"{tuple(tokens.shape)}")
    actions = tokens[:, 1:]  # (B, T-1): slot t's action is token t+1
    if mask is None:
        mask = torch.ones_like(actions, dtype=torch.bool)
    logprobs = action_logprobs(logits, mask)  # (slots, V)
    chosen = logprobs.gather(1, actions[mask].unsqueeze(1)).squeeze(1)  # (slots,)
    return unpack(chosen, mask)  # (B, T-1)
