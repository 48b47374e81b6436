"""Sampling a response to each prompt from exactly the model's distribution. No gradients here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.data import response_mask
from rlhf.model import GPT, KVCache


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token from softmax(logits) for each row: logits (B, V), uniforms (B,) in [0, 1) -> (B,).

    Inverse-CDF sampling: the cumulative probabilities cut [0, 1) into one interval per token, and a
    uniform number falls into a token's interval as often as the token is likely.
    (torch.multinomial draws V random numbers where this needs one.)
    """
    ends = torch.softmax(logits.double(), dim=1).cumsum(dim=1)  # (B, V): each interval's end
    at = (uniforms * ends[:, -1]).unsqueeze(1)  # (B, 1)
    chosen = torch.searchsorted(ends, at, right=True).squeeze(1)  # (B,)
    return chosen.clamp(max=logits.size(1) - 1)


def draw_uniforms(
    generator: torch.Generator | Tensor | None, prompts: Tensor, max_new_tokens: int
) -> Tensor:
    """One number in [0, 1) for each token to sample: (B, P) -> (B, N), on the device of prompts.

    They belong to the rows, so a row gets the same response whichever rows it is sampled with. If
    generator is a tensor, it holds the numbers already.
    """
    if isinstance(generator, Tensor):
        return generator
    shape = (len(prompts), max_new_tokens)
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=prompts.device)


