"""The optimum of the KL-regularised objective and best-of-n: by hand, and as sums over a small
world's responses."""

import math

import pytest
import torch

from rlhf.evaluate import Response
from rlhf.methods.optimum import (
    Samples,
    best_of_n,
    best_of_n_kl,
    column,
    matching_n,
    optimality_error,
    optimum,
    ppo_and_optimum,
)
from tests.core.test_exact import PROMPTS, World
from tests.helpers import f64

LN2, LN3, LN6 = math.log(2), math.log(3), math.log(6)

# ---- samples of the reference ----


def numbers(got):
    """The metrics of an Optimum of one prompt, without the weights."""
    return {name: value.item() for name, value in got._asdict().items() if name != "weights"}


def test_optimum_matches_hand_computation():
    """kl_coef is 2 and the scores are 2 ln 3, 0, 0, 0: exp(score / 2) is 3, 1, 1, 1 with mean 3/2,
    so J* = 2 ln(3/2). The weights are 1/2 and three times 1/6: score ln 3, KL = 1/2 ln 2 + 1/2
    ln(2/3) = ln 2 - 1/2 ln 3, and score - 2 KL = 2 ln 3 - 2 ln 2. ess = 1 / (1/4 + 3/36) = 3.

    The second prompt has the score 5 four times. There is nothing to gain: J* = 5, KL 0, ess 4."""
    got = optimum(f64([2 * LN3, 0, 0, 0], [5, 5, 5, 5]), kl_coef=2.0)
    expected = {
        "objective": [2 * LN3 - 2 * LN2, 5],
        "score": [LN3, 5],
        "kl_ref": [LN2 - LN3 / 2, 0],
        "ess": [3, 4],
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(got, name), f64(*values), msg=name)


def test_optimum_without_kl_penalty_is_the_best_samples():
    """With kl_coef 0 and scores 1, 4, 4, 2 they are the two fours: score 4, KL = log(4 / 2), ess 2.
    The KL costs nothing, so J* = 4."""
    got = optimum(f64([1, 4, 4, 2]), kl_coef=0.0)
    assert got.weights.tolist() == [[0, 0.5, 0.5, 0]]
    expected = {"objective": 4, "score": 4, "kl_ref": LN2, "ess": 2}
    assert numbers(got) == pytest.approx(expected)


def test_optimum_is_above_every_other_reweighting():
    """Weights w have J = sum w s - beta sum w log(N w). No other w has a higher J than the
    optimum."""
    torch.manual_seed(0)
    scores = torch.randn(1, 6, dtype=torch.float64)
    best = optimum(scores, 0.7).objective.item()
    for _ in range(200):
        w = torch.softmax(3 * torch.randn(6, dtype=torch.float64), dim=0)
        assert (w * scores[0]).sum() - 0.7 * (w * (6 * w).log()).sum() < best


# ---- samples of the reference and of a second policy ----


