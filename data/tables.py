"""Rows of one or more files -> the tables of a data set: demonstrations, comparisons and prompts,
split by prompt."""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pandas import DataFrame

from data.formats import Row
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.heldout import COLUMNS, choose_heldout
from rlhf.run.messages import ASSISTANT, HUMAN, TextOrMessages, as_text, read_prompt
from rlhf.tokenizer import Tokenizer

TABLES = ("demonstrations", "comparisons", "prompts")

Table = list[tuple[str, ...]]  # (prompt, responses ...) of each row, as the CSVs hold them


def make_tables(rows: list[Row], dropped: Counter) -> dict[str, Table]:
    """{name of a table: its rows}, each row once. What no file gives is taken from the others.

    dropped: gets the count of repeated rows.
    """
    found = {name: {} for name in (*TABLES, "up", "down")}
    for row in rows:
        found[row.table][(row.prompt, *row.responses)] = None
    dropped["dropped, repetitions"] = len(rows) - sum(map(len, found.values()))
    comparisons = [*found["comparisons"], *pair_up(found["up"], found["down"])]
    if not found["demonstrations"]:
        worse = {(prompt, rejected) for prompt, _, rejected in comparisons}
        better = [*found["up"], *((prompt, chosen) for prompt, chosen, _ in comparisons)]
        found["demonstrations"] = dict.fromkeys(row for row in better if row not in worse)
        if better:
            print("no file holds demonstrations: they are the chosen responses")
    if not found["prompts"]:
        print("no file holds prompts only: they are those of all rows")
        found["prompts"] = {row[:1]: None for table in found.values() for row in table}
    found["comparisons"] = comparisons
    return {name: list(found[name]) for name in TABLES if found[name]}


def pair_up(up: Table, down: Table) -> Table:
    """Comparisons: each good response to a prompt with each bad one to the same prompt."""
    bad = {}
    for prompt, response in down:
        bad.setdefault(prompt, []).append(response)
    pairs = []
    for prompt, response in up:
        pairs += [(prompt, response, worse) for worse in bad.get(prompt, []) if worse != response]
    return pairs


# ---- the split ----


def side_of(row: tuple[str, ...]) -> str:
    """What decides the side of a row: the user's first message, so that dialogues with the same
    beginning are on the same side."""
    return first_turn(read_prompt(row[0]))


def first_turn(prompt: TextOrMessages) -> str:
    """The content of the user's first message; of a text, what stands in its place."""
    if isinstance(prompt, str):
        before, _, after = f"\n\n{prompt.strip()}".partition(HUMAN)
        return (after or before).partition(ASSISTANT)[0].strip()
    return next(message["content"].strip() for message in prompt if message["role"] == "user")


class Split(NamedTuple):
    """Which rows are held out: those whose first message is in `test`, and a share of the others.
    Each message is on the same side in all tables."""

    share: float = 0.1  # 0: none
    test: frozenset[str] = frozenset()


def split_tables(tables: dict[str, Table], split: Split) -> dict[str, Table]:
    """{name of a CSV: its rows}: for each table, those to train on and those that are held out."""
    heldout = set(split.test)
    for table in tables.values():
        if split.share:
            heldout |= choose_heldout(map(side_of, table), split.share)
    files = {}
    for name, table in tables.items():
        files[f"{name}.csv"] = [row for row in table if side_of(row) not in heldout]
        files[f"{name}_heldout.csv"] = [row for row in table if side_of(row) in heldout]
    return files


# ---- tokens ----


def training_texts(tables: dict[str, Table], split: Split) -> list[str]:
    """Each prompt and each response to train on once, as Tokenizer reads them."""
    texts = {}
    for name, table in split_tables(tables, split).items():
        if name.endswith("_heldout.csv"):
            continue
        for prompt, *responses in table:
            texts[as_text(read_prompt(prompt))] = None
            texts |= dict.fromkeys(f" {response}" for response in responses)
    return list(texts)


class Sizes(NamedTuple):
    """In tokens: the longest row, and PPO's longest response."""

    block_size: int
    max_new_tokens: int


LONGEST_RESPONSE = 128  # of PPO
DEFAULT = Sizes(80, 40)  # of the scripts


def choose_sizes(
    tables: dict[str, Table], tokenizer: Tokenizer, limit: int, dropped: Counter
) -> tuple[dict[str, Table], Sizes]:
    """The rows that fit `limit` tokens, and the sizes that fit them. Prints the lengths.

    PPO's response is as long as most of the responses, and each prompt leaves room for it.

    Args: dropped: gets the count of rows that do not fit.
    """
    frame = measure(tables, tokenizer)
    lengths = frame[["prompt", "response"]].assign(together=frame["prompt"] + frame["response"])
    quantiles = lengths.quantile([0.5, 0.95, 1], interpolation="nearest").T
    quantiles.columns = ["median", "95 %", "longest"]
    printed = quantiles.to_string(float_format="{:.0f}".format, na_rep="-")
    print(f"lengths in tokens, end-of-text included:\n{printed}")

    block_size, room = DEFAULT
    usual = quantiles.loc["response", "95 %"]
    if usual > 0:  # not NaN
        block_size = 0
        room = round_up(min(usual, LONGEST_RESPONSE, limit / 2))
    needed = frame["prompt"] + frame["response"].clip(lower=room).fillna(room)
    fits = needed <= limit
    dropped[f"dropped, longer than {limit} tokens"] = len(frame) - sum(fits)
    if any(fits):
        block_size = max(block_size, min(limit, round_up(needed[fits].max())))
    kept = {name: list(frame["row"][fits & (frame["table"] == name)]) for name in tables}
    return kept, Sizes(block_size, room)


def round_up(size: float) -> int:
    """The next multiple of 8."""
    return math.ceil(size / 8) * 8


def measure(tables: dict[str, Table], tokenizer: Tokenizer) -> DataFrame:
    """The rows of all tables, with the name of their table, and the tokens of the prompt and of the
    longest response (NaN if there is none)."""
    rows = []
    for name, table in tables.items():
        for row in table:
            lengths = [len(tokenizer.response_ids(response)) for response in row[1:]]
            prompt_len = len(tokenizer.prompt_ids(read_prompt(row[0])))
            rows.append((name, row, prompt_len, max(lengths, default=math.nan)))
    return DataFrame(rows, columns=["table", "row", "prompt", "response"])


# ---- writing ----


def write_tables(tables: dict[str, Table], split: Split, folder: Path) -> dict[str, int]:
    """{name of a CSV: count of its rows}. Raises InputError if there would be none."""
    counts = {}
    for name, table in split_tables(tables, split).items():
        if not table:
            raise InputError(
                f"no row is left for {name}; give more rows with other prompts, a larger "
                f"--block-size if rows were too long, or a --heldout share beside --test"
            )
        columns = COLUMNS[name.removesuffix(".csv").removesuffix("_heldout")].needed
        write_csv(folder / name, [dict(zip(columns, row)) for row in table])
        counts[name] = len(table)
    return counts
