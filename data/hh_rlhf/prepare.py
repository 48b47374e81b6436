"""Make a data set of Anthropic's HH-RLHF (Bai et al. 2022): fetch a subset, drop faulty rows, cut
long dialogues.

    python data/hh_rlhf/prepare.py                   # harmless-base with GPT-2's tokenizer, to here
    python data/hh_rlhf/prepare.py --source DIR      # from train.jsonl.gz and test.jsonl.gz
                                                     # (or .jsonl) in DIR

A line of the set is {"chosen": dialogue, "rejected": dialogue}, two dialogues that differ in their
last reply. What is before that reply is the prompt. README.md here has the rules in full, and how
to train on the result.
"""

import gzip
import json
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pandas

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # where rlhf/ is
from data.bpe import train_bpe, write_ranks
from data.download import fetch
from rlhf.run.errors import InputError
from rlhf.run.files import csv_path, write_csv
from rlhf.run.flags import arg, check_positive
from rlhf.run.program import run
from rlhf.tokenizer import Tokenizer, load_tokenizer

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}/{split}.jsonl.gz"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HUMAN = "\n\nHuman:"  # a turn begins with one of these
ASSISTANT = "\n\nAssistant:"

# The lines of the report. Every row that was read is either kept or counted under the first fault
# that it has.
READ = "read"
BROKEN = "broken line"
NO_COMMON_PROMPT = "sides without a common prompt"
EMPTY = "empty reply"
IDENTICAL = "identical sides"
HUMAN_IN_REPLY = "a human's turn in a reply"
TOO_LONG = "longer than the context"
IN_TRAINING = "prompt in training too"
KEPT = "kept"
SHORTENED = "of these, shortened by whole turns"
FAULTS = (BROKEN, NO_COMMON_PROMPT, EMPTY, IDENTICAL, HUMAN_IN_REPLY, TOO_LONG, IN_TRAINING)
REPORT = (READ, *FAULTS, KEPT, SHORTENED)


@dataclass(frozen=True)
class PrepareConfig:
    """Make prompts, demonstrations and comparisons of Anthropic's HH-RLHF."""

    subset: str = arg("harmless-base", "which part to download", SUBSETS)
    source: str = arg(
        "", "folder with train and test as .jsonl.gz or .jsonl, instead of a download"
    )
    out: str = arg("", "folder to write to; empty: this script's")
    rows: int = arg(0, "only the first N rows of each split, for a quick try; 0: all")
    context: int = arg(
        512, "longest prompt and reply together, in tokens: train_sft.py's --block-size"
    )
    reply_room: int = arg(
        128, "of these, what every prompt leaves free: train_ppo.py's --max-new-tokens"
    )
    tokenizer: str = arg("gpt2", "gpt2, or own: one trained on the training split", ("gpt2", "own"))
    vocab_size: int = arg(8192, "tokens of --tokenizer own, end-of-text and pad included")

    def __post_init__(self):
        check_positive(self, "context", "reply_room")
        if self.reply_room >= self.context:
            raise ValueError(
                f"--reply-room {self.reply_room} leaves nothing of --context {self.context} for a "
                f"prompt"
            )
        if self.vocab_size < 258:
            raise ValueError(
                f"--vocab-size is {self.vocab_size}: 256 bytes, end-of-text and pad make 258 at "
                f"least"
            )


# ---- reading ----


