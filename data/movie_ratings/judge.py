"""The gold score of the movie ratings: how much a text reads like a favourable review. A judge that
no stage has seen.

It learned from whole reviews, favourable and not (movie_reviews), none of which is in the language
model's text, and from no rating. So it is another opinion than the reward model's, and if PPO
drives the reward model's score up by something that is no praise, this one does not follow. It is a
plain reader all the same, who counts words and does not see how they hang together (README.md says
how far it agrees with people): trust its averages, not single verdicts.

    weight(f) = log (p + 10) / (P + 20) - log (n + 10) / (N + 20)
    score     = sum of the weights of the text's features / sqrt(how many of them have a weight);
                0 if none has

where p of the P favourable reviews hold f, and n of the N others. A feature is a word or a pair of
neighbouring words, and counts once however often it comes: praise repeated is not more praise.
Divided by their number, the weights would make one lone "outstanding" the best review of all, and
undivided the longest text; the square root lies between. Of the rated sentences 98 in a hundred
score between -0.6 and +1.0.

The prompt counts: the raters read whole sentences, and in "Review: it is not" | "funny" the opening
decides.

prepare.py fits the weights and writes them to judge_weights.csv, beside a copy of this file.
"""

import csv
import functools
import math
import re
from pathlib import Path


def features(text: str) -> set[str]:
    """The words and the pairs of neighbouring words.

    >>> sorted(features("It's good, good!"))
    ['good', 'good good', "it's", "it's good"]
    """
    words = re.findall(r"[a-z0-9']+", text.lower())
    pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
    return {*words, *pairs}


def score_text(text: str, weights: dict[str, float]) -> float:
    """The formula above. fsum, because the order of a set changes from run to run, and a plain sum
    with it."""
    known = [weights[feature] for feature in features(text) if feature in weights]
    return math.fsum(known) / math.sqrt(len(known)) if known else 0.0


@functools.cache
def load_weights() -> dict[str, float]:
    path = Path(__file__).with_name("judge_weights.csv")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run `python data/movie_ratings/prepare.py`, which makes it"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows)  # the header
        return {feature: float(weight) for feature, weight in rows}


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Gold scores, one for each (prompt, response) pair."""
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts but {len(responses)} responses: they come in pairs"
        )
    weights = load_weights()
    scores = []
    for prompt, response in zip(prompts, responses):
        opening = prompt.removeprefix("Review:")
        scores.append(score_text(f"{opening} {response}", weights))
    return scores
