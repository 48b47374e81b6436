"""Warnings of runs that learn nothing and of measures that mean little."""

from types import SimpleNamespace

import pytest

from rlhf.run import warnings
from rlhf.run.warnings import Warnings, of_step
from train_ppo import PPOConfig


def test_a_warning_is_printed_once_as_it_arises_and_again_at_the_end(capsys):
    run = Warnings()
    for text in ("early", "", "early", "late"):
        run.add(text)
    assert capsys.readouterr().out == "warning: early\nwarning: late\n"
    run.close(["last"])
    assert capsys.readouterr().out == "warning: early\nwarning: late\nwarning: last\n"


@pytest.mark.parametrize(("steps", "warns"), [(100, False), (101, True)])
def test_count_epochs_warns_above_ten(capsys, steps, warns):
    """100 steps of 4 rows are ten times 40 rows."""
    cfg = SimpleNamespace(steps=steps, batch_size=4)
    text = Warnings().count_epochs(cfg, 40, "demonstrations", "7")
    assert text == f"40 demonstrations, {steps / 10:.1f} epochs (7 held out)"
    assert ("will overfit" in capsys.readouterr().out) == warns


# ---- PPO: equal scores ----


def rollouts(*stds, score=0.1):
    return [{"score": score, "score_std": std} for std in stds]


@pytest.mark.parametrize(
    ("rows", "steps", "warns"),
    [
        (rollouts(0, 0, 0), 9, True),
        (rollouts(1, 0, 1e-9, 0), 9, True),  # rounding
        (rollouts(4e-4, 4e-4, 4e-4, score=1000.0), 9, True),
        (rollouts(0, 0), 9, False),  # a few steps
        (rollouts(0, 0), 2, True),  # all steps
        (rollouts(0), 1, True),
        (rollouts(0, 1e-3, 0), 9, False),
        (rollouts(0, 0, 0, 0.5), 9, False),
    ],
)
def test_equal_scores_looks_at_the_last_three_steps(rows, steps, warns):
    assert bool(warnings.equal_scores(rows, PPOConfig(steps=steps))) == warns


def test_equal_scores_of_one_response_are_no_warning():
    cfg = PPOConfig(batch_size=1, minibatch_size=1)
    assert warnings.equal_scores(rollouts(0, 0, 0), cfg) == ""


# ---- at the end ----


def valid(*losses):
    rows = []
    for number, loss in enumerate(losses, start=1):
        rows.append({"step": 20 * number - 10, "loss": 12.0, "valid": None})
        rows.append({"step": 20 * number, "loss": 1.0, "valid": loss})
    return rows


def test_sft_warns_if_the_held_out_loss_has_risen_by_more_than_one_percent():
    (text,) = warnings.of_sft(valid(6.2, 7.0, 11.42))
    assert text.startswith("overfitting: valid was 6.200 after step 20 and is 11.420 at the end")
    assert warnings.of_sft(valid(0.6, 0.5, 0.504)) == []
    assert warnings.of_sft(valid(0.5)) == []


@pytest.mark.parametrize(("last", "warns"), [(11.87, False), (11.89, True), (13.0, True)])
def test_sft_warns_if_the_loss_has_not_fallen(last, warns):
    """It was 12 at first, and 1 % less is 11.88."""
    texts = warnings.of_sft(valid(last))
    assert warns == any("hardly anything was learned: the loss was 12.000" in x for x in texts)


def rewarded(accuracy, swapped, pairs, *heldout):
    rows = [{"step": 10 * n, "heldout": value} for n, value in enumerate(heldout)]
    result = {"accuracy": accuracy, "swapped_accuracy": swapped, "comparisons": pairs}
    return " ".join(warnings.of_reward_model(rows, result))


