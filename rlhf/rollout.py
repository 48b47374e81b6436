"""Sampling from the policy, and everything PPO needs to know about what was sampled. No gradients here."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf.data import response_mask
from rlhf.masked import token_logprobs
from rlhf.model import GPT, PolicyWithValue, RewardModel
from rlhf.support.runtime import autocast
from rlhf.tokenizer import Tokenizer


class Frozen(NamedTuple):
    """What does not change while the policy trains: the two frozen models and how responses are sampled and scored."""

    reference: GPT
    reward_model: RewardModel
    tokenizer: Tokenizer
    max_new_tokens: int = 40
    missing_eos_score: float = -3.0
    rows: int = 128  # how many at once, so that logits (rows, T, V) fit in memory
    amp: torch.dtype | None = None


class Rollout(NamedTuple):
    """One batch of experience; the (B, T-1) ones hold a row's action slots, see rlhf/__init__.py."""

    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T-1) bool: the policy's own actions, end-of-text included
    logprobs: Tensor  # (B, T-1) of the policy that sampled them
    ref_logprobs: Tensor  # (B, T-1) of the reference
    values: Tensor  # (B, T-1)
    scores: Tensor  # (B,) the reward model's

    def take(self, rows: Tensor) -> "Rollout":
        """Some of the rows, cut after the longest of them."""
        actions = self.mask[rows].any(dim=0).nonzero().max() + 1  # columns up to the last action
        return Rollout(self.tokens[rows, : actions + 1], *(x[rows, :actions] for x in self[1:5]), self.scores[rows])

    def ended(self, eos_id: int) -> Tensor:
        """(B,) bool: did the policy say end-of-text, or was it cut off?"""
        return has_ended(self.tokens, self.mask, eos_id)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token from softmax(logits) for each row: (B, V) -> (B,).

    Inverse-CDF sampling: the cumulative probabilities cut [0, 1) into one interval per token, and a uniform number
    falls into a token's interval as often as the token is likely. (torch.multinomial draws V random numbers where this
    draws one.)
    """
    ends = torch.softmax(logits.double(), dim=1).cumsum(dim=1)  # (B, V): where each token's interval ends
    at = torch.rand(len(logits), 1, generator=generator, dtype=ends.dtype, device=ends.device) * ends[:, -1:]  # (B, 1)
    return torch.searchsorted(ends, at, right=True).squeeze(1).clamp(max=logits.size(1) - 1)


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Tensor, prompt_lens: Tensor, max_new_tokens: int, eos_id: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a response to each prompt from exactly the model's distribution: no top-k, no top-p.

    Prompts of different lengths go side by side. At column t a row still inside its prompt keeps its own token, a
    row past it takes the sampled one, until end-of-text or max_new_tokens.

    Args:
        model: tokens -> logits (B, T, V). A model with make_cache, hidden and logits, as a GPT has, is run with a
            cache, one column at a time. Any other callable is run on the whole prefix each time; if it returns a
            tuple, its first entry counts.
        prompts (B, P), padded on the right; prompt_lens (B,), each at least 1.
        generator: on the device of prompts.
    Returns: tokens (B, T), with 0 after a row's end, and T as short as the longest row allows;
        mask (B, T-1), True where the action was sampled here.
    """
    B, P = prompts.shape
    if prompt_lens.shape != (B,) or prompt_lens.min() < 1 or prompt_lens.max() > P:
        raise ValueError(f"prompt_lens must be ({B},) numbers between 1 and {P}, got {prompt_lens.tolist()}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    width = int(prompt_lens.max()) + max_new_tokens
    columns = torch.arange(P, device=prompts.device)
    tokens = prompts.new_zeros(B, width)  # (B, T)
    tokens[:, :P] = torch.where(columns < prompt_lens.unsqueeze(1), prompts, 0)[:, :width]
    lengths, done = prompt_lens.clone(), torch.zeros_like(prompt_lens, dtype=torch.bool)  # (B,)
    cache = model.make_cache(B, width) if hasattr(model, "make_cache") else None

    start = int(prompt_lens.min())
    for t in range(start, width):
        if cache is None:
            output = model(tokens[:, :t])
            logits = (output[0] if isinstance(output, tuple) else output)[:, -1]  # (B, V), of column t
        else:  # the prompts' common part, then a column at a time; only the last column's logits, since V may be large
            logits = model.logits(model.hidden(tokens[:, cache.length : t], cache)[:, -1])  # (B, C) -> (B, V)
        sampled = sample(logits, generator)  # (B,)
        writing = (t >= prompt_lens) & ~done  # (B,): past its prompt, not at its end
        tokens[:, t] = torch.where(writing, sampled, tokens[:, t])
        lengths = torch.where(writing, t + 1, lengths)
        done = done | (writing & (sampled == eos_id)) | (lengths == prompt_lens + max_new_tokens)
        if done.all():
            break
    tokens = tokens[:, : t + 1]
    return tokens, response_mask(prompt_lens, lengths, t + 1)


def has_ended(tokens: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """(B, T), (B, T-1) -> (B,) bool: did the policy say end-of-text, or was it cut off?"""
    return (mask & (tokens[:, 1:] == eos_id)).any(dim=1)


@torch.no_grad()
def score_responses(frozen: Frozen, tokens: Tensor, mask: Tensor, prompt_lens: Tensor) -> Tensor:
    """tokens (B, T), mask (B, T-1), prompt_lens (B,) -> scores (B,).

    The score of a response without end-of-text is *replaced* by the fixed missing_eos_score, whatever the reward model
    makes of the fragment (Ziegler et al. 2019). The cut counts as a true end: V after it is 0. The KL penalty stays.
    The default, -3, is three standard deviations below an average demonstration.
    """
    scores = frozen.reward_model(tokens, prompt_lens + mask.sum(dim=1))  # (B,)
    return torch.where(has_ended(tokens, mask, frozen.tokenizer.eos_id), scores, frozen.missing_eos_score)


@torch.no_grad()
def collect(
    policy: PolicyWithValue, frozen: Frozen, prompts: Tensor, prompt_lens: Tensor, generator: torch.Generator
) -> Rollout:
    """Parts 1 and 2 of a PPO step: sample a response to each prompt, score it with all models.

    Old and reference log-probabilities come from a forward pass over the finished sequences, in the same mode as the
    update will make, and not from sampling: the two agree on paper but not to the last bit, and the ratio of the
    first update must be 1 (it is, within 1e-6).

    Args: prompts (B, P), prompt_lens (B,); generator: on the device of prompts.
    """
    with autocast(prompts.device, frozen.amp):
        tokens, mask = generate(
            policy.gpt, prompts, prompt_lens, frozen.max_new_tokens, frozen.tokenizer.eos_id, generator)
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(frozen.rows):
        with autocast(prompts.device, frozen.amp):
            logits, values = policy(tokens[rows])  # (rows, T, V), (rows, T)
            ref_logits = frozen.reference(tokens[rows])
            scores = score_responses(frozen, tokens[rows], mask[rows], prompt_lens[rows])
        logprobs, ref_logprobs = (token_logprobs(x, tokens[rows], mask[rows]) for x in (logits, ref_logits))
        parts.append((logprobs, ref_logprobs, values[:, :-1], scores))
    logprobs, ref_logprobs, values, scores = (torch.cat(part) for part in zip(*parts))
    return Rollout(tokens, mask, logprobs, ref_logprobs, values, scores)
