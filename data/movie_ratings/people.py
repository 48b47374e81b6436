"""A second judge: what the other half of the raters would say, by a pretrained model's
features.

    python data/movie_ratings/people.py --model gemma-3-270m --reward runs/gemma/reward.pt \\
        --samples runs/gemma/ppo_samples.csv

The reward model learns from the voters. This one learns from the raters who are never voters, as
the gold reward model of Gao, Schulman and Hilton (2022) stands for people. If PPO exploits errors
of the first, the second need not share them.

    people(text) = w . x(text) + b      x: the last and the mean hidden state of the model, as it
                                        was published
    w, b        ridge regression on the mean rating of each training sentence by the other half
                (ratings.csv)

The penalty is chosen on a tenth of the training sentences. Printed: how well it orders held-out
sentences, what the reward model does there, and the means of the responses before and after PPO.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # rlhf, from a plain checkout

from rlhf.data import pad_rows
from rlhf.networks import hf
from rlhf.run.files import check_file, csv_path
from rlhf.run.flags import arg
from rlhf.run.judge import share_positive
from rlhf.run.loading import load_reward_model, tokenizer_of
from rlhf.run.program import run
from rlhf.run.progress import ticker
from rlhf.run.tables import read_csv

PENALTIES = [10.0**power for power in range(-1, 6)]
BATCH = 64  # texts read at once


@dataclass(frozen=True)
class PeopleConfig:
    """Fit the second judge, test it on held-out sentences, and judge PPO's responses with
    it."""

    model: str = arg("gemma-3-270m", "what train_sft.py --init was given: a folder or a name")
    data: str = arg(str(FOLDER), "data set folder")
    sentences: int = arg(0, "training sentences to use, at random (0: all)")
    reward: str = arg("", "reward model to compare with on the held-out sentences")
    samples: tuple[str, ...] = arg((), "ppo_samples.csv files to judge")


# ---- features ----


def encode(table: pandas.DataFrame, side: str, tokenizer) -> list[list[int]]:
    """The ids of each row's Prompt with the response in the column `side`."""
    rows = []
    for prompt, response in zip(table["Prompt"], table[side]):
        rows.append(tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response))
    return rows


@torch.no_grad()
def in_batches(read, rows: list[list[int]], pad_id: int, what: str) -> Tensor:
    """read(tokens (B, T), lengths (B,)) -> (B, ...) of all rows, BATCH rows of similar length at a
    time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = []
    for at in ticker(range(0, len(rows), BATCH), f"{what}, batch"):
        batch = [rows[i] for i in order[at : at + BATCH]]
        tokens, lengths = pad_rows(batch, pad_id, torch.device("cpu"))  # (B, T), (B,)
        parts.append(read(tokens, lengths))
    back = torch.tensor(order).argsort()
    return torch.cat(parts)[back]


def features(gpt: hf.HF, tokens: Tensor, lengths: Tensor) -> Tensor:
    """tokens (B, T), lengths (B,) -> (B, 2C) in float64: hidden states at the last token, and their
    mean."""
    hidden = gpt.hidden(tokens).double()  # (B, T, C)
    last = hidden[torch.arange(len(tokens)), lengths - 1]  # (B, C)
    real = torch.arange(tokens.size(1)) < lengths.unsqueeze(1)  # (B, T)
    sums = torch.where(real.unsqueeze(2), hidden, 0.0).sum(dim=1)  # (B, C)
    return torch.cat([last, sums / lengths.unsqueeze(1)], dim=1)


# ---- regression ----


class Regression(NamedTuple):
    """y = (x - mean) / std . weight + centre"""

    mean: Tensor  # (F,) of x
    std: Tensor  # (F,) of x
    centre: Tensor  # (), the mean of y
    weight: Tensor  # (F,)

    def predict(self, x: Tensor) -> Tensor:
        """(M, F) -> (M,)"""
        return (x - self.mean) / self.std @ self.weight + self.centre


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Weights (F,) that minimise |x w - y|^2 + penalty |w|^2: x (N, F) and y (N,), both centred."""
    identity = torch.eye(x.size(1), dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + penalty * identity, x.T @ y)


def fit(x: Tensor, y: Tensor) -> Regression:
    """Ridge regression of y (N,) on x (N, F), standardised. The penalty is the best on the last
    tenth, after fitting the rest."""
    mean = x.mean(dim=0)
    std = x.std(dim=0)
    centre = y.mean()
    x = (x - mean) / std
    y = y - centre
    held = len(x) // 10
    errors = {}
    for penalty in PENALTIES:
        weight = ridge(x[:-held], y[:-held], penalty)
        errors[penalty] = (x[-held:] @ weight - y[-held:]).square().mean().item()
    best = min(errors, key=errors.get)
    return Regression(mean, std, centre, ridge(x, y, best))


