"""What a reward model has to beat: a linear one on word counts, fitted to the same votes with the
same loss.

    python data/movie_ratings/linear.py     # after prepare.py; prints the share of held-out pairs
                                            # in gold's order

    score(text) = sum over its features of weight(f) * x(f)
    x(f)        = idf(f) / norm of the text's idfs
    idf(f)      = 1 + log(texts / texts that hold f)

A feature is a word or a pair of neighbouring words, as in judge.py, that two training texts or more
hold. The weights minimise the mean of -log sigmoid(score(chosen) - score(rejected)) + decay * sum
of weight(f)^2.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
# This folder's judge.py, and rlhf, from a plain checkout.
sys.path += [str(FOLDER), str(FOLDER.parents[1])]

from judge import features

from rlhf.losses import bradley_terry_loss
from rlhf.run.errors import InputError
from rlhf.run.files import csv_path
from rlhf.run.flags import arg
from rlhf.run.judge import share_positive
from rlhf.run.program import run
from rlhf.run.tables import read_csv


@dataclass(frozen=True)
class LinearConfig:
    """Fit a linear Bradley-Terry model on word counts to comparisons.csv; test it on
    comparisons_heldout.csv."""

    data: str = arg(str(FOLDER), "data set folder")
    decay: float = arg(3e-5, "L2 penalty on the weights")


class Words(NamedTuple):
    """The x(f) of N texts in one row, as F.embedding_bag takes them."""

    indices: Tensor  # (n,): numbers of features
    begins: Tensor  # (N,): where each text's features begin
    x: Tensor  # (n,)


def count_features(texts: list[str]) -> dict[str, float]:
    """{feature: idf} over these texts, for the features of two of them or more."""
    counts = Counter()
    for text in texts:
        counts.update(features(text))
    idf = {}
    for feature, count in sorted(counts.items()):
        if count > 1:
            idf[feature] = 1 + math.log(len(texts) / count)
    return idf


def count_words(texts: list[str], idf: dict[str, float]) -> Words:
    """The features of the texts, numbered in the order of idf. A text without a known feature has
    none."""
    number = {feature: i for i, feature in enumerate(idf)}
    indices = []
    begins = []
    x = []
    for text in texts:
        begins.append(len(indices))
        known = sorted(feature for feature in features(text) if feature in idf)
        norm = math.sqrt(sum(idf[feature] ** 2 for feature in known))
        for feature in known:
            indices.append(number[feature])
            x.append(idf[feature] / norm)
    return Words(
        torch.tensor(indices, dtype=torch.long),
        torch.tensor(begins, dtype=torch.long),
        torch.tensor(x, dtype=torch.float64),
    )


def score(words: Words, weight: Tensor) -> Tensor:
    """Words of N texts, weights (features, 1) -> scores (N,)."""
    sums = F.embedding_bag(
        words.indices, weight, words.begins, mode="sum", per_sample_weights=words.x
    )  # (N, 1)
    return sums[:, 0]


def fit(words: Words, chosen: Tensor, rejected: Tensor, decay: float) -> Tensor:
    """The weights (features, 1). chosen, rejected (N,): numbers of texts."""
    count = int(words.indices.max()) + 1
    weight = torch.zeros(count, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = score(words, weight)
        penalty = decay * (weight**2).sum()
        loss = bradley_terry_loss(scores[chosen], scores[rejected]) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def numbers_of(column: pandas.Series, number: dict[str, int]) -> Tensor:
    return torch.tensor(column.map(number).tolist())


def main(cfg: LinearConfig) -> None:
    sides = ("Chosen", "Rejected")
    train = read_csv(csv_path(cfg.data, "comparisons"), sides)
    heldout = read_csv(csv_path(cfg.data, "comparisons", heldout=True), sides)
    texts = sorted({*train["Chosen"], *train["Rejected"]})
    idf = count_features(texts)
    if not idf:
        raise InputError(
            f"{cfg.data}: no word of comparisons.csv comes in two texts; there is nothing to learn"
        )
    print(f"{len(train):,} comparisons of {len(texts):,} texts, {len(idf):,} features")
    number = {text: i for i, text in enumerate(texts)}
    chosen = numbers_of(train["Chosen"], number)
    rejected = numbers_of(train["Rejected"], number)
    weight = fit(count_words(texts, idf), chosen, rejected, cfg.decay)

    chosen_scores = score(count_words(heldout["Chosen"].tolist(), idf), weight)
    rejected_scores = score(count_words(heldout["Rejected"].tolist(), idf), weight)
    share = share_positive(chosen_scores - rejected_scores)
    print(f"held out: {share:.3f} of {len(heldout):,} comparisons in gold's order")


if __name__ == "__main__":
    run(main, LinearConfig)
