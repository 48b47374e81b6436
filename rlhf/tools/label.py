"""Collect comparisons: a person at the keyboard says which of two sampled answers is better.

    python -m rlhf.tools.label --checkpoint runs/sft.pt --out my_comparisons.csv
    python train_reward.py --comparison-files my_comparisons.csv

Shows a prompt and two sampled answers in random order and takes one key. Each choice is written to the file at once:
a kill loses at most the choice that is being typed, and a second call continues where the first stopped.

    my_comparisons.csv    Pair, Prompt, Chosen, Rejected, Answer

Pair is the number of the sampled pair: the prompt and the two answers follow from it, --seed and the checkpoint. Pairs
of two equal answers are not shown, and pairs with an answer that was cut off are not shown either. Answer is first,
second, tie or skip. For a tie or a skip, Chosen and Rejected are the first and the second, and no reward model learns
from them.

--annotator judge lets the data set's judge.py choose: simulated feedback, or AI feedback if the judge is a model
(RLAIF, Bai et al. 2022). If the judge knows its annotators' noise, it votes with that noise.
"""

import csv
import functools
import itertools
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf.data import Prompt, batch_indices, encode_response, load_prompts, pad_rows
from rlhf.evaluate import decode_responses
from rlhf.extras.from_checkpoint import judge_of, tokenizer_of
from rlhf.extras.yardsticks import vote_probabilities
from rlhf.rollout import generate, has_ended
from rlhf.support.checkpoints import load_policy
from rlhf.support.cli import InputError, arg, check_not_negative, check_positive, run
from rlhf.support.judge import gold_scores
from rlhf.support.runtime import make_generator, pick_device
from rlhf.support.tables import replacing
from rlhf.tools.sample import find_reward_model

COLUMNS = ["Pair", "Prompt", "Chosen", "Rejected", "Answer"]
ANSWERS = ("first", "second", "tie", "skip")
KEYS = {"1": "first", "2": "second", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
BLOCK = 16  # pairs sampled at once
PATIENCE = 640  # pairs in a row that leave nothing to choose
writer = functools.partial(csv.writer, lineterminator="\n", quoting=csv.QUOTE_ALL)


@dataclass(frozen=True)
class LabelConfig:
    """Compare pairs of sampled answers, and keep what was chosen."""

    checkpoint: str = arg("runs/sft.pt", "sft.pt or ppo.pt that gives the answers")
    out: str = arg("my_comparisons.csv", "file of comparisons; an existing one is continued")
    annotator: str = arg("person", "who chooses: you, or the data set's judge.py", ("person", "judge"))
    count: int = arg(0, "stop when the file holds N choices (0: never)")
    data: str = arg("", "data set folder (empty: the checkpoint's)")
    reward: str = arg("", "reward model to compare with (empty: reward.pt beside the checkpoint)")
    max_new_tokens: int = arg(40, "longest answer in tokens")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "random seed")

    def __post_init__(self):
        check_positive(self, "max_new_tokens")
        check_not_negative(self, "count")
        if self.annotator == "judge" and not self.count:
            raise ValueError("--annotator judge needs --count: how many choices to take")

    def lock_file(self) -> Path:
        return Path(f"{self.out}.lock")


# ---- the file: one row an answer, whole or not at all ----


def read_answers(path: Path) -> list[list[str]]:
    """The rows of the file, which is created if it does not exist. A last row that breaks off is left out, after a copy
    of the file. Raises InputError if another row is faulty, or if it is a file of another program."""
    if not path.is_file():
        write_answers(path, [])
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if header != COLUMNS:
            raise csv.Error(f"it is not a file of this program, whose header is {','.join(COLUMNS)}")
        answers = list(itertools.takewhile(is_answer, rows))
        if len(answers) < len(rows) - 1:
            raise csv.Error(f"row {len(answers) + 1}: expected a number, three texts and one of {', '.join(ANSWERS)}")
    except csv.Error as error:
        raise InputError(f"{path} cannot be read: {error}; fix it, or give another --out") from error
    if cut := len(answers) < len(rows):  # after a kill in the middle of the last row
        Path(f"{path}.cut").write_bytes(path.read_bytes())
        print(f"{path}: its last line breaks off and is left out; {path}.cut has the file as it was")
    if cut or not path.read_bytes().endswith(b"\n"):
        write_answers(path, answers)
    return answers


def is_answer(row: list[str]) -> bool:
    return len(row) == len(COLUMNS) and row[0].isdecimal() and len(row[0]) < 10 and all(row) and row[4] in ANSWERS


def write_answers(path: Path, answers: list[list[str]]) -> None:
    """Replace the whole file."""
    with replacing(path, encoding="utf-8", newline="") as file:
        writer(file).writerows([COLUMNS, *answers])


def append_answer(path: Path, row: list[str]) -> None:
    """Add a row, which is on the disk when this returns."""
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            writer(file).writerow(row)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free some space and call again") from error


# ---- the pairs: they follow from (checkpoint, seed, number) ----