@dataclass
class Batch:
    """Prompts and what has been sampled so far, filled in place."""

    tokens: Tensor  # (B, P+N): prompt, response, then 0
    lengths: Tensor  # (B,): of prompt and response so far
    longest: Tensor  # (B,): of prompt and longest response
    uniforms: Tensor  # (B, N) for at most N new tokens; further columns are not used
    stops: Tensor  # (K,) or (): the tokens that end a response

    def append(self, rows: Tensor, going: Tensor, logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Sample token number t of n rows. A row that is not going has ended: its length stays, and
        a 0 is written after its end.

        Args: rows (n,), their numbers; going (n,) bool; logits (n, V).
        Returns: the sampled tokens (n,); going (n,) bool after them.
        """
        sampled = sample(logits, self.uniforms[rows, t])  # (n,)
        self.tokens[rows, self.lengths[rows]] = torch.where(going, sampled, 0)
        self.lengths[rows] += going
        ended = torch.isin(sampled, self.stops) | (self.lengths[rows] == self.longest[rows])
        return sampled, going & ~ended


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Tensor,
    prompt_lens: Tensor,
    max_new_tokens: int | Tensor,
    eos_id: int | Sequence[int],
    generator: torch.Generator | Tensor | None = None,
    rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sample a response to each prompt: no top-k, no top-p.

    Prompts of different lengths go side by side. There are as many forward passes as the longest
    response has tokens: the pass over the prompts already gives the first token.

    Args:
        model: tokens -> logits (B, T, V). A model with make_cache, hidden and logits, as a GPT has,
            is run with a cache. Any other callable is run on everything so far for each token; if
            it returns a tuple, its first entry counts.
        prompts (B, P), padded on the right; prompt_lens (B,), each at least 1.
        max_new_tokens: one number, or one for each row (B,); N is the largest.
        eos_id: what ends a response; several tokens may.
        generator: on the device of prompts; or the uniform random numbers themselves,
            (B, N) or wider, in float64.
        rows: how many rows at once, which bounds the cache; 0: all. The responses do not depend on
            it.
    Returns: tokens (B, T), with 0 after a row's end, and T as short as the longest row allows;
        mask (B, T-1), True where the action was sampled here.
    """
    limits = torch.as_tensor(max_new_tokens, device=prompts.device).expand(len(prompts))  # (B,)
    if prompts.device.type == "cpu":  # to ask a GPU would make the host wait
        check_prompts(prompts, prompt_lens, limits)
    N = int(torch.as_tensor(max_new_tokens).max())
    uniforms = draw_uniforms(generator, prompts, N)  # (B, N)
    real = torch.arange(prompts.size(1), device=prompts.device) < prompt_lens.unsqueeze(1)  # (B, P)
    tokens = F.pad(torch.where(real, prompts, 0), (0, N))  # (B, P+N)
    batch = Batch(
        tokens,
        prompt_lens.clone(),
        prompt_lens + limits,
        uniforms,
        torch.tensor(eos_id, device=prompts.device),
    )

    fill = fill_with_cache if hasattr(model, "make_cache") else fill_without_cache
    by_length = prompt_lens.argsort(stable=True)  # prompts of similar length: less is padded
    for row_numbers in by_length.split(rows or len(prompts)):
        fill(model, batch, row_numbers)  # in place, so the order of the rows stays
    width = int(batch.lengths.max())
    return batch.tokens[:, :width], response_mask(prompt_lens, batch.lengths, width)


def check_prompts(prompts: Tensor, prompt_lens: Tensor, limits: Tensor) -> None:
    B, P = prompts.shape
    if prompt_lens.shape != (B,) or prompt_lens.min() < 1 or prompt_lens.max() > P:
        raise ValueError(
            f"prompt_lens must be ({B},) numbers between 1 and {P}, got {prompt_lens.tolist()}"
        )
    if limits.min() < 1:
        raise ValueError(f"max_new_tokens is {limits.tolist()}: it must be at least 1")


def fill_without_cache(model: nn.Module, batch: Batch, rows: Tensor) -> None:
    """Sample the responses of some rows (n,): run the model on everything so far for each token."""
    P = int(batch.lengths[rows].max())
    every = torch.arange(len(rows), device=rows.device)  # (n,)
    going = torch.ones_like(rows, dtype=torch.bool)  # (n,): not ended yet
    for t in range(batch.uniforms.size(1)):
        output = model(batch.tokens[rows, : P + t])
        logits = output[0] if isinstance(output, tuple) else output  # (n, P+t, V)
        last = batch.lengths[rows] - 1  # (n,): the position of each row's last real token
        _, going = batch.append(rows, going, logits[every, last], t)
        if not going.any():
            return


@dataclass
class Decoding:
    """The rows that are still being sampled, n of them, and what the model remembers of them."""

    rows: Tensor  # (n,): their numbers in the batch
    going: Tensor  # (n,) bool: not ended yet
    readable: Tensor  # (n, P+N) bool: columns of the cache that hold, or will hold, no pad
    cache: KVCache

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.rows = self.rows[kept]
        self.going = self.going[kept]
        self.readable = self.readable[kept]
        self.cache.keep(kept)


def fill_with_cache(model: GPT, batch: Batch, rows: Tensor) -> None:
    """Sample the responses of some rows (n,): one pass over the prompts, then one token a pass.

    The cache has P columns of prompts, padded on the right, then one for each new token. So in a
    row with a short prompt a token's column is not its position. With prompts of 3 and 1 tokens:

        column       0   1   2   3   4
        row 0       p0  p1  p2  a0  a1     positions 0 1 2 3 4
        row 1       p0   .   .  a0  a1     positions 0 - - 1 2; readable is False at the dots

    Only the cache has these gaps: batch.tokens holds a response right after its prompt. A row that
    has ended is sampled on until enough have ended to drop them; nothing reads what it samples.
    """
    prompt_lens = batch.lengths[rows]  # (n,)
    shortest, P = torch.stack(prompt_lens.aminmax()).tolist()
    N = batch.uniforms.size(1)
    columns = torch.arange(P + N, device=rows.device)  # (P+N,)
    state = Decoding(
        rows=rows,
        going=torch.ones_like(rows, dtype=torch.bool),
        readable=(columns < prompt_lens.unsqueeze(1)) | (columns >= P),
        cache=model.make_cache(len(rows), P + N),
    )
    hidden = model.hidden(batch.tokens[rows, :P], state.cache)  # (n, P, C)
    every = torch.arange(len(rows), device=rows.device)  # (n,)
    logits = model.logits(hidden[every, prompt_lens - 1])  # (n, V)
    for t in range(N):
        newest, state.going = batch.append(state.rows, state.going, logits, t)  # (n,), (n,)
        kept = state.going.nonzero().squeeze(1)  # the host waits for the device here, once a token
        if len(kept) == 0 or t == N - 1:
            return
        if len(kept) <= 0.75 * len(state.rows):  # enough have ended to pay for a copy
            state.keep(kept)
            newest = newest[kept]
        positions = (batch.lengths[state.rows] - 1).unsqueeze(1)  # (n, 1)
        readable = None
        if shortest < P:
            readable = state.readable[:, None, None, : P + t + 1]  # (n, 1, 1, P+t+1)
        hidden = model.hidden(newest.unsqueeze(1), state.cache, positions, readable)  # (n, 1, C)
        logits = model.logits(hidden[:, 0])  # (n, V)


def has_ended(tokens: Tensor, mask: Tensor, eos_id: int | Sequence[int]) -> Tensor:
    """(B, T), (B, T-1) -> (B,) bool: did the policy say end-of-text, or was it cut off?"""
    stops = torch.tensor(eos_id, device=tokens.device)
    return (mask & torch.isin(tokens[:, 1:], stops)).any(dim=1)
