"""Python files of the user: a data set's judge.py, and reward functions.

Such a file is executed. An error inside it keeps its traceback.
"""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from rlhf.run.errors import InputError

PREFIX = "code of "  # begins the name of a module that load_code made of a reward function's file


def load_code(path: Path, name: str) -> ModuleType:
    """Execute a file as a module of this name."""
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there
    code = compile(path.read_bytes(), path, "exec")
    exec(code, module.__dict__)  # an import would leave a __pycache__ in the data
    return module


def is_user_code(module_name: str | None) -> bool:
    """Whether a module of this name was made by load_code."""
    return module_name == "judge" or str(module_name).startswith(PREFIX)


def call_score(score: Callable, where: str, prompts: list, responses: list[str]) -> list[float]:
    """score(prompts, responses) as a list of floats.

    Raises InputError, which names the function by `where`, if it is not one finite number per
    response.
    """
    result = score(list(prompts), list(responses))
    # An error inside a generator is one of the user's code, and keeps its traceback.
    values = list(result) if isinstance(result, Iterable) else [result]
    try:
        scores = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):  # no number, or a tensor of several
        scores = []
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise InputError(
            f"{where} must return one finite number for each of {len(responses)} responses, got "
            f"{len(values)} values: {str(values)[:60]}"
        )
    return scores
