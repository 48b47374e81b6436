"""Flags: a frozen dataclass becomes the command line, with one field, one flag, one default and one line of help."""

import argparse
import dataclasses
import io
import math
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class InputError(Exception):
    """A user error: `run` prints it as one line, without a traceback, and exits with status 2."""


def arg(default, help: str, choices: tuple[str, ...] | None = None, group: str | None = None, flag: bool = True):
    """A field of a config: `lr: float = arg(1e-3, "peak learning rate")` becomes the flag --lr.

    A tuple[str, ...] takes several values. group: the heading in --help from this field on. flag: False for values that
    stand by themselves, without a flag.
    """
    about = {"help": help, "choices": choices, "group": group, "flag": flag}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainConfig:
    """The flags that the three scripts share. A script gives other defaults by naming a field again."""

    data: str = arg("data/tiny_assistant", "data set folder", group="run")
    out: str = arg("runs", "folder for checkpoints and metrics")
    resume: bool = arg(False, "resume from the checkpoint in --out")
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

    def checkpoint(self, name: str) -> Path:
        """The file named by the flag --sft or --reward or, without such a flag, the one in --out."""
        return Path(getattr(self, name, "") or Path(self.out) / f"{name}.pt")


def number(text: str) -> float:
    """float(text), but NaN is refused: it would pass every check of a range."""
    if math.isnan(value := float(text)):
        raise ValueError
    return value


def whole(text: str) -> int:
    """int(text), of a size that torch can count with."""
    if abs(value := int(text)) >= 2**63:
        raise ValueError
    return value


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
            group.add_argument(flag, type={float: number, int: whole}.get(kind, kind), choices=choices, **options)
    group.add_argument("-h", "--help", action="help", help="show this page")
    flags = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    except ValueError as error:
        parser.error(str(error))


def run(main: Callable, cls: type) -> None:
    """Parse, then run a script's main. A user error is printed as one line, with exit status 2."""
    sys.stdin = sys.stdin or io.StringIO()  # None if it was closed
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal or a log cannot hold is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        main(parse_cli(cls))
    except (InputError, OSError) as error:  # an OSError is a folder that cannot be written, a full disk, ...
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|can't allocate memory", str(error)) and not isinstance(error, MemoryError):
            raise
        fail(f"not enough memory: give a smaller --micro-batch-size, or a smaller model ({error})")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; what was written stays, and training resumes from its checkpoint with --resume")


def fail(message: str) -> None:
    """One line, and exit status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def check_positive(config, *names: str) -> None:
    """Raise ValueError if a numeric field is not above 0, or infinite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be above 0 and finite")


def check_not_negative(config, *names: str) -> None:
    """Raise ValueError if a numeric field is below 0, or infinite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be 0 or more, and finite")
