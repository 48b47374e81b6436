"""A training run: begin or resume, log, save; and what --overwrite replaces."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from rlhf.evaluate import Response
from rlhf.model import GPT, GPTConfig
from rlhf.run import files, processes
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import TrainConfig
from rlhf.run.training import MAY_CHANGE, RESULTS
from tests.helpers import rows
from tests.run.small_run import (
    INPUTS,
    TOKENS,
    PPOConfig,
    RewardConfig,
    saved,
    small_run,
    step,
)

# ---- save: what a checkpoint holds ----


def test_checkpoint_holds_weights_and_what_the_run_was_made_from(run):
    checkpoint = load_checkpoint(saved(run, 7, kl_coef=0.25), "sft", unfinished=True)
    gpt = GPT(GPTConfig(**checkpoint["model_config"]))
    gpt.load_state_dict(checkpoint["model"])
    assert torch.equal(gpt(TOKENS), run.model(TOKENS))
    assert (checkpoint["kind"], checkpoint["step"], checkpoint["kl_coef"]) == ("sft", 7, 0.25)
    assert checkpoint["inputs"] == INPUTS
    defaults = dataclasses.asdict(TrainConfig())
    folder = str(run.path.parent)
    assert checkpoint["config"] == {**defaults, "lr": 0.5, "steps": 9, "out": folder}
    assert (checkpoint["tokenizer"], checkpoint["tokenizer_name"]) == ("abc", "digits")
    assert checkpoint["metrics"] == [{"step": 7, "loss": 0.5, "seconds": 7.0}]
    assert sorted(file.name for file in run.path.parent.iterdir()) == [
        "sft.csv",
        "sft.json",
        "sft.pt",
    ]


def test_unfinished_checkpoint_holds_optimizer_and_scaler_state(run):
    checkpoint = torch.load(saved(run, 8), weights_only=True)
    expected = run.optimizer.state_dict()["state"]
    assert_close(checkpoint["optimizer"]["state"], expected, atol=0, rtol=0)
    assert len(checkpoint["optimizer"]["state"]) > 0
    assert checkpoint["scaler"] == run.compute.scaler.state_dict()


def test_finished_checkpoint_holds_no_optimizer_state(run):
    unfinished = saved(run, 8).stat().st_size
    checkpoint = torch.load(saved(run, 9), weights_only=True)
    assert not checkpoint.keys() & {"optimizer", "scaler"}
    assert run.path.stat().st_size < unfinished / 2  # AdamW keeps two numbers for each weight


@pytest.mark.parametrize("step", [8, 9])
def test_checkpoint_holds_the_whole_state_dict(run, step):
    run.model.wte.requires_grad_(False)
    weights = torch.load(saved(run, step), weights_only=True)["model"]
    assert_close(weights, dict(run.model.state_dict()), atol=0, rtol=0)


def test_failed_save_leaves_the_old_checkpoint_and_the_metrics_that_belong_to_it(run, monkeypatch):
    before = saved(run, 7).read_bytes(), run.path.with_suffix(".csv").read_bytes()

    def write_half(content, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 57792 vs 57744")  # what torch makes of a full disk

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(InputError, match="sft.pt cannot be written"):
        saved(run, 8)
    assert (run.path.read_bytes(), run.path.with_suffix(".csv").read_bytes()) == before
    assert len(list(run.path.parent.iterdir())) == 3


# ---- the settings beside the checkpoint ----


def test_settings_are_written_beside_the_checkpoint_when_it_is_saved(run):
    path = run.path.with_suffix(".json")
    assert not path.exists()
    config = load_checkpoint(saved(run, 7), "sft", unfinished=True)["config"]
    assert config.pop("resume") is config.pop("overwrite") is False
    assert config.pop("config") == ""
    written = json.loads(path.read_text())
    assert written.pop("changed") == ["out"]
    assert written == config


def test_settings_of_a_run_that_goes_on_are_those_of_the_resumed_run(run, tmp_path):
    saved(run, 9)
    small_run(tmp_path, resume=True, eval_every=3)
    settings = json.loads((tmp_path / "sft.json").read_text())
    assert settings["eval_every"] == 3 and "resume" not in settings


def test_overwrite_keeps_the_old_settings_until_its_own_checkpoint_is_saved(tmp_path):
    path = tmp_path / "reward.json"
    path.write_text("old")
    with pytest.raises(InputError, match="reward.json is of another run"):
        small_run(tmp_path, cls=RewardConfig)
    run = small_run(tmp_path, cls=RewardConfig, overwrite=True)
    run.log(1, {"loss": 0.5}, ())
    assert path.read_text() == "old"
    run.save(1)
    assert json.loads(path.read_text())["steps"] == 9


def test_close_prints_the_warnings_and_then_what_comes_next(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py"])
    run.warnings.add("early")
    capsys.readouterr()
    run.close(["late"], "reward", "sample")
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {run.path}",
        "warning: early",
        "warning: late",
        f"next: python train_reward.py --out {run.path.parent}",
        f"next: python -m rlhf.tools.sample --checkpoint {run.path}",
    ]
    assert run.path.with_name("sft.warnings.txt").read_text() == "early\nlate\n"


# ---- begin ----


def test_new_run_begins_at_step_0(tmp_path):
    run = small_run(tmp_path)
    assert run.state == {"step": 0, "metrics": []}
    assert (run.step, run.rows) == (0, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sft.pt", "sft.csv"])
def test_new_run_refuses_to_replace_another(tmp_path, name):
    """The checkpoint or the metrics are there."""
    (tmp_path / name).write_text("old")
    message = f"{name} is of another run; give --resume .*, --overwrite .* another --out"
    with pytest.raises(InputError, match=message):
        small_run(tmp_path)


def test_overwrite_leaves_the_results_of_the_old_run_until_its_own_are_saved(tmp_path):
    names = ["reward.pt", "reward.csv", "reward_evaluation.csv"]
    checkpoint, csv, evaluation = [tmp_path / name for name in names]
    for path in (checkpoint, csv, evaluation):
        path.write_text("old")
    run = small_run(tmp_path, cls=RewardConfig, overwrite=True)
    run.log(1, {"loss": 0.5}, ())
    assert [path.read_text() for path in (checkpoint, csv, evaluation)] == ["old"] * 3
    run.save(1)
    assert load_checkpoint(checkpoint, "reward", unfinished=True)["step"] == 1
    assert [row["loss"] for row in rows(csv)] == ["0.5"] and not evaluation.exists()
    run.log(2, {"loss": 0.25}, ())
    assert [row["loss"] for row in rows(csv)] == ["0.5", "0.25"]


def test_overwrite_writes_metrics_at_once_if_none_are_there(tmp_path):
    """Only the evaluation of an old run is left, which is not the metrics."""
    (tmp_path / "reward_evaluation.csv").write_text("old")
    run = small_run(tmp_path, cls=RewardConfig, overwrite=True)
    run.log(1, {"loss": 0.5}, ())
    assert [row["loss"] for row in rows(tmp_path / "reward.csv")] == ["0.5"]
    assert (tmp_path / "reward_evaluation.csv").read_text() == "old"


def test_run_of_no_steps_removes_the_metrics_of_the_old_run(tmp_path):
    """It has none of its own."""
    (tmp_path / "sft.csv").write_text("old")
    run = small_run(tmp_path, steps=0, overwrite=True)
    run.save(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft.json", "sft.pt"]


# ---- resume ----


@pytest.mark.parametrize("run", ["off", "fp16"], indirect=True)
def test_resume_continues_as_the_uninterrupted_run(run, tmp_path):
    """Two more steps from the checkpoint give the weights and the loss scale of two more steps
    without it."""
    amp = "fp16" if run.compute.scaler.is_enabled() else "off"
    if amp == "fp16":
        run.compute.scaler.update(128.0)  # another scale than that of a new scaler
    saved(run, 7)
    resumed = small_run(tmp_path, amp=amp, resume=True)
    assert resumed.step == 7 and len(resumed.rows) == 1
    assert resumed.compute.scaler.get_scale() == run.compute.scaler.get_scale()
    for _ in range(2):
        step(run)
        step(resumed)
    got = dict(resumed.model.state_dict())
    assert_close(got, dict(run.model.state_dict()), atol=0, rtol=0)


def test_resume_of_a_finished_run_loads_the_weights(run, tmp_path):
    saved(run, 9)
    resumed = small_run(tmp_path, resume=True)
    assert resumed.step == 9
    assert torch.equal(resumed.model(TOKENS), run.model(TOKENS))


def test_resume_gives_back_the_state_that_was_saved(run, tmp_path):
    saved(run, 7, kl_coef=0.25)
    assert small_run(tmp_path, resume=True).state["kl_coef"] == 0.25


def test_resume_allows_settings_that_change_no_training_step(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    saved(run, 7).rename(tmp_path / "elsewhere" / "sft.pt")
    resumed = small_run(tmp_path / "elsewhere", resume=True, data="elsewhere", eval_every=3)
    assert resumed.step == 7


def test_settings_that_may_change_are_flags_of_a_script():
    """A name that no script has would be a typing error."""
    flags = set()
    for cls in (train_sft.SFTConfig, train_reward.RewardConfig, train_ppo.PPOConfig):
        flags |= {field.name for field in dataclasses.fields(cls)}
    assert flags >= MAY_CHANGE


def test_resume_rejects_another_setting(run, tmp_path):
    saved(run, 7)
    with pytest.raises(InputError, match=r"begun with another lr \(0.5, now 0.1\)"):
        small_run(tmp_path, resume=True, lr=0.1)


@pytest.mark.parametrize("inputs", [{"demonstrations": "456"}, {}, {**INPUTS, "weights": "789"}])
def test_resume_rejects_another_input_file(run, tmp_path, inputs):
    saved(run, 7)
    with pytest.raises(InputError, match="begun with another (demonstrations|weights) file"):
        small_run(tmp_path, inputs=inputs, resume=True)


def test_resume_rejects_another_tokenizer(run, tmp_path):
    saved(run, 7)
    with pytest.raises(InputError, match="another tokenizer"):
        small_run(tmp_path, tokenizer=SimpleNamespace(fingerprint="xyz"), resume=True)


def test_resume_rejects_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nothing to resume from; drop --resume"):
        small_run(tmp_path, resume=True)


def test_resume_rejects_the_checkpoint_of_another_script(run, tmp_path):
    """The name of the file says whose it should be."""
    saved(run, 7).rename(tmp_path / "reward.pt")
    message = "written by `python train_sft.py`; a checkpoint of `python train_reward.py` is"
    with pytest.raises(InputError, match=message):
        small_run(tmp_path, cls=RewardConfig, resume=True)


# AdamW's state of the first matrix, 11 x 8, and what is wrong with it.
WRONG_STATES = {
    "another shape": lambda state: state.update(exp_avg=torch.zeros(3)),
    "a transposed shape": lambda state: state.update(exp_avg_sq=torch.zeros(8, 11)),
    "a single number in memory": lambda state: state.update(exp_avg=torch.zeros(1).expand(11, 8)),
    "a step per number": lambda state: state.update(step=torch.zeros(11, 8)),
    "no step": lambda state: state.update(step=torch.zeros(0)),
    "a missing moment": lambda state: state.pop("exp_avg_sq"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_resume_rejects_an_optimizer_state_of_other_parameters(run, tmp_path, name):
    """torch loads any shape, and the next step would end in a segmentation fault."""
    content = torch.load(saved(run, 7), weights_only=True)
    assert content["optimizer"]["state"][0]["exp_avg"].shape == (11, 8)
    WRONG_STATES[name](content["optimizer"]["state"][0])
    torch.save(content, run.path)
    with pytest.raises(InputError, match="sft.pt does not fit its own settings"):
        small_run(tmp_path, resume=True)


def test_resume_rejects_weights_that_do_not_fit(run, tmp_path):
    content = torch.load(saved(run, 7), weights_only=True)
    del content["model"]["wte.weight"]
    torch.save(content, run.path)
    with pytest.raises(InputError, match='(?s)sft.pt does not fit .*Missing key.*"wte.weight"'):
        small_run(tmp_path, resume=True)


def test_resume_rejects_an_optimizer_state_in_another_order(run, tmp_path):
    """Two parameters of different shapes have changed places."""
    content = torch.load(saved(run, 7), weights_only=True)
    numbers = content["optimizer"]["param_groups"][0]["params"]
    numbers[0], numbers[1] = numbers[1], numbers[0]
    torch.save(content, run.path)
    with pytest.raises(InputError, match="sft.pt does not fit .*exp_avg has another shape"):
        small_run(tmp_path, resume=True)


# ---- results of other runs ----


@pytest.mark.parametrize(("step", "cls"), [(7, PPOConfig), (9, PPOConfig), (7, RewardConfig)])
def test_resume_removes_results_of_an_older_run(tmp_path, step, cls):
    """A kill between writing a checkpoint and removing the old run's results leaves these."""
    kind = cls.kind
    saved(small_run(tmp_path, cls=cls), step)
    names = RESULTS[kind][1:]
    for name in names:
        (tmp_path / name).write_text("old")
    (tmp_path / "sft.csv").write_text("of another stage")
    small_run(tmp_path, cls=cls, resume=True)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f"{kind}.csv", f"{kind}.json", f"{kind}.pt", "sft.csv"])
    assert (tmp_path / f"{kind}.json").read_text() != "old"


