"""Flags: a frozen dataclass becomes the command line, with one field, one flag, one default and one line of help.

And how a program ends: a user error is one line and status 2, Ctrl-C one line and status 130.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if os.name == "posix":
    import fcntl


class InputError(Exception):
    """A user error: `run` prints it as one line, without a traceback, and exits with status 2."""


def arg(default, help: str, choices: tuple[str, ...] | None = None, group: str | None = None, flag: bool = True):
    """A field of a config: `lr: float = arg(1e-3, "peak learning rate")` becomes the flag --lr.

    A tuple[str, ...] takes several values. group: the heading in --help from this field on. flag: False for values that
    stand by themselves, without a flag.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "group": group, "flag": flag})


@dataclass(frozen=True)
class TrainConfig:
    """The flags that the three scripts share. A script gives other defaults by naming a field again."""

    data: str = arg("data/tiny_assistant", "data set folder", group="run")
    out: str = arg("runs", "folder for checkpoints and metrics")
    resume: bool = arg(False, "resume from the checkpoint in --out")
    overwrite: bool = arg(False, "replace the results of another run in --out")
    tensorboard: bool = arg(False, "also write the metrics for TensorBoard")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    amp: str = arg("off", "mixed precision; auto: bf16 on a GPU that has it", ("auto", "off", "bf16", "fp16"))
    seed: int = arg(0, "random seed")
    steps: int = arg(1, "number of steps", group="optimisation")
    batch_size: int = arg(1, "rows per step")
    micro_batch_size: int = arg(0, "micro-batch size for gradient accumulation (0: off)")
    lr: float = arg(1e-3, "peak learning rate")
    warmup: int = arg(0, "steps of linear warm-up")
    max_grad_norm: float = arg(1.0, "gradient clipping norm")
    lora_rank: int = arg(0, "LoRA rank (0: train all weights)")
    eval_every: int = arg(1, "steps between evaluations and checkpoints")

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "lr", "max_grad_norm", "eval_every")
        check_not_negative(self, "micro_batch_size", "warmup", "lora_rank")
        if not self.data or not self.out:
            raise ValueError("--data and --out must name a folder")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it; give one of them")

    def lock_file(self) -> Path:
        return Path(self.out) / ".lock"

    def checkpoint(self, name: str) -> Path:
        """The file named by the flag --sft or --reward or, without such a flag, the one in --out."""
        return Path(getattr(self, name, "") or Path(self.out) / f"{name}.pt")


def described(cls: type):
    """Each field of a config with its metadata: its own or, for a field that only changes the default, its base's."""
    for field in dataclasses.fields(cls):
        bases = (base.__dataclass_fields__[field.name] for base in cls.__mro__[:-1]
                 if field.name in base.__dataclass_fields__)
        yield field, next(base.metadata for base in bases if base.metadata)


def parse_cli(cls: type, argv: list[str] | None = None):
    """Read the flags into a config. --help shows every default; a bad flag or value exits with status 2."""
    parser = argparse.ArgumentParser(
        description=cls.__doc__, usage="%(prog)s [flags]", allow_abbrev=False, add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110))
    parser.error = lambda message: fail(f"{message} (--help shows all flags)")  # no usage, which would hide the error
    hints, group = typing.get_type_hints(cls), parser
    for field, about in described(cls):
        flag = "--" + field.name.replace("_", "-") if about["flag"] else field.name
        kind, choices = hints[field.name], about["choices"]
        group = parser.add_argument_group(about["group"]) if about["group"] else group
        default = " ".join(field.default) if kind == tuple[str, ...] else str(field.default)
        options = {"help": about["help"] + (f" (default: {default})" if default else ""), "default": argparse.SUPPRESS}
        if kind == tuple[str, ...]:
            group.add_argument(flag, nargs="+" if about["flag"] else "*", action="extend", metavar="FILE", **options)
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            options["metavar"] = None if choices else {float: "X", int: "N"}.get(kind, "S")
            group.add_argument(flag, type=kind, choices=choices, **options)
    group.add_argument("-h", "--help", action="help", help="show this page")
    flags = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    except ValueError as error:
        parser.error(str(error))


def run(main: Callable, cls: type) -> None:
    """Parse, then run a program's main. A user error is printed as one line, with exit status 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal or a log cannot hold is no reason to stop
            stream.reconfigure(errors="replace")
    cfg = parse_cli(cls)
    try:
        with lock(cfg.lock_file()) if writes and hasattr(cfg, "lock_file") else contextlib.nullcontext():
            main(cfg)
        print(end="", flush=True)  # a full disk shows here and not while Python shuts down
    except SystemExit as error:
        raise RuntimeError("a judge.py called sys.exit, which would pass for the end of the program") from error
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os._exit(141)  # what a shell reports; an ordinary exit would try to write what is left, and complain
    except InputError as error:
        fail(str(error))
    except OSError as error:
        if any(frame.f_globals.get("__name__") == "judge" for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # a bug in the user's code
        if error.filename:
            fail(f"{error.filename} cannot be read or written: {error.strerror}")
        print(f"error: standard output or a file cannot be written: {error.strerror}", file=sys.stderr)
        os._exit(2)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|can't allocate|MemoryError", f"{error} {type(error).__name__}"):
            raise
        fail(f"not enough memory: give a smaller --micro-batch-size, or a smaller model ({error})")


def fail(message: str) -> None:
    """One line, and exit status 2."""
    print("error: " + textwrap.shorten(message, 600, placeholder=" ..."), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def lock(path: Path):
    """One program at a time writes where this file lies. The system releases the lock when the process dies.

    Raises InputError if another process holds it. On Windows nothing is locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another program writes here and holds {path}; wait, or give another --out") from None
    with file:
        yield


resumable: Path | None = None  # the checkpoint that this process has written or resumed from
writes = True  # False: another process of the same run writes the files (rlhf/extras/parallel.py)


def on_error(kind: type, error: BaseException, where) -> None:
    """Python's excepthook. Ctrl-C ends a program with one line, also while it still imports torch."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, where)
    try:
        print("\ninterrupted" + (f"; --resume continues from {resumable}" if resumable else ""), file=sys.stderr)
        sys.stdout.flush()
    finally:
        os._exit(130)  # without waiting for threads


sys.excepthook = on_error


def check_positive(config, *names: str, zero: bool = False) -> None:
    """Raise ValueError if a numeric field is not above 0 (or 0, if that is allowed), or infinite."""
    for name in names:
        value = getattr(config, name)
        if not (0 < value < math.inf or zero and value == 0):
            flag, least = "--" + name.replace("_", "-"), "0 or more" if zero else "above 0"
            raise ValueError(f"{flag} is {value}: it must be {least}, and finite")


check_not_negative = functools.partial(check_positive, zero=True)
