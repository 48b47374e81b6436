"""Every loss, in the order in which the scripts need them. Pure functions: tensors in, tensors out.

Masks are bool, (B, T-1), True where the action counts. Masked entries are replaced before any exp,
so that what a pad holds reaches neither a loss nor a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.masked import (
    action_logprobs,
    at_least_float32,
    check_same_shape,
    masked_mean,
    token_logprobs,
    zero_outside,
)

# ---- stage one: supervised fine-tuning ----


def sft_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the response tokens.

        -mean over True slots of log pi(token t+1 | tokens 0..t)

    Args: logits (B, T, V), or only those of the True slots, (S, V), see masked.action_slots; tokens
        (B, T); mask (B, T-1), True on the response, end-of-text included.
    Returns: scalar, nats per token. An untrained model starts near ln V.
    """
    return -masked_mean(token_logprobs(logits, tokens, mask), mask)


# ---- stage two: the reward model ----


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Negative log-likelihood of the votes, if P(chosen beats rejected) = sigmoid(r_chosen -
    r_rejected).

        -mean log sigmoid(r_chosen - r_rejected)

    Bradley and Terry 1952; Ouyang et al. 2022 (InstructGPT), equation 1 with K = 2. `logsigmoid`
    stays finite where log(sigmoid(x)) is log 0. The derivative with respect to a chosen score is
    -(1 - sigmoid(margin)) / N: a pair that is already ordered well contributes almost no gradient.

    Args: both (N,).  Returns: scalar, nats per pair; ln 2 if all scores are equal.

    >>> bradley_terry_loss(torch.tensor([0.]), torch.tensor([0.]))
    tensor(0.6931)
    """
    if chosen_scores.dim() != 1 or len(chosen_scores) == 0:
        raise ValueError(f"scores must be (N,) with N at least 1, got {tuple(chosen_scores.shape)}")
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    margins = at_least_float32(chosen_scores) - at_least_float32(rejected_scores)
    return -F.logsigmoid(margins).mean()


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Bradley-Terry over all pairs of K ranked responses: mean over a prompt's pairs, then over the
    prompts.

        -1/C(K,2) * sum over pairs of log sigmoid(r_better - r_worse)

    Ouyang et al. 2022 (InstructGPT), equation 1. With ties, the number of pairs that are left
    replaces C(K,2). The pairs of one prompt are one element: they share K forward passes, and a
    prompt with many pairs weighs no more.

    Args:
        scores (N, K).
        ranks (N, K), integers: the lower the better; equal ranks are ties, which are dropped; -1
            marks a place that holds no response. A prompt without a pair (all tied, or fewer than
            two) is left out.
    Returns: scalar. Raises ValueError if no prompt has a pair.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must be (N, K), got {tuple(scores.shape)}")
    check_same_shape(scores=scores, ranks=ranks)
    scores = at_least_float32(scores)
    better = ranks.unsqueeze(2)  # (N, K, 1)
    worse = ranks.unsqueeze(1)  # (N, 1, K)
    pairs = (better < worse) & (better >= 0)  # (N, K, K): True where i beats j; then j >= 0 too
    margins = torch.where(pairs, scores.unsqueeze(2) - scores.unsqueeze(1), 0.0)  # (N, K, K)
    losses = torch.where(pairs, -F.logsigmoid(margins), 0.0)
    counts = pairs.sum(dim=(1, 2))  # (N,)
    per_prompt = losses.sum(dim=(1, 2)) / counts.clamp(min=1)
    return masked_mean(per_prompt, counts > 0)


# ---- stage three: PPO ----


def policy_loss(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate objective, as a loss.

        ratio = exp(new_logprobs - old_logprobs)
        mean over True slots of max(-A * ratio, -A * clip(ratio, 1 - eps, 1 + eps))

    Schulman et al. 2017, equation 7. The paper maximises min(A * ratio, A * clip(ratio)); a loss is
    its negative, and -min(x, y) = max(-x, -y).

    Why a ratio. Sampling a rollout is expensive, so it is used for several gradient steps. After
    the first one the policy is no longer the one that sampled. The ratio is the importance weight
    that corrects for it: given the tokens before, E_old[ratio * A] is the mean advantage of the new
    policy's token. At ratio 1 its gradient is the plain policy gradient, A * grad log pi.

    Why a clip. The correction is only for the token itself: the tokens before it still come from
    the old policy, and so does A. So it holds only near the old policy. Once the ratio has moved
    beyond eps in the direction that the advantage asks for (up for A > 0, down for A < 0), the max
    picks the constant branch, and the gradient of that slot is exactly zero: this action has moved
    enough. A ratio that has moved in the wrong direction is never clipped, so it can come back.

    Why one mean. The policy gradient is a sum over the slots of each response and a mean over
    responses. Dividing the sum over all slots by their number only rescales it. Dividing each
    response by its own length would weigh the tokens of short responses more, which is another
    gradient. rlhf/ppo.py says how a slot weighs the same in a minibatch of short responses as in
    one of long ones. The advantages are whitened once, over the rollout.

    Args: new_logprobs (with gradient), old_logprobs, advantages, mask: (B, T-1).
    Returns: the loss; the clip fraction, the share of True slots where the clipped branch is the
        larger loss. That is less than the share with |ratio - 1| > eps, which also counts ratios
        that moved in the wrong direction and are not clipped.
    """
    check_same_shape(
        new_logprobs=new_logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
    )
    log_ratio = zero_outside(new_logprobs - old_logprobs, mask)  # (B, T-1)
    advantages = zero_outside(advantages, mask)
    # For A >= 0, any ratio above 1 + eps counts as 1 + eps. If exp made it infinite, its gradient
    # would be 0 * inf, which is NaN and not 0. So limit it before, to more than 1 + eps.
    limited = log_ratio.clamp(max=1 + clip_eps)
    ratio = torch.exp(torch.where(advantages >= 0, limited, log_ratio))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask)


