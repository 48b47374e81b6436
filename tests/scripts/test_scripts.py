"""The three scripts as a user runs them: in order, with tiny flags, twice, interrupted, and with
bad input."""

import csv
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import rlhf.losses
import train_ppo
import train_reward
import train_sft
from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.run import progress
from rlhf.run.flags import parse_cli
from rlhf.run.loading import find_tokenizer
from rlhf.run.training import RESULTS, Training
from tests.helpers import (
    TINY,
    change_sft,
    end_earlier,
    process,
    rows,
    script,
    stopped_by_its_first_checkpoint,
    tiny,
)


def test_three_stages_write_their_files(trained):
    """Checkpoints, one metrics CSV and the settings per stage, the evaluations."""
    data, out, printed = trained
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "evaluation.csv",
        "ppo.csv",
        "ppo.json",
        "ppo.pt",
        "ppo.warnings.txt",
        "ppo_samples.csv",
        "ppo_tokens.csv",
        "reward.csv",
        "reward.json",
        "reward.pt",
        "reward.warnings.txt",
        "reward_evaluation.csv",
        "reward_margins.csv",
        "sft.csv",
        "sft.json",
        "sft.pt",
        "sft.warnings.txt",
    ]
    assert [len(rows(out / f"{name}.csv")) for name in TINY] == [8, 6, 4]
    table = rows(out / "evaluation.csv")
    assert [row["policy"] for row in table] == ["sft", "ppo"]
    # --kl-target has moved it.
    kl_coef = torch.load(out / "ppo.pt", weights_only=True)["kl_coef"]
    for row in table:
        objective = float(row["score"]) - kl_coef * float(row["kl_ref"])
        assert float(row["objective"]) == pytest.approx(objective, abs=1e-4)
    assert {"score", "gold", "kl_ref", "length", "eos_rate", "win_rate_vs_sft"} <= set(table[0])
    assert float(table[0]["kl_ref"]) == 0 and float(table[0]["win_rate_vs_sft"]) == 0.5
    evaluation = rows(out / "reward_evaluation.csv")[0]
    assert {"accuracy", "bayes_accuracy"} <= set(evaluation)
    assert 0.5 < float(evaluation["bayes_accuracy"]) < 1
    assert len(rows(out / "ppo_samples.csv")) == 10
    assert "before" in printed["ppo"] and "after" in printed["ppo"]


def test_each_stage_ends_with_the_next_command(trained):
    data, out, printed = trained
    last_lines = {name: text.splitlines()[-4:] for name, text in printed.items()}
    assert last_lines["sft"][-1] == f"next: python train_reward.py --data {data} --out {out}"
    assert last_lines["reward"][-1] == f"next: python train_ppo.py --data {data} --out {out}"
    assert last_lines["ppo"] == [
        f"next: python -m rlhf.tools.optimality --checkpoint {out}/ppo.pt --data {data}",
        f"next: python -m rlhf.tools.report {out} --data {data}",
        f"next: python -m rlhf.tools.sample --checkpoint {out}/ppo.pt --data {data}",
        f"next: python -m rlhf.tools.export --checkpoint {out}/ppo.pt --data {data}",
    ]


