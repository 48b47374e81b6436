"""A frozen dataclass becomes the command line: one field, one flag, one default, one line of help."""

import argparse
import dataclasses
import io
import math
import re
import sys
import typing
from collections.abc import Callable

from rlhf.common import InputError


def arg(default, help: str, choices: tuple[str, ...] | None = None):
    """A field of a config: `lr: float = arg(1e-3, "peak learning rate")` is the flag --lr. A tuple[str, ...] takes
    several values, also flag by flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


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


def parse_cli(cls: type, argv: list[str] | None = None):
    """Read the flags into a config. --help shows every default; a bad flag or value exits with status 2."""
    parser = argparse.ArgumentParser(
        description=cls.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        options = {"default": field.default, "help": field.metadata["help"]}
        if kind == tuple[str, ...]:
            # "extend" would add to a default: none is given here, and the dataclass fills it in.
            shown = f"{options['help']} (default: {' '.join(field.default) or 'none'})"
            parser.add_argument(flag, nargs="+", action="extend", default=argparse.SUPPRESS, help=shown)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = {float: number, int: whole}.get(kind, kind)
            parser.add_argument(flag, type=kind, choices=field.metadata["choices"], **options)
    flags = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    except ValueError as error:
        parser.error(str(error))


def run(main: Callable, cls: type) -> None:
    """Parse, then run a script's main. What the user can mend is told in one line, with exit status 2."""
    sys.stdin = sys.stdin or io.StringIO()  # None where it was closed
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
        sys.exit("\ninterrupted; what was written stays, and a training goes on from its checkpoint with --resume")


def fail(message: str) -> None:
    """One line, and exit status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def check_positive(config, *names: str) -> None:
    """Raise ValueError where a numeric field is not above 0, or infinite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be above 0 and finite")


def check_not_negative(config, *names: str) -> None:
    """Raise ValueError where a numeric field is below 0, or infinite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be 0 or more, and finite")
