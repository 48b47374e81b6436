"""How a program ends: errors, Ctrl-C, closed pipes, full disks; and one program per folder."""

import io
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlhf.run.errors import InputError, fail, printable
from rlhf.run.flags import arg
from rlhf.run.judge import gold_scores, load_judge
from rlhf.run.program import lock, run
from tests.helpers import ROOT


@dataclass(frozen=True)
class Config:
    """A config."""

    lr: float = arg(0.5, "the rate")


# ---- errors ----


def test_fail_prints_one_line_and_exits_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        fail("one\n  two")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: one two\n")


def test_fail_shows_control_characters_and_does_not_send_them(capsys):
    with pytest.raises(SystemExit):
        fail("a\x1b[2Jb\x07 \x9b31m")
    assert capsys.readouterr().err == "error: a\\x1b[2Jb\\x07 \\x9b31m\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("na\u00efve \u6f22\u5b57 \U0001f600 e\u0301\n\tnext", None),  # as it is
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("over\rwritten\b\x7f", "over\\rwritten\\x08\\x7f"),
        ("\x00\x0b\x0c\x1f\x80\x9b\x9f\xa0", "\\x00\\x0b\\x0c\\x1f\\x80\\x9b\\x9f\xa0"),
    ],
)
def test_printable_shows_control_characters(text, shown):
    assert printable(text) == (text if shown is None else shown)


@pytest.fixture
def without_flags(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("one\n  two"), "error: one two"),
        (InputError("a " + "b" * 10**6), "error: a ..."),
        (MemoryError(), "error: not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "give a smaller --micro-batch-size",
        ),
    ],
)
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
    line = "error: /no/such/file cannot be read or written: No such file or directory\n"
    assert capsys.readouterr().err == line


def test_run_keeps_the_traceback_of_a_judge_that_cannot_open_its_file(without_flags, tmp_path):
    text = "def score(prompts, responses):\n    open('/no/such/file')\n"
    (tmp_path / "judge.py").write_text(text)
    with pytest.raises(RuntimeError, match=r"judge.py raised FileNotFoundError"):
        run(lambda cfg: gold_scores(load_judge(tmp_path), ["?"], ["a"]), Config)


@pytest.mark.parametrize("text", ["exit()", "def score(prompts, responses):\n    exit()"])
def test_run_does_not_let_a_judge_end_the_program(without_flags, tmp_path, text):
    (tmp_path / "judge.py").write_text(f"from sys import exit\n{text}\n")
    with pytest.raises(RuntimeError, match=r"judge.py raised SystemExit"):
        run(lambda cfg: gold_scores(load_judge(tmp_path), ["?"], ["a"]), Config)


def test_run_replaces_characters_that_the_terminal_lacks(without_flags, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    run(lambda cfg: print("caf\u00e9"), Config)
    out.flush()
    assert out.buffer.getvalue() == b"caf?\n"


# ---- Ctrl-C, closed pipes, full disks: in a process of its own ----


# Its checkpoint is OUT/sft.pt.
PROGRAM = """
import os, signal, sys, time
from dataclasses import dataclass
from rlhf.run.files import replacing
from rlhf.run.flags import TrainConfig
from rlhf.run.program import run

@dataclass(frozen=True)
class Config(TrainConfig):
    "A program."
    kind = "sft"

def save(cfg):
    with replacing(cfg.checkpoint("sft")) as file:
        file.write("new")

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)

def main(cfg):
MAIN

run(main, Config)
"""


def program(main, *flags, **streams):
    """Start PROGRAM with this text as its main(cfg), in a process of its own."""
    source = PROGRAM.replace("MAIN", textwrap.indent(main, "    "))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [sys.executable, "-c", source, *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **streams)


def check_interrupted(done, line):
    """It has printed this line only, and ended as by Ctrl-C."""
    _, printed = done.communicate()
    assert printed == f"\n{line}\n"
    assert done.returncode == 130


@pytest.mark.slow
def test_interrupted_program_without_a_checkpoint_promises_no_resume(tmp_path):
    check_interrupted(program("interrupt()", "--out", tmp_path), "interrupted")


@pytest.mark.slow
def test_interrupted_program_names_the_checkpoint_that_it_has_written(tmp_path):
    done = program("save(cfg)\ninterrupt()", "--out", tmp_path)
    check_interrupted(done, f"interrupted; --resume continues from {tmp_path}/sft.pt")


@pytest.mark.slow
def test_interrupted_program_names_the_checkpoint_that_it_has_resumed(tmp_path):
    (tmp_path / "sft.pt").write_text("old")
    done = program("interrupt()", "--out", tmp_path, "--resume")
    check_interrupted(done, f"interrupted; --resume continues from {tmp_path}/sft.pt")


@pytest.mark.slow
def test_interrupt_while_a_checkpoint_is_written_leaves_the_old_one(tmp_path):
    (tmp_path / "sft.pt").write_text("old")
    main = """
with replacing(cfg.checkpoint('sft')) as file:
    file.write('half')
    interrupt()
"""
    done = program(main, "--out", tmp_path, "--overwrite")
    check_interrupted(done, f"interrupted; --resume continues from {tmp_path}/sft.pt")
    assert (tmp_path / "sft.pt").read_text() == "old"
    assert not list(tmp_path.glob(".*.unfinished"))


@pytest.mark.slow
def test_closed_pipe_ends_a_program_quietly(tmp_path):
    done = program("[print('line', flush=True) for _ in range(100_000)]", "--out", tmp_path)
    done.stdout.readline()
    done.stdout.close()
    assert (done.stderr.read(), done.wait()) == ("", 141)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("flush", [True, False])
def test_full_disk_under_standard_output_is_one_line(tmp_path, flush):
    with open("/dev/full", "w") as full:
        done = program(f"print('line', flush={flush})", "--out", tmp_path, stdout=full)
        _, printed = done.communicate()
    line = "error: standard output or a file cannot be written: No space left on device\n"
    assert printed == line
    assert done.returncode == 2


# ---- one program per folder ----


@pytest.mark.slow
def test_second_program_in_a_folder_is_refused_until_the_first_has_died(tmp_path):
    """The first is killed, so that it cannot clean up."""
    first = program("print('in', flush=True); time.sleep(60)", "--out", tmp_path)
    assert first.stdout.readline() == "in\n"
    second = program("print('in')", "--out", tmp_path)
    out, err = second.communicate()
    assert (out, second.returncode) == ("", 2)
    assert err.startswith("error: another program writes here and holds")
    first.kill()
    first.wait()
    third = program("print('in')", "--out", tmp_path)
    assert third.communicate()[0] == "in\n" and third.returncode == 0


def test_lock_ends_with_its_block_also_after_an_error(tmp_path):
    path = tmp_path / "new" / ".lock"
    with pytest.raises(KeyError), lock(path):
        with pytest.raises(InputError, match="another program writes here"), lock(path):
            pass
        raise KeyError
    with lock(path):
        pass
