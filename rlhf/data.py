"""The three data sets, read with pandas, and the rectangles of tokens made from them.

A data set is a folder; each file has a twin *_heldout.csv whose prompts no training file holds:

    prompts.csv         Prompt                       what PPO answers
    demonstrations.csv  Prompt, Response             what fine-tuning imitates
    comparisons.csv     Prompt, Chosen, Rejected     what the reward model learns from
    tokenizer.tiktoken  byte-pair ranks; without it, GPT-2's
    judge.py            score(prompts, responses): a gold score that no training step learns from; optional
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pandas
import torch
from torch import Tensor

from rlhf.common import InputError, make_generator
from rlhf.tokenizer import Tokenizer, load_tokenizer


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
    """The one way from a response's text to its tokens, for fine-tuning, the reward model and PPO alike: one space,
    the text, end-of-text. (A prompt ends in "Assistant:", and a word's token holds the space before it.)

    Prompt and response are encoded apart, so that a prompt has the same tokens whatever follows it.
    """
    return tokenizer.encode(" " + response.strip()) + [tokenizer.eos_id]


def read_csv(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> pandas.DataFrame:
    """The named columns as text, and the optional ones where they are. Raises InputError where the file is missing,
    garbled or empty, a column is missing, or a cell is empty."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give --data a folder that holds it")
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pandas.errors.ParserError) as error:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        raise InputError(f"{path} is not a CSV file in UTF-8: {str(error).strip()}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas takes a cell too many for a name of the row
        raise InputError(f"{path}: its rows have more cells than the {len(frame.columns)} columns of its header; put "
                         f"quotes around text that holds a comma")
    missing = [column for column in columns if column not in frame]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; it needs {', '.join(columns)} and has "
                         f"{', '.join(map(str, frame.columns))}")
    columns = (*columns, *(column for column in optional if column in frame))
    frame = frame[list(columns)].fillna("")
    if frame.empty:
        raise InputError(f"{path} has a header but no rows")
    empty = frame.apply(lambda column: column.str.strip() == "")
    if empty.any(axis=None):
        row = int(empty.any(axis=1).to_numpy().argmax())
        raise InputError(f"{path}, row {row + 1}: {columns[int(empty.iloc[row].to_numpy().argmax())]} is empty "
                         f"({int(empty.any(axis=1).sum())} such rows); fill it or remove the row")
    return frame


def check_lengths(path: Path, lengths: list[int], limit: int, what: str, fix: str = "") -> None:
    """Raise InputError naming the first row that is longer than the model can read."""
    too_long = [row for row, length in enumerate(lengths, start=1) if length > limit]
    if too_long:
        row = too_long[0]
        raise InputError(f"{path}, row {row}: {what} takes {lengths[row - 1]} tokens and there is room for {limit} "
                         f"({len(too_long)} such rows); shorten or remove them, {fix}or train_sft.py with a larger "
                         f"--block-size")


def csv_path(folder: str | Path, name: str, heldout: bool = False) -> Path:
    return Path(folder) / f"{name}{'_heldout' if heldout else ''}.csv"


def load_prompts(folder: str, tokenizer: Tokenizer, limit: int, heldout: bool = False) -> list[Prompt]:
    """limit: the most tokens that a prompt may take, the model's context less the response."""
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
    check_lengths(path, [len(row.tokens) for row in rows], limit, "prompt and response together")
    return rows


def load_comparisons(
    folder: str, tokenizer: Tokenizer, limit: int, heldout: bool = False, files: tuple[str, ...] = ()
) -> list[Comparison]:
    """The data set's comparisons or, in their place, those of other files one after another.

    Pairs whose two sides have the same tokens teach nothing, and neither do those that an optional column Answer calls
    a tie or a skip (rlhf/label.py): they are dropped, and the count is printed.
    """
    kept = []
    for path in map(Path, files or [csv_path(folder, "comparisons", heldout)]):
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
        check_lengths(path, longest, limit, "prompt and longer side together")
        different = [row for row in rows if row.chosen != row.rejected]
        if len(different) < len(rows):
            print(f"{path}: {len(rows) - len(different)} of {len(rows)} pairs dropped, chosen and rejected are the "
                  f"same" + (f", or ties or skipped ({undecided})" if undecided else ""))
        kept += different
    if not kept:
        raise InputError(f"{path}: in every row chosen and rejected are the same, or it is a tie or a skip; there is "
                         f"nothing to learn")
    return kept


