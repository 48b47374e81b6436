"""Credit assignment: how much better was each action than the value network expected?

Why an advantage. The policy gradient makes each action likelier in proportion to what followed it.
A response of 20 tokens has one score at its end, so on its own it gives every token the same
credit. If all scores are positive, every sampled response is pushed up, even the worst.

Why a baseline. Subtract from what followed an action anything that does not depend on the action,
such as V(t), the return expected before it. The expected gradient stays the same, because E[grad
log pi(a)] = grad sum_a pi(a) = 0: the baseline adds no bias. The variance falls, because only the
difference from what was expected is left.
"""

import torch
from torch import Tensor

from rlhf.masked import at_least_float32, centred, check_same_shape, masked_mean


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages by generalised advantage estimation (GAE), and the returns that V is trained
    towards.

        delta[t] = r[t] + gamma * V[t+1] - V[t]          the TD error; V after the last action is 0
        A[t]     = delta[t] + gamma * lam * A[t+1]
                 = delta[t] + (gamma lam) delta[t+1] + (gamma lam)^2 delta[t+2] + ...
        R[t]     = A[t] + V[t]

    Schulman et al. 2016, equation 16; the two cases below are its equations 17 and 18.

    delta is how much one action changed the expected return: what it was paid, plus what is
    expected after it, minus what was expected before it. lam chooses how many deltas count, and
    trades bias for variance. lam = 0 is the TD error by itself: little noise, but as wrong as V is.
    lam = 1 with gamma = 1 is all rewards that followed, minus V[t]: right on average whatever V is,
    but with the noise of all later actions. The scripts' 0.95 accepts a little bias for less noise.
    gamma = 1 suits responses: the score comes once, at the end, and a discount would pay early
    tokens less of it.

    Args: rewards, values, mask: (B, T-1); the True slots of a row are consecutive.
    Returns: advantages and returns, (B, T-1), 0 where the mask is False; not whitened.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    # V after the last action is 0, and never read from a pad.
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How well V predicts the returns: 1 - Var(returns - values) / Var(returns) over the True
    slots.

    1: perfectly; 0: no better than a constant. Unless lambda is 1, the returns of GAE contain later
    values of V, so this is partly V against itself.

    Args: all (B, T-1).  Returns: scalar; -inf or NaN if all returns are equal.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    error_variance = masked_mean(centred(returns - values, mask) ** 2, mask)
    return_variance = masked_mean(centred(returns, mask) ** 2, mask)
    return 1 - error_variance / return_variance


# ---- advantages of whole responses ----
#
# Four methods (--advantage of train_ppo.py) maximise
#
#     J(pi) = E_pi[R],    R = score - kl_coef * log(pi / pi_ref) of the whole response
#
# GAE gives each token its own advantage and needs a value network for it. To the other three a
# response is one action: all its tokens get the same advantage, R minus a baseline made of other
# responses. The ratio, the clip and the epochs over a rollout stay. What each does to the objective
# (tests/core/test_advantages.py checks the last column by enumeration, at ratio 1):
#
#     method      KL                      length                 expected gradient
#     gae         k1, in the reward       one mean over tokens   J's if lambda = gamma = 1
#     rloo        k1, in the reward       one mean over tokens   J's
#     reinforce   k1, in the reward       one mean over tokens   J's
#     grpo here   k1, in the reward       one mean over tokens   not J's: each prompt is weighted by
#                                                                about 1 / std of R
#     GRPO paper  k3, a term of the loss  mean of each response  not J's, for three reasons: see
#                                                                grpo_advantages
#
# "One mean over tokens" divides by the number of tokens in the rollout, which rescales the gradient
# of a rollout and does not change its direction (rlhf/losses.py). Only GAE's advantages are
# whitened: RLOO's and REINFORCE's have the scale of R. rlhf/methods/dpo.py has DPO's row.
#
# The KL stays in the reward for all, summed over the response with its score for the last three. A
# token could also be charged only for the KL from itself on, as GAE does. Both are right on
# average. The sum is what Ahmadian et al. use.


