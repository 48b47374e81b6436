"""Python files of the user: a data set's judge.py, and reward functions.

Such a file is executed. An error inside it keeps its traceback.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from rlhf.run.errors import InputError


def load_code(path: Path, name: str) -> ModuleType:
    """Execute a file as a module of this name."""
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there
    code = compile(path.read_bytes(), path, "exec")
    with keeping_tracebacks(path):
        exec(code, module.__dict__)  # an import would leave a __pycache__ in the data
    return module


@contextlib.contextmanager
def keeping_tracebacks(where: Path | str):
    """Turn errors of the user's code that would pass for a missing file of a run or for a normal
    end into a RuntimeError."""
    try:
        yield
    except (OSError, SystemExit) as error:
        raise RuntimeError(f"{where} raised {error!r}") from error


def call_score(score: Callable, where: str, prompts: list, responses: list[str]) -> list[float]:
    """score(prompts, responses) as a list of floats.

    Raises InputError, which names the function by `where`, if it is not one finite number per
    response.
    """
    with keeping_tracebacks(where):
        result = score(list(prompts), list(responses))
        values = list(result) if isinstance(result, Iterable) else [result]  # or a generator
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
