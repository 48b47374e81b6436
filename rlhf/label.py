"""A person at the keyboard: which of two answers is better?

    python -m rlhf.label --checkpoint runs/sft.pt --out my_comparisons.csv
    python train_reward.py --comparison-files my_comparisons.csv

Shows a prompt and two sampled answers in random order and takes one key. Each answer is a line of the file at once, so
that a kill loses at most the answer that is being typed; a second call goes on where the first stopped.

    my_comparisons.csv    Pair, Prompt, Chosen, Rejected, Answer

Pair numbers the pairs that have been shown; it and --seed say which prompt and which samples. Answer is first, second,
tie or skip; of a tie or a skip, Chosen and Rejected are the first and the second, and no reward model learns from it.

--annotator judge lets the data set's judge.py answer: simulated feedback, or AI feedback where the judge is a model
(RLAIF, Bai et al. 2022). Where the judge knows its annotators' noise, it votes with that noise.
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

from rlhf.checkpoints import load_policy, load_reward_model, tokenizer_of
from rlhf.cli import arg, check_not_negative, check_positive, run
from rlhf.common import InputError, check_tokenizer, make_generator, pick_device
from rlhf.data import Prompt, batch_indices, encode_response, gold_scores, load_judge, load_prompts, pad_rows
from rlhf.evaluate import decode_responses
from rlhf.rollout import generate

COLUMNS = ("Pair", "Prompt", "Chosen", "Rejected", "Answer")
KEYS = {"1": "first", "2": "second", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
BLOCK = 16  # pairs sampled at once


@dataclass(frozen=True)
class LabelConfig:
    """Compare pairs of sampled answers, and keep what was chosen."""

    checkpoint: str = arg("runs/sft.pt", "whose answers: an sft.pt or ppo.pt")
    out: str = arg("my_comparisons.csv", "where the comparisons go; what it holds is kept and gone on from")
    annotator: str = arg("person", "who answers: a person at the keyboard, or the data set's judge.py",
                         ("person", "judge"))
    count: int = arg(0, "stop when the file holds so many answers; 0: go on until you quit")
    data: str = arg("", "data set folder; empty: the one of the checkpoint")
    reward: str = arg("", "reward model to compare with; empty: reward.pt beside the checkpoint, if there is one")
    max_new_tokens: int = arg(40, "longest answer in tokens")
    device: str = arg("auto", "where to run; auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "of the prompts, the samples and the order in which two answers are shown")

    def __post_init__(self):
        check_positive(self, "max_new_tokens")
        check_not_negative(self, "count")
        if self.annotator == "judge" and not self.count:
            raise ValueError("--annotator judge never tires: say with --count how many answers to take")


# ---- the file: one line an answer, whole or not at all ----


class AnswerFile:
    """The answers so far. `append` is on the disk when it returns; `undo` cuts the last one off again."""

    def __init__(self, path: Path):
        self.path, self.rows, self.ends = path, [], []  # ends: where each row ends, in bytes
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._line(COLUMNS))
        text = path.read_bytes()
        whole = self._records(text)
        for record in whole:
            self.rows += csv.reader(io.StringIO(record.decode("utf-8", errors="replace"), newline=""))
            self.ends.append((self.ends[-1] if self.ends else 0) + len(record))
        if not self.rows or tuple(self.rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in self.rows):
            raise InputError(f"{path} is not a file of this program, whose header is {','.join(COLUMNS)}; give another "
                             f"--out")
        if self.ends[-1] < len(text):  # a kill in the middle of a line
            os.truncate(path, self.ends[-1])

    @staticmethod
    def _line(cells) -> bytes:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
        return line.getvalue().encode("utf-8")

    @staticmethod
    def _records(text: bytes) -> list[bytes]:
        """The complete records: a line break inside quotes, where their number so far is odd, ends none."""
        records, begun = [], b""
        for line in text.splitlines(keepends=True):
            begun += line
            if line.endswith(b"\n") and begun.count(b'"') % 2 == 0:
                records.append(begun)
                begun = b""
        return records

    def append(self, *cells) -> None:
        line = self._line(cells)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append([str(cell) for cell in cells])
        self.ends.append(self.ends[-1] + len(line))

    def undo(self) -> list[str]:
        self.ends.pop()
        os.truncate(self.path, self.ends[-1])
        return self.rows.pop()

    @property
    def answers(self) -> list[list[str]]:
        return self.rows[1:]

    @property
    def next_pair(self) -> int:
        return 1 + max((int(row[0]) for row in self.answers), default=-1)


# ---- the pairs: they follow from (seed, number) alone ----


@torch.no_grad()
def sample_pairs(gpt, prompts: list[Prompt], tokenizer, cfg: LabelConfig, block: int) -> list[tuple[str, str, str]]:
    """Pairs block * BLOCK and so on: (prompt, first, second). Both are drawn alike, so which is first is random."""
    device = next(gpt.parameters()).device
    rows = [prompts[i] for i in batch_indices(len(prompts), BLOCK, block, cfg.seed)]
    tokens, prompt_lens = pad_rows([row.tokens for row in rows for _ in range(2)], tokenizer.pad_id, device)
    generator = make_generator(device, cfg.seed, "label", block)
    sampled = generate(gpt, tokens, prompt_lens, cfg.max_new_tokens, tokenizer.eos_id, generator)
    texts = decode_responses(tokenizer, *sampled)
    return [(row.text, *texts[2 * i : 2 * i + 2]) for i, row in enumerate(rows)]


def pairs_from(number: int, *source) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(number, pair) from the given number on, without pairs that leave nothing to choose."""
    block, pairs = None, []
    while True:
        if number // BLOCK != block:
            block = number // BLOCK
            pairs = sample_pairs(*source, block)
        prompt, first, second = pairs[number % BLOCK]
        if first and second and first != second:
            yield number, (prompt, first, second)
        number += 1


