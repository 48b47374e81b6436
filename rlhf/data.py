"""A data set's three kinds of rows, and the batches of tokens made from them.

A data set is a folder. `python -m rlhf.tools.prepare` makes one from other files. Each CSV may have
a twin *_heldout.csv, whose prompts are in no training file; rlhf/run/heldout.py says what is held
out without it.

    prompts.csv         Prompt                       what PPO responds to
    demonstrations.csv  Prompt, Response             what fine-tuning imitates
    comparisons.csv     Prompt, Chosen, Rejected     what the reward model learns from
    tokenizer.tiktoken  byte-pair ranks; without it, GPT-2's
    judge.py            optional: score(prompts, responses), a gold score that no training step
                        learns from
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.run.device import make_generator
from rlhf.run.errors import InputError
from rlhf.run.heldout import HELDOUT_SHARE, read_rows
from rlhf.run.messages import as_text
from rlhf.run.tables import check_lengths
from rlhf.tokenizer import Tokenizer


class Prompt(NamedTuple):
    given: str | list[dict[str, str]]  # text, or messages: see rlhf/run/messages.py
    tokens: list[int]

    @property
    def text(self) -> str:
        return as_text(self.given)


class Demonstration(NamedTuple):
    tokens: list[int]  # prompt, response, end-of-text
    prompt_len: int
    given: str | list[dict[str, str]] = ""  # the prompt, as it is in Prompt

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return len(self.tokens)


class Comparison(NamedTuple):
    prompt: Prompt
    chosen: list[int]  # response and end-of-text, without the prompt
    rejected: list[int]
    texts: tuple[str, str] = ("", "")  # the chosen and the rejected response

    @property
    def size(self) -> int:
        """Tokens that the model reads, both sides."""
        return 2 * len(self.prompt.tokens) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longer side."""
        return len(self.prompt.tokens) + max(len(self.chosen), len(self.rejected))


# ---- reading ----


def load_prompts(
    folder: str,
    tokenizer: Tokenizer,
    limit: int,
    heldout: bool = False,
    share: float = HELDOUT_SHARE,
) -> list[Prompt]:
    """limit: the most tokens that a prompt may take, the model's context minus the response."""
    [(path, frame)] = read_rows(folder, "prompts", heldout, share)
    prompts = [Prompt(given, tokenizer.prompt_ids(given)) for given in frame["Prompt"]]
    lengths = [len(prompt.tokens) for prompt in prompts]
    check_lengths(
        path, frame.index, lengths, limit, "the prompt", fix="give a smaller --max-new-tokens, "
    )
    return prompts


def load_demonstrations(
    folder: str,
    tokenizer: Tokenizer,
    limit: int,
    heldout: bool = False,
    share: float = HELDOUT_SHARE,
) -> list[Demonstration]:
    """limit: the most tokens that prompt and response may take together."""
    [(path, frame)] = read_rows(folder, "demonstrations", heldout, share)
    rows = []
    for row in frame.itertuples():
        ids = tokenizer.prompt_ids(row.Prompt)
        rows.append(Demonstration(ids + tokenizer.response_ids(row.Response), len(ids), row.Prompt))
    lengths = [row.size for row in rows]
    check_lengths(path, frame.index, lengths, limit, "the prompt with its response")
    return rows


def load_comparisons(
    folder: str,
    tokenizer: Tokenizer,
    limit: int,
    heldout: bool = False,
    share: float = HELDOUT_SHARE,
    files: tuple[Path, ...] = (),
) -> list[Comparison]:
    """files: to train on instead of the folder's comparisons.csv.

    Pairs whose two sides have the same tokens teach nothing: they are dropped, and the count is
    printed.
    """
    kept = []
    for path, frame in read_rows(folder, "comparisons", heldout, share, files):
        rows = [encode_comparison(row, tokenizer) for row in frame.itertuples()]
        lengths = [row.longest for row in rows]
        check_lengths(path, frame.index, lengths, limit, "the prompt with its longer side")
        useful = [row for row in rows if row.chosen != row.rejected]
        if len(useful) < len(rows):
            pairs = f"{len(rows) - len(useful)} of {len(rows)} pairs dropped"
            print(f"{path}: {pairs}, chosen and rejected are the same")
        kept += useful
    if not kept:
        raise InputError(
            f"{path}: no row has a chosen response that differs from the rejected one; there is "
            f"nothing to learn"
        )
    return kept


