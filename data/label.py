"""Collect comparisons: a person at the keyboard says which of two sampled answers is better.

    python -m rlhf.tools.label --checkpoint runs/sft.pt --out my_comparisons.csv
    python train_reward.py --comparison-files my_comparisons.csv

Shows a prompt and two sampled answers in random order and takes one key. Each choice is written to
the file at once: if the process is killed, at most the choice that is being typed is lost, and a
second call continues where the first stopped.

    my_comparisons.csv    Pair, Prompt, Chosen, Rejected, Answer

Pair is the number of the sampled pair: the prompt and the two answers follow from it, --seed and
the checkpoint. Pairs of two equal answers are not shown, and pairs with an answer that was cut off
are not shown either. Answer is first, second, tie or skip. For a tie or a skip, Chosen and Rejected
are the first and the second, and no reward model learns from them.
"""

import dataclasses
import os
import select
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf.data import Prompt, choose_batch, load_prompts, pad_prompts
from rlhf.model import GPT
from rlhf.rollout import decode_responses
from rlhf.run.commands import command
from rlhf.run.device import make_generator, pick_device
from rlhf.run.errors import InputError, printable
from rlhf.run.files import quoted, replacing, writing
from rlhf.run.flags import arg, check_positive
from rlhf.run.heldout import ANSWERS, HELDOUT_SHARE
from rlhf.run.loading import load_policy, tokenizer_of
from rlhf.run.messages import as_cell, as_text, read_prompt
from rlhf.run.tables import read_text, split_rows
from rlhf.sampling import generate, has_ended
from rlhf.tokenizer import Tokenizer

COLUMNS = ["Pair", "Prompt", "Chosen", "Rejected", "Answer"]
KEYS = {"1": "first", "2": "second", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
ESCAPE = "\x1b"  # what Esc sends, and the first byte of most other keys without a letter
ALT_SECONDS = 0.5  # a key that follows ESCAPE sooner was typed with Alt
BLOCK = 16  # pairs sampled at once
PATIENCE = 640  # pairs in a row that leave nothing to choose


@dataclass(frozen=True)
class LabelConfig:
    """Compare pairs of sampled answers, and keep what was chosen."""

    checkpoint: str = arg("runs/sft.pt", "sft.pt or ppo.pt that gives the answers")
    out: str = arg("my_comparisons.csv", "file of comparisons; an existing one is continued")
    count: int = arg(0, "stop when the file holds N choices (0: never)")
    data: str = arg("", "data set folder (empty: the checkpoint's)")
    max_new_tokens: int = arg(40, "longest answer in tokens")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "random seed")

    def __post_init__(self):
        check_positive(self, "max_new_tokens")

    def lock_file(self) -> Path:
        return Path(f"{self.out}.lock")


@dataclass(frozen=True)
class Pair:
    """Two sampled answers to a prompt. Both are drawn alike, so which is first is random."""

    number: int
    prompt: str  # as a CSV file holds it: rlhf/run/messages.py
    first: str
    second: str


@dataclass(frozen=True)
class Choice:
    """The answer to a pair: a row of the file, with its cells in the order of COLUMNS."""

    pair: int
    prompt: str
    chosen: str
    rejected: str
    answer: str  # one of ANSWERS


def choose(pair: Pair, answer: str) -> Choice:
    if answer == "second":
        return Choice(pair.number, pair.prompt, pair.second, pair.first, answer)
    return Choice(pair.number, pair.prompt, pair.first, pair.second, answer)


# ---- the file: one row per choice, whole or not at all ----


def read_choices(path: Path) -> list[Choice]:
    """The rows of the file, which is created if it does not exist.

    A last row that breaks off, after the process was killed, is left out, and the file is copied
    before. Raises InputError if another row is faulty, or if it is a file of another program.
    """
    if not path.is_file():
        write_choices(path, [])
    rows = read_rows(path)
    choices = parse_rows(path, rows)
    broken = len(choices) < len(rows)
    if broken:
        copy = Path(f"{path}.cut")
        with replacing(copy, "wb") as file:
            file.write(path.read_bytes())
        print(f"{path}: its last line breaks off and is left out; {copy} has the file as it was")
    if broken or not path.read_bytes().endswith(b"\n"):
        write_choices(path, choices)
    return choices


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


