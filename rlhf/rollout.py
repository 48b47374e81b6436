"""Sampling from the policy, and everything PPO needs to know about what was sampled. No gradients here."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    rows: int = 128  # how many are scored at once
    amp: torch.dtype | None = None
    sample_rows: int = 0  # how many are sampled at once, so that the cache fits in memory; 0: all


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
        slots = torch.arange(1, self.mask.size(1) + 1, device=rows.device)
        width = int((self.mask[rows] * slots).max())  # columns up to the last action
        return Rollout(self.tokens[rows, : width + 1], *(x[rows, :width] for x in self[1:5]), self.scores[rows])

    def ended(self, eos_id: int) -> Tensor:
        """(B,) bool: did the policy say end-of-text, or was it cut off?"""
        return has_ended(self.tokens, self.mask, eos_id)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token from softmax(logits) for each row: logits (B, V), uniforms (B,) in [0, 1) -> (B,).

    Inverse-CDF sampling: the cumulative probabilities cut [0, 1) into one interval per token, and a uniform number
    falls into a token's interval as often as the token is likely. (torch.multinomial draws V random numbers where this
    needs one.)
    """
    ends = torch.softmax(logits.double(), dim=1).cumsum(dim=1)  # (B, V): where each token's interval ends
    at = (uniforms * ends[:, -1]).unsqueeze(1)  # (B, 1)
    return torch.searchsorted(ends, at, right=True).squeeze(1).clamp(max=logits.size(1) - 1)


