"""The command `rlhf`, and the commands that a run prints."""

import importlib.util
import json
import shlex
import sys

import pytest

from docs.experiments.train_dpo import DPOConfig
from rlhf.run import commands
from rlhf.run.commands import PROGRAMS, command, main, next_command
from tests.helpers import ROOT
from train_ppo import PPOConfig
from train_reward import RewardConfig
from train_sft import SFTConfig


@pytest.fixture
def started(monkeypatch):
    """Makes sys.argv[0] what it is in a program that was started in this way."""
    return lambda name: monkeypatch.setattr(sys, "argv", [name])


# ---- rlhf NAME ----


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"prepare"}))
def test_each_name_is_a_program(name):
    source = importlib.util.find_spec(PROGRAMS[name]).loader.get_source(PROGRAMS[name])
    assert '\nif __name__ == "__main__":\n' in source


def test_rlhf_runs_the_named_program_with_the_flags_after_the_name(monkeypatch):
    calls = []
    monkeypatch.setattr(commands.runpy, "run_module", lambda *x, **y: calls.append((x, y)))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rlhf", "label", "--count", "3"])
    main()
    assert calls == [(("rlhf.tools.label",), {"run_name": "__main__"})]
    assert sys.argv == ["rlhf label", "--count", "3"]


def test_help_of_an_installed_program_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlhf", "sft", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: rlhf sft [flags]\n")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_rlhf_lists_its_programs(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["rlhf", *words])
    main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in PROGRAMS) and shown.startswith("usage: rlhf NAME [flags]")


def test_rlhf_refuses_a_program_that_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlhf", "smaple"])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1
    assert shown.startswith("error: unknown program smaple (rlhf NAME")


# ---- how another program is started ----


@pytest.mark.parametrize(
    ("this", "stage", "tool"),
    [
        ("train_sft.py", "python train_ppo.py", "python -m rlhf.tools.label"),
        ("../a b/train_sft.py", "python '../a b/train_ppo.py'", "python -m rlhf.tools.label"),
        ("/clone/rlhf/tools/sample.py", "python train_ppo.py", "python -m rlhf.tools.label"),
        ("/venv/bin/pytest", "python train_ppo.py", "python -m rlhf.tools.label"),
        ("-c", "python train_ppo.py", "python -m rlhf.tools.label"),
        ("rlhf sft", "rlhf ppo", "rlhf label"),
    ],
)
def test_command_starts_a_program_as_this_one_was_started(started, this, stage, tool):
    """In a clone, from another folder, a tool, other programs; installed."""
    started(this)
    assert (command("ppo"), command("label")) == (stage, tool)
    assert command("dpo") == "python -m docs.experiments.train_dpo"  # never installed


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_command_of_a_stage_names_a_file_of_the_clone(started, name):
    started("train_sft.py")
    assert (ROOT / command(name).split()[1]).is_file()


# ---- what comes next ----


