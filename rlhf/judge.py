"""A data set's judge.py: a gold score, from which no training step learns. Loaded, called, and its answers checked.

    score(prompts, responses)               one number for each pair, the higher the better
    preference_probability(first, second)   optional: how probably an annotator prefers the first of two gold scores
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

from rlhf.common import InputError


def load_judge(folder: str) -> ModuleType | None:
    """The data set's judge.py, or None where it has none. It is called once, so that a fault shows before a run and
    not at its end."""
    path = Path(folder) / "judge.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("judge_of_the_data", path)
    judge = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no __pycache__ in the user's data
    try:
        spec.loader.exec_module(judge)
    except Exception as error:
        raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
    if not hasattr(judge, "score"):
        raise InputError(f"{path} defines no score(prompts, responses)")
    gold_scores(judge, ["\n\nHuman: Hello.\n\nAssistant:"] * 2, ["Hello.", ""])
    return judge


def gold_scores(judge: ModuleType, prompts: list[str], responses: list[str]) -> list[float]:
    """judge.score, checked: one finite number for each response. Raises InputError where it fails."""
    try:
        scores = [float(score) for score in judge.score(prompts, responses)]
    except Exception as error:
        raise InputError(f"score() in {judge.__file__} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise InputError(f"score() in {judge.__file__} must return one finite number for each of {len(responses)} "
                         f"responses, got {len(scores)}: {str(scores)[:60]}")
    return scores


def vote_probabilities(judge: ModuleType, first: list[float], second: list[float]) -> list[float] | None:
    """How probably an annotator prefers the first of each pair, given the gold of both; None of a judge that does not
    know its annotators' noise. Raises InputError where the judge's preference_probability fails."""
    if not hasattr(judge, "preference_probability"):
        return None
    try:
        p = [float(judge.preference_probability(a, b)) for a, b in zip(first, second)]
    except Exception as error:
        raise InputError(f"preference_probability() in {judge.__file__} failed: {type(error).__name__}: "
                         f"{error}") from error
    if faulty := [x for x in p if not 0 <= x <= 1]:
        raise InputError(f"preference_probability() in {judge.__file__} must return a number from 0 to 1, got "
                         f"{faulty[0]}")
    return p