def test_refused_resume_removes_nothing(tmp_path):
    saved(small_run(tmp_path, cls=PPOConfig), 9)
    (tmp_path / "ppo_samples.csv").write_text("of this run")
    with pytest.raises(InputError, match="begun with another lr"):
        small_run(tmp_path, cls=PPOConfig, resume=True, lr=0.1)
    assert (tmp_path / "ppo_samples.csv").read_text() == "of this run"


# ---- log ----

METRICS = {"loss": 0.125, "valid": None, "lr": 0.0005, "grad_norm": 2.0}


def test_log_shows_only_the_metrics_of_show_and_writes_all(tmp_path, clock, capsys):
    run = small_run(tmp_path, steps=4)
    clock.now += 10
    run.log(1, METRICS, show=("loss", "lr", "valid"))
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "lr", "valid", "tokens/s", "left"]
    assert line.split() == ["1/4", "0.125", "5.0e-04", "0", "30", "s"]  # valid was not measured
    assert rows(tmp_path / "sft.csv") == [
        {
            "step": "1",
            "loss": "0.125",
            "valid": "",
            "lr": "0.0005",
            "grad_norm": "2",
            "tokens_per_s": "0",
            "seconds": "10",
        }
    ]


def test_log_prints_the_lines_that_are_due_and_writes_every_row(tmp_path, capsys):
    """With --log-every 3: the first step, every third one, and the last."""
    run = small_run(tmp_path, steps=7, eval_every=7, log_every=3)
    for number in range(1, 8):
        run.log(number, {"loss": 0.5}, ("loss",))
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["step", "1/7", "3/7", "6/7", "7/7"]
    assert [row["step"] for row in rows(tmp_path / "sft.csv")] == list("1234567")