@pytest.mark.parametrize(
    ("cfg", "name", "expected"),
    [
        (SFTConfig(), "reward", "python train_reward.py"),
        (SFTConfig(steps=5, seed=1, device="cpu"), "reward", "python train_reward.py"),
        (RewardConfig(out="x"), "ppo", "python train_ppo.py --out x"),
        (
            SFTConfig(init="m", load_in_4bit=True, steps=0),
            "reward",
            "python -m rlhf.tools.sample --checkpoint runs/sft.pt",
        ),
        (
            RewardConfig(data="d", heldout=0.2, out="a b", sft="s.pt"),
            "ppo",
            "python train_ppo.py --data d --heldout 0.2 --out 'a b' --sft s.pt",
        ),
        (
            PPOConfig(),
            "optimality",
            "python -m rlhf.tools.optimality --checkpoint runs/ppo.pt",
        ),
        (
            PPOConfig(data="d", heldout=0.2, out="x", sft="s.pt"),
            "sample",
            "python -m rlhf.tools.sample --checkpoint x/ppo.pt --data d",
        ),
        (PPOConfig(), "report", "python -m rlhf.tools.report runs"),
        (
            PPOConfig(data="d", out="x", reward=("f.py",), reward_weights=(2.0,)),
            "report",
            "python -m rlhf.tools.report x --data d",
        ),
        (
            PPOConfig(out="x", sft="s.pt", reward=("a b.pt", "f.py:g"), reward_weights=(1, 0.2)),
            "optimality",
            "python -m rlhf.tools.optimality --checkpoint x/ppo.pt --sft s.pt --reward 'a b.pt' "
            "f.py:g",
        ),
        (
            PPOConfig(out="x", sft="s.pt", reward=("r.pt", "f.py:g"), reward_weights=(1, 0.2)),
            "sample",
            "python -m rlhf.tools.sample --checkpoint x/ppo.pt --reward r.pt f.py:g "
            "--reward-weights 1 0.2",
        ),
        (
            DPOConfig(),  # its files do not lie beside it
            "optimality",
            "python -m rlhf.tools.optimality --checkpoint runs/dpo/dpo.pt --sft runs/sft.pt "
            "--reward runs/reward.pt",
        ),
        (
            PPOConfig(data="d", sft="s.pt", reward=("f.py",)),
            "export",
            "python -m rlhf.tools.export --checkpoint runs/ppo.pt --data d",
        ),
        (
            DPOConfig(),
            "sample",
            "python -m rlhf.tools.sample --checkpoint runs/dpo/dpo.pt --reward runs/reward.pt",
        ),
    ],
)
def test_next_command_has_the_flags_about_data_and_folders_that_are_no_defaults(
    started, cfg, name, expected
):
    started("train_sft.py")
    assert next_command(cfg, name) == expected


def test_next_command_of_an_installed_program(started):
    started("rlhf sft")
    assert next_command(SFTConfig(out="x"), "reward") == "rlhf reward --out x"


def prepared(folder, content):
    (folder / "comparisons.csv").touch()
    (folder / "prepare.json").write_text(json.dumps(content))
    return SFTConfig(data=str(folder))


def test_next_command_ends_with_the_flags_that_prepare_has_chosen(started, tmp_path):
    started("train_sft.py")
    cfg = prepared(tmp_path, {"flags": {"reward": "--steps 70 --lr 1e-4", "ppo": "--steps 5"}})
    begin = f"--data {shlex.quote(str(tmp_path))}"
    assert next_command(cfg, "reward") == f"python train_reward.py {begin} --steps 70 --lr 1e-4"
    assert next_command(cfg, "ppo") == f"python train_ppo.py {begin} --steps 5"
    assert next_command(cfg, "sft") == f"python train_sft.py {begin}"


def test_next_command_pastes_no_second_command_of_a_data_set(started, tmp_path):
    """A data set may be someone else's."""
    started("train_sft.py")
    cfg = prepared(tmp_path, {"flags": {"reward": "--steps 7; rm x \x1b[2J"}})
    shown = next_command(cfg, "reward")
    assert shown.endswith("--steps '7;' rm x '\\x1b[2J'")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"flags": 1}',
        '{"flags": {"reward": null}}',
        """{"flags": {"reward": "'"}}""",
    ],
)
def test_next_command_ignores_a_prepare_json_of_something_else(started, tmp_path, text):
    started("train_sft.py")
    (tmp_path / "comparisons.csv").touch()
    (tmp_path / "prepare.json").write_text(text)
    cfg = SFTConfig(data=str(tmp_path))
    assert next_command(cfg, "reward") == f"python train_reward.py --data {tmp_path}"


def test_next_command_without_comparisons_needs_a_reward_function(started, tmp_path):
    started("train_sft.py")
    expected = f"python train_ppo.py --data {tmp_path} --reward FILE.py"
    assert next_command(SFTConfig(data=str(tmp_path)), "reward") == expected
