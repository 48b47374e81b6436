"""The rows best_of_n and optimum of evaluation.csv, and the optimality of PPO: by hand, and as a program."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from rlhf.data import Prompt
from rlhf.evaluate import summarise
from rlhf.rollout import Frozen
from rlhf.support.checkpoints import digests, load_checkpoint, load_policy
from rlhf.support.cli import InputError, parse_cli
from rlhf.tokenizer import find_tokenizer
from rlhf.tools.optimality import OptimalityConfig, add_optimum, load_run, main, reference_samples, trained_file
from tests.helpers import TINY, Digits, f64, rows

LN2, LN3 = math.log(2), math.log(3)


def one(score, kl_ref, gold=None):
    return {"prompt": "p", "response": "r", "score": score, "gold": gold, "kl_ref": kl_ref, "length": 4, "ended": True}


def table_of(sft, ppo, kl_coef):
    """The rows that train_ppo.py writes. The win rates play no part here."""
    return [summarise(name, [row], [row], kl_coef) for name, row in (("sft", sft), ("ppo", ppo))]


# ---- add_optimum ----


def test_add_optimum_matches_hand_computation():
    """One prompt, scores 2 ln 3, 0, 0, 0 and kl_coef 2. As in test_optimum.py: score ln 3, KL ln 2 - 1/2 ln 3,
    J* = 2 ln(3/2), effective sample size 3. Gold 4 0 0 0 becomes 4 * 1/2.

    PPO has score 1, KL 0.09 and gold 1 on that prompt. In the table it has score 1.5, KL 0.2 and gold 3. So both rows
    move by 0.5 in score, 0.11 in KL and 2 in gold.

    best_of_n: the KL nearest to 0.2 is that of n = 2, ln 2 - 1/2. Half of all pairs hold the best sample: score ln 3,
    gold 2. Its KL does not move."""
    table = table_of(one(0.25, 0, 0.0), one(1.5, 0.2, 3.0), kl_coef=2.0)
    text = add_optimum(table, [one(1, 0.08, 1.0), one(1, 0.1, 1.0)], f64([2 * LN3, 0, 0, 0]), f64([4, 0, 0, 0]), 2.0)
    sft, ppo, best, optimal = table
    assert [row["policy"] for row in table] == ["sft", "ppo", "best_of_n", "optimum"]
    assert best["score"] == pytest.approx(LN3 + 0.5) and best["kl_ref"] == pytest.approx(LN2 - 0.5)
    assert best["gold"] == pytest.approx(4)
    assert optimal["score"] == pytest.approx(LN3 + 0.5) and optimal["kl_ref"] == pytest.approx(LN2 - LN3 / 2 + 0.11)
    assert optimal["gold"] == pytest.approx(4)
    assert optimal["objective"] == pytest.approx(2 * math.log(1.5) + 0.5 - 0.22)
    assert sft["optimality"] == 0 and optimal["optimality"] == 1
    assert ppo["optimality"] == pytest.approx((1.1 - 0.25) / (2 * math.log(1.5) + 0.03))
    assert "n = 2, whose KL is nearest to PPO's\n" in text
    assert "sample size 3.0\non average, 3.0 at least" in text


def test_add_optimum_states_the_bias_of_too_few_samples():
    """The table of the test above, with optimality O = 0.85 / G and G = 2 ln(3/2) + 0.03. The halves of the samples,
    2 ln 3 and 0, then 0 and 0, have J* = 2 ln 2 and 0. Their mean ln 2 is lower than 2 ln(3/2). Divided by G and
    multiplied by O this is the bias, and the effective sample size is too small to trust it."""
    table = table_of(one(0.25, 0, 0.0), one(1.5, 0.2, 3.0), kl_coef=2.0)
    text = add_optimum(table, [one(1, 0.08, 1.0), one(1, 0.1, 1.0)], f64([2 * LN3, 0, 0, 0]), f64([4, 0, 0, 0]), 2.0)
    G = 2 * math.log(1.5) + 0.03
    assert f"too high by {(2 * math.log(1.5) - LN2) / G * 0.85 / G:.3f} or more" in text
    assert "warning: that is too few samples to trust" in text


@pytest.mark.parametrize(("second", "error", "objective"), [(2, 0, 2.5), (0, 0.5 * 2 / 9, 3)])
def test_add_optimum_standard_error_matches_hand_computation(second, error, objective):
    """Two prompts whose samples all score 2 and 4, which are their J*. kl_coef 1. Each prompt has two PPO responses.
        second = 2: J = 1 and 2, then 3.5 and 3.5. PPO lacks 1/2 on both prompts: standard error 0.
        second = 0: J = 1 and 0, then 3.5 and 3.5. PPO lacks 3/2 and 1/2: standard deviation 1/sqrt 2, standard error
            1/2.
    In the table J is 0 for sft and 2 for ppo, so J* is 2.5 or 3. Optimality 2 / (2 + L), as a function of what PPO
    lacks, has the slope -2 / (2 + L)^2 = -2/9 at L = 1."""
    table = table_of(one(0, 0), one(3, 1), kl_coef=1.0)
    ours = [one(2, 1), one(4, 0.5), one(second, 0), one(4.5, 1)]
    text = add_optimum(table, ours, f64([2, 2, 2, 2], [4, 4, 4, 4]), None, 1.0)
    assert f"has a standard error of {error:.3f}\nfrom these prompts, and is too high by 0.000" in text
    assert table[3]["objective"] == pytest.approx(objective)


def test_add_optimum_says_if_the_samples_allow_no_larger_n():
    """PPO's KL of 1 is nearer to that of n = 3, ln 3 - 2/3, than to that of n = 2. Four samples allow n = 2."""
    table = table_of(one(0, 0), one(3, 1), kl_coef=1.0)
    text = add_optimum(table, [one(2, 1), one(4, 0.5)], f64([2, 2, 2, 2], [4, 4, 4, 4]), None, 1.0)
    assert "n = 2, the largest that 4 samples allow; PPO's KL is larger\n" in text


