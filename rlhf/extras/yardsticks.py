"""What a reward model's accuracy is compared with: the judge's, and its own with the prompts of other rows."""

from types import ModuleType

import torch

from rlhf.support.cli import InputError
from rlhf.support.judge import gold_scores
from rlhf.support.runtime import make_generator


def share_positive(margins) -> float:
    """Share of pairs in which the chosen side scores higher; equal scores count half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


def swap_prompts(rows, seed: int, limit: int):
    """Give every comparison the prompt of another row: what is left can be judged without reading the question.
    Rows that no longer fit the context are left out."""
    order = torch.randperm(len(rows), generator=make_generator("cpu", seed, "swap")).tolist()
    prompts = {row: rows[after].prompt for row, after in zip(order, order[1:] + order[:1])}
    swapped = [row._replace(prompt=prompts[i]) for i, row in enumerate(rows)]
    return [row for row in swapped if len(row.prompt.tokens) + max(len(row.chosen), len(row.rejected)) <= limit]


def judge_accuracies(gold_judge, rows, tokenizer) -> dict[str, float]:
    """What a reward model that equals the judge would reach on these comparisons. If the judge made the votes and
    knows its annotators' noise, that is the best there is.

    bayes_accuracy: expected, mean of max(p, 1 - p) with p the annotator's probability; the best that any model can do.
    judge_accuracy: on the votes as they were drawn, which lie a little off their expectation.
    """
    prompts = [row.prompt.text for row in rows]
    chosen, rejected = (
        gold_scores(gold_judge, prompts, [tokenizer.decode(side[:-1]).strip() for side in sides])
        for sides in ([row.chosen for row in rows], [row.rejected for row in rows]))
    result = {"judge_accuracy": share_positive(torch.tensor(chosen) - torch.tensor(rejected))}
    if (p := vote_probabilities(gold_judge, chosen, rejected)) is not None:
        result["bayes_accuracy"] = sum(max(x, 1 - x) for x in p) / len(p)
    return result


def vote_probabilities(judge: ModuleType, first: list[float], second: list[float]) -> list[float] | None:
    """P(an annotator prefers the first) for each pair of gold scores; None if the judge does not know it."""
    if not hasattr(judge, "preference_probability"):
        return None
    p = [float(judge.preference_probability(a, b)) for a, b in zip(first, second)]
    if wrong := [x for x in p if not 0 <= x <= 1]:
        raise InputError(f"{judge.__file__}: preference_probability() gave {wrong[0]}, not a number from 0 to 1")
    return p
