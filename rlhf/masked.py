"""Means over real tokens, and the alignment of logits with tokens, which is done only here.

Masks are bool, and True counts. Masked entries are removed with `where` and never multiplied by
zero: a pad may hold NaN or infinity, and NaN * 0 is NaN.
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


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is in float64. In float16 a sum overflows at 65,504."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, 0 elsewhere; in float32 at least."""
    return torch.where(mask, at_least_float32(x), 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over ALL True entries of the batch: sum(x where mask) / count(mask).

    Every token weighs the same. (The mean of each row's mean would weigh tokens of short responses
    more.)

    Args: x, mask: the same shape, any.
    Returns: scalar, in float32 at least. Raises ValueError if no entry is True. (On a GPU it is NaN
        then: to ask would make the host wait for everything that is queued there.)

    >>> masked_mean(torch.tensor([[1., 1., 1.], [5., 0., 0.]]),
    ...             torch.tensor([[True, True, True], [True, False, False]]))
    tensor(2.)
    """
    check_same_shape(x=x, mask=mask)
    if mask.device.type == "cpu" and not mask.any():
        raise ValueError("the mask has no True entry: there is nothing to take the mean of")
    return zero_outside(x, mask).sum() / mask.sum()


def centred(x: Tensor, mask: Tensor) -> Tensor:
    """x minus its mean over the True entries; elsewhere it means nothing.

    The lowest entry is subtracted first, so that equal entries give exactly 0. The mean of three
    123.45 in float32 is another number, and whitening would divide the rounding error by its own
    deviation.

    Args: x, mask: the same shape, any.  Returns: the same shape, in float32 at least.
    """
    x = at_least_float32(x)
    x = x - torch.where(mask, x, torch.inf).amin()
    return x - masked_mean(x, mask)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the True entries; 0 elsewhere.

        (x - mean) / sqrt(var + 1e-8),  var = mean of (x - mean)^2

    The variance is biased, as in OpenAI's lm-human-preferences.

    Args: x, mask: the same shape, any.  Returns: the same shape, in float32 at least.

    >>> masked_whiten(torch.tensor([1., 3., 9.]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    x = centred(x, mask)
    var = masked_mean(x**2, mask)
    return zero_outside(x * torch.rsqrt(var + 1e-8), mask)


# ---- logits and tokens: the only shift of logits ----


def action_slots(x: Tensor, mask: Tensor) -> Tensor:
    """What stands at the True slots: (B, T, D), (B, T-1) -> (S, D), row by row.

    Slot t reads column t, and the last column has no action.

    Half of a batch or more is prompt and padding, and the product with the vocabulary is expensive.
    So select hidden states first, and make logits only of those:

        logits = gpt.logits(action_slots(gpt.hidden(tokens), mask))  # (S, V)

    >>> x = torch.tensor([[[0.], [1.], [2.]], [[3.], [4.], [5.]]])
    >>> action_slots(x, torch.tensor([[False, True], [True, True]])).flatten()
    tensor([1., 3., 4.])
    """
    if x.dim() != 3 or mask.shape != (x.size(0), x.size(1) - 1):
        raise ValueError(
            f"expected logits or hidden states (B, T, D) and mask (B, T-1), got {tuple(x.shape)} "
            f"and {tuple(mask.shape)}"
        )
    check_same_shape(mask=mask)
    # Numbers and not the mask as index: on a GPU, each search for a mask's True entries makes the
    # host wait, and the backward pass would search again.
    rows, slots = mask.nonzero(as_tuple=True)  # (S,), (S,)
    return x[rows, slots]  # (S, D)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in float32 at least, whatever autocast made of the
    logits.

    In bfloat16 a log-probability of -8 is known to 0.03, which is as large as the changes that
    PPO's ratio has to measure. (What the logits themselves lost in half precision stays lost; it is
    the same loss in both passes of a ratio.)
    """
    return F.log_softmax(at_least_float32(logits), dim=-1)


def action_logprobs(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the whole vocabulary at the True slots.

    Args: logits (B, T, V), mask (B, T-1).  Returns: (S, V), nats.
    """
    return log_softmax(action_slots(logits, mask))


def chosen_logprobs(logprobs: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Of each action's log-probabilities, that of the token which was chosen.

    Args: logprobs (S, V), those of the True slots; tokens (B, T); mask (B, T-1).
    Returns: (B, T-1), nats, with 0 where the mask is False.
    """
    rows, slots = mask.nonzero(as_tuple=True)  # (S,), (S,)
    if len(logprobs) != len(rows):
        raise ValueError(
            f"expected logits or log-probabilities of the {len(rows)} True slots, got "
            f"{len(logprobs)}"
        )
    actions = tokens[rows, slots + 1].long()  # (S,): slot t's action is token t+1
    chosen = logprobs.gather(1, actions.unsqueeze(1)).squeeze(1)  # (S,)
    return logprobs.new_zeros(mask.shape).index_put((rows, slots), chosen)  # (B, T-1)


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probability of each token given those before it.

        out[:, t] = log softmax(logits[:, t])[tokens[:, t+1]]

    Args:
        logits (B, T, V); or only those of the True slots, (S, V), see action_slots.
        tokens (B, T).
        mask (B, T-1): the slots to compute, all if it is not given. The others are left out of the
            softmax and its gradient, and hold 0.
    Returns: (B, T-1), nats.
    """
    if mask is None:
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if tokens[:, 1:].shape != mask.shape:
        shapes = f"{tuple(tokens.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"expected tokens (B, T) and mask (B, T-1), got {shapes}")
    if logits.dim() != 2:
        logits = action_slots(logits, mask)  # (S, V)
    return chosen_logprobs(log_softmax(logits), tokens, mask)
