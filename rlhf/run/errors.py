"""User errors, the one line that is printed for one, and text that comes from elsewhere."""

import difflib
import re
import sys
import textwrap
from collections.abc import Iterable
from typing import NoReturn


class InputError(Exception):
    """A user error: `rlhf.run.program.run` prints it as one line and exits with status 2."""


def fail(message: str) -> NoReturn:
    """Print the message as one line, and exit with status 2."""
    line = textwrap.shorten(message, 600, placeholder=" ...")
    print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(2)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest of those known, or ""."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and LF


def printable(text: str) -> str:
    """Text of a data set, a checkpoint or a model as it is printed: ESC as \\x1b, CR as \\r.

    A terminal obeys control characters: they clear the screen, or overwrite what was printed.
    """
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
