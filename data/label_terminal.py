"""Labelling at the terminal: a pair is shown, and one key is the vote."""

import contextlib
import os
import re
import select
import shutil
import sys
import textwrap

from data.label_votes import Labelling, Pair
from rlhf.run.errors import printable
from rlhf.run.messages import as_text, read_prompt

KEYS = {
    "1": "first",
    "2": "second",
    "t": "tie",
    "b": "both bad",
    "s": "skip",
    "u": "undo",
    "q": "quit",
}
HELP = "1 or 2: the better one   t: tie   b: both bad   s: skip   u: undo   q: quit"
NO_KEY = "\x1b"  # what next_key returns for all that is not a single character
QUIET = 0.05  # seconds without a byte after a key
QUIET_AFTER_ESCAPE = 0.5  # a slow connection may tear a sequence apart
# A sequence that began and has not ended: ESC [ or ESC O without its last letter. It may have lost
# its ESC to the burst before.
OPEN = re.compile(r"(?:^|\x1b)(?:\[\[?|O)[0-9;:<=>?]*$")


def annotate(labelling: Labelling) -> None:
    """Have pairs answered until there are enough, none is left, or the person quits."""
    with single_keys():
        while labelling.pair:
            discard_typed_ahead()
            show(labelling.pair, labelling.progress())
            answer = KEYS[ask_key()]
            if answer == "quit":
                return
            labelling.answer(answer)


# ---- what is shown ----


def show(pair: Pair, progress: str) -> None:
    width = shutil.get_terminal_size().columns
    prompt = as_text(read_prompt(pair.prompt)).strip()
    rule = "-" * min(width, len(HELP))
    parts = [
        f"\n{rule}\n{progress}\n",
        wrapped(prompt, width),
        "",
        wrapped(pair.first, width, "  1: "),
        "",
        wrapped(pair.second, width, "  2: "),
        "",
        wrapped(HELP, width),
    ]
    print("\n".join(parts), flush=True)


def wrapped(text: str, width: int, label: str = "") -> str:
    """The text in lines of this width, the first after the label and the others below it. Control
    characters are spelled out."""
    lines = []
    for line in printable(text).split("\n"):
        before = " " * len(label) if lines else label
        wrapper = textwrap.TextWrapper(
            width=max(width, len(label) + 20),
            initial_indent=before,
            subsequent_indent=" " * len(label),
            break_on_hyphens=False,
        )
        lines += wrapper.wrap(line) or [""]
    return "\n".join(lines)


# ---- keys ----


def has_keys() -> bool:
    """Whether single keys can be read; if not, lines are."""
    return sys.stdin.isatty() and os.name == "posix"


@contextlib.contextmanager
def single_keys():
    """Let the terminal give keys without Enter, and not print them."""
    if not has_keys():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def discard_typed_ahead() -> None:
    """Forget the keys that were typed before a pair is shown: they are no votes on it."""
    if has_keys():
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def ask_key() -> str:
    """Wait for one of KEYS."""
    key = read_key()
    while key not in KEYS:
        print("1, 2, t, b, s, u or q", end="\r", flush=True)  # not to scroll the pair away
        key = read_key()
    return key


def read_key() -> str:
    """One key from the terminal or, if there is none, the first letter of a line. "q" at the end of
    the input."""
    if not has_keys():
        return sys.stdin.readline()[:1].lower() or "q"
    return next_key(sys.stdin.fileno()) or "q"


def next_key(terminal: int) -> str:
    """The next key in lower case; NO_KEY for bytes that are no single key; "" at the end of the
    input.

    A character counts if it arrives by itself. Several at once are what one of the other keys sends
    (ESC [ 1 ~ is Home), pasted text, what the mouse sends, or two keys: nobody has read a pair that
    fast. After an ESC, all that follows within QUIET_AFTER_ESCAPE belongs to it.
    """
    burst = read_bytes(terminal)
    while burst and (OPEN.search(burst) or more_comes(terminal, burst)):
        more = read_bytes(terminal)
        if not more:
            break
        burst += more
    return burst.lower() if len(burst) <= 1 else NO_KEY


def more_comes(terminal: int, burst: str) -> bool:
    """Whether another byte arrives soon."""
    seconds = QUIET_AFTER_ESCAPE if "\x1b" in burst else QUIET
    return bool(select.select([terminal], [], [], seconds)[0])


def read_bytes(terminal: int) -> str:
    """What has arrived, at least one byte; "" at the end of the input."""
    return os.read(terminal, 4096).decode("latin-1")
