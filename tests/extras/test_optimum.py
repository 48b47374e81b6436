"""The optimum of the KL-regularised objective and best-of-n, compared with fractions."""

import math

import pytest
import torch

from rlhf.extras.optimum import best_of_n, best_of_n_kl, matching_n, optimum
from tests.helpers import f64

LN2, LN3 = math.log(2), math.log(3)


def test_optimum_matches_hand_computation():
    """kl_coef is 2 and the scores are 2 ln 3, 0, 0, 0: exp(score / 2) is 3, 1, 1, 1 with mean 3/2, so J* = 2 ln(3/2).
    The weights are 1/2 and three times 1/6: score ln 3, KL = 1/2 ln 2 + 1/2 ln(2/3) = ln 2 - 1/2 ln 3, and
    score - 2 KL = 2 ln 3 - 2 ln 2. ess = 1 / (1/4 + 3/36) = 3.

    The second prompt has the score 5 four times. There is nothing to gain: J* = 5, KL 0, ess 4."""
    got = optimum(f64([2 * LN3, 0, 0, 0], [5, 5, 5, 5]), kl_coef=2.0)
    expected = {"objective": [2 * LN3 - 2 * LN2, 5], "score": [LN3, 5], "kl_ref": [LN2 - LN3 / 2, 0], "ess": [3, 4]}
    for name, values in expected.items():
        torch.testing.assert_close(got[name], f64(*values), msg=name)


def test_optimum_without_kl_penalty_is_the_best_samples():
    """With kl_coef 0 and scores 1, 4, 4, 2 they are the two fours: score 4, KL = log(4 / 2), ess 2. The KL costs
    nothing, so J* = 4."""
    got = optimum(f64([1, 4, 4, 2]), kl_coef=0.0)
    assert got.pop("weights").tolist() == [[0, 0.5, 0.5, 0]]
    assert {name: value.item() for name, value in got.items()} == pytest.approx(
        {"objective": 4, "score": 4, "kl_ref": LN2, "ess": 2})


def test_optimum_is_above_every_other_reweighting():
    """Weights w have J = sum w s - beta sum w log(N w). No other w has a higher J than the optimum."""
    torch.manual_seed(0)
    scores = torch.randn(1, 6, dtype=torch.float64)
    best = optimum(scores, 0.7)["objective"].item()
    for _ in range(200):
        w = torch.softmax(3 * torch.randn(6, dtype=torch.float64), dim=0)
        assert (w * scores[0]).sum() - 0.7 * (w * (6 * w).log()).sum() < best


def test_best_of_n_matches_hand_computation():
    """Scores 1, 3, 2 and n = 2: the best of the three pairs are 3, 3, 2, so the expected score is 8/3. Their values are
    10, 10, 30, with mean 50/3. n = 1 is the mean and n = 3 the maximum."""
    scores, values = f64([1, 3, 2]), f64([20, 10, 30])
    for n, score, value in ((1, 2, 20), (2, 8 / 3, 50 / 3), (3, 3, 10)):
        assert best_of_n(scores, scores, n).item() == pytest.approx(score, rel=1e-12)
        assert best_of_n(scores, values, n).item() == pytest.approx(value, rel=1e-12)


def test_best_of_n_of_a_thousand_samples_is_finite():
    """Scores 1 to 1000, n = 256: the expected maximum is n (N + 1) / (n + 1) = 256 * 1001 / 257."""
    scores = torch.arange(1.0, 1001.0, dtype=torch.float64).unsqueeze(0)
    assert best_of_n(scores, scores, 256).item() == pytest.approx(256 * 1001 / 257, rel=1e-9)


def test_best_of_n_kl_and_matching_n_match_hand_computation():
    """log n - (n - 1) / n is 0 for n = 1 and ln 2 - 1/2 for n = 2. matching_n is the inverse, between 1 and the limit:
    ln 66 - 65/66 = 3.205, ln 65 - 64/65 = 3.190 and ln 67 - 66/67 = 3.220, so 66 is nearest to 3.2."""
    assert best_of_n_kl(1) == 0 and best_of_n_kl(2) == pytest.approx(LN2 - 0.5)
    assert [matching_n(kl, 256) for kl in (-1.0, 0.0, 0.2, 3.2, 99.0)] == [1, 1, 2, 66, 256]


def test_best_of_n_kl_is_that_of_its_distribution():
    """N equally likely responses have different scores, and n = 5 of them are drawn with replacement. Then
    P(best is rank i) = (i/N)^n - ((i-1)/N)^n. For large N its KL to the uniform distribution is log n - (n - 1) / n."""
    N, n = 100_000, 5
    i = torch.arange(1, N + 1, dtype=torch.float64)
    p = (i / N) ** n - ((i - 1) / N) ** n
    assert (p * (N * p).log()).sum().item() == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_optimum_and_best_of_n_reject_bad_arguments():
    with pytest.raises(ValueError, match="N at least 2"):
        optimum(torch.zeros(3, 1), 0.1)
    with pytest.raises(ValueError, match=r"\(Q, N\)"):
        optimum(torch.zeros(3), 0.1)
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="0 or more"):
            optimum(torch.zeros(3, 4), bad)
    for n in (0, 5):
        with pytest.raises(ValueError, match="between 1 and N"):
            best_of_n(torch.zeros(3, 4), torch.zeros(3, 4), n)
    with pytest.raises(ValueError, match="shapes must be equal"):
        best_of_n(torch.zeros(3, 4), torch.zeros(3, 1), 2)
