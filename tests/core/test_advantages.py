"""Generalised advantage estimation: worked by hand, special cases, the explicit sum, and masks of different lengths."""

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import explained_variance, gae
from tests.helpers import POISON, f64


@pytest.mark.parametrize("poison", POISON)
def test_gae_matches_hand_computation(poison):
    """r 0 0 1, V 1/2 1/2 1/2, gamma 1, lambda 1/2. From the last action to the first:
        delta 2 = 1 + 0 - 1/2 = 1/2        A = 1/2                      (V after the last action is 0, not the pad's)
        delta 1 = 0 + 1/2 - 1/2 = 0        A = 0 + 1/2 * 1/2 = 1/4
        delta 0 = 0                        A = 1/2 * 1/4 = 1/8
    R = A + V = 5/8 3/4 1. The prompt's slot before and the pad after hold poison. Their results are 0."""
    rewards, values = f64([poison, 0, 0, 1, poison]), f64([poison, 0.5, 0.5, 0.5, poison])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert_close(advantages, f64([0, 0.125, 0.25, 0.5, 0]))
    assert_close(returns, f64([0, 0.625, 0.75, 1, 0]))


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "advantages"),
    [
        ([0, 0, 1], [0.5, 0.5, 0.5], 1, 0.95, [0.45125, 0.475, 0.5]),
        ([-0.1, 0.05, 1], [0.2, 0.4, 0.6], 1, 0.95, [0.6985, 0.63, 0.4]),
        ([1, 2, 4], [8, 4, 2], 0.5, 0, [-5, -1, 2]),  # delta: 1 + 2 - 8, 2 + 1 - 4, 4 + 0 - 2
        ([1, 2, 3], [10, 20, 30], 1, 1, [-4, -15, -27]),  # rewards to go 6 5 3, minus V
        ([1, 2, 4], [0, 0, 0], 0.5, 1, [3, 4, 4]),  # 1 + 2/2 + 4/4, 2 + 4/2, 4
    ],
)
def test_gae_special_cases_of_gamma_and_lambda(rewards, values, gamma, lam, advantages):
    """lambda 0 is the one-step error. lambda 1 with gamma 1 is the reward to go minus V. gamma discounts the rewards
    and the next value."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    got, returns = gae(f64(rewards), f64(values), mask, gamma, lam)
    assert_close(got, f64(advantages))
    assert_close(returns, f64(advantages) + f64(values))


def test_gae_equals_explicit_double_sum():
    """A[t] = sum over k >= t of (gamma lambda)^(k-t) * (r[k] + gamma V[k+1] - V[k]), written as two loops over rows
    whose responses start and end at different slots."""
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    spans = [(0, 6), (2, 5), (3, 4), (5, 6)]
    mask = torch.zeros(4, 6, dtype=torch.bool)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = True
        for t in range(first, end):
            for k in range(t, end):
                after = values[row, k + 1] if k + 1 < end else 0.0
                delta = rewards[row, k] + 0.9 * after - values[row, k]
                expected[row, t] += (0.9 * 0.7) ** (k - t) * delta
    advantages, returns = gae(rewards, values, mask, 0.9, 0.7)
    assert_close(advantages, expected)
    assert_close(returns, torch.where(mask, expected + values, 0.0))


def test_gae_of_batch_equals_gae_of_each_row():
    """Each row of a batch gets the advantages that its own action slots get without the other rows and without pads."""
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    together, _ = gae(rewards, values, mask, 1.0, 0.95)
    for row in range(3):
        kept = mask[row]
        single, _ = gae(rewards[row : row + 1, kept], values[row : row + 1, kept], mask[row : row + 1, kept], 1.0, 0.95)
        assert_close(together[row, kept], single[0])


def test_gae_does_not_modify_its_inputs():
    rewards, values, mask = f64([1, 2]), f64([3, 4]), torch.tensor([[True, False]])
    gae(rewards, values, mask, 1.0, 1.0)
    assert rewards.tolist() == [[1, 2]] and values.tolist() == [[3, 4]] and mask.tolist() == [[True, False]]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(
    ("values", "expected"), [([2, 2, 2, 2], 0), ([1, 2, 3, 6], 1), ([4, 5, 6, 9], 1), ([1, 2, 3, 2], 1 / 7)])
def test_explained_variance_matches_hand_computation(values, expected, poison):
    """Returns 1 2 3 6 have variance (4 + 1 + 0 + 9) / 4 = 7/2.
        values 2 2 2 2: the errors have the same variance, so 0
        values equal to the returns, or off by a constant: the errors have no variance, so 1
        values 1 2 3 2: errors 0 0 0 4 have variance 3, so 1 - 3 / (7/2) = 1/7"""
    mask = torch.tensor([[True, True, True, True, False]])
    got = explained_variance(f64([*values, poison]), f64([1, 2, 3, 6, poison]), mask)
    assert got.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mismatched", [0, 1, 2])
def test_gae_and_explained_variance_reject_mismatched_shapes(mismatched):
    arguments = [torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)]
    arguments[mismatched] = arguments[mismatched][:, :1]
    with pytest.raises(ValueError, match="shapes must be equal"):
        gae(*arguments, 1.0, 0.95)
    with pytest.raises(ValueError, match="shapes must be equal"):
        explained_variance(*arguments)
