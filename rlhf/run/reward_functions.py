"""Rewards that --reward names: a reward model's checkpoint, and functions of the user.

    --reward runs/reward.pt rules.py:brevity politeness.py --reward-weights 1 0.2 0.5

A function gets the prompts, as text or as messages (rlhf/run/messages.py), and the responses as
text, and returns one number per response:

    def score(prompts, responses):
        return [float("please" in response) for response in responses]

Its file is executed, and only if the user names it: a checkpoint never makes a function run.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rlhf.run.errors import InputError
from rlhf.run.files import check_file
from rlhf.run.user_code import call_score, load_code

OTHER_METRICS = ("model", "std")  # ppo.csv has score_model and score_std
SPEC = re.compile(r"(.+\.py)(?::(\w+))?")  # FILE.py or FILE.py:FUNCTION


class RewardFunction(NamedTuple):
    name: str  # FUNCTION or, without it, FILE
    path: Path
    score: Callable[[list, list[str]], list[float]]

    def __call__(self, prompts: Sequence, responses: list[str]) -> list[float]:
        """One number per response. Raises InputError if it is something else."""
        where = f"{self.name}() in {self.path}"
        return call_score(self.score, where, prompts, responses)


class Rewards(NamedTuple):
    """What --reward and --reward-weights name."""

    model: Path | None  # a reward model's checkpoint
    functions: tuple[str, ...]  # FILE.py or FILE.py:FUNCTION
    weights: tuple[float, ...]  # of the model, then of the functions

    def files(self) -> dict[str, Path]:
        """{"reward NAME": the file of a function, "reward": the reward model's}."""
        files = {}
        for spec in self.functions:
            path, _, name = parse(spec)
            files[f"reward {name}"] = path
        if self.model is not None:
            files["reward"] = self.model
        return files


def named_rewards(names: tuple[str, ...], weights: tuple[float, ...], default: Path) -> Rewards:
    """What the flags name; without names, the reward model `default`.

    Raises ValueError if they name anything but a reward model and then functions, if two metrics
    would have one name, or if there are weights of another number.
    """
    names = names or (str(default),)
    model = Path(names[0]) if names[0].endswith(".pt") else None
    functions = names[1:] if model else names
    if not all(map(SPEC.fullmatch, functions)):
        raise ValueError(
            f"--reward {' '.join(names)}: give a reward model FILE.pt first, if any, and then "
            f"functions as FILE.py or FILE.py:FUNCTION"
        )
    metrics = [*OTHER_METRICS, *[parse(spec)[-1] for spec in functions]]
    for name in metrics:
        if metrics.count(name) > 1:
            raise ValueError(
                f"--reward: two metrics would be score_{name}; rename a function or its file"
            )
    if weights and len(weights) != len(names):
        raise ValueError(f"--reward-weights: {len(weights)} weights for {len(names)} rewards")
    return Rewards(model, functions, weights or (1.0,) * len(names))


def parse(spec: str) -> tuple[Path, str, str]:
    """The file of FILE.py or FILE.py:FUNCTION, the function, and the name of its metric."""
    file, function = SPEC.fullmatch(spec).groups()
    path = Path(file)
    return path, function or "score", function or path.stem


def load_function(spec: str) -> RewardFunction:
    """Execute the file of FILE.py or FILE.py:FUNCTION, and find the function: `score` if none is
    named.

    Raises InputError if the file is missing or has no such function.
    """
    path, attribute, name = parse(spec)
    check_file(path, "give --reward a file with a function score(prompts, responses)")
    sys.path.append(str(path.resolve().parent))  # it may import files beside it
    function = getattr(load_code(path, spec), attribute, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {path} has no function {attribute}")
    return RewardFunction(name, path, function)


def part_means(functions: tuple[RewardFunction, ...], parts: Tensor) -> dict[str, float]:
    """The mean of each reward's scores, parts (B, K), by name; empty if there is only one reward.

    The K columns are those of the functions, after that of the reward model if there is one.
    """
    if parts.size(1) == 1:
        return {}
    means = parts.mean(dim=0).tolist()
    names = ["model", *[function.name for function in functions]]
    return {f"score_{name}": mean for name, mean in zip(names[-len(means) :], means)}
