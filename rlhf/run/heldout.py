"""The rows of a data set: those that are trained on, and those that are held out.

NAME_heldout.csv holds the held-out rows of NAME.csv. If it is missing, about a tenth of the prompts
of NAME.csv is held out (--heldout), each with all of its rows. A hash of the prompt chooses them,
so the same prompt is on the same side in every file and in every run. (A file of a few prompts is
the exception: one at least is held out, and one is not.)
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pandas import DataFrame

from rlhf.run.errors import InputError
from rlhf.run.files import csv_path
from rlhf.run.messages import prompt_fault, read_prompt
from rlhf.run.tables import check_rows, read_csv

HELDOUT_SHARE = 0.1  # of the prompts


class Columns(NamedTuple):
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    # The table whose held-out file counts, if it is another one's: rankings are trained on, and
    # comparisons evaluated.
    twin: str = ""


COLUMNS = {
    "prompts": Columns(("Prompt",)),
    "demonstrations": Columns(("Prompt", "Response")),
    "comparisons": Columns(("Prompt", "Chosen", "Rejected"), ("Answer",)),
    "rankings": Columns(("Prompt", "Response", "Rank"), ("Group",), "comparisons"),
}
# Of data/label_votes.py; the first two have a winner.
ANSWERS = ("first", "second", "tie", "both bad", "skip")


def read_rows(
    folder: str,
    name: str,
    heldout: bool,
    share: float = HELDOUT_SHARE,
    files: tuple[Path, ...] = (),
) -> list[tuple[Path, DataFrame]]:
    """The rows of one side of a table of a data set: [(the file, its rows)].

    If a hash chooses the held-out prompts, their side prints how many they are. The column Prompt
    holds text or messages (rlhf/run/messages.py). Rows of comparisons whose column Answer names no
    better side are left out.

    Args: name: of COLUMNS; share: of the prompts that is held out if there is no held-out file;
        files: instead of the folder's own to train on.
    Raises: InputError as read_csv does, or if a prompt is no list of messages and looks like one.
    """
    twin = csv_path(folder, COLUMNS[name].twin or name, heldout=True)
    files = files or (csv_path(folder, name),)
    if twin.is_file():
        return [(path, read_table(path, name)) for path in ((twin,) if heldout else files)]
    tables = [(path, read_table(path, name)) for path in files]
    prompts = [cell for _, frame in tables for cell in frame["PromptCell"]]
    chosen = choose_heldout(prompts, share)
    if heldout:
        if not chosen:
            raise InputError(f"there is one prompt only, so none can be held out; write {twin}")
        print(
            f"no {twin.name}: {len(chosen)} of {len(set(prompts))} prompts are held out, chosen by "
            f"a hash (--heldout {share:g})"
        )
    return [(path, frame[frame["PromptCell"].isin(chosen) == heldout]) for path, frame in tables]


def read_table(path: Path, name: str) -> DataFrame:
    """The rows of a file, prompts read; the column PromptCell holds them as the file spells them.

    Raises: as read_rows.
    """
    frame = read_csv(path, COLUMNS[name].needed, COLUMNS[name].optional)
    check_rows(path, "Prompt", [prompt_fault(cell) for cell in frame["Prompt"]])
    prompts = [read_prompt(cell) for cell in frame["Prompt"]]
    frame = frame.assign(PromptCell=frame["Prompt"], Prompt=prompts)
    return with_a_winner(path, frame) if "Answer" in frame else frame


def with_a_winner(path: Path, frame: DataFrame) -> DataFrame:
    """The rows that have a better side. Raises InputError if an Answer is unknown."""
    fault = "is {!r}; it must be first, second, tie, both bad or skip"
    faults = ["" if x in ANSWERS else fault.format(x) for x in frame["Answer"]]
    check_rows(path, "Answer", faults)
    kept = frame[frame["Answer"].isin(ANSWERS[:2])]
    left_out = len(frame) - len(kept)
    if left_out:
        print(f"{path}: {left_out} of {len(frame)} rows name no better side")
    return kept


# ---- which prompts ----


def hash_of(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return int(digest[:8], 16) / 16**8


def choose_heldout(prompts: Iterable[str], share: float) -> set[str]:
    """Those of the prompts that are held out: about this share. Of two or more, one at least is
    held out, and one at least is not."""
    different = sorted(set(prompts), key=hash_of)
    count = sum(hash_of(prompt) < share for prompt in different)
    count = min(max(count, 1), len(different) - 1)
    return set(different[:count])
