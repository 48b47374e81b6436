"""A data set's judge.py: a gold score, from which no training step learns.

    score(prompts, responses)               one number per response; higher is better
    preference_probability(first, second)   optional: P(an annotator prefers the first), given two gold scores

judge.py is code of the data set and runs as such. An error inside it keeps its traceback.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

from rlhf.support.cli import InputError


def load_judge(folder: str) -> ModuleType | None:
    """The data set's judge.py, or None if it has none. It is called once, so that an error shows before a run and not
    at its end."""
    path = Path(folder) / "judge.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("judge_of_the_data", path)
    judge = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no __pycache__ in the user's data
    try:
        spec.loader.exec_module(judge)
    finally:
        sys.dont_write_bytecode = writes
    if not hasattr(judge, "score"):
        raise InputError(f"{path} defines no score(prompts, responses)")
    gold_scores(judge, ["\n\nHuman: Hello.\n\nAssistant:"] * 2, ["Hello.", ""])
    return judge


def gold_scores(judge: ModuleType, prompts: list[str], responses: list[str]) -> list[float]:
    """judge.score, checked: one finite number per response."""
    scores = [float(score) for score in judge.score(prompts, responses)]
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise InputError(f"score() in {judge.__file__} must return one finite number for each of {len(responses)} "
                         f"responses, got {len(scores)}: {str(scores)[:60]}")
    return scores


def vote_probabilities(judge: ModuleType, first: list[float], second: list[float]) -> list[float] | None:
    """P(an annotator prefers the first) for each pair of gold scores; None if the judge does not know it."""
    if not hasattr(judge, "preference_probability"):
        return None
    p = [float(judge.preference_probability(a, b)) for a, b in zip(first, second)]
    if wrong := [x for x in p if not 0 <= x <= 1]:
        raise InputError(f"preference_probability() in {judge.__file__} must return a number from 0 to 1, got "
                         f"{wrong[0]}")
    return p
