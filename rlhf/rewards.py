"""From one score for a response to one reward for each action.

scores (B,) come from the reward model; rewards (B, T-1) are what reinforcement learning maximises.
The two never share a name here.

Why a KL penalty. The reward model has only seen text like the reference's. Far from it, its scores
mean little, and a policy that is free to go anywhere finds text with a high score and no sense. So
each token is charged for how much likelier the policy makes it than the reference does.

Why in the reward and not as a term of the loss. In the reward the KL is part of the return: a token
is also credited for the KL of the tokens after it, and one value network predicts both. As a loss
term, the KL of each token counts by itself, given the tokens before it. Its gradient misses how a
token changes the KL of all later ones.
"""

import torch
from torch import Tensor

from rlhf.masked import check_same_shape


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref of each sampled action: the estimator of KL(pi || pi_ref) that enters the
    reward.

    Its expectation over actions sampled from pi is the KL; a single one may be negative. Schulman,
    "Approximating KL divergence" (2020), k1.

    Why k1 in the reward, although it is the noisier estimator. By the product rule

        grad E[k] = E[k * grad log pi] + E[grad k]

    A policy gradient holds the reward constant, so it has only the first term. For k1 that is the
    whole gradient of the KL, because the second one, E[grad k1] = E[grad log pi], is zero.

    Args: both (B, T-1), nats.  Returns: (B, T-1), nats per token; summed over a response, nats per
        response.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(pi_ref/pi - 1) - log(pi_ref/pi) = expm1(-d) + d, with d = log pi - log pi_ref.

    Schulman 2020, k3: unbiased as well, and never negative. While the two are close, as the old and
    the new policy are within a step (`kl_old`), it is much less noisy than k1. Far apart, where
    pi_ref/pi can be large, it is noisier.

    It does not belong in the reward. Held constant there, E[k3 * grad log pi] is not the gradient
    of the KL: the part left out, E[grad k3], is not zero. It can even have the wrong sign
    (test_k3_in_the_reward_has_another_gradient). Here k3 is only logged.

    Argument order matters: with the two exchanged, on the same samples, it estimates another
    quantity, also positive.

    Args: both (B, T-1), nats.  Returns: (B, T-1), nats per token.
    """
    d = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-d) + d


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Per-token KL penalty, plus the score on the last action.

        rewards[t] = -kl_coef * (log pi - log pi_ref)[t]  + (score if t is the response's last
        action)

    Ziegler et al. 2019, equation 2; InstructGPT, equation 2. Summed over a response this is score -
    kl_coef * log(pi/pi_ref), whose expectation is the objective J = E[score] - kl_coef * KL(pi ||
    pi_ref).

    Args: scores (B,); logprobs, ref_logprobs, mask: (B, T-1); kl_coef: score units per nat.
    Returns: rewards (B, T-1), 0 where the mask is False. Raises ValueError if a row has no action.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} must hold one number a row of mask {tuple(mask.shape)}"
        )
    if mask.device.type == "cpu" and not mask.any(dim=1).all():
        raise ValueError("a row of the mask has no True slot: its score has no action to land on")
    penalties = torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0)  # (B, T-1)
    slots = torch.arange(mask.size(1), device=mask.device)  # (T-1,)
    last = torch.where(mask, slots, -1).amax(dim=1, keepdim=True)  # (B, 1): the last True slot
    return torch.where(slots == last, penalties + scores.unsqueeze(1), penalties)


def adapt_kl_coef(
    kl_coef: float, kl_ref: float, target: float, horizon: float, batch_size: int
) -> float:
    """The next step's kl_coef, from an adaptive KL controller: raised if kl_ref is above its
    target, lowered below it.

        error = clip(kl_ref / target - 1, -0.2, 0.2)
        kl_coef * (1 + error * batch_size / horizon)

    Ziegler et al. 2019, section 2.2, where the factor is 0.1 * error per step; their code uses
    batch_size / horizon. A change of kl_coef moves the KL only slowly: too short a horizon makes it
    swing.

    Args: kl_ref, target: nats per response, target 0: kl_coef stays; horizon, batch_size: in
        responses.
    """
    if target == 0:
        return kl_coef
    error = min(max(kl_ref / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / horizon)
