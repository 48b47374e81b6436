"""Credit: how much better was each action than what the value estimate expected?"""

import torch
from torch import Tensor

from rlhf.masked import check_same_shape, masked_mean


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the action slots.

        delta[t] = r[t] + gamma * V[t+1] - V[t]              V after the last action is 0: the response is over
        A[t]     = delta[t] + gamma * lam * A[t+1]
                 = delta[t] + (gamma lam) delta[t+1] + (gamma lam)^2 delta[t+2] + ...
        R[t]     = A[t] + V[t]                               what the value estimate is trained towards

    Schulman et al. 2016, equation 16; the cases that follow are 17 and 18. lam = 0 trusts the value estimate (A =
    delta); lam = 1 trusts the rewards alone (with gamma = 1, A is the sum of all that follow, less V). gamma = 1 is
    right for responses: the score comes once, at the end, and a discount would pay the first words less of it.

    Args: rewards, values, mask: (B, T-1); the True slots of a row are consecutive.
    Returns: advantages and returns, (B, T-1), 0 where the mask is False; not whitened.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    values = torch.where(mask, values, 0.0)  # so that the V after the last action is 0, never read from a pad
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the True slots: 1 perfect, 0 no better than a constant.

    Args: all (B, T-1).  Returns: scalar; -inf or NaN where all the returns are equal.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    errors = returns - values
    error_variance = masked_mean((errors - masked_mean(errors, mask)) ** 2, mask)
    return_variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - error_variance / return_variance
