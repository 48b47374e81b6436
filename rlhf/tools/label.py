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
import io
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

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

COLUMNS = ("Pair", "Prompt", "Chosen", "Rejected", "Answer")
ANSWERS = ("first", "second", "tie", "skip")
KEYS = {"1": "first", "2": "second", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
BLOCK = 16  # pairs sampled at once
PATIENCE = 640  # pairs in a row that leave nothing to choose


@dataclass(frozen=True)
class LabelConfig:
    """Compare pairs of sampled answers, and keep what was chosen."""

    checkpoint: str = arg("runs/sft.pt", "sft.pt or ppo.pt that gives the answers")
    out: str = arg("my_comparisons.csv", "file of comparisons; an existing one is continued")
    annotator: str = arg("person", "who chooses: you, or the data set's judge.py",
                         ("person", "judge"))
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


# ---- the file: one line an answer, whole or not at all ----


def line_of(cells) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
    return line.getvalue()


class AnswerFile:
    """The choices so far. When `append` and `undo` return, the file on disk is up to date."""

    def __init__(self, path: Path):
        self.path, self.answers = path, []
        if not path.is_file():
            self._rewrite()
            return
        text = path.read_bytes().decode("utf-8", errors="replace")
        try:
            rows = list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise InputError(f"{path} cannot be read: {error}; fix it, or give another --out") from error
        if not rows or tuple(rows[0]) != COLUMNS:
            raise InputError(f"{path} is not a file of this program, whose header is {','.join(COLUMNS)}; give "
                             f"another --out")
        faulty = [number for number, row in enumerate(rows[1:], start=1) if not self._sound(row)]
        if faulty and faulty[0] < len(rows) - 1:
            raise InputError(f"{path}, row {faulty[0]}: expected a number, three texts and one of "
                             f"{', '.join(ANSWERS)}; fix it, or give another --out")
        self.answers = rows[1 : len(rows) - len(faulty)]
        if faulty:  # the last line, after a kill in the middle of it
            cut = path.with_name(path.name + ".cut")
            cut.write_text(text, encoding="utf-8")
            print(f"{path}: its last line breaks off and is left out; {cut} has the file as it was")
        if faulty or not text.endswith("\n"):
            self._rewrite()

    @staticmethod
    def _sound(row: list[str]) -> bool:
        return len(row) == len(COLUMNS) and row[0].isdecimal() and len(row[0]) < 10 and all(row) and row[4] in ANSWERS

    def _rewrite(self) -> None:
        with replacing(self.path, encoding="utf-8", newline="") as file:
            file.writelines(map(line_of, [COLUMNS, *self.answers]))

    def append(self, *cells) -> None:
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(line_of(cells))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error}); free some space and call again") from error
        self.answers.append([str(cell) for cell in cells])

    def undo(self) -> list[str]:
        last = self.answers.pop()
        self._rewrite()
        return last

    @property
    def next_pair(self) -> int:
        return 1 + max((int(row[0]) for row in self.answers), default=-1)


# ---- the pairs: they follow from (checkpoint, seed, number) ----


