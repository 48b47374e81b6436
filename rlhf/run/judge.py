"""A data set's judge.py: a gold score, from which no training step learns.

    score(prompts, responses)               one number per response; higher is better
    preference_probability(first, second)   optional: P(an annotator prefers the first), given two
                                            gold scores
    knows(prompt)                           optional: whether it can score responses to a prompt,
                                            for `rlhf.tools.sample`

judge.py is code of the data set and runs as such.
"""

from types import ModuleType

import torch
from torch import Tensor

from rlhf.run.errors import InputError
from rlhf.run.files import data_folder
from rlhf.run.user_code import call_score, load_code


def load_judge(folder: str) -> ModuleType | None:
    """The data set's judge.py, or None if it has none."""
    path = data_folder(folder) / "judge.py"
    return load_code(path, "judge") if path.is_file() else None


def gold_scores(
    judge: ModuleType | None, prompts: list[str], responses: list[str]
) -> list[float] | list[None]:
    """judge.score, checked: one finite number per response. Without a judge, one None each."""
    if judge is None:
        return [None] * len(responses)
    return call_score(judge.score, f"score() in {judge.__file__}", prompts, responses)


def vote_probabilities(
    judge: ModuleType, first: list[float], second: list[float]
) -> list[float] | None:
    """P(an annotator prefers the first) for each pair of gold scores.

    None if the judge has no preference_probability. Raises InputError if that is no probability.
    """
    if not hasattr(judge, "preference_probability"):
        return None
    probabilities = [float(judge.preference_probability(*golds)) for golds in zip(first, second)]
    for p in probabilities:
        if not 0 <= p <= 1:
            raise InputError(
                f"{judge.__file__}: preference_probability() gave {p}, not a number from 0 to 1"
            )
    return probabilities


def share_positive(margins: Tensor) -> float:
    """Share of pairs whose chosen side scores higher; equal scores count half.

    margins: (N,) score of the chosen side minus that of the rejected one.
    """
    return (margins.sign().float().mean().item() + 1) / 2


def judge_accuracies(judge: ModuleType | None, rows: list) -> dict[str, float]:
    """Accuracies on these rlhf.data.Comparison of a reward model that equals the judge.

    judge_accuracy: on the votes as they were drawn, which lie a little off their expectation.
    bayes_accuracy: its expectation, the mean of max(p, 1 - p) with p the annotator's probability;
        only if the judge knows p. If the judge made the votes, no model can do better.
    """
    if judge is None:
        return {}
    prompts = [row.prompt.text for row in rows]
    golds = []
    for side in (0, 1):  # chosen, rejected
        responses = [row.texts[side].strip() for row in rows]
        golds.append(gold_scores(judge, prompts, responses))
    chosen, rejected = torch.tensor(golds)  # (N,), (N,)
    accuracies = {"judge_accuracy": share_positive(chosen - rejected)}
    probabilities = vote_probabilities(judge, *golds)
    if probabilities is not None:
        best = [max(p, 1 - p) for p in probabilities]
        accuracies["bayes_accuracy"] = sum(best) / len(best)
    return accuracies