def value_loss(
    new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of V against the returns, clipped around the V of the rollout.

        V_clipped = V_old + clip(V - V_old, -eps, eps)
        mean over True slots of 1/2 max((V - R)^2, (V_clipped - R)^2)

    From OpenAI's baselines and lm-human-preferences (Ziegler et al. 2019); not in the PPO paper. It
    keeps V near the estimate that the advantages were computed with. clip_eps = inf, the default of
    train_ppo.py, turns the clipping off.

    Args: new_values (with gradient), old_values, returns, mask: (B, T-1).
    Returns: the loss; the share of True slots where V has moved beyond eps and the clipped branch
        is the larger loss.
    """
    check_same_shape(new_values=new_values, old_values=old_values, returns=returns, mask=mask)
    new_values = zero_outside(new_values, mask)
    old_values = zero_outside(old_values, mask)
    returns = zero_outside(returns, mask)
    clipped_values = old_values + (new_values - old_values).clamp(-clip_eps, clip_eps)
    unclipped = (new_values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    # Within eps, V_clipped differs from V only by rounding.
    beyond = (new_values - old_values).abs() > clip_eps
    return loss, masked_mean((beyond & (clipped > unclipped)).float(), mask)


def entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """How undecided the policy is: mean over True slots of -sum over the vocabulary of p log p.

    Args: logits (B, T, V); mask (B, T-1).  Returns: scalar, nats per token; at most ln V.
    """
    return mean_entropy(action_logprobs(logits, mask))


def mean_entropy(logprobs: Tensor) -> Tensor:
    """The same, from the log-probabilities (S, V) of the True slots."""
    if len(logprobs) == 0:
        raise ValueError("the mask has no True entry: there is nothing to take the mean of")
    # A token of probability 0 adds 0: the limit of p log p, where 0 * -inf would be NaN.
    finite = torch.where(logprobs == -torch.inf, 0.0, logprobs)  # (S, V)
    return -(logprobs.exp() * finite).sum(dim=1).mean()