@torch.no_grad()
def generate(model: nn.Module, prompts: Tensor, prompt_lens: Tensor, max_new_tokens: int, eos_id: int,
             generator: torch.Generator | Tensor | None = None, rows: int = 0) -> tuple[Tensor, Tensor]:
    """Sample a response to each prompt from exactly the model's distribution: no top-k, no top-p.

    Prompts of different lengths go side by side: one forward pass over all of them, then one for each new token.

    Args:
        model: tokens -> logits (B, T, V). A model with make_cache, hidden and logits, as a GPT has, is run with a
            cache. Any other callable is run on everything so far for each token; if it returns a tuple, its first
            entry counts.
        prompts (B, P), padded on the right; prompt_lens (B,), each at least 1.
        generator: on the device of prompts; or the uniform random numbers themselves, (B, max_new_tokens) in float64.
        rows: how many rows at once, which bounds the cache; 0: all. The random numbers belong to the rows, so the
            responses do not depend on it.
    Returns: tokens (B, T), with 0 after a row's end, and T as short as the longest row allows;
        mask (B, T-1), True where the action was sampled here.
    """
    B, P = prompts.shape
    if prompt_lens.shape != (B,) or prompt_lens.min() < 1 or prompt_lens.max() > P:
        raise ValueError(f"prompt_lens must be ({B},) numbers between 1 and {P}, got {prompt_lens.tolist()}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    P = int(prompt_lens.max())
    real = torch.arange(P, device=prompts.device) < prompt_lens.unsqueeze(1)  # (B, P)
    tokens = F.pad(torch.where(real, prompts[:, :P], 0), (0, max_new_tokens))  # (B, T)
    uniforms = generator if isinstance(generator, Tensor) else torch.rand(
        B, max_new_tokens, generator=generator, dtype=torch.float64, device=prompts.device)
    lengths = prompt_lens.clone()  # (B,): of prompt and response so far
    for some in prompt_lens.argsort(stable=True).split(rows or B):  # prompts of similar length: less is padded
        write_responses(model, tokens, lengths, some, uniforms, eos_id)
    width = int(lengths.max())
    return tokens[:, :width], response_mask(prompt_lens, lengths, width)


def write_responses(model: nn.Module, tokens: Tensor, lengths: Tensor, rows: Tensor, uniforms: Tensor,
                    eos_id: int) -> None:
    """Sample the responses of some rows, in place: tokens (B, T), lengths (B,), uniforms (B, N) for N new tokens."""
    P, N = int(lengths[rows].max()), uniforms.size(1)
    cache = model.make_cache(len(rows), P + N) if hasattr(model, "make_cache") else None
    columns = torch.arange(P + N, device=rows.device)
    no_pad = (columns < lengths[rows].unsqueeze(1)) | (columns >= P)  # (n, P + N): between prompt and response are pads
    ragged = not no_pad.all()
    going, sampled = torch.ones_like(rows, dtype=torch.bool), rows  # not at end-of-text yet; the newest tokens
    for t in range(N):
        last = lengths[rows] - 1  # (n,): the position of each row's last real token
        every = torch.arange(len(rows), device=rows.device)
        if cache is None:
            output = model(tokens[rows, : P + t])
            logits = (output[0] if isinstance(output, tuple) else output)[every, last]  # (n, V)
        elif t == 0:  # all prompts in one pass
            logits = model.logits(model.hidden(tokens[rows, :P], cache)[every, last])  # (n, P, C) -> (n, C) -> (n, V)
        else:
            readable = no_pad[:, None, None, : P + t] if ragged else None  # (n, 1, 1, P + t)
            logits = model.logits(model.hidden(sampled.unsqueeze(1), cache, last.unsqueeze(1), readable)[:, 0])
        sampled = sample(logits, uniforms[rows, t])  # (n,)
        tokens[rows, lengths[rows]] = torch.where(going, sampled, 0)
        lengths[rows] += going
        going = going & (sampled != eos_id)
        kept = going.nonzero().squeeze(1)  # the host waits for the device here, once a token
        if len(kept) == 0:
            break
        if cache is not None and len(kept) <= 0.75 * len(rows):  # enough have ended to pay for a copy
            rows, going, sampled, no_pad = rows[kept], going[kept], sampled[kept], no_pad[kept]
            cache.keep(kept)


def has_ended(tokens: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """(B, T), (B, T-1) -> (B,) bool: did the policy say end-of-text, or was it cut off?"""
    return (mask & (tokens[:, 1:] == eos_id)).any(dim=1)


@torch.no_grad()
def score_responses(frozen: Frozen, tokens: Tensor, mask: Tensor, prompt_lens: Tensor) -> Tensor:
    """tokens (B, T), mask (B, T-1), prompt_lens (B,) -> scores (B,).

    The score of a response without end-of-text is *replaced* by the fixed missing_eos_score, whatever the reward model
    makes of the fragment (Ziegler et al. 2019): it has only seen finished responses, so its score of a fragment means
    little, and the policy could learn never to end. The cut counts as a true end: V after it is 0. The KL penalty
    stays. The default, -3, is three standard deviations below an average demonstration.
    """
    scores = frozen.reward_model(tokens, prompt_lens + mask.sum(dim=1))  # (B,)
    return torch.where(has_ended(tokens, mask, frozen.tokenizer.eos_id), scores, frozen.missing_eos_score)


@torch.no_grad()
def collect(policy: PolicyWithValue, frozen: Frozen, prompts: Tensor, prompt_lens: Tensor,
            generator: torch.Generator | Tensor) -> Rollout:
    """Parts 1 and 2 of a PPO step: sample a response to each prompt, score it with all models.

    Old and reference log-probabilities come from a forward pass over the finished sequences, in the same mode as the
    update will make, and not from sampling: the two agree on paper but not to the last bit, and the ratio of the
    first update must be 1 (it is, within 1e-6).

    Args: prompts (B, P), prompt_lens (B,); generator: as for generate.
    """
    with autocast(prompts.device, frozen.amp):
        tokens, mask = generate(policy.gpt, prompts, prompt_lens, frozen.max_new_tokens, frozen.tokenizer.eos_id,
                                generator, frozen.sample_rows)
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(frozen.rows):
        with autocast(prompts.device, frozen.amp):
            hidden, values = policy.hidden(tokens[rows])  # (rows, T, C), (rows, T)
            ref_hidden = frozen.reference.hidden(tokens[rows])
            scores = score_responses(frozen, tokens[rows], mask[rows], prompt_lens[rows])
            logprobs, ref_logprobs = (
                token_logprobs(x, tokens[rows], mask[rows], gpt.logits)
                for x, gpt in ((hidden, policy.gpt), (ref_hidden, frozen.reference)))
        parts.append((logprobs, ref_logprobs, values[:, :-1], scores))
    logprobs, ref_logprobs, values, scores = (torch.cat(part) for part in zip(*parts))
    return Rollout(tokens, mask, logprobs, ref_logprobs, values, scores)