def pairs_from(number: int, gpt, prompts: list[Prompt], tokenizer, cfg: LabelConfig):
    """(number, (prompt, first, second)) of each pair from the given number on. Both answers are drawn alike, so which
    is first is random. Left out are pairs of equal answers, and pairs with an answer that is empty, was cut off, or
    does not fit when a model reads it again."""
    device, shown = next(gpt.parameters()).device, number
    for block in itertools.count(number // BLOCK):
        rows = [prompts[i] for i in batch_indices(len(prompts), BLOCK, block, cfg.seed)]
        tokens, prompt_lens = pad_rows([row.tokens for row in rows for _ in range(2)], tokenizer.pad_id, device)
        generator = make_generator(device, cfg.seed, "label", block)
        tokens, mask = generate(gpt, tokens, prompt_lens, cfg.max_new_tokens, tokenizer.eos_id, generator)
        texts, ended = decode_responses(tokenizer, tokens, mask), has_ended(tokens, mask, tokenizer.eos_id).tolist()
        texts = [text if end else "" for text, end in zip(texts, ended)]
        for at, (row, *sides) in enumerate(zip(rows, texts[::2], texts[1::2]), start=block * BLOCK):
            longest = len(row.tokens) + max(len(encode_response(tokenizer, side)) for side in sides)
            if at >= number and all(sides) and sides[0] != sides[1] and longest <= gpt.config.block_size:
                shown = at
                yield at, (row.text, *sides)
        if at - shown >= PATIENCE:
            raise InputError(f"the last {PATIENCE} pairs left nothing to choose: both answers were the same, or one "
                             f"was cut off; give a larger --max-new-tokens, or another --checkpoint")


# ---- who answers ----


def read_key() -> str:
    """One key from the terminal, without Enter if the terminal can do that; otherwise the first letter of a line."""
    if not sys.stdin.isatty() or os.name != "posix":
        return sys.stdin.readline()[:1].lower() or "q"
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        return sys.stdin.read(1).lower() or "q"
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def ask(prompt: str, first: str, second: str) -> str:
    """Show a pair and wait for one of KEYS."""
    print(f"\n{prompt.strip()}\n\n  1: {first}\n  2: {second}\n\n"
          "1 or 2: the better one    t: tie    s: skip    u: undo the last answer    q: quit", flush=True)
    while (key := read_key()) not in KEYS:
        print("1, 2, t, s, u or q", flush=True)
    return KEYS[key]


def judge_answer(judge, prompt: str, first: str, second: str, rng: random.Random) -> str:
    """The judge's vote: with its annotators' noise if it knows that, else for the higher gold."""
    a, b = gold_scores(judge, [prompt] * 2, [first, second])
    if (p := vote_probabilities(judge, [a], [b])) is not None:
        return "first" if rng.random() < p[0] else "second"
    return "tie" if a == b else "first" if a > b else "second"


def agrees(reward_model, tokenizer, prompt: str, chosen: str, rejected: str) -> bool:
    """Whether the reward model makes the same choice. If a side is too long for it to read, it does not."""
    ids, device = tokenizer.encode(prompt), next(reward_model.parameters()).device
    sides = [ids + encode_response(tokenizer, side) for side in (chosen, rejected)]
    fits = max(map(len, sides)) <= reward_model.gpt.config.block_size
    scores = reward_model(*pad_rows(sides, tokenizer.pad_id, device)).tolist() if fits else [0, 0]
    return scores[0] > scores[1]


def summary(answers: list[list[str]], agree) -> str:
    """How many answers there are, and for which share of the choices agree(prompt, chosen, rejected) holds. agree: None
    without a reward model."""
    decided = [row for row in answers if row[4] in ("first", "second")]
    text = f"{len(answers)} answered, {len(decided)} of them with a choice"
    if agree and decided:
        text += f"; the reward model agrees with {sum(agree(*row[1:4]) for row in decided) / len(decided):.0%}"
    return text


def main(cfg: LabelConfig) -> None:
    path, out, device = Path(cfg.checkpoint), Path(cfg.out), pick_device(cfg.device)
    gpt, checkpoint = load_policy(path, "sft", "ppo")
    data = cfg.data or checkpoint["config"]["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)
    source = gpt.to(device), load_prompts(data, tokenizer, gpt.config.block_size - cfg.max_new_tokens), tokenizer, cfg
    reward_model = find_reward_model(cfg.reward, path, tokenizer, device)
    agree = reward_model and functools.cache(functools.partial(agrees, reward_model, tokenizer))  # scores a row once
    judge = judge_of(cfg.data, data) if cfg.annotator == "judge" else None
    if cfg.annotator == "judge" and judge is None:
        raise InputError(f"--annotator judge: {data} has no judge.py")
    answers = read_answers(out)
    if answers:
        print(f"{out}: going on after {summary(answers, agree)}")

    pairs = pairs_from(1 + max((int(row[0]) for row in answers), default=-1), *source)
    while not cfg.count or len(answers) < cfg.count:
        number, pair = next(pairs)
        answer = ask(*pair) if judge is None else judge_answer(judge, *pair, random.Random(f"{cfg.seed} vote {number}"))
        if answer == "quit":
            break
        if answer == "undo":
            number = int(answers.pop()[0]) if answers else number
            write_answers(out, answers)
            pairs = pairs_from(number, *source)
            continue
        prompt, *sides = pair
        answers.append([str(number), prompt, *(sides[::-1] if answer == "second" else sides), answer])
        append_answer(out, answers[-1])
        if judge is None or len(answers) % 500 == 0:
            print(summary(answers, agree), flush=True)
    print(f"{out}: {summary(answers, agree)}; next: python train_reward.py --comparison-files {out}")


if __name__ == "__main__":
    run(main, LabelConfig)
