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
from rlhf.run.files import check_file, digests
from rlhf.run.user_code import PREFIX, call_score, load_code

RESERVED_NAMES = ("model", "std")  # ppo.csv has score_model and score_std
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
    weights: tuple[float, ...]

    def load_functions(self) -> tuple[RewardFunction, ...]:
        """Execute the files, and find the functions: `score` if none is named.

        Raises InputError if a file is missing or has no such function, or if two have one name.
        """
        functions = {}
        for spec in self.functions:
            function = load_function(spec)
            if function.name in functions or function.name in RESERVED_NAMES:
                raise InputError(
                    f"--reward {spec}: the metric score_{function.name} exists already; rename the "
                    f"function or the file"
                )
            functions[function.name] = function
        return tuple(functions.values())


def named_rewards(names: tuple[str, ...], weights: tuple[float, ...], default: Path) -> Rewards:
    """What the flags name; without names, the reward model `default`.

    Raises ValueError if they name more than one model, or weights of another number.
    """
    names = names or (str(default),)
    functions = tuple(name for name in names if SPEC.fullmatch(name))
    models = [name for name in names if name not in functions]
    if len(models) > 1 or models and not models[0].endswith(".pt"):
        raise ValueError(
            f"--reward {' '.join(models)}: give one reward model FILE.pt at most, and functions as "
            f"FILE.py or FILE.py:FUNCTION"
        )
    if weights and len(weights) != len(names):
        raise ValueError(f"--reward-weights: {len(weights)} weights for {len(names)} rewards")
    by_name = dict(zip(names, weights or [1.0] * len(names)))
    in_order = [by_name[name] for name in (*models, *functions)]
    return Rewards(Path(models[0]) if models else None, functions, tuple(in_order))


def reward_name(spec: str) -> str:
    """FUNCTION or, without it, FILE; "model" for a reward model."""
    if not SPEC.fullmatch(spec):
        return "model"
    file, name = SPEC.fullmatch(spec).groups()
    return name or Path(file).stem


def load_function(spec: str) -> RewardFunction:
    """The function of FILE.py or FILE.py:FUNCTION. Raises InputError if there is none."""
    file, name = SPEC.fullmatch(spec).groups()
    path = check_file(Path(file), "give --reward a file with a function score(prompts, responses)")
    sys.path.append(str(path.resolve().parent))  # it may import files beside it
    function = getattr(load_code(path, PREFIX + spec), name or "score", None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {path} has no function {name or 'score'}")
    return RewardFunction(reward_name(spec), path, function)


def part_means(model, functions: tuple[RewardFunction, ...], parts: Tensor) -> dict[str, float]:
    """The mean of each reward's scores, parts (B, K), by name; empty if there is only one reward.

    model: the reward model, or None.
    """
    names = [function.name for function in functions]
    if model is not None:
        names.insert(0, "model")
    if len(names) == 1:
        return {}
    means = parts.mean(dim=0).tolist()
    return {f"score_{name}": mean for name, mean in zip(names, means)}


def function_digests(functions: tuple[RewardFunction, ...]) -> dict[str, str]:
    """{"reward NAME": SHA-256 of its file}."""
    return digests(**{f"reward {function.name}": function.path for function in functions})