def find_tokenizer(folder: str, choice: str = "auto") -> Tokenizer:
    """auto: the data set's own ranks where it has some, else GPT-2's."""
    if not Path(folder).is_dir():
        raise InputError(f"--data {folder}: there is no such folder here")
    own = Path(folder) / "tokenizer.tiktoken"
    if choice == "auto":
        choice = str(own) if own.is_file() else "gpt2"
    return load_tokenizer(choice)


def load_judge(folder: str) -> ModuleType | None:
    """The data set's judge.py, or None where it has none. It is called once, so that a fault shows before a run and
    not at its end."""
    path = Path(folder) / "judge.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("judge", path)
    judge = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no __pycache__ in the user's data
    try:
        spec.loader.exec_module(judge)
    except Exception as error:
        raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
    if not hasattr(judge, "score"):
        raise InputError(f"{path} defines no score(prompts, responses)")
    gold_scores(judge, ["\n\nHuman: Hello.\n\nAssistant:"] * 2, ["Hello.", ""])
    return judge


def gold_scores(judge: ModuleType, prompts: list[str], responses: list[str]) -> list[float]:
    """judge.score, checked: one finite number for each response. Raises InputError where it fails."""
    try:
        scores = [float(score) for score in judge.score(prompts, responses)]
    except Exception as error:
        raise InputError(f"score() in {judge.__file__} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise InputError(f"score() in {judge.__file__} must return one finite number for each of {len(responses)} "
                         f"responses, got {len(scores)}: {str(scores)[:60]}")
    return scores


def vote_probabilities(judge: ModuleType, first: list[float], second: list[float]) -> list[float] | None:
    """How probably an annotator prefers the first of each pair, given the gold of both; None of a judge that does not
    know its annotators' noise. Raises InputError where the judge's preference_probability fails."""
    if not hasattr(judge, "preference_probability"):
        return None
    try:
        p = [float(judge.preference_probability(a, b)) for a, b in zip(first, second)]
    except Exception as error:
        raise InputError(f"preference_probability() in {judge.__file__} failed: {type(error).__name__}: "
                         f"{error}") from error
    if faulty := [x for x in p if not 0 <= x <= 1]:
        raise InputError(f"preference_probability() in {judge.__file__} must return a number from 0 to 1, got "
                         f"{faulty[0]}")
    return p


# ---- batches ----


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of batch `step`: through the whole set in a fresh order, then again in another.

    They follow from (seed, step) alone, so a resumed run sees the rows that the uninterrupted one saw.
    """
    rows = []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(at, count)
        if not rows or offset == 0:
            order = torch.randperm(count, generator=make_generator("cpu", seed, "epoch", epoch)).tolist()
        rows.append(order[offset])
    return rows


def chunks(rows: list, size: int) -> list[list]:
    """A batch in pieces of `size` rows, the last one smaller where it must be; 0: in one piece. Shorter rows come
    first, so that fewer are padded to the length of a longer one."""
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
    actions = torch.arange(1, width, device=lengths.device)  # (T-1,): slot t's action is token t+1
    return (actions >= prompt_lens.unsqueeze(1)) & (actions < lengths.unsqueeze(1))


def demonstration_batch(
    rows: list[Demonstration], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-> tokens (B, T), mask (B, T-1): True on the response, end-of-text included."""
    tokens, lengths = pad_rows([row.tokens for row in rows], pad_id, device)
    prompt_lens = torch.tensor([row.prompt_len for row in rows], device=device)
    return tokens, response_mask(prompt_lens, lengths, tokens.size(1))


def comparison_batch(rows: list[Comparison], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> tokens (2N, T), lengths (2N,): the N chosen first, then the N rejected, for one forward pass."""
    chosen = [row.prompt.tokens + row.chosen for row in rows]
    return pad_rows(chosen + [row.prompt.tokens + row.rejected for row in rows], pad_id, device)