def parse_rows(path: Path, rows: list[list[str]]) -> list[Choice]:
    """The rows as choices; the last one is left out if it is faulty. Raises InputError if another
    one is."""
    choices = []
    for number, cells in enumerate(rows, start=1):
        if is_choice(cells):
            choices.append(Choice(int(cells[0]), *cells[1:]))
        elif number < len(rows):
            answers = ", ".join(ANSWERS)
            raise InputError(
                f"{path}, row {number}: expected a number, three texts and one of {answers}; fix "
                f"it, or give another --out"
            )
    return choices


def is_choice(cells: list[str]) -> bool:
    if len(cells) != len(COLUMNS) or not all(cells):
        return False
    number = cells[0]
    return number.isdecimal() and len(number) < 10 and cells[4] in ANSWERS


def line_of(cells: Iterable) -> str:
    """A row of the file. All cells are in quotation marks, so that a row that breaks off shows."""
    return ",".join(quoted(str(cell)) for cell in cells) + "\n"


def write_choices(path: Path, choices: list[Choice]) -> None:
    """Replace the whole file."""
    with replacing(path, encoding="utf-8", newline="") as file:
        file.write(line_of(COLUMNS))
        for choice in choices:
            file.write(line_of(dataclasses.astuple(choice)))


def append_choice(path: Path, choice: Choice) -> None:
    """Add a row, which is on the disk when this returns."""
    with writing(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(line_of(dataclasses.astuple(choice)))
        file.flush()
        os.fsync(file.fileno())


# ---- the pairs: they follow from (checkpoint, seed, number) ----


class Pairs:
    """The numbered pairs of a policy. They are sampled in blocks, and each block once."""

    def __init__(self, gpt: GPT, prompts: list[Prompt], tokenizer: Tokenizer, cfg: LabelConfig):
        self.gpt = gpt
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.blocks: dict[int, list[Pair]] = {}

    def first_from(self, number: int) -> Pair:
        """The first pair to show that has this number or a higher one."""
        last_block = (number + PATIENCE) // BLOCK
        for block in range(number // BLOCK, last_block + 1):
            for pair in self.block(block):
                if pair.number >= number:
                    return pair
        raise InputError(
            f"the last {PATIENCE} pairs left nothing to choose: both answers were the same, or one "
            f"was cut off; give a larger --max-new-tokens, or another --checkpoint"
        )

    def block(self, block: int) -> list[Pair]:
        """The pairs of a block that are shown."""
        if block not in self.blocks:
            prompts = choose_batch(self.prompts, BLOCK, block, self.cfg.seed)
            answers = self.sample_answers(prompts, block)
            self.blocks[block] = self.make_pairs(prompts, answers, block)
        return self.blocks[block]

    def sample_answers(self, prompts: list[Prompt], block: int) -> list[str]:
        """Two answers to each prompt, one after the other; "" for one that was cut off."""
        cfg = self.cfg
        tokenizer = self.tokenizer
        device = next(self.gpt.parameters()).device
        twice = [prompt for prompt in prompts for _ in range(2)]
        tokens, prompt_lens = pad_prompts(twice, tokenizer.pad_id, device)  # (B, P), (B,)
        generator = make_generator(device, cfg.seed, "label", block)
        tokens, mask = generate(
            self.gpt, tokens, prompt_lens, cfg.max_new_tokens, tokenizer.stop_ids, generator
        )  # (B, T), (B, T-1)
        texts = decode_responses(tokenizer, tokens, mask)
        ended = has_ended(tokens, mask, tokenizer.stop_ids).tolist()
        return [text if has_end else "" for text, has_end in zip(texts, ended)]

    def make_pairs(self, prompts: list[Prompt], answers: list[str], block: int) -> list[Pair]:
        pairs = []
        for i, prompt in enumerate(prompts):
            first, second = answers[2 * i : 2 * i + 2]
            if self.leaves_a_choice(prompt, first, second):
                pairs.append(Pair(block * BLOCK + i, as_cell(prompt.given), first, second))
        return pairs

    def leaves_a_choice(self, prompt: Prompt, first: str, second: str) -> bool:
        """Not if an answer is empty or was cut off, if both are equal, or if a reward model could
        not read one again: it does not fit, or holds a NUL byte, as untrained models say it."""
        if not first or not second or first == second or "\0" in first + second:
            return False
        lengths = [len(self.tokenizer.response_ids(side)) for side in (first, second)]
        return len(prompt.tokens) + max(lengths) <= self.gpt.config.block_size


# ---- who answers ----


def read_key() -> str:
    """One key from the terminal, without Enter if the terminal can do that; otherwise the first
    letter of a line. "q" at the end of the input."""
    if not sys.stdin.isatty() or os.name != "posix":
        return sys.stdin.readline()[:1].lower() or "q"
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        return next_key(sys.stdin.fileno()) or "q"
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def next_key(terminal: int) -> str:
    """The next key in lower case; ESCAPE for one that sends several bytes, which are all read.

    ESC [ ... x    arrows, Home, F5, ...: up to a byte from "@" to "~"
    ESC [ [ x      F1 to F5 of the Linux console
    ESC O ... x    F1 to F4; arrows and the number block in some modes
    ESC x          Alt and a key
    """
    key = read_byte(terminal)
    escaped = key == ESCAPE
    while key == ESCAPE and select.select([terminal], [], [], ALT_SECONDS)[0]:
        key = read_byte(terminal)
    if key not in ("[", "O"):  # they are no answers, so they continue an ESC, however late
        return ESCAPE if escaped else key.lower()
    key = read_byte(terminal)
    if key == "[":
        key = read_byte(terminal)
    while key and not "@" <= key <= "~":
        key = read_byte(terminal)
    return ESCAPE


def read_byte(terminal: int) -> str:
    """ "" at the end of the input."""
    return os.read(terminal, 1).decode("latin-1")


def ask(pair: Pair) -> str:
    """Show a pair and wait for one of KEYS: an answer, undo or quit."""
    prompt = as_text(read_prompt(pair.prompt)).strip()
    print(
        f"\n{printable(prompt)}\n\n"
        f"  1: {printable(pair.first)}\n  2: {printable(pair.second)}\n\n"
        "1 or 2: the better one    t: tie    s: skip    u: undo the last answer    q: quit",
        flush=True,
    )
    key = read_key()
    while key not in KEYS:
        print("1, 2, t, s, u or q", flush=True)
        key = read_key()
    return KEYS[key]


def summary(choices: list[Choice]) -> str:
    """How many pairs were answered, and how many with a better side."""
    decided = [choice for choice in choices if choice.answer in ("first", "second")]
    return f"{len(choices)} answered, {len(decided)} of them with a choice"


# ---- the program ----


def collect(
    pairs: Pairs,
    choices: list[Choice],
    annotator: Callable[[Pair], str],
    cfg: LabelConfig,
) -> None:
    """Have pairs answered, and add them to `choices` and the file, until there are enough or the
    annotator quits."""
    out = Path(cfg.out)
    number = 1 + max((choice.pair for choice in choices), default=-1)
    while not cfg.count or len(choices) < cfg.count:
        pair = pairs.first_from(number)
        answer = annotator(pair)
        if answer == "quit":
            return
        if answer == "undo":
            if choices:
                number = choices.pop().pair
            write_choices(out, choices)
            continue
        choices.append(choose(pair, answer))
        append_choice(out, choices[-1])
        number = pair.number + 1
        if annotator is ask or len(choices) % 500 == 0:
            print(summary(choices), flush=True)


def main(cfg: LabelConfig, annotator: Callable[[Pair], str] = ask) -> None:
    """annotator: gives a value of KEYS for a pair."""
    path = Path(cfg.checkpoint)
    device = pick_device(cfg.device)
    gpt, checkpoint = load_policy(path, "sft", "ppo")
    data = cfg.data or checkpoint["config"]["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)
    limit = gpt.config.block_size - cfg.max_new_tokens
    prompts = load_prompts(
        data, tokenizer, limit, share=checkpoint["config"].get("heldout", HELDOUT_SHARE)
    )
    pairs = Pairs(gpt.to(device), prompts, tokenizer, cfg)

    out = Path(cfg.out)
    choices = read_choices(out)
    if choices:
        print(f"{out}: going on after {summary(choices)}")
    collect(pairs, choices, annotator, cfg)
    total = summary(choices)
    print(f"{out}: {total}; next: {command('reward')} --comparison-files {out}")
