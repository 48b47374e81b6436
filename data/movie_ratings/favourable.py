"""A classifier as the reward: how likely it is that people rate a sentence above zero.

    python train_ppo.py --data data/movie_ratings --reward data/movie_ratings/favourable.py \\
        --max-new-tokens 4 16 --missing-eos-score none

    score(text) = log sigmoid(b + sum over its features of weight(f) * x(f))

Logistic regression on the words and pairs of words of linear.py, fitted to ratings.csv when the
first responses are scored, which takes some seconds. The judge learns from whole reviews instead.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
# This folder's linear.py, and rlhf, from a plain checkout.
sys.path += [str(FOLDER), str(FOLDER.parents[1])]

import linear

from rlhf.run.judge import share_positive
from rlhf.run.tables import read_csv

DECAY = 3e-5  # L2 penalty on the weights, as in linear.py


class Classifier(NamedTuple):
    idf: dict[str, float]
    weight: Tensor  # (features, 1)
    bias: Tensor  # ()

    def logits(self, texts: list[str]) -> Tensor:
        """(N,)"""
        return linear.score(linear.count_words(texts, self.idf), self.weight) + self.bias


def fit(texts: list[str], favourable: Tensor) -> Classifier:
    """favourable (N,) bool."""
    idf = linear.count_features(texts)
    words = linear.count_words(texts, idf)
    weight = torch.zeros(len(idf), 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = linear.score(words, weight) + bias
        penalty = DECAY * (weight**2).sum()
        loss = F.binary_cross_entropy_with_logits(logits, favourable.double()) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return Classifier(idf, weight.detach(), bias.detach())


def read_ratings(name: str) -> tuple[list[str], Tensor]:
    """The sentences of a file of prepare.py, and whether people's mean is above zero, (N,)."""
    table = read_csv(FOLDER / name, ("Response", "Gold"))
    return table["Response"].tolist(), torch.tensor(table["Gold"].astype(float).to_numpy()) > 0


@functools.cache
def classifier() -> Classifier:
    return fit(*read_ratings("ratings.csv"))


def score(prompts, responses):
    """log p(favourable) of the review so far, prompt and response."""
    openings = [prompt.removeprefix("Review:").strip() for prompt in prompts]
    texts = [f"{opening} {response}" for opening, response in zip(openings, responses)]
    return F.logsigmoid(classifier().logits(texts)).tolist()


if __name__ == "__main__":
    sentences, favourable = read_ratings("ratings_heldout.csv")
    margins = torch.where(favourable, 1, -1) * classifier().logits(sentences)
    print(f"held out: {share_positive(margins):.3f} of {len(sentences):,} sentences")
