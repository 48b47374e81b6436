"""Means over real tokens, and the alignment of logits with tokens, which is done in no other file.

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

    Args: x, mask: the same shape, any.  Returns: scalar.  Raises ValueError if no entry is True. (On a GPU it is NaN
        then: to ask would make the host wait for everything that is queued there.)

    >>> masked_mean(torch.tensor([[1., 1., 1.], [5., 0., 0.]]),
    ...             torch.tensor([[True, True, True], [True, False, False]]))
    tensor(2.)
    """
    check_same_shape(x=x, mask=mask)
    if mask.device.type == "cpu" and not mask.any():
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


def action_logprobs(logits: Tensor, mask: Tensor, to_logits=None) -> Tensor:
    """log softmax of the logits that choose an action: logits (B, T, V), mask (B, T-1) -> (True slots, V).

    This is the shift of the project: slot t reads column t of logits, and the last column has no action.

    With to_logits, `logits` are hidden states (B, T, C), and to_logits, such as GPT.logits, makes logits of those at
    True slots only. Half of a batch or more is prompt and padding, and the product with the vocabulary is expensive.

    The softmax is taken in float32 at least, whatever autocast made of the logits: in bfloat16 a log-probability of
    -8 is known to 0.03, which is as large as the changes that PPO's ratio has to measure. (What the logits themselves
    lost in half precision stays lost; it is the same loss in both passes of a ratio.)
    """
    if logits.dim() != 3 or mask.shape != (logits.size(0), logits.size(1) - 1):
        raise ValueError(f"expected logits (B, T, V) and mask (B, T-1), got {tuple(logits.shape)} and "
                         f"{tuple(mask.shape)}")
    check_same_shape(mask=mask)
    # Numbers and not the mask as index: on a GPU, every look for a mask's True entries makes the host wait.
    rows, slots = mask.nonzero(as_tuple=True)
    logits = logits[rows, slots]  # (True slots, V), or (True slots, C)
    logits = logits if to_logits is None else to_logits(logits)  # (True slots, V)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def chosen_logprobs(logprobs: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Of each action's log-probabilities, that of the token which was chosen.

    Args: logprobs (True slots, V) of action_logprobs, tokens (B, T), mask (B, T-1).
    Returns: (B, T-1), nats, with 0 where the mask is False.
    """
    row = (mask.flatten().cumsum(dim=0) - 1).clamp(min=0).view(mask.shape)  # (B, T-1): a True slot's row of logprobs
    return torch.where(mask, logprobs[row, tokens[:, 1:]], 0.0)  # slot t's action is token t+1


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor | None = None, to_logits=None) -> Tensor:
    """Log-probability of each token given those before it.

        out[:, t] = log softmax(logits[:, t])[tokens[:, t+1]]

    Args: logits: (B, T, V), or hidden states (B, T, C) with to_logits, see action_logprobs; tokens: (B, T); mask:
        (B, T-1), the slots to compute, all if it is not given. The others are left out of the softmax and its
        gradient, and hold 0.
    Returns: (B, T-1), nats.
    """
    if logits.dim() != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(f"expected logits (B, T, V) and tokens (B, T), got {tuple(logits.shape)} and "
                         f"{tuple(tokens.shape)}")
    if mask is None:
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    return chosen_logprobs(action_logprobs(logits, mask, to_logits), tokens, mask)
