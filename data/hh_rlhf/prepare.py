"""Make a data set of Anthropic's HH-RLHF (Bai et al. 2022): fetch a subset, drop faulty rows, cut long dialogues.

    python data/hh_rlhf/prepare.py                   # harmless-base with GPT-2's tokenizer, into this folder
    python data/hh_rlhf/prepare.py --source DIR      # from train.jsonl.gz and test.jsonl.gz (or .jsonl) in DIR

A line of the set is {"chosen": dialogue, "rejected": dialogue}, two dialogues that differ in their last reply. What is
before that reply is the prompt. README.md here has the rules in full, and how to train on the result.
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

import pandas

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # where rlhf/ is
from data.bpe import train_bpe, write_ranks
from rlhf.support.cli import InputError, arg, check_not_negative, check_positive, run
from rlhf.support.tables import csv_path, write_csv
from rlhf.data import encode_response
from data.download import fetch
from rlhf.tokenizer import Tokenizer, load_tokenizer

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}/{split}.jsonl.gz"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # a turn begins with one of these

# The lines of the report. Every row that was read is either kept or counted under the first fault that it has.
READ, KEPT, SHORTENED = "read", "kept", "of these, shortened by whole turns"
BROKEN, NO_COMMON_PROMPT, IDENTICAL = "broken line", "sides without a common prompt", "identical sides"
EMPTY, HUMAN_IN_REPLY = "empty reply", "a human's turn in a reply"
TOO_LONG, IN_TRAINING = "longer than the context", "prompt in training too"
REPORT = (READ, BROKEN, NO_COMMON_PROMPT, EMPTY, IDENTICAL, HUMAN_IN_REPLY, TOO_LONG, IN_TRAINING, KEPT, SHORTENED)


@dataclass(frozen=True)
class PrepareConfig:
    """Make prompts, demonstrations and comparisons of Anthropic's HH-RLHF."""

    subset: str = arg("harmless-base", "which part to download", SUBSETS)
    source: str = arg("", "folder with train and test as .jsonl.gz or .jsonl, instead of a download")
    out: str = arg("", "folder to write to; empty: this script's")
    rows: int = arg(0, "only the first N rows of each split, for a quick try; 0: all")
    context: int = arg(512, "longest prompt and reply together, in tokens: train_sft.py's --block-size")
    reply_room: int = arg(128, "of these, what every prompt leaves free: train_ppo.py's --max-new-tokens")
    tokenizer: str = arg("gpt2", "gpt2, or own: one trained on the training split", ("gpt2", "own"))
    vocab_size: int = arg(8192, "tokens of --tokenizer own, end-of-text and pad included")

    def __post_init__(self):
        check_positive(self, "context", "reply_room")
        check_not_negative(self, "rows")
        if self.reply_room >= self.context:
            raise ValueError(f"--reply-room {self.reply_room} leaves nothing of --context {self.context} for a prompt")
        if self.vocab_size < 258:
            raise ValueError(f"--vocab-size is {self.vocab_size}: 256 bytes, end-of-text and pad make 258 at least")


# ---- reading ----


def split_dialogue(text: str) -> tuple[str, str]:
    """(prompt, reply): the prompt goes up to the last "Assistant:" and includes it. Raises ValueError where the text
    does not begin with a human's turn, has no assistant's, or cannot be written as UTF-8."""
    text.encode("utf-8")  # half of a surrogate pair, which JSON can spell, raises a ValueError
    # In a CSV file pandas may take a lone \r for the end of a row, and a NUL for the end of a cell.
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    before, marker, reply = text.rpartition(ASSISTANT)
    if not before.startswith(HUMAN):
        raise ValueError("not a dialogue")
    return before + marker, reply.strip()