@pytest.mark.parametrize(
    ("share", "tilt", "ratio"),
    [(0.5, (6, 0.75, 1, 1), (3, 0.5, 1, 1)), (0.25, (7.5, 0.5, 1, 1), (3, 1 / 3, 1, 1))],
)
def test_optimum_of_two_policies_matches_hand_computation(share, tilt, ratio):
    """kl_coef is 2. tilt is exp(score / 2) and ratio is pi / pi_ref. The mixture is q = a + (1 - a)
    * ratio:
        a = 1/2: q = 2, 3/4, 1, 1          a = 1/4: q = 5/2, 1/2, 1, 1
    In both cases tilt / q is 3, 1, 1, 1 with mean 3/2, so J* = 2 ln(3/2). The weights are 1/2 and
    three times 1/6 and ess is 3. The score is 1/2 * 2 ln(tilt[0]) + 1/6 * 2 ln(tilt[1]), and J* =
    score - 2 KL."""
    got = optimum(2 * f64(tilt).log(), 2.0, f64(ratio).log(), share)
    score = math.log(tilt[0]) + math.log(tilt[1]) / 3
    expected = {
        "objective": 2 * math.log(1.5),
        "score": score,
        "kl_ref": score / 2 - math.log(1.5),
        "ess": 3,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(got, name), f64(value), msg=name)
    torch.testing.assert_close(got.weights, f64([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_optimum_of_two_policies_without_kl_penalty_is_the_best_samples():
    """Scores 4, 4, 1 and ratios 3, 1, 1 with a = 1/2: q = 2, 1, 1. The two fours have the weights
    1/2 and 1, divided by 3/2. The reference samples a four with probability (1/2 + 1) / 3 = 1/2,
    and -log of it is the KL. ess = 9/5."""
    got = optimum(f64([4, 4, 1]), 0.0, f64([3, 1, 1]).log(), 0.5)
    torch.testing.assert_close(got.weights, f64([1 / 3, 2 / 3, 0]))
    expected = {"objective": 4, "score": 4, "kl_ref": LN2, "ess": 1.8}
    assert numbers(got) == pytest.approx(expected)


def test_optimum_of_two_equal_policies_is_that_of_the_reference():
    """Whatever their shares. So is that of two different policies, if all samples are the
    reference's."""
    torch.manual_seed(0)
    scores, log_ratio = torch.randn(2, 3, 8, dtype=torch.float64)
    plain = optimum(scores, 0.3)
    equal = optimum(scores, 0.3, torch.zeros_like(scores), 0.2)
    torch.testing.assert_close(equal, plain, rtol=1e-12, atol=1e-12)
    all_of_reference = optimum(scores, 0.3, log_ratio, 1.0)
    torch.testing.assert_close(all_of_reference, plain, rtol=1e-12, atol=1e-12)


def test_optimum_of_far_policies_is_finite():
    """log_ratio 800 and -800, beyond exp's range in float64; a = 1/2. The first sample's weight is
    exp(-800) * 2 and counts nothing. The second's is exp(1 / 0.001) * 2, so J* = 0.001 * (1000 + ln
    2 - ln 2)."""
    got = optimum(f64([1, 1]), 0.001, f64([800, -800]), 0.5)
    assert got.objective.item() == pytest.approx(1, rel=1e-12)
    assert got.weights.tolist() == [[0, 1]]


# ---- the exact world: 40 responses to each of three prompts ----

KL_COEF = 0.5


@pytest.fixture(scope="module")
def exact():
    """Scores and log-probabilities of all responses under the reference and a second policy, each
    (3, 40), and Z. The second policy is the optimum of twice the kl_coef: halfway between the
    reference and pi*."""
    world = World(seed=1)
    scores = world.scores.view(len(PROMPTS), -1)  # (3, 40)
    log_ref = world.ref_logprobs.sum(dim=1).view(len(PROMPTS), -1)  # (3, 40)
    log_pi = torch.log_softmax(log_ref + scores / (2 * KL_COEF), dim=1)  # (3, 40)
    z = (log_ref.exp() * (scores / KL_COEF).exp()).sum(dim=1)  # (3,)
    return scores, log_ref, log_pi, z


def one_sample(scores, log_ratio, share):
    """exp(score / kl_coef) / (q / pi_ref) of each response: Z by optimum, from two samples that are
    this response."""
    scores_twice = torch.stack([scores.flatten()] * 2, dim=1)  # (120, 2)
    log_ratio_twice = torch.stack([log_ratio.flatten()] * 2, dim=1)  # (120, 2)
    got = optimum(scores_twice, KL_COEF, log_ratio_twice, share)
    return (got.objective / KL_COEF).exp().view_as(scores)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.0])
def test_expected_weight_under_the_mixture_is_exactly_z(exact, share):
    """The sum over all responses of q times the weight of a sample, with q = a pi_ref + (1 - a)
    pi."""
    scores, log_ref, log_pi, z = exact
    q = share * log_ref.exp() + (1 - share) * log_pi.exp()
    torch.testing.assert_close(
        (q * one_sample(scores, log_pi - log_ref, share)).sum(dim=1), z, rtol=1e-12, atol=0
    )


BROKEN = {
    "sign of the log-ratio": lambda log_ratio, share: (-log_ratio, share),
    "shares swapped": lambda log_ratio, share: (log_ratio, 1 - share),
    "all weighted as samples of the reference": lambda log_ratio, share: (log_ratio, 1.0),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_expected_weight_of_broken_mixture_differs(exact, broken):
    """So the test above can fail."""
    scores, log_ref, log_pi, z = exact
    q = 0.25 * log_ref.exp() + 0.75 * log_pi.exp()
    expected = (q * one_sample(scores, *BROKEN[broken](log_pi - log_ref, 0.25))).sum(dim=1)
    assert ((expected / z - 1).abs() > 0.01).all()


def draw(exact, rows, from_ref, from_pi, seed=0):
    """Scores and log-ratios (rows, from_ref + from_pi) of sampled responses to each prompt."""
    scores, log_ref, log_pi, _ = exact
    generator = torch.Generator().manual_seed(seed)
    for at in range(len(PROMPTS)):
        drawn = []
        for logprobs, n in ((log_ref, from_ref), (log_pi, from_pi)):
            if n:
                p = logprobs[at].exp()
                picked = torch.multinomial(p, rows * n, replacement=True, generator=generator)
                drawn.append(picked.view(rows, n))
        drawn = torch.cat(drawn, dim=1)  # (rows, from_ref + from_pi)
        yield scores[at][drawn], (log_pi - log_ref)[at][drawn]


def test_sampled_estimate_of_z_is_unbiased(exact):
    """The mean of 20,000 estimates from 5 samples of the reference and 15 of the policy is within 4
    standard errors, and these are below 0.3 %. The estimate of each broken mixture is further
    away."""
    for z, (scores, log_ratio) in zip(exact[3], draw(exact, 20_000, 5, 15)):
        estimates = (optimum(scores, KL_COEF, log_ratio, 0.25).objective / KL_COEF).exp()
        error = estimates.std() / len(estimates) ** 0.5
        assert (estimates.mean() - z).abs() < 4 * error and error < 0.003 * z
        for broken in BROKEN.values():
            got = optimum(scores, KL_COEF, *broken(log_ratio, 0.25))
            wrong = (got.objective / KL_COEF).exp()
            assert (wrong.mean() - z).abs() > 8 * error


def test_sampled_optimum_converges_to_the_exact_one(exact):
    """100,000 samples of each policy. pi* is pi_ref * exp(score / kl_coef) / Z."""
    for at, (scores, log_ratio) in enumerate(draw(exact, 1, 100_000, 100_000)):
        got = optimum(scores, KL_COEF, log_ratio, 0.5)
        s = exact[0][at]  # (40,)
        log_ref = exact[1][at]  # (40,)
        log_best = log_ref + s / KL_COEF - exact[3][at].log()
        expected = {
            "objective": KL_COEF * exact[3][at].log(),
            "score": (log_best.exp() * s).sum(),
            "kl_ref": (log_best.exp() * (log_best - log_ref)).sum(),
        }
        for name, value in expected.items():
            assert getattr(got, name).item() == pytest.approx(value.item(), abs=0.01), name


def test_estimate_of_the_optimum_is_low_by_its_formula(exact):
    """By about kl_coef * (1/ess - 1/N) / 2 on average, from 200 samples of the reference."""
    for z, (scores, _) in zip(exact[3], draw(exact, 4_000, 200, 0)):
        got = optimum(scores, KL_COEF)
        low = KL_COEF * z.log() - got.objective.mean()
        formula = KL_COEF * (1 / got.ess - 1 / 200) / 2
        assert low.item() == pytest.approx(formula.mean().item(), rel=0.25)


# ---- best-of-n ----


def test_best_of_n_matches_hand_computation():
    """Scores 1, 3, 2 and n = 2: the best of the three pairs are 3, 3, 2, so the expected score is
    8/3. Their values are 10, 10, 30, with mean 50/3. n = 1 is the mean and n = 3 the maximum."""
    scores, values = f64([1, 3, 2]), f64([20, 10, 30])
    for n, score, value in ((1, 2, 20), (2, 8 / 3, 50 / 3), (3, 3, 10)):
        assert best_of_n(scores, scores, n).item() == pytest.approx(score, rel=1e-12)
        assert best_of_n(scores, values, n).item() == pytest.approx(value, rel=1e-12)


def test_best_of_n_of_a_thousand_samples_is_finite():
    """Scores 1 to 1000, n = 256: the expected maximum is n (N + 1) / (n + 1) = 256 * 1001 / 257."""
    scores = torch.arange(1.0, 1001.0, dtype=torch.float64).unsqueeze(0)
    assert best_of_n(scores, scores, 256).item() == pytest.approx(256 * 1001 / 257, rel=1e-9)


def test_best_of_n_kl_and_matching_n_match_hand_computation():
    """log n - (n - 1) / n is 0 for n = 1 and ln 2 - 1/2 for n = 2. matching_n is the inverse,
    between 1 and the limit: ln 66 - 65/66 = 3.205, ln 65 - 64/65 = 3.190 and ln 67 - 66/67 = 3.220,
    so 66 is nearest to 3.2."""
    assert best_of_n_kl(1) == 0 and best_of_n_kl(2) == pytest.approx(LN2 - 0.5)
    assert [matching_n(kl, 256) for kl in (-1.0, 0.0, 0.2, 3.2, 99.0)] == [1, 1, 2, 66, 256]


def test_best_of_n_kl_is_that_of_its_distribution():
    """N equally likely responses have different scores, and n = 5 of them are drawn with
    replacement. Then P(best is rank i) = (i/N)^n - ((i-1)/N)^n. For large N its KL to the uniform
    distribution is log n - (n - 1) / n."""
    N, n = 100_000, 5
    i = torch.arange(1, N + 1, dtype=torch.float64)
    p = (i / N) ** n - ((i - 1) / N) ** n
    assert (p * (N * p).log()).sum().item() == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_optimum_and_best_of_n_reject_bad_arguments():
    with pytest.raises(ValueError, match="N at least 2"):
        optimum(torch.zeros(3, 1), 0.1)
    with pytest.raises(ValueError, match=r"\(Q, N\)"):
        optimum(torch.zeros(3), 0.1)
    for kl_coef, share in ((-0.1, 1), (float("nan"), 1), (0.1, 0), (0.1, 1.1), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="0 or more, and above 0 and at most 1"):
            optimum(torch.zeros(3, 4), kl_coef, torch.zeros(3, 4), share)
    with pytest.raises(ValueError, match="shapes must be equal"):
        optimum(torch.zeros(3, 4), 0.1, torch.zeros(3, 1))
    for n in (0, 5):
        with pytest.raises(ValueError, match="between 1 and N"):
            best_of_n(torch.zeros(3, 4), torch.zeros(3, 4), n)
    with pytest.raises(ValueError, match="shapes must be equal"):
        best_of_n(torch.zeros(3, 4), torch.zeros(3, 1), 2)


# ---- of responses ----


def one(score, kl_ref, gold=None, prompt="p"):
    return Response(prompt, "r", score, gold, kl_ref, length=4, ended=True)


def test_ppo_and_optimum_match_hand_computation():
    """kl_coef is 2. Three responses of the reference, whose kl_ref is -log_ratio, and one of PPO,
    so a = 3/4. Ratios pi / pi_ref 5, 1, 1 and 5 give q = 3/4 + 1/4 * ratio = 2, 1, 1, 2. exp(score
    / 2) is 6, 1, 1, 2, divided by q 3, 1, 1, 1. As above J* = 2 ln(3/2), ess 3, weights 1/2 and
    three times 1/6. The score is 1/2 * 2 ln 6 + 1/6 * 2 ln 2, gold 1/2 * 3 + 1/6 * (-3). PPO has
    the score 2 ln 2 and the KL ln 5."""
    reference = [one(2 * LN6, -math.log(5), 3), one(0, 0, 0), one(0, 0, 0)]
    ppo = [one(2 * LN2, math.log(5), -3)]
    row = ppo_and_optimum(Samples(reference, ppo), 2.0).row()
    score = LN6 + LN2 / 3
    assert (row.pop("prompt"), row["samples"]) == ("p", 4)
    assert row == pytest.approx(
        {
            "samples": 4,
            "ess": 3,
            "ppo_score": 2 * LN2,
            "ppo_gold": -3,
            "ppo_kl_ref": math.log(5),
            "ppo_objective": 2 * LN2 - 2 * math.log(5),
            "score": score,
            "gold": 1,
            "kl_ref": score / 2 - math.log(1.5),
            "objective": 2 * math.log(1.5),
        }
    )


def test_ppo_and_optimum_without_judge_have_no_gold():
    row = ppo_and_optimum(Samples([one(1, 0)], [one(2, 0)]), 1.0).row()
    assert row["gold"] is row["ppo_gold"] is None and row["score"] > 1
    assert column([one(1, 0)], "gold").isnan().all()


def test_optimality_error_matches_hand_computation():
    """PPO gained 2 and lacks 1/2 and 3/2, so L = 1 with the standard error 1/2. Optimality 2 / (2 +
    L) has the slope -2 / (2 + L)^2 = -2/9. An L that is too low by 0.3 makes it too high."""
    assert optimality_error(2.0, f64(0.5, 1.5), -0.3) == pytest.approx((1 / 9, 0.3 * 2 / 9))
    assert optimality_error(-0.5, f64(0.5, 1.5), -0.3) == pytest.approx((1, -0.3 * 2))
    assert optimality_error(2.0, f64(1), -0.3) == pytest.approx((math.inf, 0.3 * 2 / 9))
    assert optimality_error(-1.0, f64(0.5, 1.5), -0.3) == (math.inf, math.inf)
