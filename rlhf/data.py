"""A data set's three kinds of rows, read with pandas, and the batches of tokens made from them.

A data set is a folder. Each CSV has a twin *_heldout.csv, whose prompts are in no training file:

    prompts.csv         Prompt                       what PPO responds to
    demonstrations.csv  Prompt, Response             what fine-tuning imitates
    comparisons.csv     Prompt, Chosen, Rejected     what the reward model learns from
    tokenizer.tiktoken  byte-pair ranks; without it, GPT-2's
    judge.py            optional: score(prompts, responses), a gold score that no training step learns from
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.support.cli import InputError
from rlhf.support.runtime import make_generator
from rlhf.support.tables import check_lengths, csv_path, read_csv
from rlhf.tokenizer import Tokenizer


class Prompt(NamedTuple):
    text: str
    tokens: list[int]


class Demonstration(NamedTuple):
    tokens: list[int]  # prompt, response, end-of-text
    prompt_len: int

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return len(self.tokens)


class Comparison(NamedTuple):
    prompt: Prompt
    chosen: list[int]  # response and end-of-text, without the prompt
    rejected: list[int]

    @property
    def size(self) -> int:
        """Tokens that the model reads, both sides."""
        return 2 * len(self.prompt.tokens) + len(self.chosen) + len(self.rejected)


# ---- reading ----


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Tokens of a response: one space, the text, end-of-text. The only such function, for all three stages.

    (A prompt ends in "Assistant:", and a word's token holds the space before it.) Prompt and response are encoded
    separately, so that a prompt has the same tokens whatever follows it.
    """
    return tokenizer.encode(" " + response.strip()) + [tokenizer.eos_id]


def load_prompts(folder: str, tokenizer: Tokenizer, limit: int, heldout: bool = False) -> list[Prompt]:
    """limit: the most tokens that a prompt may take, the model's context minus the response."""
    path = csv_path(folder, "prompts", heldout)
    prompts = [Prompt(text, tokenizer.encode(text)) for text in read_csv(path, ("Prompt",))["Prompt"]]
    check_lengths(path, [len(prompt.tokens) for prompt in prompts], limit, "the prompt",
                  fix="give a smaller --max-new-tokens, ")
    return prompts


def load_demonstrations(folder: str, tokenizer: Tokenizer, limit: int, heldout: bool = False) -> list[Demonstration]:
    """limit: the most tokens that prompt and response may take together."""
    path = csv_path(folder, "demonstrations", heldout)
    rows = []
    for prompt, response in read_csv(path, ("Prompt", "Response")).itertuples(index=False):
        ids = tokenizer.encode(prompt)
        rows.append(Demonstration(ids + encode_response(tokenizer, response), len(ids)))
    check_lengths(path, [len(row.tokens) for row in rows], limit, "the prompt with its response")
    return rows


def load_comparisons(paths: list[Path], tokenizer: Tokenizer, limit: int) -> list[Comparison]:
    """The comparisons of one or more files.

    Pairs whose two sides have the same tokens teach nothing, and neither do those that an optional column Answer calls
    a tie or a skip (rlhf/tools/label.py): they are dropped, and the count is printed.
    """
    kept = []
    for path in paths:
        rows, undecided = [], 0
        frame = read_csv(path, ("Prompt", "Chosen", "Rejected"), optional=("Answer",))
        for row, (prompt, chosen, rejected, *answer) in enumerate(frame.itertuples(index=False), start=1):
            sides = encode_response(tokenizer, chosen), encode_response(tokenizer, rejected)
            rows.append(Comparison(Prompt(prompt, tokenizer.encode(prompt)), *sides))
            if answer and answer[0] not in ("first", "second", "tie", "skip"):
                raise InputError(f"{path}, row {row}: Answer is {answer[0]!r}; it must be first, second, tie or skip")
            if answer in (["tie"], ["skip"]):
                undecided += 1
                rows[-1] = rows[-1]._replace(rejected=rows[-1].chosen)
        longest = [len(row.prompt.tokens) + max(len(row.chosen), len(row.rejected)) for row in rows]
        check_lengths(path, longest, limit, "the prompt with its longer side")
        different = [row for row in rows if row.chosen != row.rejected]
        if len(different) < len(rows):
            print(f"{path}: {len(rows) - len(different)} of {len(rows)} pairs dropped, chosen and rejected are the "
                  f"same" + (f", or ties or skipped ({undecided})" if undecided else ""))
        kept += different
    if not kept:
        raise InputError(f"{', '.join(map(str, paths))}: in every row chosen and rejected are the same, or it is a tie "
                         f"or a skip; there is nothing to learn")
    return kept


# ---- batches ----


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of batch `step`: through the whole set in random order, then again in another order.

    They follow from (seed, step) only, so a resumed run sees the rows that the uninterrupted run saw.
    """
    rows = []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(at, count)
        if not rows or offset == 0:
            order = torch.randperm(count, generator=make_generator("cpu", seed, "epoch", epoch)).tolist()
        rows.append(order[offset])
    return rows


def chunks(rows: list, size: int) -> list[list]:
    """A batch cut into micro-batches of `size` rows, the last one smaller if it must be; 0: one micro-batch. Shorter
    rows come first, so that less is padded."""
    if not size:
        return [rows]
    rows = sorted(rows, key=lambda row: row.size)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def pad_rows(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T), padded on the right, and lengths (B,)."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    return tokens, torch.tensor([len(row) for row in rows], device=device)


def response_mask(prompt_lens: Tensor, lengths: Tensor, width: int) -> Tensor:
    """(B,), (B,) -> (B, T-1) with T = width: True at slot t where token t+1 belongs to the response.

    prompt 3 tokens, length 6, width 7:    slot 0 1 2 3 4 5  ->  - - T T T -
    """
    positions = torch.arange(1, width, device=lengths.device)  # (T-1,): slot t's action is token t+1
    return (positions >= prompt_lens.unsqueeze(1)) & (positions < lengths.unsqueeze(1))


def demonstration_batch(rows: list[Demonstration], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> tokens (B, T), mask (B, T-1): True on the response, end-of-text included."""
    tokens, lengths = pad_rows([row.tokens for row in rows], pad_id, device)
    prompt_lens = torch.tensor([row.prompt_len for row in rows], device=device)
    return tokens, response_mask(prompt_lens, lengths, tokens.size(1))


def comparison_batch(rows: list[Comparison], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> tokens (2N, T), lengths (2N,): the N chosen first, then the N rejected, for one forward pass."""
    chosen = [row.prompt.tokens + row.chosen for row in rows]
    return pad_rows(chosen + [row.prompt.tokens + row.rejected for row in rows], pad_id, device)