def read_row(line: bytes) -> tuple[str, str, str] | str:
    """(prompt, chosen, rejected) of a line, or its first fault."""
    try:
        row = json.loads(line)
        (prompt, chosen), (other_prompt, rejected) = (split_dialogue(row[side]) for side in ("chosen", "rejected"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no JSON, no object, no text, ...
        return BROKEN
    if prompt != other_prompt:
        return NO_COMMON_PROMPT
    if not chosen or not rejected:
        return EMPTY
    if chosen == rejected:
        return IDENTICAL
    if HUMAN in chosen or HUMAN in rejected:  # a model that imitates this speaks for the human as well
        return HUMAN_IN_REPLY
    return prompt, chosen, rejected


def find_split(cfg: PrepareConfig, split: str) -> Path:
    """The file of a split, "train" or "test"; downloaded if there is no --source."""
    if not cfg.source:
        return fetch(URL.format(subset=cfg.subset, split=split), HERE / "downloads" / cfg.subset)
    for path in (Path(cfg.source) / f"{split}.jsonl.gz", Path(cfg.source) / f"{split}.jsonl"):
        if path.is_file():
            return path
    raise InputError(f"--source {cfg.source} holds neither {split}.jsonl.gz nor {split}.jsonl")


def read_split(path: Path, limit: int, counts: Counter) -> pandas.DataFrame:
    """The sound ones of the first `limit` rows (0: all) as Prompt, Chosen, Rejected; the others are counted.

    Raises InputError where the file is no gzip or none of it can be read as dialogues.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = list(islice((line for line in file if line.strip()), limit or None))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}); remove it and fetch it again") from None
    rows = [read_row(line) for line in lines]
    counts[READ] = len(rows)
    counts.update(row for row in rows if isinstance(row, str))
    if counts[BROKEN] == len(rows):
        begins = f"it begins {lines[0][:60]!r}" if lines else "it is empty"
        raise InputError(f'{path}: no line is a JSON object with two dialogues, "chosen" and "rejected"; {begins}')
    sound = [row for row in rows if not isinstance(row, str)]
    return pandas.DataFrame(sound, columns=["Prompt", "Chosen", "Rejected"], dtype=object)


# ---- tokens ----


def train_tokenizer(train: pandas.DataFrame, vocab_size: int) -> tuple[Tokenizer, list[bytes]]:
    """A tokenizer of the chosen dialogues, before any is cut, and its ranks."""
    print(f"training a tokenizer on {len(train):,} dialogues, which may take minutes", flush=True)
    ranks = train_bpe((f"{prompt} {chosen}" for prompt, chosen in zip(train["Prompt"], train["Chosen"])),
                      vocab_size - 2)  # end-of-text and pad have no rank; rlhf/tokenizer.py adds them
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.tiktoken"
        write_ranks(ranks, path)
        return load_tokenizer(str(path)), ranks


def shorten(prompt: str, tokenizer: Tokenizer, limit: int) -> str:
    """The prompt from the first human's turn after which at most `limit` tokens are left; "" if there is none.

    A human's turn goes together with the answer to it, so what stays begins with a human again.
    """
    for turn in re.finditer(HUMAN, prompt):
        if len(tokenizer.encode(prompt[turn.start() :])) <= limit:
            return prompt[turn.start() :]
    return ""


def fit(frame: pandas.DataFrame, tokenizer: Tokenizer, cfg: PrepareConfig, split: str, counts: Counter):
    """The rows with prompts short enough, for both sides and for PPO; a new column Whole has the uncut prompts.

    One prompt serves all three files: prompt + max(longer side, --reply-room) <= --context.
    """
    prompts = []
    for done, (prompt, chosen, rejected) in enumerate(frame.itertuples(index=False), start=1):
        longer = max(len(encode_response(tokenizer, reply)) for reply in (chosen, rejected))
        prompts.append(shorten(prompt, tokenizer, cfg.context - max(longer, cfg.reply_room)))
        if done % 5000 == 0:
            print(f"{split}: measured {done:,} of {len(frame):,} rows", flush=True)
    frame = frame.assign(Whole=frame["Prompt"], Prompt=prompts)
    counts[TOO_LONG] = prompts.count("")
    return frame[frame["Prompt"] != ""]


# ---- writing ----


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


def main(cfg: PrepareConfig) -> None:
    out = Path(cfg.out or HERE)
    own = out / "tokenizer.tiktoken"
    if cfg.tokenizer == "gpt2" and own.exists():  # the three scripts would take it for this set's tokenizer
        raise InputError(f"{own} is from another run and would be used instead of GPT-2's tokenizer; remove it, or "
                         f"give another --out, or --tokenizer own")
    counts = {"train": Counter(), "test": Counter()}
    train, test = (read_split(find_split(cfg, split), cfg.rows, counts[split]) for split in counts)
    out.mkdir(parents=True, exist_ok=True)  # before the long part, so that a folder that cannot be made shows now

    if cfg.tokenizer == "gpt2":
        tokenizer, ranks = load_tokenizer("gpt2"), []
    else:
        tokenizer, ranks = train_tokenizer(train, cfg.vocab_size)
    train = fit(train, tokenizer, cfg, "train", counts["train"])
    test = fit(test, tokenizer, cfg, "test", counts["test"])
    # Two rows of one dialogue may have been cut at different turns, and two dialogues be the same once cut.
    seen = test["Prompt"].isin(train["Prompt"]) | test["Whole"].isin(train["Whole"])
    counts["test"][IN_TRAINING] = int(seen.sum())
    test = test[~seen]

    for split, frame in (("train", train), ("test", test)):
        counts[split][KEPT] = len(frame)
        counts[split][SHORTENED] = int((frame["Prompt"] != frame["Whole"]).sum())
    report = {split: [count[line] for line in REPORT] for split, count in counts.items()}
    print(pandas.DataFrame(report, index=REPORT).to_string(formatters=["{:,}".format] * 2))
    if train.empty or test.empty:
        raise InputError("a split has no rows left, see the counts above; nothing was written")

    with tempfile.TemporaryDirectory(dir=out) as folder:  # all files complete before the first gets its name
        write_split(train, Path(folder), heldout=False)
        write_split(test, Path(folder), heldout=True)
        if ranks:
            write_ranks(ranks, Path(folder) / own.name)
            print(f"{own.name}: {len(ranks):,} ranks")
        for path in Path(folder).iterdir():
            os.replace(path, out / path.name)
    print(f"wrote these to {out}")


if __name__ == "__main__":
    run(main, PrepareConfig)
