"""The closing table: means, wins, and the rows of the best possible policy."""

import math

import pytest
import torch

from rlhf.evaluate import Setting, add_optimum, reference_samples, summarise
from rlhf.data import Prompt


def one(score, kl_ref, gold=None, ended=True):
    return {"prompt": "p", "response": "r", "score": score, "gold": gold, "kl_ref": kl_ref, "length": 4, "ended": ended}


def test_summarise_by_hand():
    """Scores 1 and 3, KL 1 and 2 at kl_coef 1/2: J = 2 - 3/4. Gold 5 and 0 against 5 and 1: a tie and a loss, 1/4."""
    row = summarise("x", [one(1, 1, 5.0), one(3, 2, 0.0, ended=False)], [one(9, 0, 5.0), one(9, 0, 1.0)], 0.5)
    assert row == {"policy": "x", "score": 2, "gold": 2.5, "kl_ref": 1.5, "objective": 1.25, "length": 4,
                   "eos_rate": 0.5, "win_rate_vs_sft": 0.25, "prompts": 2}
    assert summarise("x", [one(9, 0)], [one(1, 0)], 0.5)["win_rate_vs_sft"] == 1  # without a judge, by score


def test_add_optimum_by_hand():
    """One prompt, scores 2 ln 3, 0, 0, 0 and kl_coef 2, as in test_optimum_by_hand: score ln 3, KL ln 2 - 1/2 ln 3,
    J* = 2 ln(3/2); gold 4 0 0 0 becomes 4 * 1/2. On that prompt PPO has score 1, KL 0.09 and gold 1, in the table score
    1.5, KL 0.2 and gold 3, so they move by 0.5, 0.11 and 2. best_of_n: KL 0.2 in the table is nearest to n = 2,
    ln 2 - 1/2, and half of all pairs hold the best sample: score ln 3, gold 2."""
    ln2, ln3 = math.log(2), math.log(3)
    scores, golds = torch.tensor([[2 * ln3, 0, 0, 0]], dtype=torch.float64), torch.tensor([[4.0, 0, 0, 0]])
    table = [summarise("sft", [one(0.25, 0, 0.0)], [one(0, 0, 0.0)], 2.0),
             summarise("ppo", [one(1.5, 0.2, 3.0)], [one(0, 0, 0.0)], 2.0)]
    text = add_optimum(table, [one(1, 0.08, 1.0), one(1, 0.1, 1.0)], scores, golds.double(), 2.0)
    sft, ppo, best, optimal = table
    assert best["policy"] == "best_of_n" and "n = 2, whose KL is nearest to PPO's\n" in text
    assert best["score"] == pytest.approx(ln3 + 0.5) and best["kl_ref"] == pytest.approx(ln2 - 0.5)
    assert best["gold"] == pytest.approx(4)
    assert optimal["score"] == pytest.approx(ln3 + 0.5) and optimal["kl_ref"] == pytest.approx(ln2 - ln3 / 2 + 0.11)
    assert optimal["gold"] == pytest.approx(4)
    assert optimal["objective"] == pytest.approx(2 * math.log(1.5) + 0.5 - 0.22)
    assert sft["optimality"] == 0 and optimal["optimality"] == 1
    assert ppo["optimality"] == pytest.approx((1.1 - 0.25) / (2 * math.log(1.5) + 0.03))
    # The halves, 2 ln 3 and 0, then 0 and 0: J* is 2 ln 2 and 0, so ln 2 on average, in place of 2 ln(3/2). As a share
    # of the optimum's gain, 2 ln(3/2) + 0.03, and times PPO's optimality:
    bias = (2 * math.log(1.5) - ln2) / (2 * math.log(1.5) + 0.03) * ppo["optimality"]
    assert f"too high by {bias:.3f} or more" in text
    assert "sample size 3.0\non average, 3.0 at least" in text
    assert "warning" in text


