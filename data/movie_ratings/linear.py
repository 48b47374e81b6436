"""What a reward model has to beat: a linear one on word counts, fitted to the same votes with the same loss.

    python data/movie_ratings/linear.py        # after prepare.py; prints the share of held-out pairs in gold's order

    score(text) = sum over its features of weight(f) * x(f),     x(f) = idf(f) / norm of the text's idfs
    idf(f)      = 1 + log(texts / texts that hold f)

A feature is a word or a pair of neighbouring words, as in judge.py, that two training texts or more hold. The weights
minimise the mean of -log sigmoid(score(chosen) - score(rejected)) + decay * sum of weight(f)^2.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
sys.path += [str(FOLDER), str(FOLDER.parents[1])]  # this folder's judge.py, and rlhf, from a plain checkout

from judge import features

from rlhf.support.cli import InputError, arg, check_not_negative, run
from rlhf.support.tables import csv_path, read_csv
from rlhf.losses import bradley_terry_loss


@dataclass(frozen=True)
class LinearConfig:
    """Fit a linear Bradley-Terry model on word counts to comparisons.csv; test it on comparisons_heldout.csv."""

    data: str = arg(str(FOLDER), "data set folder")
    decay: float = arg(3e-5, "L2 penalty on the weights")

    def __post_init__(self):
        check_not_negative(self, "decay")


def count_features(texts: list[str]) -> dict[str, float]:
    """{feature: idf} over these texts, for the features of two of them or more."""
    counts = Counter(feature for text in texts for feature in features(text))
    return {feature: 1 + math.log(len(texts) / n) for feature, n in sorted(counts.items()) if n > 1}


def count_words(texts: list[str], idf: dict[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """The x(f) of all texts in one row, as F.embedding_bag takes them: numbers of features in the order of idf, where
    each text's begin (N,), and x. A text without a known feature has none."""
    number = {feature: i for i, feature in enumerate(idf)}
    known = [sorted(feature for feature in features(text) if feature in idf) for text in texts]
    norms = [math.sqrt(sum(idf[feature] ** 2 for feature in row)) for row in known]
    indices = torch.tensor([number[feature] for row in known for feature in row], dtype=torch.long)
    x = torch.tensor([idf[feature] / norm for row, norm in zip(known, norms) for feature in row], dtype=torch.float64)
    ends = torch.tensor([len(row) for row in known]).cumsum(0)  # (N,)
    return indices, torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]]), x


def score(words: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
    """What count_words gave, weights (features, 1) -> scores (N,)."""
    indices, begins, x = words
    return F.embedding_bag(indices, weight, begins, mode="sum", per_sample_weights=x)[:, 0]


def fit(words: tuple[Tensor, Tensor, Tensor], chosen: Tensor, rejected: Tensor, decay: float) -> Tensor:
    """The weights (features, 1). chosen, rejected (N,): numbers of texts."""
    weight = torch.zeros(int(words[0].max()) + 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = score(words, weight)
        loss = bradley_terry_loss(scores[chosen], scores[rejected]) + decay * (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def main(cfg: LinearConfig) -> None:
    train, heldout = (read_csv(csv_path(cfg.data, "comparisons", heldout), ("Chosen", "Rejected"))
                      for heldout in (False, True))
    texts = sorted({*train["Chosen"], *train["Rejected"]})
    number = {text: i for i, text in enumerate(texts)}
    idf = count_features(texts)
    if not idf:
        raise InputError(f"{cfg.data}: no word of comparisons.csv comes in two texts; there is nothing to learn")
    print(f"{len(train):,} comparisons of {len(texts):,} texts, {len(idf):,} features")
    sides = (torch.tensor(train[side].map(number).tolist()) for side in ("Chosen", "Rejected"))
    weight = fit(count_words(texts, idf), *sides, cfg.decay)
    chosen, rejected = (score(count_words(heldout[side].tolist(), idf), weight) for side in ("Chosen", "Rejected"))
    right = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()
    print(f"held out: {right:.3f} of {len(heldout):,} comparisons in gold's order")


if __name__ == "__main__":
    run(main, LinearConfig)
