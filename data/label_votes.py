"""Votes: the pair that one is about, the file that holds them, and the one way to add or undo one.

    my_comparisons.csv    Pair, Prompt, Chosen, Rejected, Answer

Answer is first, second, tie, both bad or skip. Only of the first two is there a better side; for
the others, Chosen and Rejected are the first and the second, and no reward model learns from them.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf.run.errors import InputError
from rlhf.run.files import quoted, replacing, writing
from rlhf.run.heldout import ANSWERS
from rlhf.run.messages import prompt_fault
from rlhf.run.tables import read_text, split_rows

COLUMNS = ["Pair", "Prompt", "Chosen", "Rejected", "Answer"]
DECIDED = ("first", "second")


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt."""

    number: int
    prompt: str  # as a CSV file holds it: rlhf/run/messages.py
    first: str
    second: str

    @property
    def key(self) -> tuple[str, ...]:
        """The same for the same texts, whichever side is first."""
        return (self.prompt, *sorted((self.first, self.second)))


@dataclass(frozen=True)
class Vote:
    """The answer to a pair: a row of the file, with its cells in the order of COLUMNS."""

    pair: int
    prompt: str
    chosen: str
    rejected: str
    answer: str  # one of ANSWERS

    @property
    def shown(self) -> Pair:
        """The pair as the person saw it."""
        sides = (self.chosen, self.rejected)
        return Pair(self.pair, self.prompt, *(sides[::-1] if self.answer == "second" else sides))

    @property
    def meaning(self) -> str:
        """The same for two votes that say the same, whichever side was first."""
        return f"better: {self.chosen}" if self.answer in DECIDED else self.answer


def vote_for(pair: Pair, answer: str) -> Vote:
    sides = (pair.second, pair.first) if answer == "second" else (pair.first, pair.second)
    return Vote(pair.number, pair.prompt, *sides, answer)


# ---- the file: one row per vote, whole or not at all ----


def read_votes(path: Path) -> list[Vote]:
    """The rows of the file, which is created if it does not exist.

    A last row that breaks off, after the process was killed, is left out, and the file is copied
    before. Raises InputError if another row is faulty, or if it is a file of another program.
    """
    if not path.is_file():
        write_votes(path, [])
    rows = read_rows(path)
    votes = parse_rows(path, rows)
    broken = len(votes) < len(rows)
    if broken:
        copy = Path(f"{path}.cut")
        with replacing(copy, "wb") as file:
            file.write(path.read_bytes())
        print(f"{path}: its last line breaks off and is left out; {copy} has the file as it was")
    if broken or not path.read_bytes().endswith(b"\n"):
        write_votes(path, votes)
    return votes


def read_rows(path: Path) -> list[list[str]]:
    """The cells of all rows below the header. Raises InputError if the header is another one."""
    text = read_text(path, cut=True)
    if text.count('"') % 2:
        text += '"'  # the last row breaks off inside a cell
    rows = split_rows(path, text)
    if rows[0] != COLUMNS:
        header = ",".join(COLUMNS)
        raise InputError(
            f"{path} is not a file of this program, whose header is {header}; give another --out"
        )
    return rows[1:]


def parse_rows(path: Path, rows: list[list[str]]) -> list[Vote]:
    """The rows as votes; the last one is left out if it is faulty. Raises InputError if another one
    is."""
    votes = []
    for number, cells in enumerate(rows, start=1):
        if is_vote(cells):
            votes.append(Vote(int(cells[0]), *cells[1:]))
        elif number < len(rows):
            answers = ", ".join(ANSWERS)
            raise InputError(
                f"{path}, row {number}: expected a number, a prompt, two texts and one of "
                f"{answers}; fix it, or give another --out"
            )
    return votes


def is_vote(cells: list[str]) -> bool:
    if len(cells) != len(COLUMNS) or not all(cells):
        return False
    number, prompt = cells[:2]
    if not number.isdecimal() or len(number) > 9 or prompt_fault(prompt):
        return False
    return cells[4] in ANSWERS


def line_of(cells: Iterable) -> str:
    """A row of the file. All cells are in quotation marks, so that a row that breaks off shows."""
    return ",".join(quoted(str(cell)) for cell in cells) + "\n"


