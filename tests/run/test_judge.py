"""A data set's judge.py: what it must give, and the accuracies that follow from it."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf.data import Comparison, Prompt
from rlhf.run.errors import InputError
from rlhf.run.judge import (
    gold_scores,
    judge_accuracies,
    load_judge,
    share_positive,
    vote_probabilities,
)


def judge_of(score, **functions):
    """A judge of one response at a time."""
    return SimpleNamespace(
        __file__="judge.py",
        score=lambda prompts, responses: [score(response) for response in responses],
        **functions,
    )


# ---- load_judge ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def score(prompts, responses): return [1.0]",
            "one finite number for each of 2 responses, got 1",
        ),
        (
            "def score(prompts, responses): return [float('nan')] * len(prompts)",
            "one finite number",
        ),
    ],
)
def test_gold_scores_rejects_scores_that_are_none(tmp_path, text, message):
    (tmp_path / "judge.py").write_text(text)
    with pytest.raises(InputError, match=message):
        gold_scores(load_judge(str(tmp_path)), ["?"] * 2, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "error"),
    [("1/0", ZeroDivisionError), ("def score(prompts, responses): return prompts[9]", IndexError)],
)
def test_an_error_inside_the_judge_keeps_its_traceback(tmp_path, text, error):
    (tmp_path / "judge.py").write_text(text)
    with pytest.raises(error):
        gold_scores(load_judge(str(tmp_path)), ["?"] * 2, ["a", "b"])


def test_load_judge_of_a_folder_without_judge_is_none(tmp_path):
    assert load_judge(str(tmp_path)) is None


def test_load_judge_allows_dataclasses(tmp_path):
    """With postponed annotations, dataclasses look up the module that they are defined in."""
    text = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class A:
    x: int

def score(prompts, responses):
    return [A(len(r)).x for r in responses]
"""
    (tmp_path / "judge.py").write_text(text)
    assert load_judge(str(tmp_path)).score(["?"], ["four"]) == [4]


def test_load_judge_leaves_nothing_in_the_data_set(tmp_path):
    (tmp_path / "judge.py").write_text("def score(prompts, responses): return [0] * len(prompts)")
    load_judge(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["judge.py"]


# ---- scores and votes ----


def test_gold_scores_without_a_judge_are_none():
    assert gold_scores(None, ["?", "?"], ["one", "four"]) == [None, None]


def test_gold_scores_are_floats():
    golds = gold_scores(judge_of(len), ["?", "?"], ["one", "four"])
    assert golds == [3.0, 4.0] and all(type(gold) is float for gold in golds)


def test_gold_scores_reject_infinity():
    with pytest.raises(InputError, match=r"score\(\) in judge.py must return one finite number"):
        gold_scores(judge_of(lambda response: math.inf), ["?"], ["one"])


def test_vote_probabilities_of_a_judge_without_noise_are_none():
    assert vote_probabilities(SimpleNamespace(__file__="judge.py"), [1.0], [2.0]) is None


def test_vote_probabilities_come_from_the_judge():
    judge = SimpleNamespace(__file__="judge.py", preference_probability=lambda a, b: a / b)
    assert vote_probabilities(judge, [1.0, 0.0], [2.0, 3.0]) == [0.5, 0.0]


@pytest.mark.parametrize("p", [1.5, -0.5, math.nan])
def test_vote_probabilities_reject_what_is_no_probability(p):
    judge = SimpleNamespace(__file__="judge.py", preference_probability=lambda a, b: a)
    with pytest.raises(InputError, match="a number from 0 to 1"):
        vote_probabilities(judge, [0.5, p], [2.0, 2.0])


# ---- accuracies ----


def test_share_positive_counts_a_tie_half():
    """Two of four are positive, one is 0: 2.5 / 4."""
    assert share_positive(torch.tensor([0.1, -3.0, 0.0, 7.0])) == 0.625


PROMPT = Prompt("?", [1])
# Texts of 3 against 1 letters, 1 against 2, 2 against 2.
ROWS = [
    Comparison(PROMPT, [2, 9], [3, 9], ("aaa", " b")),
    Comparison(PROMPT, [2, 9], [3, 9], ("a ", "bb")),
    Comparison(PROMPT, [2, 9], [3, 9], ("aa", "bb")),
]


def test_judge_accuracies_match_hand_computation():
    """Gold is the length: 3 against 1, 1 against 2, 2 against 2. One win, one loss and one tie are
    1/2. P(the longer one wins) is 0.9, P of a tie 0.5: max(p, 1 - p) is 0.9, 0.9 and 0.5."""

    def preference_probability(first, second):
        return 0.5 if first == second else 0.9 if first > second else 0.1

    judge = judge_of(len, preference_probability=preference_probability)
    accuracies = judge_accuracies(judge, ROWS)
    assert accuracies == pytest.approx({"judge_accuracy": 0.5, "bayes_accuracy": 2.3 / 3})


def test_judge_accuracies_without_known_noise_have_no_bayes_accuracy():
    assert judge_accuracies(judge_of(len), ROWS[:1]) == {"judge_accuracy": 1.0}


def test_judge_accuracies_without_a_judge_are_empty():
    assert judge_accuracies(None, ROWS) == {}