def test_add_optimum_of_policy_worse_than_its_reference_has_bias_too_low():
    """Scores 2 ln 3, 0, 0, 0 and kl_coef 2: J* = 2 ln(3/2). PPO has J = 0 on the prompt and -1/2 in the table. SFT has
    0. So J* in the table is 2 ln(3/2) - 1/2 = G and the optimality is -1/2 / G. Half of the samples give a J* that is
    lower by 2 ln(3/2) - ln 2. Times 1/2 / G^2 this is the bias. A J* that is too low makes -1/2 / G too low."""
    table = table_of(one(0, 0), one(-0.5, 0), kl_coef=2.0)
    text = add_optimum(table, [one(0, 0)], f64([2 * LN3, 0, 0, 0]), None, 2.0)
    G = 2 * math.log(1.5) - 0.5
    assert table[1]["optimality"] == pytest.approx(-0.5 / G)
    assert f"too low by {(2 * math.log(1.5) - LN2) * 0.5 / G**2:.3f} or more" in text and "warning" in text


def test_add_optimum_of_policy_worse_than_its_reference_has_a_positive_standard_error():
    """As in the second case of the standard error above, but SFT has J = 2.5: PPO's optimality is (2 - 2.5) / (3 - 2.5)
    = -1 and its slope -1 / (1/2). The standard error is 1/2 * 2."""
    table = table_of(one(2.5, 0), one(3, 1), kl_coef=1.0)
    ours = [one(2, 1), one(4, 0.5), one(0, 0), one(4.5, 1)]
    text = add_optimum(table, ours, f64([2, 2, 2, 2], [4, 4, 4, 4]), None, 1.0)
    assert "has a standard error of 1.000\n" in text


def test_add_optimum_without_possible_gain_has_no_optimality():
    """All samples have the same score and PPO has the score of SFT: there is nothing to divide by."""
    table = table_of(one(1, 0), one(1, 0), kl_coef=0.5)
    text = add_optimum(table, [one(1, 0)], torch.ones(1, 4, dtype=torch.float64), None, 0.5)
    assert [row["optimality"] for row in table] == [None] * 4 and "warning" in text
    assert table[3]["score"] == 1


def test_add_optimum_without_judge_has_no_gold():
    table = table_of(one(0, 0), one(1, 0.1), kl_coef=2.0)
    add_optimum(table, [one(1, 0.1)], f64([2 * LN3, 0, 0, 0]), None, 2.0)
    assert [row["gold"] for row in table] == [None] * 4


# ---- reference_samples ----


def test_reference_samples_have_the_exact_mean_score(gpt, reward_model):
    """Responses of one token: end-of-text with its score or, cut off, -7. The mean of 4,000 samples is within 4
    standard errors of the exact mean. The judge counts letters: an ended response has none."""
    judge = SimpleNamespace(__file__="judge.py", score=lambda prompts, responses: [len(text) for text in responses])
    frozen = Frozen(gpt, reward_model, Digits(), max_new_tokens=1, missing_eos_score=-7.0, rows=300)
    scores, golds = reference_samples([Prompt("1 2", [1, 2])], 4000, frozen, judge)
    with torch.no_grad():
        p = torch.softmax(gpt(torch.tensor([[1, 2]]))[0, -1], dim=0)
        ended = reward_model(torch.tensor([[1, 2, 10]]), torch.tensor([3])).item()
    exact = p[10].item() * ended + (1 - p[10].item()) * -7
    assert scores.shape == golds.shape == (1, 4000)
    assert scores.mean().item() == pytest.approx(exact, abs=4 * scores.std().item() / 4000**0.5)
    assert set(golds[0].tolist()) == {0.0, 1.0} and ((golds[0] == 0) == (scores[0] > -7)).all()