def test_log_after_resume_keeps_the_rows_of_the_checkpoint(tmp_path):
    """The checkpoint is of step 2, so the row of step 3 is written again, whatever the file holds
    by now."""
    csv = tmp_path / "sft.csv"
    run = small_run(tmp_path, steps=4)
    for number in (1, 2):
        run.log(number, {"loss": number / 8, "valid": None}, ())
    run.save(2)
    run.log(3, {"loss": 3 / 8, "valid": None}, ())
    for text in ("of another run", None):
        if text:
            csv.write_text(text)
        resumed = small_run(tmp_path, steps=4, resume=True)
        assert len(rows(csv)) == 2
        resumed.log(3, {"loss": 9.0, "valid": 1.0}, ())
        got = [(row["step"], row["loss"], row["valid"]) for row in rows(csv)]
        assert got == [("1", "0.125", ""), ("2", "0.25", ""), ("3", "9", "1")]


def test_log_appends_a_row_at_the_same_cost_after_any_number(tmp_path, monkeypatch):
    """Only the first row and the rows of a save write the file as a whole."""
    whole = []
    monkeypatch.setattr(files, "write_csv", lambda path, rows: whole.append(len(rows)))
    run = small_run(tmp_path, steps=4)
    for number in (1, 2, 3):
        run.log(number, {"loss": number / 8}, ())
        (tmp_path / "sft.csv").touch()
    assert whole == [1]
    lines = (tmp_path / "sft.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["2", "0.25"], ["3", "0.375"]]


def test_save_writes_the_metrics_again_that_have_been_changed(tmp_path):
    run = small_run(tmp_path, steps=4)
    for number in (1, 2):
        run.log(number, {"loss": number / 8}, ())
    whole = (tmp_path / "sft.csv").read_bytes()
    (tmp_path / "sft.csv").write_text("edited")
    run.save(2)
    assert (tmp_path / "sft.csv").read_bytes() == whole


@pytest.mark.parametrize("end", [0, -1, -3, None])
def test_resume_cuts_the_metrics_to_those_of_the_checkpoint(tmp_path, end):
    """The file ends in half a row, in rows that come after the checkpoint, or in the same rows
    again; or it is gone."""
    csv = tmp_path / "sft.csv"
    run = small_run(tmp_path, steps=4)
    run.log(1, {"loss": 0.5}, ())
    run.save(1)
    before = csv.read_bytes()
    run.log(2, {"loss": 0.25}, ())
    longer = csv.read_bytes()
    assert longer.startswith(before) and len(longer) > len(before)
    csv.write_bytes(longer[:end] if end != 0 else longer + longer)
    if end is None:
        csv.unlink()
    small_run(tmp_path, steps=4, resume=True)
    assert csv.read_bytes() == before


def test_log_after_resume_adds_the_seconds_before(tmp_path, clock):
    """200 seconds up to step 2, then 15."""
    run = small_run(tmp_path, steps=4)
    run.rows = [{"step": n, "tokens_per_s": 9, "seconds": 100.0 * n} for n in (1, 2)]
    run.save(2)
    resumed = small_run(tmp_path, steps=4, resume=True)
    clock.now += 15
    resumed.log(3, {}, ())
    assert resumed.rows[-1]["seconds"] == 215


def test_log_writes_measured_metrics_for_tensorboard(tmp_path, monkeypatch):
    """A resumed run removes what was written after its checkpoint: purge_step is the next step."""
    written = []
    opened = []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = small_run(tmp_path, tensorboard=True)
    run.log(1, METRICS, ())
    run.save(1)
    small_run(tmp_path, tensorboard=True, resume=True)
    assert opened == [(tmp_path / "tensorboard" / "sft", 1), (tmp_path / "tensorboard" / "sft", 2)]
    assert ("sft/loss", 0.125, 1) in written
    assert "sft/valid" not in [name for name, _, _ in written]  # not measured


def test_sampled_texts_are_printed_and_go_to_tensorboard(tmp_path, monkeypatch, capsys):
    texts = []
    writer = SimpleNamespace(add_text=lambda *text: texts.append(text))
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    response = Response("\n\nHuman: Hi.\n\nAssistant:", "Hello.", 1.5, None, 0.0, 3, True)
    small_run(tmp_path, tensorboard=True).show_responses(2, [response])
    assert texts == [("sft/response 0", "Hi.\n\nHello.", 2)]
    assert "now -> Hello." in capsys.readouterr().out
    small_run(tmp_path, overwrite=True).show_responses(2, [response])  # without TensorBoard
    assert len(texts) == 1


def test_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard needs the package: pip install tensorb"):
        small_run(tmp_path, tensorboard=True)


# ---- what is due, and what is counted ----


def test_announce_says_where_and_how(tmp_path, capsys):
    small_run(tmp_path, seed=3, amp="bf16").announce("12 rows")
    assert capsys.readouterr().out == "12 rows, on cpu, amp bf16, seed 3\n"


def test_announce_starts_the_clock(tmp_path, clock):
    """What comes before the first step, such as the judge's scores, does not count as training."""
    run = small_run(tmp_path)
    clock.now += 100
    run.announce("12 rows")
    clock.now += 10
    run.log(1, {}, ())
    assert run.rows[-1]["seconds"] == 10


def test_evaluations_are_due_every_eval_every_steps_and_at_the_end(tmp_path):
    run = small_run(tmp_path, steps=10, eval_every=4)
    assert [step for step in range(1, 11) if run.evaluates(step)] == [4, 8, 10]


def test_lines_are_due_at_the_first_step_every_log_every_and_at_evaluations(tmp_path):
    run = small_run(tmp_path, steps=10, eval_every=4, log_every=3)
    assert [step for step in range(1, 11) if run.logs(step)] == [1, 3, 4, 6, 8, 9, 10]


def test_count_tokens_adds_up(tmp_path):
    run = small_run(tmp_path)
    run.count_tokens(7)
    run.count_tokens(5)
    assert run.progress.tokens == 12


# ---- several processes ----


def test_process_that_does_not_write_changes_no_file(tmp_path, monkeypatch):
    """As all but one of several processes: neither a CSV of this run nor one of an earlier run."""
    monkeypatch.setattr(processes, "RANK", 1)
    for name in ("reward.csv", "reward_evaluation.csv"):
        (tmp_path / name).write_text("step\n1\n")
    before = {path: (path.read_text(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    run = small_run(tmp_path, cls=RewardConfig, steps=2, overwrite=True, tensorboard=True)
    run.log(1, {"loss": 0.5}, ("loss",))
    run.save(1)
    after = {path: (path.read_text(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert after == before
