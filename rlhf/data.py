"""A data set's three kinds of rows, read with pandas, and the batches of tokens made from them.

A data set is a folder. Each CSV has a twin *_heldout.csv, whose prompts are in no training file:

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
from pandas import DataFrame
from torch import Tensor

from rlhf.run.device import make_generator
from rlhf.run.errors import InputError
from rlhf.run.files import csv_path
from rlhf.run.tables import check_lengths, read_csv
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

    @property
    def differs(self) -> bool:
        return self.chosen != self.rejected

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longer side."""
        return len(self.prompt.tokens) + max(len(self.chosen), len(self.rejected))


# ---- reading ----


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Tokens of a response: one space, the text, end-of-text. The only such function, for all three
    stages.

    (A prompt ends in "Assistant:", and a word's token holds the space before it.) Prompt and
    response are encoded separately, so that a prompt has the same tokens whatever follows it.
    """
    return tokenizer.encode(" " + response.strip()) + [tokenizer.eos_id]


def load_prompts(
    folder: str, tokenizer: Tokenizer, limit: int, heldout: bool = False
) -> list[Prompt]:
    """limit: the most tokens that a prompt may take, the model's context minus the response."""
    path = csv_path(folder, "prompts", heldout)
    texts = read_csv(path, ("Prompt",))["Prompt"]
    prompts = [Prompt(text, tokenizer.encode(text)) for text in texts]
    lengths = [len(prompt.tokens) for prompt in prompts]
    check_lengths(path, lengths, limit, "the prompt", fix="give a smaller --max-new-tokens, ")
    return prompts


def load_demonstrations(
    folder: str, tokenizer: Tokenizer, limit: int, heldout: bool = False
) -> list[Demonstration]:
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

    Pairs whose two sides have the same tokens teach nothing, and neither do those that an optional
    column Answer calls a tie or a skip (rlhf/tools/label.py): they are dropped, and the count is
    printed.
    """
    kept = []
    for path in paths:
        frame = read_csv(path, ("Prompt", "Chosen", "Rejected"), optional=("Answer",))
        rows = [encode_comparison(row, tokenizer) for row in frame.itertuples()]
        check_lengths(path, [row.longest for row in rows], limit, "the prompt with its longer side")
        decided = is_decided(path, frame)
        useful = [row for row, is_vote in zip(rows, decided) if is_vote and row.differs]
        if len(useful) < len(rows):
            ties = decided.count(False)
            also = f", or ties or skipped ({ties})" if ties else ""
            pairs = f"{len(rows) - len(useful)} of {len(rows)} pairs dropped"
            print(f"{path}: {pairs}, chosen and rejected are the same{also}")
        kept += useful
    if not kept:
        names = ", ".join(map(str, paths))
        raise InputError(
            f"{names}: in every row chosen and rejected are the same, or it is a tie or a skip; "
            f"there is nothing to learn"
        )
    return kept


def encode_comparison(row, tokenizer: Tokenizer) -> Comparison:
    """row: with fields Prompt, Chosen and Rejected."""
    prompt = Prompt(row.Prompt, tokenizer.encode(row.Prompt))
    chosen = encode_response(tokenizer, row.Chosen)
    rejected = encode_response(tokenizer, row.Rejected)
    return Comparison(prompt, chosen, rejected)


def is_decided(path: Path, frame: DataFrame) -> list[bool]:
    """Whether each row has a better side. Raises InputError if its Answer is unknown."""
    if "Answer" not in frame:
        return [True] * len(frame)
    for number, answer in enumerate(frame["Answer"], start=1):
        if answer not in ("first", "second", "tie", "skip"):
            choices = "first, second, tie or skip"
            raise InputError(f"{path}, row {number}: Answer is {answer!r}; it must be {choices}")
    return frame["Answer"].isin(["first", "second"]).tolist()


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
