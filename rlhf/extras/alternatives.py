"""Options of train_ppo.py, --advantage rloo|grpo|reinforce, and DPO: other ways to climb PPO's objective.

    J(pi) = E_pi[R],    R = score - kl_coef * log(pi / pi_ref) of the whole response

`--advantage` replaces part 4 of a PPO step. A response is one action: all its tokens get the same advantage, R minus a
baseline made of other responses. There is no value network. The ratio, the clip and the epochs over a rollout stay.

What each does to the objective (tests/extras/test_alternatives.py checks the last column by enumeration, at ratio 1):

    method      KL                       length                 expected gradient
    gae         k1, in the reward        one mean over tokens   that of J if lambda = 1; else as wrong as V is
    rloo        k1, in the reward        one mean over tokens   that of J
    reinforce   k1, in the reward        one mean over tokens   that of J
    grpo here   k1, in the reward        one mean over tokens   not J's: each prompt is weighted by about 1 / std of R
    GRPO paper  k3, a term of the loss   mean of each response  not J's, for three reasons: see grpo_advantages
    DPO         by its constant, beta    a sum over tokens      not J's, but the same optimum: see dpo_loss

"One mean over tokens" divides by the number of tokens in the rollout, which rescales the gradient of a rollout and
does not turn it (rlhf/losses.py). Advantages are not whitened here: RLOO and REINFORCE have the scale of R.

The KL stays in the reward for all three, summed over the response with its score. A token could also be charged only
for the KL from itself on, as GAE does. Both are right on average. The sum is what Ahmadian et al. use.
"""

import torch
from torch import Tensor, nn

from rlhf.data import Comparison, chunks, comparison_batch, response_mask
from rlhf.extras.yardsticks import share_positive
from rlhf.losses import bradley_terry_loss
from rlhf.masked import check_same_shape, token_logprobs
from rlhf.model import GPT
from rlhf.support.runtime import autocast

# ---- advantages of whole responses ----


def grouped(scores: Tensor, group_size: int) -> Tensor:
    """(B,) -> (groups, G): groups are consecutive rows. Raises ValueError if they do not come out even."""
    if scores.dim() != 1 or group_size < 2 or len(scores) == 0 or len(scores) % group_size:
        raise ValueError(f"scores must be (B,) with B a multiple of group_size, and group_size 2 or more: got "
                         f"{tuple(scores.shape)} and {group_size}")
    return scores.view(-1, group_size)


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out (RLOO): the score minus the mean score of the group's other responses.

        A[i] = s[i] - 1/(G-1) * sum over j != i of s[j]  =  G/(G-1) * (s[i] - mean of the group)

    Ahmadian et al. 2024; Kool et al. 2019. The other responses to a prompt say what score to expect from it, as a value
    network does before the first token. They do not depend on response i, so the baseline adds no bias: with R as
    scores the expected gradient is that of J.

    With group_size = B the baseline is the mean of all other rows, whatever their prompts: that is REINFORCE here
    (Williams 1992). It is as unbiased, and noisier, because it does not know that one prompt is harder than another.

    Args: scores (B,), the G = group_size responses to a prompt in consecutive rows.
    Returns: (B,).  Raises ValueError if G is 1 or B is not a multiple of G.

    >>> rloo_advantages(torch.tensor([1., 2., 6.]), 3)
    tensor([-3.0000, -1.5000,  4.5000])
    """
    groups = grouped(scores, group_size)
    return ((groups - groups.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))).flatten()


def grpo_advantages(scores: Tensor, group_size: int, divide: bool = True) -> Tensor:
    """Group-relative advantages (GRPO): the score minus the mean of its group, divided by the group's deviation.

        A[i] = (s[i] - mean) / sqrt(var + 1e-8),    var = mean of (s - mean)^2     (biased, as in masked_whiten)

    Shao et al. 2024 (DeepSeekMath), section 4.1. divide = False is Liu et al. 2025 (Dr. GRPO), which equals (G-1)/G
    times RLOO: the mean holds s[i] itself, and that shrinks the expected gradient of J by exactly this factor.

    The division is a bias. It weighs a prompt by about 1/std, so a prompt whose responses score alike counts as much as
    one with much to gain. With G = 2, A is +1 or -1: that climbs the rate of wins of one response over another, not J.

    GRPO as published differs in two more ways, and both change the gradient:
        Its KL is a term of the loss, k3 of each token. The gradient of that is the one of KL(pi_ref || pi), token by
        token: the KL the other way round, without the credit of a token for the KL of later ones.
        It takes the mean over each response's tokens, so a token of a long response weighs less.
    `--advantage grpo` takes neither. Its scores are R, so the division rescales score and KL alike, and the trade
    between the two in each prompt stays that of kl_coef.

    Args: scores (B,), the G = group_size responses to a prompt in consecutive rows.
    Returns: (B,).  Raises ValueError if G is 1 or B is not a multiple of G.

    >>> grpo_advantages(torch.tensor([1., 3., 5., 5.]), 2)
    tensor([-1.,  1.,  0.,  0.])
    """
    groups = grouped(scores, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    var = (centred**2).mean(dim=1, keepdim=True)
    return (centred * torch.rsqrt(var + 1e-8) if divide else centred).flatten()


def response_advantages(rewards: Tensor, mask: Tensor, advantage: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Part 4 of a PPO step for --advantage rloo, grpo and reinforce: every token gets its response's advantage.

    Args: rewards, mask: (B, T-1), of `shape_rewards`. A row's sum is R = score - kl_coef * log(pi / pi_ref).
    Returns: advantages (B, T-1), 0 where the mask is False; returns (B, T-1), all 0: the values of PolicyWithoutValue
        are 0 too, so the value loss is 0.
    """
    check_same_shape(rewards=rewards, mask=mask)
    R = rewards.sum(dim=1)  # (B,)
    if advantage == "grpo":
        advantages = grpo_advantages(R, group_size)  # (B,)
    else:
        advantages = rloo_advantages(R, len(R) if advantage == "reinforce" else group_size)  # (B,)
    return torch.where(mask, advantages.unsqueeze(1), 0.0), torch.zeros_like(rewards)


