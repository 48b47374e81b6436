"""docs.experiments.votes: the judge as annotator."""

import random
from types import SimpleNamespace

import pytest

from data import label_pairs
from data.label_votes import Pair
from docs.experiments.votes import VotesConfig, judge_answer, main
from rlhf.run.flags import parse_cli
from tests.helpers import rows


def test_judge_as_annotator_stops_at_count(trained, tmp_path, monkeypatch, capsys):
    """Two calls write the same rows as one. The model is hardly trained and seldom ends a response,
    so here each response counts as ended."""
    data, out, _ = trained
    monkeypatch.setattr(label_pairs, "has_ended", lambda tokens, *_: tokens[:, 0] == tokens[:, 0])

    def run(name, count):
        flags = ["--checkpoint", out / "sft.pt", "--data", data, "--out", tmp_path / name]
        settings = ["--device", "cpu", "--max-new-tokens", 8, "--count", count]
        main(parse_cli(VotesConfig, [str(flag) for flag in (*flags, *settings)]))
        return rows(tmp_path / name)

    run("parts.csv", 7)
    got = run("parts.csv", 20)
    assert run("whole.csv", 20) == got and len(got) == 20
    assert "next: python train_reward.py --comparison-files" in capsys.readouterr().out


def test_judge_votes_for_higher_gold_or_with_known_noise():
    """Without preference_probability the higher gold wins, and equal golds tie. With it, the share
    of votes is that probability."""
    golds = {"a": 1.0, "b": 0.0, "c": 0.0}

    def score(prompts, responses):
        return [golds[response] for response in responses]

    judge = SimpleNamespace(__file__="judge.py", score=score)
    rng = random.Random(0)
    votes = [judge_answer(judge, Pair(0, "p", *sides), rng) for sides in ("ab", "ba", "bc")]
    assert votes == ["first", "second", "tie"]
    judge.preference_probability = lambda a, b: 0.8 if a > b else 0.2
    votes = [judge_answer(judge, Pair(0, "p", "a", "b"), rng) for _ in range(4000)]
    share = votes.count("first") / 4000
    assert share == pytest.approx(0.8, abs=0.02)  # three standard deviations: 0.019
    assert votes.count("tie") == 0
