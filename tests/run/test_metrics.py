"""Metrics of gradient steps: over micro-batches, steps and processes."""

import math

import pytest
import torch

from rlhf.run import metrics
from rlhf.run.metrics import GradientStepMetrics, finite_mean


def history_of(*steps):
    """The history of these steps, each a list of (weight, {name: number}) of its micro-batches."""
    history = GradientStepMetrics()
    for micro_batches in steps:
        history.begin_step()
        for weight, numbers in micro_batches:
            values = {name: torch.tensor(number) for name, number in numbers.items()}
            history.add(torch.tensor(weight), values)
    return history


def test_means_weigh_micro_batches_and_average_over_minibatches():
    """One minibatch of two micro-batches, 1/4 * 2 + 3/4 * 6 = 5, and one whole minibatch, 3. The
    mean is 4."""
    history = history_of(
        [(0.25, {"loss": 2.0, "norm": 8.0}), (0.75, {"loss": 6.0, "norm": 0.0})],
        [(1.0, {"loss": 3.0, "norm": 1.0})],
    )
    assert history.means() == {"loss": 4.0, "norm": 1.5}


def test_metrics_hold_no_gradient():
    history = GradientStepMetrics()
    history.begin_step()
    loss = torch.tensor(2.0, requires_grad=True) * 3
    history.add(torch.tensor(1.0), {"loss": loss, "max_loss": loss})
    assert history.means() == {"loss": 6.0}
    assert not history.means()["loss"].requires_grad
    assert not history.first("max_loss").requires_grad


def test_max_metrics_are_the_maximum_over_the_micro_batches_of_the_first_step():
    """They are no means, so their weights do not count."""
    history = history_of(
        [(0.25, {"max_ratio": 2.0}), (0.5, {"max_ratio": 7.0}), (0.25, {"max_ratio": 3.0})],
        [(1.0, {"max_ratio": 9.0})],
    )
    assert history.first("max_ratio") == 7.0


@pytest.mark.parametrize("at", [0, 1])
def test_max_metrics_keep_nan(at):
    values = [2.0, 2.0]
    values[at] = math.nan
    history = history_of([(0.5, {"max_ratio": value}) for value in values])
    assert math.isnan(history.first("max_ratio"))


@pytest.mark.parametrize("other", [2.0, 9.0, math.nan])
def test_means_are_summed_over_processes_and_maxima_are_the_largest(monkeypatch, other):
    """The other process has the same sums. Its weights make up the rest of the minibatch's. NaN
    stays NaN."""
    monkeypatch.setattr(metrics, "total", lambda numbers: 2 * numbers)
    monkeypatch.setattr(metrics, "gather", lambda mine: torch.cat([mine, torch.tensor([other])]))
    history = history_of([(0.5, {"loss": 3.0, "max_ratio": 7.0})])
    assert history.means() == {"loss": 3.0}
    largest = other if math.isnan(other) else max(7.0, other)
    assert history.first("max_ratio").item() == pytest.approx(largest, nan_ok=True)


def test_finite_mean_leaves_out_what_is_not_finite():
    values = [torch.tensor(x) for x in (1.0, math.inf, 3.0, math.nan)]
    assert finite_mean(values) == 2.0
    assert math.isnan(finite_mean([torch.tensor(math.inf)]))
