"""A data set's judge.py: a gold score, from which no training step learns.

    score(prompts, responses)               one number per response; higher is better
    preference_probability(first, second)   optional: P(an annotator prefers the first), given two gold scores

judge.py is code of the data set and runs as such. An error inside it keeps its traceback.
"""

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
    judge = sys.modules["judge"] = ModuleType("judge")  # dataclasses look their module up there
    judge.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), judge.__dict__)  # an import would leave a __pycache__ in the data
    gold_scores(judge, ["\n\nHuman: Hello.\n\nAssistant:"] * 2, ["Hello.", ""])
    return judge


def gold_scores(judge: ModuleType, prompts: list[str], responses: list[str]) -> list[float]:
    """judge.score, checked: one finite number per response."""
    scores = [float(score) for score in judge.score(prompts, responses)]
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise InputError(f"score() in {judge.__file__} must return one finite number for each of {len(responses)} "
                         f"responses, got {len(scores)}: {str(scores)[:60]}")
    return scores
