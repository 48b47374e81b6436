"""The measures of docs/experiments/toxicity.py, by hand."""

import csv
import json
import math

import pytest
from torch.testing import assert_close

from docs.experiments import toxicity
from rlhf.run.errors import InputError
from tests.helpers import f64


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, I can't help you with that.",
        "I’m not sure what you mean.",
        "I can't answer that question.",
        "I don't know.",
        "Well. I cannot recommend anything.",
        "I would rather not say. Take a walk.",
        "I don't really understand the question.",
    ],
)
def test_refusals_are_found(text):
    assert toxicity.refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "Gravity pulls masses together.",
        "You can't go wrong with pasta.",
        "If you don't know, ask.",
        "You cannot recommend it too often.",
        "Don't be afraid of salt.",
        "Try yoga. Breathe. I'm sorry it is so short.",  # the third sentence
        "",
    ],
)
def test_other_responses_are_no_refusals(text):
    assert not toxicity.refuses(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("What do you mean?", True), ("Why? How?", True), ("Why? So.", False), ("", True)],
)
def test_asks_back(text, expected):
    assert toxicity.asks_back(text) is expected


def test_difference_by_hand():
    """Changes -1, 0, -2, -1: mean -1, variance 2/3, so 1.96 sqrt(2/3 / 4)."""
    mean, half_width = toxicity.difference(f64(0, 1, 0, 1), f64(1, 1, 2, 2))
    assert_close((mean, half_width), (-1.0, 1.96 * math.sqrt(1 / 6)))


def responses(path, column, *checkpoints):
    lines = []
    for checkpoint, texts in zip(("sft.pt", "ppo.pt"), checkpoints):
        for number, (text, gold) in enumerate(texts):
            line = {"checkpoint": checkpoint, "prompt": f"Q{number}?", "response": text}
            lines.append(json.dumps(line | {"ended": True, column: gold}) + "\n")
    path.write_text("".join(lines))
    return str(path)


def test_table_by_hand(tmp_path, capsys):
    before = [("You fool. Go away", -0.9), ("Yes.", -0.1), ("No.", -0.2)]
    after = [("Yes.", -0.1), ("Yes.", -0.1), ("I won't say.", -0.1)]
    file = responses(tmp_path / "a.jsonl", "gold", before, after)
    questions = responses(
        tmp_path / "b.jsonl", "gold", [("So.", 0), ("Why?", 0)], [("I don't know.", 0), ("So.", 0)]
    )
    out = tmp_path / "table.csv"
    toxicity.main(toxicity.ToxicityConfig((file,), (questions,), out=str(out)))
    expected = {
        "prompts": (3, 3),
        "distinct": (1, 2 / 3),
        "words": (2, 5 / 3),
        "offensive": (0.4, 0.1),
        "offensive_change": (0, -0.3),
        "above_half": (1 / 3, 0),
        "refused": (0, 100 / 3),
        "refusals": (0, 50),
        "asks_back": (50, 0),
    }
    with out.open(newline="") as file:
        table = list(csv.DictReader(file))
    for name, numbers in expected.items():
        found = [float(row[name]) for row in table]
        assert_close(found, list(map(float, numbers)), rtol=1e-5, atol=0)
    assert "refusals" in capsys.readouterr().out


def test_checkpoint_with_fewer_responses_is_refused(tmp_path):
    file = responses(tmp_path / "a.jsonl", "gold", [("Yes.", 0), ("No.", 0)], [("Yes.", 0)])
    with pytest.raises(InputError, match="have 2, 1 responses; run rlhf.tools.sample to its end"):
        toxicity.main(toxicity.ToxicityConfig((file,)))


def test_verdicts_are_shown(tmp_path, capsys):
    file = responses(tmp_path / "a.jsonl", "gold", [("Yes.", 0), ("I don't know.", 0)])
    toxicity.main(toxicity.ToxicityConfig((file,), (file,), show=9))
    printed = capsys.readouterr().out
    assert "answers: Q0? -> Yes.\n" in printed and "refuses: Q1? -> I don't know.\n" in printed


def test_responses_without_gold_are_refused(tmp_path):
    file = responses(tmp_path / "a.jsonl", "score", [("Yes.", 1)])
    with pytest.raises(InputError, match="has no gold"):
        toxicity.main(toxicity.ToxicityConfig((file,)))


def test_files_are_needed():
    with pytest.raises(InputError, match="give one or more files"):
        toxicity.main(toxicity.ToxicityConfig())
