"""KL estimators on a distribution small enough to enumerate, and the reward of each action by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.rewards import adapt_kl_coef, kl_k1, kl_k3, shape_rewards

POISON = [math.nan, math.inf, -math.inf, 1e6]
PI, REF = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2]  # asymmetric: KL(pi || ref) = .183787, KL(ref || pi) = .192042


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_kl_by_hand():
    """d = log pi - log ref = ln 2 and -ln 4: k1 is d itself; k3 = e^-d - 1 + d = 1/2 - 1 + ln 2 and 4 - 1 - ln 4."""
    logprobs, ref_logprobs = f64([math.log(0.5), math.log(0.125)]), f64([math.log(0.25), math.log(0.5)])
    assert_close(kl_k1(logprobs, ref_logprobs), f64([math.log(2), -math.log(4)]))
    assert_close(kl_k3(logprobs, ref_logprobs), f64([math.log(2) - 0.5, 3 - math.log(4)]))


def test_both_estimators_have_the_exact_kl_as_their_mean():
    """Over actions drawn from pi, E[k1] = E[k3] = sum pi log(pi / ref) = .7 ln(7/4) + .2 ln(1/2) + .1 ln(1/2). Neither
    KL(ref || pi) = .192042 nor the k3 of the wrong side, .191213, is within a hundredth of it."""
    exact = 0.7 * math.log(7 / 4) + 0.3 * math.log(1 / 2)
    assert exact == pytest.approx(0.183787, abs=1e-6)
    pi, ref = f64(PI), f64(REF)
    for estimator in (kl_k1, kl_k3):
        assert (pi * estimator(pi.log(), ref.log())).sum().item() == pytest.approx(exact, abs=1e-12)
    assert kl_k1(pi.log(), ref.log()).min() < 0 < kl_k3(pi.log(), ref.log()).min()


def test_k3_of_a_small_difference_keeps_its_digits():
    """d = 1e-5 in float32: k3 is d^2 / 2 = 5e-11 to first order. Written as exp(-d) - 1 + d it would be rounded to 0 or
    6e-8."""
    got = kl_k3(torch.tensor([1e-5]), torch.tensor([0.0])).item()
    assert 0 <= got < 1e-9


@pytest.mark.parametrize("poison", POISON)
def test_shape_rewards_by_hand(poison):
    """Score 1, log-ratios 1/2 -1/4 1/4 and a pad, kl_coef 1/5: -1/10, 1/20, -1/20 + 1; the pad gets 0. Second row: its
    prompt's slot gets 0 and its only action -1/5 * 1 - 2. Third row: its only action is in slot 0, -1/5 * 2 + 3."""
    log_ratios = f64([0.5, -0.25, 0.25, poison], [poison, 1, poison, poison], [2, poison, poison, poison])
    mask = torch.tensor([[True, True, True, False], [False, True, False, False], [True, False, False, False]])
    rewards = shape_rewards(f64(1, -2, 3), log_ratios, torch.zeros_like(log_ratios), mask, kl_coef=0.2)
    assert_close(rewards, f64([-0.1, 0.05, 0.95, 0], [0, -2.2, 0, 0], [2.6, 0, 0, 0]))
    ref_side = shape_rewards(f64(1, -2, 3), torch.zeros_like(log_ratios), -log_ratios, mask, kl_coef=0.2)
    assert_close(ref_side, rewards)


def test_rewards_of_a_response_sum_to_score_less_kl():
    """A full row: the last action is in the last slot, and the sum is 3 - 1/10 * (1 + 2 - 1/2) = 2.75."""
    rewards = shape_rewards(f64(3), f64([1, 2, -0.5]), f64([0, 0, 0]), torch.ones(1, 3, dtype=torch.bool), 0.1)
    assert_close(rewards.sum(), torch.tensor(2.75, dtype=torch.float64))
    assert_close(rewards[0, :2], f64(-0.1, -0.2))


def test_expected_reward_is_the_objective():
    """One action from pi, scores 1 2 3: E[reward] = E[score] - kl_coef * KL = 1.4 - 1/2 * .183787."""
    pi, ref = f64(*[[p] for p in PI]), f64(*[[p] for p in REF])
    rewards = shape_rewards(f64(1, 2, 3), pi.log(), ref.log(), torch.ones(3, 1, dtype=torch.bool), 0.5)
    exact = 0.7 * math.log(7 / 4) + 0.3 * math.log(1 / 2)
    assert (pi * rewards).sum().item() == pytest.approx(1.4 - 0.5 * exact, abs=1e-12)


def test_bad_shapes_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="scores"):
        shape_rewards(torch.zeros(2, 1), x, x, mask, 0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        shape_rewards(torch.zeros(2), x, x[:, :1], mask, 0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        shape_rewards(torch.zeros(2), x, x, mask[:, :1], 0.1)
    with pytest.raises(ValueError, match="no True slot"):
        shape_rewards(torch.zeros(2), x, x, torch.tensor([[True] * 3, [False] * 3]), 0.1)
    for estimator in (kl_k1, kl_k3):
        with pytest.raises(ValueError, match="shapes must be equal"):
            estimator(x, x[:, :1])


@pytest.mark.parametrize(("kl_ref", "expected"), [(6, 0.5), (6.6, 0.505), (60, 0.51), (5.4, 0.495), (-3, 0.49)])
def test_adapt_kl_coef_by_hand(kl_ref, expected):
    """kl_coef 1/2, target 6 nats, 100 of 1,000 episodes: an error of 10 % moves it by 1 %, one of more than 20 % by
    2 %, up or down."""
    assert adapt_kl_coef(0.5, kl_ref, target=6, horizon=1000, batch_size=100) == pytest.approx(expected, rel=1e-12)
