"""Generalised advantage estimation by hand, at its two ends, against the explicit sum, and over ragged masks."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import explained_variance, gae

POISON = [math.nan, math.inf, -math.inf, 1e6]


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("poison", POISON)
def test_gae_by_hand(poison):
    """r 0 0 1, V 1/2 1/2 1/2, gamma 1, lambda 1/2, from the back:
        delta 2 = 1 + 0 - 1/2 = 1/2        A = 1/2                      (nothing follows: V after is 0, not the pad's)
        delta 1 = 0 + 1/2 - 1/2 = 0        A = 0 + 1/2 * 1/2 = 1/4
        delta 0 = 0                        A = 1/2 * 1/4 = 1/8
    R = A + V = 5/8 3/4 1. The prompt's slot before and the pad after hold poison and get 0."""
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
        ([1, 2, 3], [10, 20, 30], 1, 1, [-4, -15, -27]),  # rewards to go 6 5 3, less V
        ([1, 2, 4], [0, 0, 0], 0.5, 1, [3, 4, 4]),  # 1 + 2/2 + 4/4, 2 + 4/2, 4
    ],
)
def test_gae_table(rewards, values, gamma, lam, advantages):
    """lambda 0 is the one-step error; lambda 1 with gamma 1 is the reward to go less V; gamma discounts rewards and
    the next value alike."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    got, returns = gae(f64(rewards), f64(values), mask, gamma, lam)
    assert_close(got, f64(advantages))
    assert_close(returns, f64(advantages) + f64(values))


def test_gae_is_the_double_sum():
    """A[t] = sum over k >= t of (gamma lambda)^(k-t) * (r[k] + gamma V[k+1] - V[k]), written out as two loops over
    rows whose response starts and ends at different slots."""
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


def test_a_batch_is_its_rows_alone():
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    together, _ = gae(rewards, values, mask, 1.0, 0.95)
    for row in range(3):
        kept = mask[row]
        alone, _ = gae(rewards[row : row + 1, kept], values[row : row + 1, kept], mask[row : row + 1, kept], 1.0, 0.95)
        assert_close(together[row, kept], alone[0])


def test_gae_leaves_its_inputs_alone():
    rewards, values, mask = f64([1, 2]), f64([3, 4]), torch.tensor([[True, False]])
    gae(rewards, values, mask, 1.0, 1.0)
    assert rewards.tolist() == [[1, 2]] and values.tolist() == [[3, 4]] and mask.tolist() == [[True, False]]


@pytest.mark.parametrize("poison", POISON)
def test_explained_variance_by_hand(poison):
    """Returns 1 2 3 6 (variance (4 + 1 + 0 + 9) / 4 = 7/2), values 2 2 2 2: the errors vary as much: 0. Values equal to
    the returns, or off by a constant: 1. Values 1 2 3 2: errors 0 0 0 4, variance 3, 1 - 3 / 3.5 = 1/7."""
    mask = torch.tensor([[True, True, True, True, False]])
    returns = f64([1, 2, 3, 6, poison])
    for values, expected in (([2, 2, 2, 2], 0), ([1, 2, 3, 6], 1), ([4, 5, 6, 9], 1), ([1, 2, 3, 2], 1 / 7)):
        got = explained_variance(f64([*values, poison]), returns, mask)
        assert got.item() == pytest.approx(expected, abs=1e-12)


def test_bad_shapes_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for spoiled in range(3):
        arguments = [x, x, mask]
        arguments[spoiled] = arguments[spoiled][:, :1]
        with pytest.raises(ValueError, match="shapes must be equal"):
            gae(*arguments, 1.0, 0.95)
        with pytest.raises(ValueError, match="shapes must be equal"):
            explained_variance(*arguments)