# ---- the judge of people, and what it is compared with ----


class People:
    """people(text): a pretrained model's features, and a regression on them once it is fitted."""

    def __init__(self, model: str):
        self.gpt = hf.HF(hf.HFConfig(model, rank=0, four_bit=False, kept=()))
        self.tokenizer = hf.HFTokenizer(model, "none")
        self.regression = None

    def read(self, table: pandas.DataFrame, side: str, what: str) -> Tensor:
        """The features of the responses in the column `side`, (N, 2C)."""
        rows = encode(table, side, self.tokenizer)

        def read_batch(tokens: Tensor, lengths: Tensor) -> Tensor:
            return features(self.gpt, tokens, lengths)

        return in_batches(read_batch, rows, self.tokenizer.pad_id, what)

    def fit(self, train: pandas.DataFrame) -> None:
        ratings = torch.tensor(numbers(train["Gold"]), dtype=torch.float64)  # (N,)
        self.regression = fit(self.read(train, "Response", "training sentences"), ratings)

    def score(self, table: pandas.DataFrame, side: str, what: str) -> Tensor:
        """(N,)"""
        return self.regression.predict(self.read(table, side, what))


def numbers(column: pandas.Series) -> list[float]:
    return column.astype(float).tolist()


def score_with(reward: Path, table: pandas.DataFrame, data: str) -> Tensor:
    """The reward model's scores of the responses, (N,). data: its data set folder."""
    model, checkpoint = load_reward_model(reward)
    tokenizer = tokenizer_of(reward, checkpoint, data)
    rows = encode(table, "Response", tokenizer)
    return in_batches(model, rows, tokenizer.pad_id, "reward model")


def print_heldout(
    scores: dict[str, Tensor], heldout: pandas.DataFrame, pairs: pandas.DataFrame
) -> None:
    """For each reader's scores of the held-out sentences (N,): correlation with people's mean, and
    share of the pairs in its order."""
    gold = torch.tensor(numbers(heldout["Gold"]))  # (N,)
    number = {text: i for i, text in enumerate(heldout["Response"])}
    chosen = torch.tensor(pairs["Chosen"].map(number).tolist())
    rejected = torch.tensor(pairs["Rejected"].map(number).tolist())
    for name, x in scores.items():
        r = torch.corrcoef(torch.stack([x.double(), gold.double()]))[0, 1]
        share = share_positive(x[chosen] - x[rejected])
        print(f"    {name:12}  {r:.3f}  {share:.3f}")


def print_gain(people: People, path: Path) -> None:
    """The means of the responses in a ppo_samples.csv, before and after PPO."""
    table = pandas.read_csv(check_file(path), dtype=str, keep_default_na=False)
    before = people.score(table, "Before", "Before")
    after = people.score(table, "After", "After")
    gain = after - before
    error = gain.std() / len(gain) ** 0.5
    means = f"{before.mean():+.3f} before, {after.mean():+.3f} after"
    gains = f"gain {gain.mean():+.3f}, standard error {error:.3f}; wins {share_positive(gain):.3f}"
    print(f"{path}: {len(table)} prompts, people's mean by people.py {means}; {gains}")


def main(cfg: PeopleConfig) -> None:
    people = People(cfg.model)
    columns = ("Prompt", "Response", "Gold")
    train = read_csv(csv_path(cfg.data, "ratings"), columns)
    # In random order, because the source has favourable sentences first.
    train = train.sample(frac=1, random_state=0)[: cfg.sentences or None]
    heldout = read_csv(csv_path(cfg.data, "ratings", heldout=True), columns)
    people.fit(train)
    pairs = read_csv(csv_path(cfg.data, "comparisons", heldout=True), ("Chosen", "Rejected"))

    scores = {"people.py": people.score(heldout, "Response", "held-out sentences")}
    if cfg.reward:
        scores["reward model"] = score_with(Path(cfg.reward), heldout, cfg.data)
    print(
        f"{len(train):,} training sentences. Held out: correlation with people's mean "
        f"({len(heldout):,}), share of the clear pairs in its order ({len(pairs):,})"
    )
    print_heldout(scores, heldout, pairs)
    for path in map(Path, cfg.samples):
        print_gain(people, path)


if __name__ == "__main__":
    run(main, PeopleConfig)