def centred_groups(scores: Tensor, group_size: int) -> Tensor:
    """(B,) -> (groups, G): the scores of consecutive rows minus their mean, in float32 at least.

    Exactly 0 if they are equal, see masked.centred. Raises ValueError if the groups do not come out
    even.
    """
    if scores.dim() != 1 or group_size < 2 or len(scores) == 0 or len(scores) % group_size:
        raise ValueError(
            f"scores must be (B,) with B a multiple of group_size, and group_size 2 or more: got "
            f"{tuple(scores.shape)} and {group_size}"
        )
    groups = at_least_float32(scores).view(-1, group_size)  # (groups, G)
    groups = groups - groups.amin(dim=1, keepdim=True)
    return groups - groups.mean(dim=1, keepdim=True)


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out (RLOO): the score minus the mean score of the group's other
    responses.

        A[i] = s[i] - 1/(G-1) * sum over j != i of s[j]  =  G/(G-1) * (s[i] - mean of the group)

    Ahmadian et al. 2024; Kool et al. 2019. The other responses to a prompt say what score to expect
    from it, as a value network does before the first token. They do not depend on response i, so
    the baseline adds no bias: with R as scores the expected gradient is that of J.

    With group_size = B the baseline is the mean of all other rows, whatever their prompts: that is
    REINFORCE here (Williams 1992). It is as unbiased, and noisier, because it does not know that
    one prompt is harder than another.

    Args: scores (B,), the G = group_size responses to a prompt in consecutive rows.
    Returns: (B,).  Raises ValueError if G is 1 or B is not a multiple of G.

    >>> rloo_advantages(torch.tensor([1., 2., 6.]), 3)
    tensor([-3.0000, -1.5000,  4.5000])
    """
    groups = centred_groups(scores, group_size)
    return (groups * (group_size / (group_size - 1))).flatten()


def grpo_advantages(scores: Tensor, group_size: int, divide: bool = True) -> Tensor:
    """Group-relative advantages (GRPO): the score minus the mean of its group, divided by the
    group's deviation.

        A[i] = (s[i] - mean) / sqrt(var + 1e-8),    var = mean of (s - mean)^2

    Shao et al. 2024 (DeepSeekMath), section 4.1. The variance is biased, as in masked_whiten.
    divide = False is Liu et al. 2025 (Dr. GRPO), which equals (G-1)/G times RLOO: the mean holds
    s[i] itself, and that shrinks the expected gradient of J by exactly this factor.

    The division is a bias. It weighs a prompt by about 1/std, so a prompt whose responses score
    alike counts as much as one with much to gain. With G = 2, A is +1 or -1: that climbs the rate
    of wins of one response over another, not J.

    GRPO as published differs in two more ways, and both change the gradient. Its KL is a term of
    the loss, k3 of each token: the gradient of that is the one of KL(pi_ref || pi), the KL the
    other way round, without the credit of a token for the KL of later ones. And it takes the mean
    over each response's tokens, so a token of a long response weighs less.

    `--advantage grpo` takes neither. Its scores are R, so the division rescales score and KL alike,
    and the trade between the two in each prompt stays that of kl_coef.

    Args: scores (B,), the G = group_size responses to a prompt in consecutive rows.
    Returns: (B,).  Raises ValueError if G is 1 or B is not a multiple of G.

    >>> grpo_advantages(torch.tensor([1., 3., 5., 5.]), 2)
    tensor([-1.,  1.,  0.,  0.])
    """
    groups = centred_groups(scores, group_size)
    var = (groups**2).mean(dim=1, keepdim=True)
    if divide:
        groups = groups * torch.rsqrt(var + 1e-8)
    return groups.flatten()


def response_advantages(
    rewards: Tensor, mask: Tensor, advantage: str, group_size: int
) -> tuple[Tensor, Tensor]:
    """Part 4 of a PPO step for --advantage rloo, grpo and reinforce: every token gets its
    response's advantage.

    Args: rewards, mask: (B, T-1), of `shape_rewards`. A row's sum is R = score - kl_coef * log(pi /
        pi_ref).
    Returns: advantages (B, T-1), 0 where the mask is False; returns (B, T-1), all 0: the values of
        PolicyWithoutValue are 0 too, so the value loss is 0.
    """
    check_same_shape(rewards=rewards, mask=mask)
    R = rewards.sum(dim=1)  # (B,)
    if advantage == "grpo":
        advantages = grpo_advantages(R, group_size)  # (B,)
    elif advantage == "rloo":
        advantages = rloo_advantages(R, group_size)  # (B,)
    else:  # reinforce: one group of all rows
        advantages = rloo_advantages(R, len(R))  # (B,)
    return torch.where(mask, advantages.unsqueeze(1), 0.0), torch.zeros_like(rewards)
