"""A linear reward model: how harmless the words of a response are, whatever the prompt is.

    cp data/hh_rlhf/harmless.py long        # beside the comparisons.csv that it learns from
    python train_ppo.py --data hh --out runs/hh --reward runs/hh/reward.pt long/harmless.py

    score(response) = (weights . tfidf(response) - mean) / std

The weights are those of a Bradley-Terry model: a response is preferred with probability
sigmoid(weights . (tfidf(chosen) - tfidf(rejected))). It is fitted to the comparisons.csv beside
this file when it is loaded. Mean and std are those of the responses there. scikit-learn comes with
the judge's package.
"""

from pathlib import Path

import numpy as np

from rlhf.run.errors import InputError
from rlhf.run.tables import read_csv

try:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
except ImportError as error:
    raise InputError("this reward needs a package: pip install scikit-learn") from error

PAIRS = read_csv(Path(__file__).with_name("comparisons.csv"), ("Chosen", "Rejected"))
CHOSEN, REJECTED = list(PAIRS["Chosen"]), list(PAIRS["Rejected"])


def fit() -> tuple[TfidfVectorizer, np.ndarray]:
    """The words, and their weights (V,)."""
    vectorizer = TfidfVectorizer(min_df=3).fit(CHOSEN + REJECTED)
    chosen, rejected = vectorizer.transform(CHOSEN), vectorizer.transform(REJECTED)
    differences = (chosen - rejected).toarray()  # (N, V)
    # Each pair in both orders, so that there is no intercept. C is the inverse of the L2 penalty.
    model = LogisticRegression(C=0.3, fit_intercept=False, max_iter=1000)
    model.fit(np.concatenate([differences, -differences]), np.repeat([1, 0], len(CHOSEN)))
    return vectorizer, model.coef_[0]


VECTORIZER, WEIGHTS = fit()


def raw_scores(responses: list[str]) -> np.ndarray:
    return VECTORIZER.transform(responses) @ WEIGHTS  # (N,)


RAW = raw_scores(CHOSEN + REJECTED)


def score(prompts, responses):
    return ((raw_scores(responses) - RAW.mean()) / RAW.std()).tolist()