@torch.no_grad()
def sample_pairs(gpt, prompts: list[Prompt], tokenizer, cfg: LabelConfig, block: int) -> list[tuple[str, str, str]]:
    """Pairs block * BLOCK and so on: (prompt, first, second). Both are drawn alike, so which is first is random. An
    answer that was cut off, or that no model could read again, is no answer: "" in its place."""
    device = next(gpt.parameters()).device
    rows = [prompts[i] for i in batch_indices(len(prompts), BLOCK, block, cfg.seed)]
    tokens, prompt_lens = pad_rows([row.tokens for row in rows for _ in range(2)], tokenizer.pad_id, device)
    generator = make_generator(device, cfg.seed, "label", block)
    tokens, mask = generate(gpt, tokens, prompt_lens, cfg.max_new_tokens, tokenizer.eos_id, generator)
    texts = decode_responses(tokenizer, tokens, mask)
    for i, ended in enumerate(has_ended(tokens, mask, tokenizer.eos_id).tolist()):
        again = len(rows[i // 2].tokens) + len(encode_response(tokenizer, texts[i]))
        if not ended or again > gpt.config.block_size:
            texts[i] = ""
    return [(row.text, *texts[2 * i : 2 * i + 2]) for i, row in enumerate(rows)]


def pairs_from(number: int, *source) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(number, pair) from the given number on, without pairs that leave nothing to choose."""
    block, pairs, idle = None, [], 0
    while idle < PATIENCE:
        if number // BLOCK != block:
            block = number // BLOCK
            pairs = sample_pairs(*source, block)
        prompt, first, second = pairs[number % BLOCK]
        idle += 1
        if first and second and first != second:
            idle = 0
            yield number, (prompt, first, second)
        number += 1
    raise InputError(f"the last {PATIENCE} pairs left nothing to choose: both answers were the same, or one was cut "
                     f"off; give a larger --max-new-tokens, or another --checkpoint")


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


class Agreement:
    """How often a reward model makes the same choice, over the file; nothing without a reward model."""

    def __init__(self, reward_model, tokenizer):
        self.reward_model, self.tokenizer, self.known = reward_model, tokenizer, {}

    @torch.no_grad()
    def agrees(self, row: list[str]) -> bool:
        _, prompt, chosen, rejected, _ = row
        if tuple(row) not in self.known:
            ids = self.tokenizer.encode(prompt)
            device = next(self.reward_model.parameters()).device
            tokens, lengths = pad_rows([ids + encode_response(self.tokenizer, side) for side in (chosen, rejected)],
                                       self.tokenizer.pad_id, device)
            fits = tokens.size(1) <= self.reward_model.gpt.config.block_size  # too long to read: no
            scores = self.reward_model(tokens, lengths) if fits else (0, 0)
            self.known[tuple(row)] = bool(scores[0] > scores[1])
        return self.known[tuple(row)]

    def __call__(self, answers: list[list[str]]) -> str:
        decided = [row for row in answers if row[4] in ("first", "second")]
        text = f"{len(answers)} answered, {len(decided)} of them with a choice"
        if self.reward_model is not None and decided:
            text += f"; the reward model agrees with {sum(map(self.agrees, decided)) / len(decided):.0%}"
        return text


def main(cfg: LabelConfig) -> None:
    device = pick_device(cfg.device)
    path = Path(cfg.checkpoint)
    gpt, checkpoint = load_policy(path, "sft", "ppo")
    data = cfg.data or checkpoint["config"]["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)
    prompts = load_prompts(data, tokenizer, gpt.config.block_size - cfg.max_new_tokens)
    reward_model = find_reward_model(cfg.reward, path, tokenizer, device)
    judge = judge_of(cfg.data, data) if cfg.annotator == "judge" else None
    if cfg.annotator == "judge" and judge is None:
        raise InputError(f"--annotator judge: {data} has no judge.py")
    file, agreement = AnswerFile(Path(cfg.out)), Agreement(reward_model, tokenizer)
    if file.answers:
        print(f"{cfg.out}: going on after {agreement(file.answers)}")

    source = gpt.to(device), prompts, tokenizer, cfg
    pairs = pairs_from(file.next_pair, *source)
    while not cfg.count or len(file.answers) < cfg.count:
        number, (prompt, first, second) = next(pairs)
        if cfg.annotator == "judge":
            answer = judge_answer(judge, prompt, first, second, random.Random(f"{cfg.seed} vote {number}"))
        else:
            answer = ask(prompt, first, second)
        if answer == "quit":
            break
        if answer == "undo":
            if file.answers:
                number = int(file.undo()[0])
            pairs = pairs_from(number, *source)
            continue
        chosen, rejected = (second, first) if answer == "second" else (first, second)
        file.append(number, prompt, chosen, rejected, answer)
        if cfg.annotator == "person" or len(file.answers) % 500 == 0:
            print(agreement(file.answers), flush=True)
    print(f"{cfg.out}: {agreement(file.answers)}; next: python train_reward.py --comparison-files {cfg.out}")


if __name__ == "__main__":
    run(main, LabelConfig)
