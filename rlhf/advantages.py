"""Credit assignment: how much better was each action than the value network expected?

Why an advantage. The policy gradient makes each action likelier in proportion to what followed it. A response of 20
tokens has one score at its end, so on its own it gives every token the same credit. If all scores are positive, every
sampled response is pushed up, even the worst.

Why a baseline. Subtract from what followed an action anything that does not depend on the action, such as V(t), the
return expected before it. The expected gradient stays the same, because E[grad log pi(a)] = grad sum_a pi(a) = 0: the
baseline adds no bias. The variance falls, because only the difference from what was expected is left.
"""

import torch
from torch import Tensor

from rlhf.masked import check_same_shape, masked_mean


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages by generalised advantage estimation (GAE), and the returns that V is trained towards.

        delta[t] = r[t] + gamma * V[t+1] - V[t]              the TD error; V after the last action is 0
        A[t]     = delta[t] + gamma * lam * A[t+1]
                 = delta[t] + (gamma lam) delta[t+1] + (gamma lam)^2 delta[t+2] + ...
        R[t]     = A[t] + V[t]

    Schulman et al. 2016, equation 16; the two cases below are its equations 17 and 18.

    delta is how much one action changed the expected return: what it was paid, plus what is expected after it, minus
    what was expected before it. lam chooses how many deltas count, and trades bias for variance. lam = 0 is the TD
    error by itself: little noise, but as wrong as V is. lam = 1 with gamma = 1 is all rewards that followed, minus
    V[t]: right on average whatever V is, but with the noise of all later actions. The scripts' 0.95 accepts a little
    bias for less noise. gamma = 1 suits responses: the score comes once, at the end, and a discount would pay early
    tokens less of it.

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
    """How well V predicts the returns: 1 - Var(returns - values) / Var(returns) over the True slots.

    1: perfectly; 0: no better than a constant.

    Args: all (B, T-1).  Returns: scalar; -inf or NaN if all returns are equal.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    errors = returns - values
    error_variance = masked_mean((errors - masked_mean(errors, mask)) ** 2, mask)
    return_variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - error_variance / return_variance