def test_reference_samples_without_judge_have_no_gold(gpt, reward_model):
    frozen = Frozen(gpt, reward_model, Digits(), max_new_tokens=2)
    scores, golds = reference_samples([Prompt("1", [1]), Prompt("2 3", [2, 3])], 6, frozen, None)
    assert scores.shape == (2, 6) and golds is None


# ---- trained_file ----


@pytest.fixture
def trained_with(tmp_path):
    """A folder with ppo.pt and sft.pt, a copy of it elsewhere, and the part of the checkpoint that names the file."""
    folder, moved = tmp_path / "runs", tmp_path / "moved"
    folder.mkdir()
    (folder / "sft.pt").write_bytes(b"fine-tuned")
    shutil.copytree(folder, moved)
    checkpoint = {"config": {"sft": "", "out": str(folder)}, "inputs": digests(sft=folder / "sft.pt")}
    return SimpleNamespace(folder=folder, moved=moved, checkpoint=checkpoint)


def test_trained_file_is_the_one_in_the_out_folder(trained_with):
    path = trained_file(trained_with.checkpoint, "sft", "", trained_with.moved / "ppo.pt")
    assert path == trained_with.folder / "sft.pt"


def test_trained_file_is_the_one_that_the_flag_of_the_run_named(trained_with):
    trained_with.checkpoint["config"]["sft"] = str(trained_with.moved / "sft.pt")
    path = trained_file(trained_with.checkpoint, "sft", "", trained_with.folder / "ppo.pt")
    assert path == trained_with.moved / "sft.pt"


def test_trained_file_of_a_moved_folder_is_beside_the_checkpoint(trained_with):
    (trained_with.folder / "sft.pt").unlink()
    path = trained_file(trained_with.checkpoint, "sft", "", trained_with.moved / "ppo.pt")
    assert path == trained_with.moved / "sft.pt"


def test_trained_file_may_be_named(trained_with):
    given = str(trained_with.moved / "sft.pt")
    assert trained_file(trained_with.checkpoint, "sft", given, trained_with.folder / "ppo.pt").samefile(given)


@pytest.mark.parametrize("given", [True, False])
def test_trained_file_rejects_another_file(trained_with, given):
    path = trained_with.folder / "sft.pt"
    path.write_bytes(b"trained again")
    with pytest.raises(InputError, match="is not the sft.pt that .*ppo.pt was trained with; name it with --sft"):
        trained_file(trained_with.checkpoint, "sft", str(path) if given else "", trained_with.folder / "ppo.pt")


# ---- the program ----


