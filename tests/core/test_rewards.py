"""KL estimators on a distribution of three outcomes, and the reward of each action by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.rewards import adapt_kl_coef, kl_k1, kl_k3, shape_rewards
from tests.helpers import POISON, f64

PI, REF = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2]  # KL(pi || ref) = .183787, KL(ref || pi) = .192042


def test_kl_estimators_match_hand_computation():
    """d = log pi - log ref = ln 2 and -ln 4. k1 = d. k3 = e^-d - 1 + d = 1/2 - 1 + ln 2 and 4 - 1 -
    ln 4."""
    logprobs, ref_logprobs = (
        f64([math.log(0.5), math.log(0.125)]),
        f64([math.log(0.25), math.log(0.5)]),
    )
    assert_close(kl_k1(logprobs, ref_logprobs), f64([math.log(2), -math.log(4)]))
    assert_close(kl_k3(logprobs, ref_logprobs), f64([math.log(2) - 0.5, 3 - math.log(4)]))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_have_the_exact_kl_as_their_mean(estimator):
    """Over actions drawn from pi: E[k1] = E[k3] = sum pi log(pi / ref) = .7 ln(7/4) + .2 ln(1/2) +
    .1 ln(1/2). KL(ref || pi) = .192042 and the k3 of the wrong side, .191213, differ from it by
    more than .007."""
    exact = 0.7 * math.log(7 / 4) + 0.3 * math.log(1 / 2)
    assert exact == pytest.approx(0.183787, abs=1e-6)
    pi, ref = f64(PI), f64(REF)
    assert (pi * estimator(pi.log(), ref.log())).sum().item() == pytest.approx(exact, abs=1e-12)


def test_k1_may_be_negative_and_k3_is_not():
    """The action of probability .2 has d = ln(1/2) < 0."""
    pi, ref = f64(PI), f64(REF)
    assert kl_k1(pi.log(), ref.log()).min() < 0 < kl_k3(pi.log(), ref.log()).min()


def test_k3_of_a_small_difference_is_accurate():
    """d = 1e-5 in float32: k3 is about d^2 / 2 = 5e-11. Written as exp(-d) - 1 + d it would be
    rounded to 0 or 6e-8."""
    got = kl_k3(torch.tensor([1e-5]), torch.tensor([0.0])).item()
    assert 0 <= got < 1e-9


def gradient_by_logits(loss_of):
    """d loss / d logits at softmax(logits) = PI, where loss_of takes log pi."""
    logits = f64(PI).log().requires_grad_()
    return torch.autograd.grad(loss_of(logits.log_softmax(dim=1)), logits)[0]


LN2, LN7_4 = math.log(2), math.log(7 / 4)


@pytest.mark.parametrize(
    ("estimator", "k", "rounded"),
    [
        (kl_k1, (LN7_4, -LN2, -LN2), (0.263, -0.175, -0.088)),
        (kl_k3, (4 / 7 - 1 + LN7_4, 1 - LN2, 1 - LN2), (-0.037, 0.025, 0.012)),
    ],
)
def test_k3_in_the_reward_has_another_gradient(estimator, k, rounded):
    """The gradient of KL(pi || ref) by the logits, and what a policy gradient makes of an estimator
    k in the reward, which it holds constant: E[k grad log pi], by logit j pi_j (k_j - E[k]). E[k] =
    .1838.

        k1 = ln(7/4), ln(1/2), ln(1/2) = .5596, -.6931, -.6931:
            .7 * .3758, .2 * -.8769, .1 * -.8769
        k3 = 4/7 - 1 + ln(7/4), 2 - 1 + ln(1/2) = .1310, .3069:
            .7 * -.0527, .2 * .1231, .1 * .1231

    k1 has the gradient of the KL. k3 has the wrong sign in every component."""
    ref = f64(REF).log()
    of_kl = gradient_by_logits(lambda logprobs: (logprobs.exp() * (logprobs - ref)).sum())
    got = gradient_by_logits(
        lambda logprobs: (
            logprobs.detach().exp() * estimator(logprobs.detach(), ref) * logprobs
        ).sum()
    )
    mean = sum(p * x for p, x in zip(PI, k))
    expected = [p * (x - mean) for p, x in zip(PI, k)]
    assert tuple(round(x, 3) for x in expected) == rounded
    assert_close(got, f64(expected), atol=1e-12, rtol=0)
    if estimator is kl_k1:
        assert_close(got, of_kl, atol=1e-12, rtol=0)
    else:
        assert (got * of_kl).max() < 0


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_shape_rewards_matches_hand_computation(side, poison):
    """kl_coef 1/5. The log ratios are in the policy's log-probabilities or, negated, in the
    reference's.

    row 1: score 1, log ratios 1/2 -1/4 1/4, a pad:          -1/10, 1/20, -1/20 + 1, 0
    row 2: score -2, its prompt's slot, log ratio 1, 2 pads:  0, -1/5 - 2, 0, 0
    row 3: score 3, log ratio 2 in slot 0, three pads:       -2/5 + 3, 0, 0, 0
    """
    log_ratios = f64(
        [0.5, -0.25, 0.25, poison], [poison, 1, poison, poison], [2, poison, poison, poison]
    )
    mask = torch.tensor(
        [[True, True, True, False], [False, True, False, False], [True, False, False, False]]
    )
    zeros = torch.zeros_like(log_ratios)
    logprobs, ref_logprobs = (log_ratios, zeros) if side == "policy" else (zeros, -log_ratios)
    rewards = shape_rewards(f64(1, -2, 3), logprobs, ref_logprobs, mask, kl_coef=0.2)
    assert_close(rewards, f64([-0.1, 0.05, 0.95, 0], [0, -2.2, 0, 0], [2.6, 0, 0, 0]))


def test_rewards_of_a_response_sum_to_score_minus_kl_penalty():
    """A row without pads: the score is on the last slot, and the sum is 3 - 1/10 * (1 + 2 - 1/2) =
    2.75."""
    rewards = shape_rewards(
        f64(3), f64([1, 2, -0.5]), f64([0, 0, 0]), torch.ones(1, 3, dtype=torch.bool), 0.1
    )
    assert_close(rewards.sum(), torch.tensor(2.75, dtype=torch.float64))
    assert_close(rewards[0, :2], f64(-0.1, -0.2))


def test_expected_reward_equals_the_objective():
    """One action from pi, scores 1 2 3: E[reward] = E[score] - kl_coef * KL = 1.4 - 1/2 *
    .183787."""
    pi, ref = f64(*[[p] for p in PI]), f64(*[[p] for p in REF])
    rewards = shape_rewards(
        f64(1, 2, 3), pi.log(), ref.log(), torch.ones(3, 1, dtype=torch.bool), 0.5
    )
    exact = 0.7 * math.log(7 / 4) + 0.3 * math.log(1 / 2)
    assert (pi * rewards).sum().item() == pytest.approx(1.4 - 0.5 * exact, abs=1e-12)


def test_shape_rewards_rejects_mismatched_shapes():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="scores"):
        shape_rewards(torch.zeros(2, 1), x, x, mask, 0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        shape_rewards(torch.zeros(2), x, x[:, :1], mask, 0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        shape_rewards(torch.zeros(2), x, x, mask[:, :1], 0.1)


def test_shape_rewards_rejects_a_row_without_actions():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="no True slot"):
        shape_rewards(torch.zeros(2), x, x, torch.tensor([[True] * 3, [False] * 3]), 0.1)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_reject_mismatched_shapes(estimator):
    with pytest.raises(ValueError, match="shapes must be equal"):
        estimator(torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("kl_ref", "expected"), [(6, 0.5), (6.6, 0.505), (60, 0.51), (5.4, 0.495), (-3, 0.49)]
)
def test_adapt_kl_coef_matches_hand_computation(kl_ref, expected):
    """kl_coef 1/2, target 6 nats, 100 of 1,000 responses. An error of 10 % moves kl_coef by 1 %. An
    error of more than 20 % moves it by 2 %, up or down."""
    assert adapt_kl_coef(0.5, kl_ref, target=6, horizon=1000, batch_size=100) == pytest.approx(
        expected, rel=1e-12
    )