def write_votes(path: Path, votes: list[Vote]) -> None:
    """Replace the whole file."""
    with replacing(path, encoding="utf-8", newline="") as file:
        file.write(line_of(COLUMNS))
        for vote in votes:
            file.write(line_of(dataclasses.astuple(vote)))


def append_vote(path: Path, vote: Vote) -> None:
    """Add a row, which is on the disk when this returns."""
    with writing(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(line_of(dataclasses.astuple(vote)))
        file.flush()
        os.fsync(file.fileno())


# ---- labelling ----


class Labelling:
    """The pair to show now, and the votes so far. The terminal and the page both go through it.

    pair: the pair to show; None if there are enough votes, or no pairs are left.
    """

    def __init__(self, pairs, path: Path, count: int = 0):
        """pairs: of data/label_pairs.py; count: stop at this many votes in the file (0: never)."""
        self.pairs = pairs
        self.path = path
        self.count = count
        self.votes = read_votes(path)
        self.seconds: list[float] = []  # that each vote took
        self.show_next()

    def show_next(self) -> None:
        self.pair = None if self.left() == 0 else self.pairs.next_pair(self.votes)
        self.shown_at = time.monotonic()

    def left(self) -> int | None:
        """How many pairs are still to be voted on; None if there is no end."""
        ends = [self.pairs.left(self.votes)]
        if self.count:
            ends.append(max(0, self.count - len(self.votes)))
        return min((end for end in ends if end is not None), default=None)

    def answer(self, answer: str) -> None:
        """Write the vote for the pair that is shown, and go on to the next one.

        answer: one of ANSWERS, or "undo", which takes the last vote out of the file.
        """
        if answer == "undo":
            write_votes(self.path, self.votes[:-1])
            self.votes = self.votes[:-1]
        else:
            vote = vote_for(self.pair, answer)
            append_vote(self.path, vote)
            self.votes.append(vote)
            self.seconds.append(time.monotonic() - self.shown_at)
        self.show_next()

    def progress(self) -> str:
        """ "37 of 200, about 12 min left". The time goes by the median of the votes since the
        program started, so that a break does not count."""
        left = self.left()
        if left is None:
            return f"{len(self.votes)} done"
        text = f"{len(self.votes)} of {len(self.votes) + left}"
        if left and len(self.seconds) >= 3:
            minutes = math.ceil(left * statistics.median(self.seconds) / 60)
            text += f", about {minutes} min left"
        return text

    def summary(self) -> str:
        """How many pairs were answered, and how many with a better side."""
        decided = [vote for vote in self.votes if vote.answer in DECIDED]
        return f"{len(self.votes)} answered, {len(decided)} of them with a choice"


# ---- agreement of two passes ----


def agreement(first_pass: list[Vote], second_pass: list[Vote]) -> str:
    """How often a person gave the same answer twice, in two lines. Skipped pairs do not count, and
    of a pair with several votes in a pass, the last one does."""
    earlier = {vote.shown.key: vote for vote in first_pass}
    later = {vote.shown.key: vote for vote in second_pass}
    both = []
    for key in earlier.keys() & later.keys():
        votes = (earlier[key], later[key])
        if "skip" not in (votes[0].answer, votes[1].answer):
            both.append(votes)
    decided = [votes for votes in both if all(vote.answer in DECIDED for vote in votes)]
    return (
        f"the same answer in both passes: {share_same(both)}\n"
        f"where both name a better side, the same one: {share_same(decided)}"
    )


def share_same(pairs_of_votes: list[tuple[Vote, Vote]]) -> str:
    same = sum(first.meaning == second.meaning for first, second in pairs_of_votes)
    return share_in_words(same, len(pairs_of_votes))


def share_in_words(same: int, count: int) -> str:
    """ "8 of 10, 80 % (95 % interval: 49 to 94 %)" """
    if not count:
        return "no pairs yet"
    low, high = wilson(same, count)
    interval = f"95 % interval: {100 * low:.0f} to {100 * high:.0f} %"
    return f"{same} of {count}, {100 * same / count:.0f} % ({interval})"


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927). It stays within 0 and 1, also for 0 of n."""
    z = 1.96
    share = successes / count
    scale = 1 + z**2 / count
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - spread) / scale, min(scale, centre + spread) / scale
