"""Flags, the help page, and what a script prints if the user has made an error."""

import io
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlhf.support.cli import (
    InputError,
    TrainConfig,
    arg,
    check_not_negative,
    check_positive,
    described,
    parse_cli,
    run,
)
from rlhf.support.judge import load_judge
from tests.helpers import ROOT
from train_ppo import PPOConfig
from train_reward import RewardConfig
from train_sft import SFTConfig


@dataclass(frozen=True)
class Config:
    """A config."""

    lr: float = arg(0.5, "the rate", group="optimisation")
    steps: int = arg(9, "the steps")
    resume: bool = arg(False, "go on", group="run")
    amp: str = arg("off", "precision", ("off", "bf16"))
    block_size: int = arg(8, "context")
    files: tuple[str, ...] = arg(("a", "b"), "some files")
    init: str = arg("", "where to start")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("--steps must be at least 1")


@dataclass(frozen=True)
class Derived(Config):
    """Another config."""

    steps: int = 20
    rank: int = arg(4, "the rank")


def help_page(cls, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(cls, ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def groups(page):
    """{heading: lines of flags below it}"""
    found, heading = {}, None
    for line in page.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line.rstrip(":")
            found[heading] = []
        elif line.startswith("  -"):
            found[heading].append(line.strip())
    return found


# ---- flags ----


def test_parse_cli_without_flags_gives_the_defaults():
    assert parse_cli(Config, []) == Config()


def test_parse_cli_reads_flags_into_the_config():
    got = parse_cli(Config, ["--lr", "1e-3", "--resume", "--amp", "bf16", "--block-size", "4"])
    assert got == Config(lr=1e-3, resume=True, amp="bf16", block_size=4)


def test_parse_cli_collects_repeated_flags_of_several_values():
    assert parse_cli(Config, ["--files", "c", "d", "--lr", "0.5", "--files", "e"]) == Config(files=("c", "d", "e"))


def test_parse_cli_reads_values_without_a_flag():
    @dataclass(frozen=True)
    class Folders:
        """Values without a flag."""

        names: tuple[str, ...] = arg(("runs",), "folders", flag=False)
        out: str = arg("x.png", "figure")

    assert parse_cli(Folders, []) == Folders()
    assert parse_cli(Folders, ["a", "b", "--out", "y.png"]) == Folders(names=("a", "b"), out="y.png")


@pytest.mark.parametrize(
    "argv",
    [["--stepz", "3"], ["--steps", "many"], ["--steps", "0"], ["--steps", "9" * 5000], ["--amp", "fp8"],
     ["--step", "3"], ["--lr", "much"]],
)
def test_parse_cli_rejects_impossible_flags_with_one_line_and_status_2(argv, capsys):
    """An unknown flag, a value of the wrong type, a value out of range, a number of 5,000 digits, an abbreviation."""
    with pytest.raises(SystemExit) as stop:
        parse_cli(Config, argv)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in shown
    assert shown.startswith("error: ") and shown.count("\n") == 1 and len(shown) < 700


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_check_positive_rejects_zero_negative_and_infinite_numbers(value):
    check_positive(Config(lr=1e-9), "lr")
    with pytest.raises(ValueError, match="--lr is .*: it must be above 0, and finite"):
        check_positive(Config(lr=value), "lr")


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_check_not_negative_rejects_negative_and_infinite_numbers(value):
    check_not_negative(Config(block_size=0), "block_size")
    with pytest.raises(ValueError, match="--block-size is .*: it must be 0 or more, and finite"):
        check_not_negative(Config(block_size=value), "block_size")


# ---- the help page ----


def test_help_shows_defaults(capsys):
    page = help_page(Config, capsys)
    assert "the rate (default: 0.5)" in page and "some files (default: a b)" in page and "--no-resume" in page


def test_help_shows_no_default_if_it_is_empty(capsys):
    line = next(line for line in help_page(Config, capsys).splitlines() if "--init" in line)
    assert line.endswith("where to start")


def test_help_has_a_heading_for_each_group_and_a_line_for_each_flag(capsys):
    """A group lasts until the next field that names one. -h comes last."""
    found = groups(help_page(Config, capsys))
    assert [line.split()[0] for line in found["optimisation"]] == ["--lr", "--steps"]
    assert [line.split()[0].rstrip(",") for line in found["run"]] == [
        "--resume", "--amp", "--block-size", "--files", "--init", "-h"]


def test_help_of_a_field_with_another_default_is_that_of_the_base(capsys):
    """Derived names steps again without help. It keeps the help and the group of Config and shows its own default."""
    found = groups(help_page(Derived, capsys))
    assert [line.split()[0] for line in found["optimisation"]] == ["--lr", "--steps"]
    assert found["optimisation"][1].endswith("the steps (default: 20)")
    assert parse_cli(Derived, []).steps == 20


def test_help_is_110_columns_wide_in_any_terminal(capsys, monkeypatch):
    @dataclass(frozen=True)
    class Long:
        """A config."""

        rate: int = arg(1, "word " * 100)

    monkeypatch.setenv("COLUMNS", "40")
    assert 100 < max(map(len, help_page(Long, capsys).splitlines())) <= 110


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_help_of_a_script_is_short(cls, capsys):
    """At most 60 lines of at most 110 columns. The help of a flag is on one line."""
    lines = help_page(cls, capsys).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 110
    for field, about in described(cls):
        assert sum(about["help"] in line for line in lines) == 1, field.name


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_help_of_a_script_has_every_flag_once_under_the_groups_of_train_config(cls, capsys):
    found = groups(help_page(cls, capsys))
    flags = [line.split()[0].rstrip(",") for lines in found.values() for line in lines]
    assert sorted(flags) == sorted(["-h", *("--" + field.name.replace("_", "-") for field, _ in described(cls))])
    shared = {"run": ["--data", "--seed"], "optimisation": ["--steps", "--lr", "--eval-every"]}
    for heading, names in shared.items():
        assert set(names) <= {line.split()[0] for line in found[heading]}


def test_help_of_a_script_shows_its_own_default_with_the_help_of_train_config(capsys):
    """SFTConfig gives steps another default and no help."""
    line = next(line for line in help_page(SFTConfig, capsys).splitlines() if line.startswith("  --steps"))
    help_of_base = TrainConfig.__dataclass_fields__["steps"].metadata["help"]
    assert not SFTConfig.__dataclass_fields__["steps"].metadata and TrainConfig().steps != SFTConfig().steps
    assert line.endswith(f"{help_of_base} (default: {SFTConfig().steps})")


# ---- errors ----


@pytest.fixture
def without_flags(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py"])


@pytest.mark.parametrize(
    ("error", "line"),
    [(InputError("one\n  two"), "error: one two"), (InputError("a " + "b" * 10**6), "error: a ..."),
     (MemoryError(), "error: not enough memory"), (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "give a smaller --micro-batch-size")])
def test_run_prints_a_user_error_as_one_line(without_flags, capsys, error, line):
    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, Config)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and line in shown and shown.count("\n") == 1


def test_run_keeps_the_traceback_of_a_bug(without_flags):
    def main(cfg):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(main, Config)


def test_run_names_a_file_that_cannot_be_read(without_flags, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda cfg: open("/no/such/file"), Config)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: /no/such/file cannot be read or written: No such file or directory\n"


def test_run_keeps_the_traceback_of_a_judge_that_cannot_open_its_file(without_flags, tmp_path):
    (tmp_path / "judge.py").write_text("def score(prompts, responses):\n    open('/no/such/file')\n")
    with pytest.raises(FileNotFoundError):
        run(lambda cfg: load_judge(tmp_path), Config)


def test_run_does_not_let_a_judge_end_the_program(without_flags):
    def main(cfg):
        sys.exit(0)

    with pytest.raises(RuntimeError, match="called sys.exit"):
        run(main, Config)


def test_run_replaces_letters_that_the_terminal_lacks(without_flags, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    run(lambda cfg: print("caf\u00e9"), Config)
    out.flush()
    assert out.buffer.getvalue() == b"caf?\n"


# ---- Ctrl-C, closed pipes, full disks: in a process of its own ----


def program(text, *command, **streams):
    """Start a program whose main(cfg) has this text; it has a --out, as the scripts have."""
    text = f"""import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from rlhf.support import cli
@dataclass(frozen=True)
class Config(cli.TrainConfig):
    "A program."
def main(cfg):
    {text}
cli.run(main, Config)"""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([sys.executable, "-c", text, *map(str, command)], cwd=ROOT, text=True, **streams)


def test_interrupted_program_promises_resume_only_if_there_is_a_checkpoint(tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    for before, line in (("", "interrupted\n"), ("cli.resumable = Path('runs/x.pt'); ",
                                                 "interrupted; --resume continues from runs/x.pt\n")):
        done = program(before + kill, "--out", tmp_path)
        assert (done.communicate()[1], done.returncode) == ("\n" + line, 130)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train_sft.py"], ["-m", "rlhf.tools.sample"]])
def test_interrupt_during_imports_is_one_line(command):
    """A module that torch imports early sends the signal."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            "import os, signal, sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'torch':\n            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n")
        done = subprocess.run([sys.executable, *command, "--out", folder], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": folder})
    assert (done.stderr, done.returncode) == ("\ninterrupted\n", 130)


def test_closed_pipe_ends_a_program_quietly(tmp_path):
    done = program("[print('line', flush=True) for _ in range(100_000)]", "--out", tmp_path)
    done.stdout.readline()
    done.stdout.close()
    assert (done.stderr.read(), done.wait()) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("flush", [True, False])
def test_full_disk_under_standard_output_is_one_line(tmp_path, flush):
    with open("/dev/full", "w") as full:
        done = program(f"print('line', flush={flush})", "--out", tmp_path, stdout=full)
        assert done.communicate()[1] == "error: standard output or a file cannot be written: No space left on device\n"
    assert done.returncode == 2


# ---- one program per folder ----


def test_second_program_in_a_folder_is_refused_until_the_first_has_died(tmp_path):
    """The first is killed, so that it cannot clean up."""
    first = program("print('in', flush=True); time.sleep(60)", "--out", tmp_path)
    assert first.stdout.readline() == "in\n"
    second = program("print('in')", "--out", tmp_path)
    out, err = second.communicate()
    assert (out, second.returncode) == ("", 2) and err.startswith("error: another program writes here and holds")
    first.kill()
    first.wait()
    third = program("print('in')", "--out", tmp_path)
    assert third.communicate()[0] == "in\n" and third.returncode == 0
