"""User errors, and the one line that is printed for one."""

import sys
import textwrap
from typing import NoReturn


class InputError(Exception):
    """A user error: `rlhf.run.program.run` prints it as one line and exits with status 2."""


def fail(message: str) -> NoReturn:
    """Print the message as one line, and exit with status 2."""
    print("error: " + textwrap.shorten(message, 600, placeholder=" ..."), file=sys.stderr)
    sys.exit(2)