@pytest.mark.slow
def test_config_repeats_a_run(trained, tmp_path):
    """The settings that another run has written beside its checkpoint, with another --out."""
    data, _, _ = trained
    first, second = tmp_path / "first", tmp_path / "second"
    script("sft", "--data", data, "--out", first, "--seed", "3", "--weight-decay", "0.5")
    script("sft", "--config", first / "sft.json", "--out", second)
    settings = [json.loads((folder / "sft.json").read_text()) for folder in (first, second)]
    assert settings[0]["seed"] == 3 and settings[1] == {**settings[0], "out": str(second)}
    weights = [torch.load(x / "sft.pt", weights_only=True)["model"] for x in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_first_step_has_known_losses_and_no_kl(trained):
    """SFT starts within 10 % of ln V, the reward loss at ln 2, and PPO with kl_ref 0, nothing
    clipped on its first minibatch, and a policy loss near 0."""
    data, out, _ = trained
    vocabulary = torch.load(out / "sft.pt", weights_only=True)["model_config"]["vocab_size"]
    assert float(rows(out / "sft.csv")[0]["loss"]) == pytest.approx(math.log(vocabulary), rel=0.1)
    assert float(rows(out / "reward.csv")[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    first = rows(out / "ppo.csv")[0]
    assert abs(float(first["kl_ref"])) < 1e-5 and abs(float(first["policy_loss"])) < 0.05
    assert all(float(row["first_log_ratio"]) < 1e-5 for row in rows(out / "ppo.csv"))


def scores_of(checkpoint, data, file, *columns):
    """The scores that reward.pt gives the responses in these columns of a file."""
    checkpoint = torch.load(checkpoint, weights_only=True)
    model = RewardModel(GPT(GPTConfig(**checkpoint["model_config"])))
    model.load_state_dict(checkpoint["model"])
    tokenizer, scores = find_tokenizer(str(data)), []
    for row in rows(data / file):
        prompt = tokenizer.encode(row["Prompt"])
        for column in columns:
            ids = torch.tensor([prompt + tokenizer.response_ids(row[column])])
            with torch.no_grad():
                scores.append(model(ids, torch.tensor([ids.size(1)])).item())
    return torch.tensor(scores)


def test_scores_have_mean_0_and_std_1_on_both_sides_of_the_comparisons(trained):
    """Over comparisons.csv, row by row, from the constants in the checkpoint."""
    data, out, _ = trained
    scores = scores_of(out / "reward.pt", data, "comparisons.csv", "Chosen", "Rejected")
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_reward_model_needs_no_demonstrations(trained, tmp_path):
    """Their scores may all be the same: those that imitate the chosen side, after training."""
    data, out, _ = trained
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for path in copy.glob("demonstrations*.csv"):
        path.unlink()
    for name in ("reward", "ppo"):
        models = [] if name == "reward" else ["--reward", tmp_path / "reward.pt"]
        script(name, "--data", copy, "--out", tmp_path, "--sft", out / "sft.pt", *models)
    weights = [torch.load(x / "reward.pt", weights_only=True)["model"] for x in (out, tmp_path)]
    assert torch.equal(weights[0]["scale"], weights[1]["scale"])


def inputs_of(name, data, out):
    """The flags that make a script read from the folders of `trained`."""
    models = {
        "sft": [],
        "reward": ["--sft", out / "sft.pt"],
        "ppo": ["--sft", out / "sft.pt", "--reward", out / "reward.pt"],
    }
    return ["--data", data, *models[name]]


def check_interrupted_run(folder, name):
    """The checkpoint of the middle of the run is there, and nothing later."""
    checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
    assert checkpoint["step"] == {"sft": 4, "reward": 3, "ppo": 2}[name]
    assert "optimizer" in checkpoint


def check_same_run(one, other, name):
    """Two folders hold the same weights, bit for bit, and the same logged numbers but the
    clock's."""
    whole = torch.load(one / f"{name}.pt", weights_only=True)
    resumed = torch.load(other / f"{name}.pt", weights_only=True)
    assert whole["step"] == resumed["step"] == {"sft": 8, "reward": 6, "ppo": 4}[name]
    for key, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][key]), key
    clock = {"tokens_per_s", "seconds"}
    for row, same in zip(rows(one / f"{name}.csv"), rows(other / f"{name}.csv"), strict=True):
        assert {k: v for k, v in row.items() if k not in clock} == {
            k: v for k, v in same.items() if k not in clock
        }


@pytest.mark.parametrize("name", TINY)
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(trained, tmp_path, name):
    """Interrupted after the middle checkpoint, then resumed."""
    data, out, _ = trained
    flags = [*inputs_of(name, data, out), "--out", tmp_path]
    with stopped_by_its_first_checkpoint():
        script(name, *flags)
    check_interrupted_run(tmp_path, name)
    script(name, *flags, "--resume")
    check_same_run(out, tmp_path, name)


STOP_AFTER_SAVE = """import runpy
from rlhf.run.training import Training
save = Training.save
def save_and_stop(*args, **state):
    save(*args, **state)
    raise KeyboardInterrupt
Training.save = save_and_stop
runpy.run_path("train_{}.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_run_resumed_in_a_new_process_equals_the_uninterrupted_run(trained, tmp_path, name):
    """As above, but nothing passes from the first process to the second except files."""
    data, out, _ = trained
    flags = tiny(name, *inputs_of(name, data, out), "--out", tmp_path)
    cut = process("-c", STOP_AFTER_SAVE.format(name), *flags)
    assert cut.returncode == 130
    assert cut.stderr == f"\ninterrupted; --resume continues from {tmp_path}/{name}.pt\n"
    check_interrupted_run(tmp_path, name)
    resumed = process(f"train_{name}.py", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    check_same_run(out, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "bf16"],
        ["--amp", "fp16"],
        ["--value-network", "shared"],
        "--entropy-coef 0.01 --value-clip-eps 0.2 --temperature 0.7".split(),
        "--max-new-tokens 4 9 --missing-eos-score none".split(),
    ],
)
def test_ppo_runs_with_each_option(trained, tmp_path, flags):
    data, out, _ = trained
    script("ppo", *inputs_of("ppo", data, out), "--out", tmp_path, "--steps", "2", *flags)
    assert all(math.isfinite(float(row["policy_loss"])) for row in rows(tmp_path / "ppo.csv"))


@pytest.mark.slow
def test_reward_model_learns_from_rankings(trained, tmp_path):
    """rankings.csv made of the comparisons: the same pairs, so the first loss is ln 2 and an
    evaluation comes out."""
    data, out, _ = trained
    copy = tmp_path / "data"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with (copy / "rankings.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Prompt", "Response", "Rank"])
        for row in rows(data / "comparisons.csv"):
            writer.writerow([row["Prompt"], row["Chosen"], 1])
            writer.writerow([row["Prompt"], row["Rejected"], 2])
    flags = [*inputs_of("reward", copy, out), "--out", tmp_path, "--rankings"]
    script("reward", *flags, "--micro-batch-size", "3")
    assert float(rows(tmp_path / "reward.csv")[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(rows(tmp_path / "reward_evaluation.csv")[0]["comparisons"]) == 40
    scores = scores_of(tmp_path / "reward.pt", copy, "rankings.csv", "Response")
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_missing_checkpoint_names_the_script_to_run_first(trained, tmp_path):
    data, out, _ = trained
    for name, first in (("reward", "train_sft.py"), ("ppo", "train_sft.py")):
        done = script(name, "--data", data, "--out", tmp_path, ok=False)
        assert done.returncode == 2 and f"run `python {first}` first" in done.stderr
    done = script("ppo", "--data", data, "--out", tmp_path, "--sft", out / "sft.pt", ok=False)
    assert done.returncode == 2 and "run `python train_reward.py` first" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sft", ["--data", "nowhere"], "no such folder"),
        ("sft", ["--n-head", "3"], "must be a multiple of n_head"),
        ("sft", ["--block-size", "12", "--overwrite"], "there is room for 12"),
        ("ppo", ["--steps", "0"], "must be above 0"),
        ("reward", ["--sft", "OUT/reward.pt"], "written by `python train_reward.py`"),
        ("reward", ["--sft", "data/tiny_assistant/judge.py"], "not a checkpoint"),
        ("reward", ["--resume", "--lr", "0.5"], "begun with another lr"),
        ("ppo", ["--max-new-tokens", "500"], "there is room for 0"),
        ("ppo", ["--max-new-tokens", "70"], "there is room for 10"),
        ("ppo", ["--minibatch-size", "3"], "must be a multiple"),
        ("ppo", ["--gamma", "1.5"], "between 0 and 1"),
        ("ppo", ["--kl-coef", "nan"], "nan does not lie from 0"),
        ("ppo", ["--value-clip-eps", "inf"], "inf does not lie from 0"),
        ("ppo", ["--kl-target", "6", "--kl-horizon", "2"], "must be --batch-size or more"),
        ("ppo", ["--advantage", "a2c"], "argument --advantage: invalid choice"),
        ("ppo", ["--advantage", "rloo"], "need --group-size 2 or more"),
        ("ppo", ["--advantage", "grpo", "--group-size", "1"], "need --group-size 2 or more"),
        (
            "ppo",
            ["--advantage", "reinforce", "--batch-size", "1", "--minibatch-size", "1"],
            "reinforce needs --batch-size 2",
        ),
        ("ppo", ["--advantage", "rloo", "--group-size", "3"], "must be a multiple of --group-size"),
        ("ppo", ["--group-size", "0"], "must be above 0"),
        ("sft", [], "sft.pt is of another run"),
        ("reward", [], "reward.pt is of another run"),
        ("ppo", [], "ppo.pt is of another run"),
        ("ppo", ["--resume", "--overwrite"], "give one of them"),
        ("sft", ["--weight-decay", "-1"], "-1.0 does not lie from 0"),
        ("ppo", ["--device", "quantum"], "invalid choice"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(trained, name, flags, message):
    """No traceback, and not a byte of the output folder has changed."""
    data, out, _ = trained
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = [flag.replace("OUT", str(out)) for flag in flags]
    done = script(name, "--data", data, "--out", out, *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# in float16 the scaler skips steps whose gradient is NaN, so that the weights stay finite
DIVERGING = [
    ("sft", ["--lr", "1e30"]),
    # The weights are finite, the loss on held-out rows is not.
    ("sft", ["--lr", "1e10", "--steps", "1"]),
    ("sft", ["--amp", "fp16", "--lr", "60"]),
    ("reward", ["--lr", "1e30"]),
    ("reward", ["--lr", "1e20", "--steps", "1"]),
    ("reward", ["--amp", "fp16", "--lr", "3000", "--steps", "30", "--eval-every", "30"]),
    ("ppo", ["--lr", "1e30"]),
    ("ppo", ["--lr", "1e10", "--steps", "1"]),
    ("ppo", ["--amp", "fp16", "--lr", "3000"]),
    # The loss and its gradient are finite, the square of the gradient is not.
    ("ppo", ["--value-coef", "1e25"]),
    ("ppo", ["--value-coef", "1e25", "--amp", "bf16", "--steps", "1"]),
    ("ppo", ["--entropy-coef", "1e25", "--value-network", "shared"]),
]


@pytest.mark.parametrize(("name", "flags"), DIVERGING)
def test_diverging_run_stops_with_one_line_and_saves_nothing(trained, tmp_path, name, flags):
    data, out, _ = trained
    inputs = inputs_of(name, data, out)
    done = script(name, *inputs, "--out", tmp_path, "--warmup", "0", *flags, ok=False)
    assert done.returncode == 2 and "the run has diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / f"{name}.pt").exists()


def test_reward_model_that_learned_nothing_is_not_scaled_up(trained, tmp_path):
    """The checkpoint of the middle of the run stays."""
    data, out, _ = trained
    inputs = inputs_of("reward", data, out)
    done = script("reward", *inputs, "--out", tmp_path, "--lr", "1e-9", ok=False)
    assert done.returncode == 2 and "the reward model learned nothing" in done.stderr
    assert torch.load(tmp_path / "reward.pt", weights_only=True)["step"] == 3
    assert not (tmp_path / "reward_evaluation.csv").exists()


# ---- runs that learn nothing ----


def cut(source, folder, **sizes):
    """A copy of the data set, with the first rows of some files."""
    shutil.copytree(source, folder)
    for name, size in sizes.items():
        kept = rows(source / f"{name}.csv")[:size]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(kept[0]))
            writer.writeheader()
            writer.writerows(kept)
    return folder


@pytest.mark.slow
def test_sft_that_overfits_says_so_first_and_last(trained, tmp_path):
    """160 steps on five rows: 256 epochs. The lowest valid comes long before the end."""
    data = cut(trained[0], tmp_path / "data", demonstrations=5)
    flags = "--steps 160 --eval-every 20 --log-every 40 --lr 0.02".split()
    printed = script("sft", "--data", data, "--out", tmp_path / "runs", *flags).stdout
    first, last = printed.splitlines()[0], printed.splitlines()[-2]
    assert first == "warning: 256 epochs over the same demonstrations will overfit; lower --steps"
    assert "5 demonstrations, 256.0 epochs (40 held out)" in printed
    losses = {}
    for row in rows(tmp_path / "runs" / "sft.csv"):
        if row["valid"]:
            losses[row["step"]] = float(row["valid"])
    step = min(losses, key=losses.get)
    assert int(step) < 160
    assert last.startswith(f"warning: overfitting: valid was {losses[step]:.3f} after step {step} ")
    assert f"is {losses['160']:.3f} at the end" in last


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_nan_between_logged_steps_is_not_saved(trained, tmp_path, name, monkeypatch):
    """The loss of step 2 is infinite, and metrics are logged after steps 1 and 4."""
    data, out, _ = trained
    module, loss = {
        "sft": (rlhf.losses, "sft_loss"),
        "reward": (rlhf.losses, "bradley_terry_loss"),
    }[name]
    true_loss = getattr(module, loss)
    calls = []

    def break_the_second(*args):
        calls.append(args)
        return true_loss(*args) * (math.inf if len(calls) == 2 else 1.0)

    monkeypatch.setattr(module, loss, break_the_second)
    flags = [*inputs_of(name, data, out), "--out", tmp_path, "--log-every", "9"]
    done = script(name, *flags, "--steps", "8", "--eval-every", "4", ok=False)
    assert done.returncode == 2 and "the run has diverged" in done.stderr
    assert len(calls) >= 2 and not (tmp_path / f"{name}.pt").exists()


def test_run_in_float16_whose_steps_were_all_skipped_does_not_finish(
    trained, tmp_path, monkeypatch
):
    """The loss is finite, its gradient is not: the scaler skips both steps, and the weights would
    be those of the start."""
    data, out, _ = trained
    true_loss = rlhf.losses.sft_loss

    def break_the_gradient(logits, *args):
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * math.inf)
        return true_loss(logits, *args)

    monkeypatch.setattr(rlhf.losses, "sft_loss", break_the_gradient)
    flags = ["--data", data, "--out", tmp_path, "--steps", "2", "--amp", "fp16"]
    done = script("sft", *flags, ok=False)
    assert done.returncode == 2 and "every gradient step was skipped" in done.stderr
    assert not (tmp_path / "sft.pt").exists()


def constant_reward(out, folder):
    """A copy of reward.pt whose head reads nothing: every score is 0.7."""
    reward = torch.load(out / "reward.pt", weights_only=True)
    weights = reward["model"]
    weights["head.weight"].zero_()
    weights["head.bias"].fill_(0.7 * weights["scale"] + weights["mean"])
    torch.save(reward, folder / "reward.pt")
    return folder / "reward.pt"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--advantage", "rloo", "--group-size", "2"]])
def test_ppo_says_if_all_scores_are_equal(trained, tmp_path, flags):
    """Once as it happens and once at the end: here nothing ends, so every score is -3."""
    data, out, _ = trained
    inputs = inputs_of("ppo", data, out)
    printed = script("ppo", *inputs, "--out", tmp_path, "--max-new-tokens", "2", *flags).stdout
    assert printed.count("warning: nothing to learn: the scores that are compared are equal") == 2
    assert "or none ends (then raise --max-new-tokens" in printed
    assert [float(row["score_std"]) for row in rows(tmp_path / "ppo.csv")] == [0] * 4
    assert "PPO did not raise the score: +0.000" in printed.splitlines()[-5]


@pytest.mark.slow
def test_ppo_says_if_the_reward_model_gives_everything_the_same_score(trained, tmp_path):
    data, out, _ = trained
    end_earlier(out, tmp_path, data)
    reward = constant_reward(tmp_path, tmp_path)
    models = ["--sft", tmp_path / "sft.pt", "--reward", reward]
    flags = ["--max-new-tokens", "40", "--missing-eos-score", "0.7"]
    printed = script("ppo", "--data", data, "--out", tmp_path / "runs", *models, *flags).stdout
    assert printed.count("the reward model does not tell them apart") == 2


def test_one_held_out_comparison_has_no_other_prompt(trained, tmp_path):
    """swapped_accuracy is empty, and the count is said."""
    data = cut(trained[0], tmp_path / "data", comparisons_heldout=1)
    printed = script("reward", *inputs_of("reward", data, trained[1]), "--out", tmp_path).stdout
    result = rows(tmp_path / "reward_evaluation.csv")[0]
    assert result["swapped_accuracy"] == "" and result["comparisons"] == "1"
    assert "evaluated on 1 comparisons only" in printed and "another row" not in printed


@pytest.mark.slow
def test_closing_evaluation_of_the_reward_model_shows_its_progress(trained, tmp_path, monkeypatch):
    """In micro-batches of four times the training's, shortest rows first; with a line every ten
    seconds."""
    data, out, _ = trained
    sizes, widths, score = [], [], RewardModel.forward

    def spy(model, tokens, lengths):
        if not torch.is_grad_enabled():
            sizes.append(len(tokens))
            widths.append(tokens.size(1))
        return score(model, tokens, lengths)

    monkeypatch.setattr(RewardModel, "forward", spy)
    clock = SimpleNamespace(perf_counter=itertools.count(0, 6).__next__)  # 6 s from look to look
    monkeypatch.setattr(progress, "time", clock)
    flags = ["--micro-batch-size", "2", "--eval-every", "6"]
    inputs = inputs_of("reward", data, out)
    printed = script("reward", *inputs, "--out", tmp_path, *flags).stdout
    assert sizes == [16] * 15  # eight pairs: 40 for the scale, 40 held out, and 40 swapped
    assert widths[:5] == sorted(widths[:5]) and widths[5:10] == sorted(widths[5:10])
    assert len(re.findall(r"scores, micro-batch: \d of 5, .* left", printed)) >= 3
    one = rows(out / "reward_evaluation.csv")[0]
    assert rows(tmp_path / "reward_evaluation.csv")[0] == one


# ---- one run, one folder ----


def test_ppo_refuses_a_reward_model_of_another_sft(trained, tmp_path):
    data, out, _ = trained
    change_sft(out, tmp_path, lambda weights: weights["ln_f.bias"].add_(0.01))
    done = script("ppo", "--data", data, "--out", tmp_path, "--reward", out / "reward.pt", ok=False)
    assert done.returncode == 2 and "was made from another sft file than" in done.stderr
    assert not (tmp_path / "ppo.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_checkpoint(
    trained, tmp_path, monkeypatch, name
):
    """Then nothing of the old run is left, until the new one writes its own tables."""
    data, out, _ = trained
    folder = tmp_path / "runs"
    flags = [*inputs_of(name, data, out), "--out", folder, "--overwrite", "--seed", "1"]
    shutil.copytree(out, folder)
    results = [path for path in folder.iterdir() if path.name in (f"{name}.pt", *RESULTS[name])]
    before = {path: path.read_bytes() for path in results}

    def stop(*args, **state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "save", stop)
        script(name, *flags)
    assert {path: path.read_bytes() for path in results} == before
    assert len(before) == {"sft": 4, "reward": 6, "ppo": 6}[name]
    with stopped_by_its_first_checkpoint():
        script(name, *flags)
    left = [path for path in results if path.exists()]
    assert {path.name for path in left} == {f"{name}.{end}" for end in ("pt", "csv", "json")}
    assert all(path.read_bytes() != before[path] for path in left)


def test_metrics_of_a_resumed_run_come_from_its_checkpoint(trained, tmp_path):
    """A kill between the two files leaves the metrics of an older run beside the new checkpoint."""
    data, out, _ = trained
    for name in ("sft.pt", "sft.csv"):
        shutil.copy(out / name, tmp_path)
    (tmp_path / "sft.csv").write_text("of an older run")
    script("sft", "--data", data, "--out", tmp_path, "--resume")
    assert (tmp_path / "sft.csv").read_bytes() == (out / "sft.csv").read_bytes()


# ---- the rest of the input ----


@pytest.mark.slow
def test_unwritable_folder_gives_one_line(small_data, tmp_path):
    """In a process of its own."""
    (tmp_path / "file").write_text("not a folder")
    done = process("train_sft.py", *tiny("sft", "--data", small_data, "--out", tmp_path / "file"))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_data_set_with_another_tokenizer_is_read_with_that_of_the_checkpoint(trained, tmp_path):
    data, out, _ = trained
    other = tmp_path / "other"
    other.mkdir()
    for path in data.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    ranks = (other / "tokenizer.tiktoken").read_text().splitlines(keepends=True)
    (other / "tokenizer.tiktoken").write_text("".join(ranks[:-1]))
    script("reward", "--data", other, "--out", tmp_path / "runs", "--sft", out / "sft.pt")
    sft = torch.load(out / "sft.pt", weights_only=True)
    reward = torch.load(tmp_path / "runs" / "reward.pt", weights_only=True)
    assert reward["tokenizer"] == sft["tokenizer"] != find_tokenizer(str(other)).fingerprint


@pytest.mark.parametrize(
    "config", [train_sft.SFTConfig, train_reward.RewardConfig, train_ppo.PPOConfig]
)
def test_help_fits_a_screen_and_names_the_common_flags(config, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(config, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 58 and max(map(len, lines)) <= 110
    flags = {line.split()[0].rstrip(",") for line in lines if line.startswith("  -")}
    assert {"--data", "--out", "--device", "--amp", "--seed", "--steps", "--resume"} <= flags
    assert any(line.startswith("  --out") and line.endswith("(default: runs)") for line in lines)


def test_training_lines_fit_110_columns(trained):
    for printed in trained[2].values():
        lines = [line for line in printed.splitlines() if re.match(r" +(step|\d+/\d+) ", line)]
        assert len(lines) > 4 and max(map(len, lines)) <= 110


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_three_stages_run_on_a_gpu(trained, tmp_path, amp):
    data, *_ = trained
    for name in TINY:
        script(name, "--data", data, "--out", tmp_path, "--device", "cuda", "--amp", amp)
    assert all(math.isfinite(float(row["policy_loss"])) for row in rows(tmp_path / "ppo.csv"))