class PolicyWithoutValue(nn.Module):
    """A policy in the place of PolicyWithValue, without a value network: its values are 0."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> the policy's hidden states (B, T, C), values (B, T)."""
        return self.gpt.hidden(tokens), torch.zeros(tokens.shape, device=tokens.device)


# ---- DPO ----


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float) -> Tensor:
    """Direct preference optimisation: the Bradley-Terry loss, with the policy itself as the reward model.

        r(y) = beta * log(pi(y) / pi_ref(y))
        -mean log sigmoid(r(chosen) - r(rejected))

    Rafailov et al. 2023, equation 7. Why. The best policy of J is pi* = pi_ref * exp(score / beta) / Z. Solved for the
    score, that is r plus log Z, which is the same for both responses to a prompt. So if the scores are fitted to votes
    by Bradley-Terry, pi* can be fitted directly. There is no reward model and no sampling.

    The expected gradient is not that of J. With votes of a Bradley-Terry model on all pairs of responses the minimum is
    pi*. With few pairs, all sampled from other policies, nothing is known of the responses that no pair holds, and the
    probability of the chosen one may fall too, as only the difference counts.

    beta is the KL penalty coefficient for scores in log-odds of the votes. train_reward.py divides its scores by
    `scale`, so kl_coef in train_ppo.py and beta = kl_coef * scale have the same optimum.

    Args: log-probabilities of whole responses, summed over their tokens, (N,) each, the policy's with gradient; beta.
    Returns: scalar, nats per pair; ln 2 if the policy is the reference.  Raises ValueError if the shapes differ.

    >>> dpo_loss(torch.tensor([-1.]), torch.tensor([-2.]), torch.tensor([-1.]), torch.tensor([-2.]), beta=0.1)
    tensor(0.6931)
    """
    check_same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen,
                     ref_rejected=ref_rejected)
    return bradley_terry_loss(beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected))


def pair_logprobs(rows: list[Comparison], policy: GPT, reference: nn.Module, pad_id: int, device, amp) -> Tensor:
    """Log-probabilities (4, N) of the responses of N comparisons, in the order of dpo_loss: policy chosen, policy
    rejected, reference chosen, reference rejected. The reference's have no gradient."""
    tokens, lengths = comparison_batch(rows, pad_id, device)  # (2N, T), (2N,)
    prompt_lens = torch.tensor([len(row.prompt.tokens) for row in rows] * 2, device=device)  # (2N,)
    mask = response_mask(prompt_lens, lengths, tokens.size(1))  # (2N, T-1)
    with autocast(device, amp):
        ours = token_logprobs(policy.hidden(tokens), tokens, mask, policy.logits).sum(dim=1)  # (2N,)
        with torch.no_grad():
            theirs = token_logprobs(reference.hidden(tokens), tokens, mask, reference.logits).sum(dim=1)  # (2N,)
    return torch.cat([ours, theirs]).view(4, -1)


@torch.no_grad()
def pair_accuracy(rows: list[Comparison], *models) -> float:
    """Share of comparisons in which log(pi / pi_ref) is higher for the chosen response. models: as in pair_logprobs."""
    logprobs = torch.cat([pair_logprobs(part, *models) for part in chunks(rows, 128)], dim=1)  # (4, N)
    chosen, rejected = logprobs[:2] - logprobs[2:]  # (N,), (N,)
    return share_positive(chosen - rejected)