# ---- who answers ----


def read_key() -> str:
    """One key from the terminal, without Enter where the terminal can do that; otherwise the first letter of a line."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()[:1].lower() or "q"
    try:
        import termios
        import tty
    except ImportError:  # Windows
        import msvcrt

        return msvcrt.getwch().lower()
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
    """The judge's vote: with its annotators' noise where it knows that, else for the higher gold."""
    a, b = gold_scores(judge, [prompt] * 2, [first, second])
    if hasattr(judge, "preference_probability"):
        return "first" if rng.random() < judge.preference_probability(a, b) else "second"
    return "tie" if a == b else "first" if a > b else "second"


class Agreement:
    """How often a reward model would have chosen the same, over the answers in the file; nothing without one."""

    def __init__(self, reward_model, tokenizer):
        self.reward_model, self.tokenizer, self.known = reward_model, tokenizer, {}

    @torch.no_grad()
    def agrees(self, row: list[str]) -> bool:
        pair, prompt, chosen, rejected, _ = row
        if pair not in self.known:
            ids = self.tokenizer.encode(prompt)
            device = next(self.reward_model.parameters()).device
            scores = self.reward_model(*pad_rows([ids + encode_response(self.tokenizer, side)
                                                  for side in (chosen, rejected)], self.tokenizer.pad_id, device))
            self.known[pair] = bool(scores[0] > scores[1])
        return self.known[pair]

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
    judge, reward_model = load_judge(data), None
    if cfg.annotator == "judge" and judge is None:
        raise InputError(f"--annotator judge: {data} has no judge.py")
    reward_path = Path(cfg.reward or path.with_name("reward.pt"))
    if cfg.reward or reward_path.is_file():
        reward_model, reward = load_reward_model(reward_path)
        check_tokenizer(reward_path, reward, tokenizer)
        reward_model.to(device)
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
