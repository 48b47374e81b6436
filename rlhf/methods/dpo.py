"""DPO: learn the policy from comparisons directly, without a reward model and without sampling.

It has the same optimum as PPO's objective

    J(pi) = E_pi[R],    R = score - kl_coef * log(pi / pi_ref) of the whole response

and another expected gradient. Its row of the table in rlhf/advantages.py:

    method   KL                      length              expected gradient
    DPO      by its constant, beta   a sum over tokens   not J's, but the same optimum: see dpo_loss

`python -m docs.experiments.train_dpo` trains with it.
"""

import torch
from torch import Tensor

from rlhf.data import Comparison, comparison_batch, response_mask
from rlhf.losses import bradley_terry_loss
from rlhf.masked import action_slots, check_same_shape, token_logprobs
from rlhf.model import GPT
from rlhf.run.device import Compute


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation: the Bradley-Terry loss, with the policy itself as the reward
    model.

        r(y) = beta * log(pi(y) / pi_ref(y))
        -mean log sigmoid(r(chosen) - r(rejected))

    Rafailov et al. 2023, equation 7. Why. The best policy of J is pi* = pi_ref * exp(score / beta)
    / Z. Solved for the score, that is r plus log Z, which is the same for both responses to a
    prompt. So if the scores are fitted to votes by Bradley-Terry, pi* can be fitted directly. There
    is no reward model and no sampling.

    The expected gradient is not that of J. With votes of a Bradley-Terry model on all pairs of
    responses the minimum is pi*. With few pairs, all sampled from other policies, nothing is known
    of the responses that no pair holds, and the probability of the chosen one may fall too, as only
    the difference counts.

    beta is the KL penalty coefficient for scores in log-odds of the votes. train_reward.py divides
    its scores by `scale`, so kl_coef in train_ppo.py and beta = kl_coef * scale have the same
    optimum.

    Args: log-probabilities of whole responses, summed over their tokens, (N,) each, the policy's
        with gradient; beta.
    Returns: scalar, nats per pair; ln 2 if the policy is the reference.  Raises ValueError if the
        shapes differ.

    >>> chosen, rejected = torch.tensor([-1.]), torch.tensor([-2.])
    >>> dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    tensor(0.6931)
    """
    check_same_shape(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    r_chosen = beta * (policy_chosen - ref_chosen)  # (N,)
    r_rejected = beta * (policy_rejected - ref_rejected)  # (N,)
    return bradley_terry_loss(r_chosen, r_rejected)


def response_logprobs(gpt: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each whole response: tokens (B, T), mask (B, T-1) -> (B,)."""
    logits = gpt.logits(action_slots(gpt.hidden(tokens), mask))  # (S, V)
    return token_logprobs(logits, tokens, mask).sum(dim=1)


def pair_logprobs(
    rows: list[Comparison], policy: GPT, reference: GPT, pad_id: int, compute: Compute
) -> Tensor:
    """Log-probabilities (4, N) of the responses of N comparisons, in the order of dpo_loss: policy
    chosen, policy rejected, reference chosen, reference rejected. The reference's have no
    gradient."""
    tokens, lengths = comparison_batch(rows, pad_id, compute.device)  # (2N, T), (2N,)
    prompt_lens = [len(row.prompt.tokens) for row in rows] * 2
    prompt_lens = torch.tensor(prompt_lens, device=compute.device)  # (2N,)
    mask = response_mask(prompt_lens, lengths, tokens.size(1))  # (2N, T-1)
    with compute.autocast():
        logprobs = response_logprobs(policy, tokens, mask)  # (2N,)
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, tokens, mask)  # (2N,)
    return torch.cat([logprobs, ref_logprobs]).view(4, -1)
