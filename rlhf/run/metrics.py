"""Metrics of gradient steps, over their micro-batches and over processes."""

import math

import torch
from torch import Tensor

from rlhf.run.processes import gather, total


class GradientStepMetrics:
    """Scalars of each gradient step. They stay on their device until they are read.

    A metric is the sum of its micro-batches' means, and the processes', each times its weight. In
    PPO that is sum / D (rlhf/ppo.py): the mean over an epoch is exact, that of one minibatch only
    if its responses are as long as the rollout's. A metric whose name begins with max_ is a maximum
    over actions.
    """

    def __init__(self):
        self.steps = 0
        self.sums = {}  # {name: over all steps}
        self.firsts = {}  # {name of a maximum: in the first step}

    def begin_step(self) -> None:
        self.steps += 1

    def add(self, weight: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one micro-batch of the latest step.

        weight: what the micro-batch's loss is multiplied by; metrics: {name: scalar}.
        """
        for name, value in metrics.items():
            value = value.detach()
            if not name.startswith("max_"):
                self.sums[name] = self.sums.get(name, 0.0) + weight * value
            elif self.steps == 1:
                self.firsts[name] = torch.maximum(self.firsts.get(name, value), value)  # NaN stays

    def means(self) -> dict[str, Tensor]:
        """{name: mean over the gradient steps}, without the maxima."""
        sums = total(torch.stack(list(self.sums.values())))  # (n,)
        return dict(zip(self.sums, sums / self.steps))

    def first(self, name: str) -> Tensor:
        """A metric of the first step that is a maximum, over all processes."""
        return gather(self.firsts[name].reshape(1)).max()


def finite_mean(values: list[Tensor]) -> Tensor:
    """Mean of the finite values of a list of scalars; NaN if there is none.

    For gradient norms: in float16 the scaler skips a step whose gradient is not finite.
    """
    return torch.stack(values).nan_to_num(math.nan, math.nan, math.nan).nanmean()