def test_standard_error_by_hand():
    """Two prompts whose samples all score 2 and 4, which are their J*; kl_coef 1. PPO answers the first with J = 1 and
    2, the second with 3.5 and 3.5: it lacks 1/2 and 1/2. With 1 and 0 in place of 1 and 2 it lacks 3/2 and 1/2:
    standard deviation 1/sqrt 2, standard error 1/2. J of the table: 0 for sft, 2 for PPO, so J* is 2.5 and 3, and
    optimality 2 / (2 + L) has the slope -2 / (2 + L)^2 = -2/9 at L = 1."""
    scores = torch.tensor([[2.0, 2, 2, 2], [4, 4, 4, 4]], dtype=torch.float64)
    for second, error in ((2, 0.0), (0, 0.5 * 2 / 9)):
        table = [summarise("sft", [one(0, 0)], [one(0, 0)], 1.0), summarise("ppo", [one(3, 1)], [one(0, 0)], 1.0)]
        ours = [one(2, 1), one(4, 0.5), one(second, 0), one(4.5, 1)]
        text = add_optimum(table, ours, scores, None, 1.0)
        # PPO's KL of 1 is beyond n = 2, ln 2 - 1/2, and nearer to that of n = 3, ln 3 - 2/3
        assert "n = 2, the largest that 4 samples allow; PPO's KL is larger\n" in text
        assert f"has a standard error of {error:.3f}\nfrom these prompts, and is too high by 0.000" in text
        assert table[3]["objective"] == pytest.approx(2.5 if second else 3)


def test_a_policy_below_its_reference_looks_worse_than_it_is():
    """Scores 2 ln 3, 0, 0, 0 and kl_coef 2 again, J* = 2 ln(3/2). PPO has J = 0 there and -1/2 in the table, SFT 0: so
    J* is 2 ln(3/2) - 1/2 = G, the optimality -1/2 / G. Half of the samples give ln 2: half a unit over G^2 times as
    much lower; and a J* that is too low makes -1/2 / G too low."""
    ln2, scores = math.log(2), torch.tensor([[2 * math.log(3), 0, 0, 0]], dtype=torch.float64)
    table = [summarise("sft", [one(0, 0)], [one(0, 0)], 2.0), summarise("ppo", [one(-0.5, 0)], [one(0, 0)], 2.0)]
    text = add_optimum(table, [one(0, 0)], scores, None, 2.0)
    G = 2 * math.log(1.5) - 0.5
    assert table[1]["optimality"] == pytest.approx(-0.5 / G)
    assert f"too low by {(2 * math.log(1.5) - ln2) * 0.5 / G**2:.3f} or more" in text and "warning" in text

    scores = torch.tensor([[2.0, 2, 2, 2], [4, 4, 4, 4]], dtype=torch.float64)  # as in test_standard_error_by_hand
    table = [summarise("sft", [one(2.5, 0)], [one(0, 0)], 1.0), summarise("ppo", [one(3, 1)], [one(0, 0)], 1.0)]
    text = add_optimum(table, [one(2, 1), one(4, 0.5), one(0, 0), one(4.5, 1)], scores, None, 1.0)
    assert "has a standard error of 1.000\n" in text  # 1/2 in what it lacks, times |-1| / (1/2)


def test_a_reference_that_cannot_be_bettered_has_no_optimality():
    """All samples score the same, and PPO is no better: nothing to divide by, and the line says not to trust it."""
    table = [summarise(name, [one(1, 0)], [one(1, 0)], 0.5) for name in ("sft", "ppo")]
    text = add_optimum(table, [one(1, 0)], torch.ones(1, 4, dtype=torch.float64), None, 0.5)
    assert [row["optimality"] for row in table] == [None] * 4 and "warning" in text
    assert table[3]["gold"] is None and table[3]["score"] == 1


def test_reference_samples_are_the_references(gpt, reward_model):
    """Means over many samples are near those of an exact sum: responses of one token, so 11 of them."""

    class Tokens:
        pad_id, eos_id = 0, 10

        @staticmethod
        def decode(ids):
            return "".join(map(str, ids))

    class Judge:
        __file__ = "judge.py"

        @staticmethod
        def score(prompts, responses):
            return [len(response) for response in responses]

    prompt = Prompt("1 2", [1, 2])
    scores, golds = reference_samples([prompt], 4000, Setting(gpt, reward_model, Tokens, Judge, 1, -7.0))
    with torch.no_grad():
        p = torch.softmax(gpt(torch.tensor([[1, 2]]))[0, -1], dim=0)
        ended = reward_model(torch.tensor([[1, 2, 10]]), torch.tensor([3])).item()
    exact = p[10].item() * ended + (1 - p[10].item()) * -7
    assert scores.shape == golds.shape == (1, 4000)
    assert scores.mean().item() == pytest.approx(exact, abs=4 * scores.std().item() / 4000**0.5)
    assert set(golds[0].tolist()) == {0.0, 1.0} and ((golds[0] == 0) == (scores[0] > -7)).all()