@pytest.mark.parametrize("flags", [["--samples", "15"], ["--samples", "2"], ["--prompts", "0"]])
def test_optimality_rejects_impossible_counts(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(OptimalityConfig, flags)
    assert stop.value.code == 2 and f"{flags[0]} is {flags[1]}" in capsys.readouterr().err


PROGRAM = ["--prompts", "3", "--samples", "16", "--device", "cpu"]


def numbers(row):
    """The cells of a row but its name. An empty cell is NaN."""
    return {name: float(cell or "nan") for name, cell in row.items() if name != "policy"}


@pytest.fixture(scope="module")
def ended_run(trained, tmp_path_factory):
    """An output folder of train_ppo.py. The trained fixture is too short for responses that end, and all of its scores
    are equal. So 5 is added to the logit of end-of-text here, before the policy is trained."""
    data, out, _ = trained
    folder = tmp_path_factory.mktemp("optimality")
    shutil.copy(out / "reward.pt", folder)
    sft = torch.load(out / "sft.pt", weights_only=True)
    embedding = sft["model"]["wte.weight"][find_tokenizer(str(data)).eos_id]
    sft["model"]["ln_f.bias"] = 5 * embedding / embedding.square().sum()
    torch.save(sft, folder / "sft.pt")
    flags = ["--data", data, "--out", folder, "--device", "cpu", *TINY["ppo"].split(), "--lr", "0.003",
             "--temperature", "0.8"]
    train_ppo.main(parse_cli(train_ppo.PPOConfig, list(map(str, flags))))
    return folder


@pytest.fixture
def copied(ended_run, tmp_path):
    """Its copy, which a test may change."""
    return shutil.copytree(ended_run, tmp_path / "copy")


def run(folder, *flags):
    main(parse_cli(OptimalityConfig, ["--checkpoint", str(folder / "ppo.pt"), *PROGRAM, *flags]))
    return rows(folder / "evaluation.csv")


def test_optimality_keeps_the_rows_of_train_ppo(trained, tmp_path):
    """It adds the rows best_of_n and optimum and the column optimality."""
    folder = shutil.copytree(trained[1], tmp_path / "copy")
    before = rows(folder / "evaluation.csv")
    assert [row["policy"] for row in before] == ["sft", "ppo"] and "optimality" not in before[0]
    after = run(folder)
    assert [row["policy"] for row in after] == ["sft", "ppo", "best_of_n", "optimum"]
    assert list(after[0]) == [*before[0], "optimality"]
    for old, new in zip(before, after):
        kept = {name: cell for name, cell in numbers(new).items() if name != "optimality"}
        assert kept == pytest.approx(numbers(old), rel=1e-5, abs=1e-6)


def test_optimality_of_the_written_rows_follows_from_their_objectives(copied, capsys):
    """(J - J_sft) / (J* - J_sft), with J = score - kl_coef * kl_ref. The rows sft and ppo are those of train_ppo.py."""
    before = rows(copied / "evaluation.csv")
    sft, ppo, best, optimum = map(numbers, run(copied))
    for old, new in zip(before, (sft, ppo)):
        assert {name: new[name] for name in numbers(old)} == pytest.approx(numbers(old), rel=1e-5, abs=1e-6)
    gain = optimum["objective"] - sft["objective"]
    assert gain > 0 and (sft["optimality"], optimum["optimality"]) == (0, 1)
    for row in (ppo, best):
        assert row["optimality"] == pytest.approx((row["objective"] - sft["objective"]) / gain, abs=1e-4)
    kl_coef = load_checkpoint(copied / "ppo.pt", "ppo")["kl_coef"]  # --kl-target has moved it
    for row in (best, optimum):
        assert row["prompts"] == 3
        assert row["objective"] == pytest.approx(row["score"] - kl_coef * row["kl_ref"], abs=1e-4)
    shown = capsys.readouterr().out
    assert "best_of_n: n = " in shown and "16 reference samples for each of 3 prompts" in shown
    assert f"wrote {copied / 'evaluation.csv'}" in shown


def test_load_run_restores_the_models_of_the_run(copied):
    """The policy has all weights of ppo.pt, its value network included. Policy and reference have the temperature of
    the run, and sampling has its settings."""
    loaded = load_run(parse_cli(OptimalityConfig, ["--checkpoint", str(copied / "ppo.pt"), "--device", "cpu"]))
    torch.testing.assert_close(
        dict(loaded.policy.state_dict()), load_checkpoint(copied / "ppo.pt", "ppo")["model"], atol=0, rtol=0)
    assert any(name.startswith("value_gpt.") for name in loaded.policy.state_dict())
    assert loaded.policy.gpt.temperature == loaded.frozen.reference.temperature == 0.8
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded.policy.gpt(tokens), load_policy(copied / "ppo.pt", "ppo")[0](tokens))
    assert (loaded.frozen.max_new_tokens, loaded.frozen.missing_eos_score, len(loaded.prompts)) == (8, -3.0, 10)


def test_load_run_of_a_shared_value_head_has_no_value_network(trained, ended_run, tmp_path):
    flags = ["--data", trained[0], "--sft", ended_run / "sft.pt", "--reward", ended_run / "reward.pt",
             "--out", tmp_path, "--device", "cpu", *TINY["ppo"].split(), "--steps", "1", "--value-network", "shared"]
    train_ppo.main(parse_cli(train_ppo.PPOConfig, list(map(str, flags))))
    loaded = load_run(parse_cli(OptimalityConfig, ["--checkpoint", str(tmp_path / "ppo.pt"), "--device", "cpu"]))
    assert loaded.policy.value_gpt is None


def test_optimality_may_run_again_with_the_same_result(copied):
    for first, second in zip(run(copied), run(copied), strict=True):
        assert numbers(first) == pytest.approx(numbers(second), rel=1e-5, abs=1e-6, nan_ok=True)


def test_optimality_rejects_another_reward_model(copied):
    """A reward model that was changed after the run has other bytes. evaluation.csv stays as it was."""
    before = (copied / "evaluation.csv").read_bytes()
    checkpoint = torch.load(copied / "reward.pt", weights_only=True)
    checkpoint["model"]["head.bias"] += 1
    torch.save(checkpoint, copied / "reward.pt")
    with pytest.raises(InputError, match="is not the reward.pt that .*ppo.pt was trained with"):
        run(copied, "--reward", str(copied / "reward.pt"))
    assert (copied / "evaluation.csv").read_bytes() == before