class Row(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def split_dialogue(text: str) -> tuple[str, str]:
    """(prompt, reply): the prompt goes up to the last "Assistant:" and includes it.

    Raises ValueError if the text does not begin with a human's turn, has no assistant's, or cannot
    be written as UTF-8.
    """
    text.encode("utf-8")  # half of a surrogate pair, which JSON can spell, raises a ValueError
    # In a CSV file pandas may take a lone \r for the end of a row, and a NUL for the end of a cell.
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    before, marker, reply = text.rpartition(ASSISTANT)
    if not before.startswith(HUMAN):
        raise ValueError("not a dialogue")
    return before + marker, reply.strip()


def read_row(line: bytes) -> Row | str:
    """The row of a line, or its first fault, one of FAULTS."""
    try:
        sides = json.loads(line)
        prompt, chosen = split_dialogue(sides["chosen"])
        other_prompt, rejected = split_dialogue(sides["rejected"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return BROKEN  # no JSON, no object, no text, ...
    if prompt != other_prompt:
        return NO_COMMON_PROMPT
    if not chosen or not rejected:
        return EMPTY
    if chosen == rejected:
        return IDENTICAL
    if HUMAN in chosen or HUMAN in rejected:  # imitated, it makes a model speak for the human
        return HUMAN_IN_REPLY
    return Row(prompt, chosen, rejected)


def find_split(cfg: PrepareConfig, split: str) -> Path:
    """The file of a split, "train" or "test"; downloaded if there is no --source."""
    if not cfg.source:
        url = URL.format(subset=cfg.subset, split=split)
        return fetch(url, HERE / "downloads" / cfg.subset)
    for name in (f"{split}.jsonl.gz", f"{split}.jsonl"):
        path = Path(cfg.source) / name
        if path.is_file():
            return path
    raise InputError(f"--source {cfg.source} holds neither {split}.jsonl.gz nor {split}.jsonl")


def read_lines(path: Path, limit: int) -> list[bytes]:
    """The first `limit` lines (0: all) that are not blank. Raises InputError if it is no gzip."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            lines = (line for line in file if line.strip())
            return list(islice(lines, limit or None))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"{path} is not a whole gzip file ({error}); remove it and fetch it again"
        raise InputError(message) from None


def read_split(path: Path, limit: int, counts: Counter) -> pandas.DataFrame:
    """The sound ones of the first `limit` rows (0: all) as Prompt, Chosen, Rejected; the others are
    counted.

    Raises InputError if the file is no gzip or none of it can be read as dialogues.
    """
    lines = read_lines(path, limit)
    sound = []
    for line in lines:
        row = read_row(line)
        if isinstance(row, Row):
            sound.append(row)
        else:
            counts[row] += 1
    counts[READ] = len(lines)
    if counts[BROKEN] == len(lines):
        begins = f"it begins {lines[0][:60]!r}" if lines else "it is empty"
        raise InputError(
            f'{path}: no line is a JSON object with two dialogues, "chosen" and "rejected"; '
            f"{begins}"
        )
    return pandas.DataFrame(sound, columns=["Prompt", "Chosen", "Rejected"], dtype=object)


# ---- tokens ----


def make_tokenizer(
    cfg: PrepareConfig, train: pandas.DataFrame
) -> tuple[Tokenizer, list[bytes] | None]:
    """The tokenizer, and the ranks to write if it is the data set's own."""
    if cfg.tokenizer == "gpt2":
        return load_tokenizer("gpt2"), None
    return train_tokenizer(train, cfg.vocab_size)


def train_tokenizer(train: pandas.DataFrame, vocab_size: int) -> tuple[Tokenizer, list[bytes]]:
    """A tokenizer of the chosen dialogues, before any is cut, and its ranks."""
    print(f"training a tokenizer on {len(train):,} dialogues, which may take minutes", flush=True)
    texts = train["Prompt"] + " " + train["Chosen"]
    ranks = train_bpe(texts, vocab_size - 2)  # rlhf/tokenizer.py adds end-of-text and pad
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.tiktoken"
        write_ranks(ranks, path)
        return load_tokenizer(str(path)), ranks


def shorten(prompt: str, tokenizer: Tokenizer, limit: int) -> str:
    """The prompt from the first human's turn after which at most `limit` tokens are left; "" if
    there is none.

    A human's turn goes together with the answer to it, so what stays begins with a human again.
    """
    for turn in re.finditer(HUMAN, prompt):
        rest = prompt[turn.start() :]
        if len(tokenizer.encode(rest)) <= limit:
            return rest
    return ""


def fit(
    frame: pandas.DataFrame, tokenizer: Tokenizer, cfg: PrepareConfig, split: str, counts: Counter
) -> pandas.DataFrame:
    """The rows with prompts short enough, for both sides and for PPO; a new column Whole has the
    uncut prompts.

    One prompt serves all three files: prompt + max(longer side, --reply-room) <= --context.
    """
    prompts = []
    for done, row in enumerate(frame.itertuples(index=False), start=1):
        lengths = [len(tokenizer.response_ids(reply)) for reply in (row.Chosen, row.Rejected)]
        room = max(*lengths, cfg.reply_room)
        prompts.append(shorten(row.Prompt, tokenizer, cfg.context - room))
        if done % 5000 == 0:
            print(f"{split}: measured {done:,} of {len(frame):,} rows", flush=True)
    frame = frame.assign(Whole=frame["Prompt"], Prompt=prompts)
    counts[TOO_LONG] = prompts.count("")
    return frame[frame["Prompt"] != ""]


def drop_training_prompts(
    test: pandas.DataFrame, train: pandas.DataFrame, counts: Counter
) -> pandas.DataFrame:
    """The rows of the test split whose prompts are not in the training split.

    Both the cut and the whole prompts are compared: two rows of one dialogue may have been cut at
    different turns, and two dialogues may be the same once they are cut.
    """
    seen = test["Prompt"].isin(train["Prompt"]) | test["Whole"].isin(train["Whole"])
    counts[IN_TRAINING] = int(seen.sum())
    return test[~seen]


# ---- writing ----


def count_kept(frame: pandas.DataFrame, counts: Counter) -> None:
    counts[KEPT] = len(frame)
    counts[SHORTENED] = int((frame["Prompt"] != frame["Whole"]).sum())


def print_report(counts: dict[str, Counter]) -> None:
    """The lines of REPORT, with a column for each split."""
    columns = {}
    for split, count in counts.items():
        columns[split] = [count[line] for line in REPORT]
    frame = pandas.DataFrame(columns, index=REPORT)
    print(frame.to_string(formatters=["{:,}".format] * 2))


def write_split(frame: pandas.DataFrame, folder: Path, heldout: bool) -> None:
    tables = {
        "prompts": frame[["Prompt"]].drop_duplicates(),
        "demonstrations": frame[["Prompt", "Chosen"]].rename(columns={"Chosen": "Response"}),
        "comparisons": frame[["Prompt", "Chosen", "Rejected"]],
    }
    for name, table in tables.items():
        path = csv_path(folder, name, heldout)
        write_csv(path, table.to_dict("records"))
        print(f"{path.name}: {len(table):,} rows, {path.stat().st_size:,} bytes")


def write_data_set(
    out: Path, train: pandas.DataFrame, test: pandas.DataFrame, ranks: list[bytes] | None
) -> None:
    """Write all files. They are complete before the first one gets its name."""
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        write_split(train, folder, heldout=False)
        write_split(test, folder, heldout=True)
        if ranks is not None:
            write_ranks(ranks, folder / "tokenizer.tiktoken")
            print(f"tokenizer.tiktoken: {len(ranks):,} ranks")
        for path in folder.iterdir():
            os.replace(path, out / path.name)
    print(f"wrote these to {out}")


def check_no_tokenizer(out: Path) -> None:
    """Raise InputError if there is a tokenizer, which the scripts would take for this set's."""
    path = out / "tokenizer.tiktoken"
    if path.exists():
        raise InputError(
            f"{path} is from another run and would be used instead of GPT-2's tokenizer; remove "
            f"it, or give another --out, or --tokenizer own"
        )


def main(cfg: PrepareConfig) -> None:
    out = Path(cfg.out or HERE)
    if cfg.tokenizer == "gpt2":
        check_no_tokenizer(out)
    counts = {"train": Counter(), "test": Counter()}
    train = read_split(find_split(cfg, "train"), cfg.rows, counts["train"])
    test = read_split(find_split(cfg, "test"), cfg.rows, counts["test"])
    # Before the long part, so that a folder that cannot be made shows now.
    out.mkdir(parents=True, exist_ok=True)

    tokenizer, ranks = make_tokenizer(cfg, train)
    train = fit(train, tokenizer, cfg, "train", counts["train"])
    test = fit(test, tokenizer, cfg, "test", counts["test"])
    test = drop_training_prompts(test, train, counts["test"])
    count_kept(train, counts["train"])
    count_kept(test, counts["test"])
    print_report(counts)
    if train.empty or test.empty:
        raise InputError("a split has no rows left, see the counts above; nothing was written")
    write_data_set(out, train, test, ranks)


if __name__ == "__main__":
    run(main, PrepareConfig)
