"""A second yardstick: what the other half of the raters would say, by a pretrained model's features.

    python data/movie_ratings/people.py --model gemma-3-270m --reward runs/gemma/reward.pt \\
        --samples runs/gemma/ppo_samples.csv

The reward model learns from the voters. This one learns from the raters who are never voters, as the gold reward model
of Gao, Schulman and Hilton (2022) stands for people. If PPO finds errors of the first, the second need not share them.

    people(text) = w . x(text) + b      x: the last and the mean hidden state of the model, as it was published
    w, b        ridge regression on the mean rating of each training sentence by the other half (ratings.csv)

The penalty is chosen on a tenth of the training sentences. Printed: how well it orders held-out sentences, what the
reward model does there, and the means of the responses before and after PPO.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # rlhf, from a plain checkout

from rlhf.data import encode_response, pad_rows
from rlhf.extras import hf
from rlhf.extras.yardsticks import share_positive
from rlhf.support.checkpoints import load_reward_model
from rlhf.support.cli import arg, check_not_negative, run
from rlhf.support.tables import check_file, csv_path, read_csv, ticker

PENALTIES = [10.0**power for power in range(-1, 6)]


@dataclass(frozen=True)
class PeopleConfig:
    """Fit the second yardstick, test it on held-out sentences, and judge PPO's responses with it."""

    model: str = arg("gemma-3-270m", "what train_sft.py --init was given: a folder or a name")
    data: str = arg(str(FOLDER), "data set folder")
    sentences: int = arg(0, "training sentences to use, at random (0: all)")
    reward: str = arg("", "reward model to compare with on the held-out sentences")
    samples: tuple[str, ...] = arg((), "ppo_samples.csv files to judge")

    def __post_init__(self):
        check_not_negative(self, "sentences")


def encode(rows: list[tuple[str, str]], tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt) + encode_response(tokenizer, response) for prompt, response in rows]


@torch.no_grad()
def in_batches(read, rows: list[list[int]], pad_id: int, what: str) -> Tensor:
    """read(tokens (B, T), lengths (B,)) -> (B, ...) of all rows, 64 rows of similar length at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [read(*pad_rows([rows[i] for i in order[at : at + 64]], pad_id, torch.device("cpu")))
             for at in ticker(range(0, len(rows), 64), f"{what}, batch")]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def features(gpt: hf.HF, tokens: Tensor, lengths: Tensor) -> Tensor:
    """tokens (B, T), lengths (B,) -> (B, 2C) in float64: hidden states at the last token, and their mean."""
    hidden = gpt.hidden(tokens).double()  # (B, T, C)
    real = torch.arange(tokens.size(1)) < lengths.unsqueeze(1)  # (B, T)
    mean = torch.where(real.unsqueeze(2), hidden, 0.0).sum(dim=1) / lengths.unsqueeze(1)  # (B, C)
    return torch.cat([hidden[torch.arange(len(tokens)), lengths - 1], mean], dim=1)


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Weights (F,) that minimise |x w - y|^2 + penalty |w|^2: x (N, F) and y (N,), both centred."""
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.size(1), dtype=x.dtype), x.T @ y)


def fit(x: Tensor, y: Tensor):
    """(N, F), (N,) -> a function (M, F) -> (M,). The penalty is the best on the last tenth, after fitting the rest."""
    mean, std, centre = x.mean(dim=0), x.std(dim=0), y.mean()
    x, y = (x - mean) / std, y - centre
    held = len(x) // 10
    errors = {penalty: (x[-held:] @ ridge(x[:-held], y[:-held], penalty) - y[-held:]).square().mean().item()
              for penalty in PENALTIES}
    weight = ridge(x, y, min(errors, key=errors.get))
    return lambda new: (new - mean) / std @ weight + centre


def main(cfg: PeopleConfig) -> None:
    gpt = hf.HF(hf.HFConfig(cfg.model, rank=0, four_bit=False, kept=()))
    tokenizer = gpt.tokenizer

    def read(rows: list[tuple[str, str]], what: str) -> Tensor:
        return in_batches(lambda *batch: features(gpt, *batch), encode(rows, tokenizer), tokenizer.pad_id, what)

    columns = ("Prompt", "Response", "Gold")
    train = read_csv(csv_path(cfg.data, "ratings"), columns)
    train = train.sample(frac=1, random_state=0)[: cfg.sentences or None]  # the source has favourable sentences first
    heldout = read_csv(csv_path(cfg.data, "ratings", heldout=True), columns)
    people = fit(read(list(zip(train["Prompt"], train["Response"])), "training sentences"),
                 torch.tensor(train["Gold"].astype(float).tolist(), dtype=torch.float64))
    rows = list(zip(heldout["Prompt"], heldout["Response"]))
    gold = torch.tensor(heldout["Gold"].astype(float).tolist())  # (N,)
    pairs = read_csv(csv_path(cfg.data, "comparisons", heldout=True), ("Chosen", "Rejected"))
    number = {text: i for i, text in enumerate(heldout["Response"])}
    chosen, rejected = (torch.tensor(pairs[side].map(number).tolist()) for side in ("Chosen", "Rejected"))

    readers = {"people.py": people(read(rows, "held-out sentences"))}
    if cfg.reward:
        model, _ = load_reward_model(Path(cfg.reward))
        own = model.gpt.tokenizer
        readers["reward model"] = in_batches(model, encode(rows, own), own.pad_id, "reward model")
    print(f"{len(train):,} training sentences. Held out: correlation with people's mean ({len(rows):,}), share of the "
          f"clear pairs in its order ({len(pairs):,})")
    for name, scores in readers.items():
        r = torch.corrcoef(torch.stack([scores.double(), gold.double()]))[0, 1]
        print(f"    {name:12}  {r:.3f}  {share_positive(scores[chosen] - scores[rejected]):.3f}")

    for path in map(Path, cfg.samples):
        table = pandas.read_csv(check_file(path), dtype=str, keep_default_na=False)
        before, after = (people(read(list(zip(table["Prompt"], table[side])), side)) for side in ("Before", "After"))
        gain = after - before
        print(f"{path}: {len(table)} prompts, people's mean by people.py {before.mean():+.3f} before, "
              f"{after.mean():+.3f} after; gain {gain.mean():+.3f}, standard error {gain.std() / len(gain)**0.5:.3f}; "
              f"wins {share_positive(gain):.3f}")


if __name__ == "__main__":
    run(main, PeopleConfig)
