"""Parts 1 and 2 of a PPO step: sample responses, and score them with all models. No gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.masked import action_slots, token_logprobs
from rlhf.model import GPT, PolicyWithoutValue, PolicyWithValue, RewardModel
from rlhf.run import processes
from rlhf.run.device import autocast
from rlhf.sampling import draw_uniforms, generate, has_ended
from rlhf.tokenizer import Tokenizer


class Frozen(NamedTuple):
    """What does not change while the policy trains: the two frozen models and how responses are
    sampled and scored."""

    reference: GPT
    reward_model: RewardModel
    tokenizer: Tokenizer
    max_new_tokens: int = 40
    missing_eos_score: float = -3.0
    rows: int = 128  # how many are scored at once
    amp: torch.dtype | None = None
    sample_rows: int = 0  # how many are sampled at once, so that the cache fits in memory; 0: all


class Rollout(NamedTuple):
    """Prompts with their sampled responses; (B, T-1) are action slots, see rlhf/__init__.py."""

    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T-1) bool: the policy's own actions, end-of-text included
    logprobs: Tensor  # (B, T-1) of the policy that sampled them
    ref_logprobs: Tensor  # (B, T-1) of the reference
    values: Tensor  # (B, T-1)
    scores: Tensor  # (B,) the reward model's

    def ended(self, eos_id: int) -> Tensor:
        """(B,) bool: did the policy say end-of-text, or was it cut off?"""
        return has_ended(self.tokens, self.mask, eos_id)


@torch.no_grad()
def collect(
    policy: PolicyWithValue | PolicyWithoutValue,
    frozen: Frozen,
    prompts: Tensor,
    prompt_lens: Tensor,
    generator: torch.Generator | Tensor | None,
) -> Rollout:
    """Sample a response to each prompt, and score it with all models.

    Under torchrun each process does its share of the rows, and all get the whole rollout.

    Args: prompts (B, P), prompt_lens (B,); generator: as for generate.
    """
    uniforms = draw_uniforms(generator, prompts, frozen.max_new_tokens)  # (B, N)
    if len(prompts) < processes.WORLD:  # too few to share: every process does all of them
        return collect_rows(policy, frozen, prompts, prompt_lens, uniforms)
    mine = [processes.share(x) for x in (prompts, prompt_lens, uniforms)]
    return Rollout(*map(processes.gather, collect_rows(policy, frozen, *mine)))


def collect_rows(policy, frozen: Frozen, prompts, prompt_lens, uniforms: Tensor) -> Rollout:
    """collect, on one process.

    Args: prompts (B, P); prompt_lens (B,); uniforms (B, N): a random number for each token that may
        be sampled, see sampling.draw_uniforms.
    """
    eos_id = frozen.tokenizer.eos_id
    with autocast(prompts.device, frozen.amp):
        # ---- 1 generate ----
        tokens, mask = generate(
            policy.gpt,
            prompts,
            prompt_lens,
            frozen.max_new_tokens,
            eos_id,
            uniforms,
            frozen.sample_rows,
        )  # (B, T), (B, T-1)
    # ---- 2 score ----
    parts = []
    for part in torch.arange(len(tokens), device=tokens.device).split(frozen.rows):  # row numbers
        parts.append(score_rows(policy, frozen, tokens[part], mask[part], prompt_lens[part]))
    return Rollout(*map(torch.cat, zip(*parts)))  # the parts' tokens joined, their masks, ...


def score_rows(policy, frozen: Frozen, tokens, mask, prompt_lens: Tensor) -> Rollout:
    """What the policy, the reference and the reward model make of finished responses.

    Old and reference log-probabilities come from a forward pass over the finished sequences, as in
    the update, and not from sampling: the two agree on paper but not bit for bit, and the ratio
    must be 1 in the first gradient step of an update (it is, within 4e-6).

    Args: tokens (B, T), mask (B, T-1), prompt_lens (B,).
    """
    with autocast(tokens.device, frozen.amp):
        hidden, values = policy.hidden_and_values(tokens)  # (B, T, C), (B, T)
        ref_hidden = frozen.reference.hidden(tokens)  # (B, T, C)
        scores = score_responses(frozen, tokens, mask, prompt_lens)  # (B,)
        logits = policy.gpt.logits(action_slots(hidden, mask))  # (S, V)
        ref_logits = frozen.reference.logits(action_slots(ref_hidden, mask))  # (S, V)
        logprobs = token_logprobs(logits, tokens, mask)  # (B, T-1)
        ref_logprobs = token_logprobs(ref_logits, tokens, mask)  # (B, T-1)
    return Rollout(tokens, mask, logprobs, ref_logprobs, values[:, :-1], scores)


@torch.no_grad()
def score_responses(frozen: Frozen, tokens: Tensor, mask: Tensor, prompt_lens: Tensor) -> Tensor:
    """tokens (B, T), mask (B, T-1), prompt_lens (B,) -> scores (B,).

    The score of a response without end-of-text is *replaced* by the fixed missing_eos_score,
    whatever the reward model makes of the fragment (Ziegler et al. 2019): it has only seen finished
    responses, so its score of a fragment means little, and the policy could learn never to end. The
    cut counts as a true end: V after it is 0. The KL penalty stays. The default, -3, is three
    standard deviations below an average response of the comparisons.
    """
    lengths = prompt_lens + mask.sum(dim=1)  # (B,)
    scores = frozen.reward_model(tokens, lengths)  # (B,)
    ended = has_ended(tokens, mask, frozen.tokenizer.eos_id)  # (B,)
    return torch.where(ended, scores, frozen.missing_eos_score)