def test_reward_model_that_does_not_read_the_prompt_is_warned_of():
    """Within 1 / sqrt(pairs), about two standard errors: 0.1 of 100 pairs, 0.02 of 2,500."""
    assert rewarded(0.9, 0.6, 100) == ""
    for accuracy, swapped, pairs in ((0.9, 0.85, 100), (0.9, 0.95, 100), (0.827, 0.827, 2500)):
        text = rewarded(accuracy, swapped, pairs)
        assert text.startswith(f"swapped_accuracy {swapped:.3f} is as high as accuracy")
        assert text.endswith("the reward model does not read the prompt")
    assert rewarded(0.9, 0.87, 2500) == ""
    assert rewarded(0.9, None, 2500) == ""  # all prompts are the same


def test_reward_model_near_chance_is_warned_of_whatever_the_prompt():
    assert rewarded(0.54, 0.54, 2500).startswith("accuracy is near 0.5 or below")


def test_reward_model_that_was_better_before_the_end_is_warned_of():
    """0.72 of 500 pairs, then 0.65: more than 1 / sqrt(500) = 0.045 less."""
    text = rewarded(0.65, 0.5, 2500, None, 0.6, 0.72, 0.7)
    assert "wrong held-out pairs was 0.280 after step 20 and is 0.350 at the end" in text
    assert rewarded(0.68, 0.5, 2500, None, 0.6, 0.72, 0.7) == ""
    assert rewarded(0.65, 0.5, 2500, None, None) == ""


@pytest.mark.parametrize(("pairs", "error"), [(1, "0.50"), (16, "0.12"), (20, None)])
def test_measures_from_few_rows_are_said_to_be(pairs, error):
    """The standard error of a share is at most 0.5 / sqrt(rows)."""
    text = rewarded(1.0, None, pairs)
    assert text == (
        f"evaluated on {pairs} comparisons only: standard errors of shares are up to {error}"
        if error
        else ""
    )


def responses(*scores):
    return [SimpleNamespace(score=score) for score in scores]


def test_policy_is_warned_of_if_its_score_has_not_risen():
    """Gains of 1 and 0, thirty of each: 0.5 with an error of 0.5 / sqrt(60) = 0.065. Gains of 0.1
    more than 1 and less than -1: 0.1 with 1 / sqrt(60) = 0.129."""
    before = responses(*[0.0] * 60)
    assert warnings.of_policy("PPO", before, responses(*[0.0, 1.0] * 30)) == []
    for after in ([1.1, -0.9] * 30, [0.0] * 60, [-1.0, -0.5] * 30):
        (text,) = warnings.of_policy("PPO", before, responses(*after))
        assert text.startswith("PPO did not raise the score: ")
    (text,) = warnings.of_policy("DPO", before, responses(*[1.1, -0.9] * 30))
    assert "+0.100 on held-out prompts, with a standard error of 0.129" in text


def test_policy_evaluated_on_few_prompts_is_said_to_be():
    texts = warnings.of_policy("PPO", responses(0.0, 0.0), responses(1.0, 1.0))
    assert texts == [
        "evaluated on 2 prompts only: standard errors of shares are up to 0.35",
    ]


def test_of_step_warns_if_an_end_scores_less_than_a_cut():
    """Those that are cut off have -3. The mean of all is -6, so those that end have less."""
    row = {"score": -6.0, "score_std": 1.0}
    cfg = PPOConfig()
    text = of_step([row], cfg)
    assert "responses score -6.00 on average, and those that are cut off -3" in text
    assert of_step([row], PPOConfig(missing_eos_score=None)) == ""
    assert of_step([row], PPOConfig(missing_eos_score=-6.5)) == ""
    assert of_step([{**row, "score": -3.0}], cfg) == ""  # -3 each


def test_of_step_warns_of_an_odd_scale_of_functions_only():
    row = {"score": 10.0, "score_std": 20.0}
    text = of_step([row], PPOConfig(reward=("x.py",)))
    assert "deviate by 20 at first" in text and "--reward-weights by 0.05" in text
    assert of_step([row], PPOConfig()) == ""
    assert of_step([{**row, "score_std": 1.0}], PPOConfig(reward=("x.py",))) == ""