def encode_comparison(row, tokenizer: Tokenizer) -> Comparison:
    """row: with fields Prompt, Chosen and Rejected."""
    prompt = Prompt(row.Prompt, tokenizer.prompt_ids(row.Prompt))
    chosen = tokenizer.response_ids(row.Chosen)
    rejected = tokenizer.response_ids(row.Rejected)
    return Comparison(prompt, chosen, rejected, (row.Chosen, row.Rejected))


def swap_prompts(rows: list[Comparison], seed: int, limit: int) -> list[Comparison]:
    """Give every comparison the prompt of another row: what is left can be judged without reading
    the question. Rows are left out if that is the same prompt, or if they no longer fit the
    context."""
    generator = make_generator("cpu", seed, "swap")
    order = torch.randperm(len(rows), generator=generator).tolist()
    donors = dict(zip(order, order[1:] + order[:1]))
    swapped = []
    for number, row in enumerate(rows):
        prompt = rows[donors[number]].prompt
        row_with_other = row._replace(prompt=prompt)
        if prompt.text != row.prompt.text and row_with_other.longest <= limit:
            swapped.append(row_with_other)
    return swapped


# ---- batches ----


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of batch `step`: through the whole set in random order, then again in another
    order.

    They follow from (seed, step) only, so a resumed run sees the rows that the uninterrupted run
    saw.
    """
    rows = []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(at, count)
        if not rows or offset == 0:
            generator = make_generator("cpu", seed, "epoch", epoch)
            order = torch.randperm(count, generator=generator).tolist()
        rows.append(order[offset])
    return rows


def choose_batch(rows: list, batch_size: int, step: int, seed: int) -> list:
    """The rows of batch `step`, see batch_indices."""
    return [rows[i] for i in batch_indices(len(rows), batch_size, step, seed)]


def pad_rows(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T), padded on the right, and lengths (B,)."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    return tokens, torch.tensor([len(row) for row in rows], device=device)


def pad_prompts(prompts: list[Prompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> tokens (B, P), padded on the right, and prompt_lens (B,)."""
    return pad_rows([prompt.tokens for prompt in prompts], pad_id, device)


def response_mask(prompt_lens: Tensor, lengths: Tensor, width: int) -> Tensor:
    """(B,), (B,) -> (B, T-1) with T = width: True at slot t where token t+1 belongs to the
    response.

    prompt 3 tokens, length 6, width 7:    slot 0 1 2 3 4 5  ->  - - T T T -
    """
    # Slot t's action is token t+1.
    positions = torch.arange(1, width, device=lengths.device)  # (T-1,)
    return (positions >= prompt_lens.unsqueeze(1)) & (positions < lengths.unsqueeze(1))


def demonstration_batch(
    rows: list[Demonstration], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-> tokens (B, T), mask (B, T-1): True on the response, end-of-text included."""
    tokens, lengths = pad_rows([row.tokens for row in rows], pad_id, device)
    prompt_lens = torch.tensor([row.prompt_len for row in rows], device=device)
    return tokens, response_mask(prompt_lens, lengths, tokens.size(1))


def comparison_batch(
    rows: list[Comparison], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-> tokens (2N, T), lengths (2N,): first the N chosen, then the N rejected."""
    chosen = [row.prompt.tokens + row.chosen for row in rows]
    rejected = [row.prompt.tokens + row.rejected for row in rows]
    return pad_rows(chosen + rejected, pad_id, device)
