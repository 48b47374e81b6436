"""Metrics of gradient steps, over their micro-batches and over processes."""

import torch
from torch import Tensor

from rlhf.run.processes import gather, total


class GradientStepMetrics:
    """A dict of scalars for each gradient step. They stay on their device until they are read.

    A metric is the sum of its micro-batches' means, and the processes', each times its weight. In
    PPO that is sum / D (rlhf/ppo.py): the mean over an epoch is exact, that of one minibatch only
    if its responses are as long as the rollout's. A metric whose name begins with max_ is a maximum
    over actions.
    """

    def __init__(self):
        self.steps = []

    def begin_step(self) -> None:
        self.steps.append({})

    def add(self, weight: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one micro-batch to the latest step.

        weight: what the micro-batch's loss is multiplied by; metrics: {name: scalar}.
        """
        latest = self.steps[-1]
        for name, value in metrics.items():
            value = value.detach()
            if name.startswith("max_"):
                latest[name] = torch.maximum(latest.get(name, value), value)  # NaN stays NaN
            else:
                latest[name] = latest.get(name, 0.0) + weight * value

    def means(self) -> dict[str, float]:
        """{name: mean over the gradient steps}, without the maxima."""
        means = {}
        for name in self.steps[0]:
            if not name.startswith("max_"):
                means[name] = sum(step[name] for step in self.steps).item() / len(self.steps)
        return total(means)

    def first(self, name: str) -> float:
        """A metric of the first step that is a maximum, over all processes."""
        of_processes = gather(self.steps[0][name].reshape(1))  # (processes,)
        return of_processes.max().item()


def finite_mean(values: list[Tensor]) -> float:
    """Mean of the finite values of a list of scalars.

    For gradient norms: in float16 the scaler skips a step whose gradient is not finite.
    """
    stacked = torch.stack(values)
    return stacked[stacked.isfinite()].mean().item()
