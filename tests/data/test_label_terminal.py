"""data/label_terminal.py: the keys, what is shown, and labelling at a pseudo-terminal."""

import io
import os
import sys
import threading
import time

import pytest

from data import label_terminal
from data.label_pairs import ListedPairs
from data.label_terminal import KEYS, NO_KEY, next_key, show, wrapped
from data.label_votes import Labelling, Pair

# What the keys of a usual keyboard send. {} is a modifier: 2 Shift, 3 Alt, 5 Ctrl, 8 all of them.
MODIFIERS = range(2, 9)
VT100 = ["\x1bO" + letter for letter in "ABCDHFPQRSMjklmnopqrstuvwxyX"]
VT100 += ["\x1b[" + letter for letter in "ABCD"]
NUMBERS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 23, 24]
NUMBERS += [25, 26, 28, 29, 31, 32, 33, 34]
XTERM = ["\x1b[" + letter for letter in "ABCDEFHZ"] + [f"\x1b[{n}~" for n in NUMBERS]
XTERM += [f"\x1b[{n};{m}~" for n in NUMBERS for m in MODIFIERS]
XTERM += [f"\x1b[1;{m}{letter}" for letter in "ABCDEFHPQRS" for m in MODIFIERS]
XTERM += [f"\x1bO{m}{letter}" for letter in "ABCDPQRS" for m in MODIFIERS]
XTERM += [f"\x1b[27;{m};{ord(letter)}~" for letter in "12tbsuq" for m in MODIFIERS]
XTERM += [f"\x1b[{ord(letter)};{m}u" for letter in "12tbsuq" for m in MODIFIERS]
LINUX = ["\x1b[[" + letter for letter in "ABCDE"]
ALT = ["\x1b" + letter for letter in "12tbsuqxTSUQ~\r\t\x7f"]
ALT += ["\x1b" + sequence for sequence in ("\x1b[A", "\x1b[1~", "\x1bOP", "\x1b[[A")]
PASTE = ["\x1b[200~12tsu\r\x1b[201~", "12", "tie", "1\r1\r", "\xc3\xa9", "\x1b[200~1"]
MOUSE = ["\x1b[M 1t", "\x1b[Mq!!", "\x1b[<0;12;2M", "\x1b[<0;12;2m", "\x1b[32;12;2M"]
REPLIES = ["\x1b[I", "\x1b[O", "\x1b[?1;2c", "\x1b[24;1R", "\x1b]11;rgb:11/22/22\x07"]
REPLIES += ["\x1bP1+r436f=323536\x1b\\", "\x1b_Gi=1;t\x1b\\"]


BURSTS = [*VT100, *XTERM, *LINUX, *ALT, *PASTE, *MOUSE, *REPLIES]


# ---- keys ----


def keys_of(*parts, pause):
    """What next_key returns, up to the end of the input, for bytes that arrive in these parts."""
    terminal, keyboard = os.pipe()

    def type_parts():
        for part in parts:
            os.write(keyboard, part.encode("latin-1"))
            time.sleep(pause)
        os.close(keyboard)

    typing = threading.Thread(target=type_parts)
    typing.start()
    keys = []
    while not keys or keys[-1]:
        keys.append(next_key(terminal))
    typing.join()
    os.close(terminal)
    return keys[:-1]


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(label_terminal, "QUIET", 0.01)
    monkeypatch.setattr(label_terminal, "QUIET_AFTER_ESCAPE", 0.02)


def test_letters_are_keys_in_lower_case(short_waits):
    assert keys_of(*"12tBSuQ", pause=0.1) == ["1", "2", "t", "b", "s", "u", "q"]


@pytest.mark.slow
def test_key_whose_bytes_arrive_one_by_one_is_no_vote():
    """An ESC waits for half a second, and a sequence that began for its end."""
    for sequence in ("\x1b[1~", "\x1b[2;5~", "\x1bOP", "\x1b[[A", "\x1b1"):
        assert keys_of(*sequence, "", pause=0.07)[0] == NO_KEY, sequence
        assert len(keys_of(*sequence, pause=0.07)) == 1, sequence


@pytest.mark.slow
def test_sequence_that_arrives_long_after_its_escape_is_no_vote(short_waits):
    """The rest waits for its own end."""
    for sequence in ("\x1b[1~", "\x1bOq", "\x1b[[A"):
        assert keys_of(*sequence, "2", pause=0.2) == [NO_KEY, NO_KEY, "2"]


def test_escape_by_itself_does_nothing_not_even_to_a_later_key(short_waits):
    assert keys_of("\x1b", "1", pause=0.3) == [NO_KEY, "1"]
    assert keys_of("\x1b", pause=0) == [NO_KEY]


def test_two_keys_at_once_are_none():
    assert keys_of("12", pause=0) == [NO_KEY]


# ---- at a pseudo-terminal ----


class Desk:
    """A person at a pseudo-terminal, and label_terminal.annotate in a thread."""

    def __init__(self, labelling, monkeypatch):
        pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
        self.keyboard, terminal = pty.openpty()
        self.screen = io.StringIO()
        self.stdin = os.fdopen(terminal, "r")
        monkeypatch.setattr(sys, "stdin", self.stdin)
        monkeypatch.setattr(sys, "stdout", self.screen)
        self.program = threading.Thread(target=label_terminal.annotate, args=(labelling,))
        self.program.start()
        self.wait_for("q: quit", 1)

    def type(self, text):
        os.write(self.keyboard, text.encode("latin-1"))

    def wait_for(self, text, times):
        """Until the screen has shown the text so many times."""
        deadline = time.monotonic() + 10
        while self.screen.getvalue().count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} was not shown {times} times"
            time.sleep(0.002)

    def leave(self):
        self.program.join(timeout=10)
        assert not self.program.is_alive()
        self.stdin.close()
        os.close(self.keyboard)


def some_pairs(count):
    return [Pair(i, f"p{i}", f"a{i}", f"b{i}") for i in range(count)]


@pytest.mark.slow
def test_no_key_but_the_seven_votes_at_a_terminal(tmp_path, monkeypatch, short_waits):
    """All keys of xterm and of the Linux console, with their modifiers, pasted text, the mouse and
    what a terminal reports by itself: each is answered with the list of keys. Then the real keys,
    each typed when its pair is on the screen."""
    labelling = Labelling(ListedPairs(some_pairs(9)), tmp_path / "votes.csv")
    desk = Desk(labelling, monkeypatch)
    for number, burst in enumerate([*BURSTS, "\x1b"], start=1):
        desk.type(burst)
        desk.wait_for("1, 2, t, b, s, u or q", number)
        assert labelling.votes == [], repr(burst)
    for number, key in enumerate("12tbsu1", start=2):
        desk.type(key)
        desk.wait_for("q: quit", number)
    desk.type("q")
    desk.leave()
    answers = [vote.answer for vote in labelling.votes]
    assert answers == ["first", "second", "tie", "both bad", "first"]  # the skip was undone
    assert len(KEYS) == 7


def test_keys_typed_before_a_pair_is_shown_do_not_count(tmp_path, monkeypatch, short_waits):
    """The next pair takes half a second to sample, and "2" is typed meanwhile."""

    class SlowPairs(ListedPairs):
        def next_pair(self, votes):
            if votes:
                desk.type("2")
                time.sleep(0.5)
            return super().next_pair(votes)

    labelling = Labelling(SlowPairs(some_pairs(3)), tmp_path / "votes.csv")
    desk = Desk(labelling, monkeypatch)
    desk.type("1")
    desk.wait_for("q: quit", 2)
    time.sleep(0.2)
    desk.type("q")
    desk.leave()
    assert [vote.answer for vote in labelling.votes] == ["first"]


def test_terminal_is_as_before_afterwards(tmp_path, monkeypatch):
    termios = pytest.importorskip("termios", reason="this system has no terminals")
    desk = Desk(Labelling(ListedPairs(some_pairs(1)), tmp_path / "votes.csv"), monkeypatch)
    assert not termios.tcgetattr(desk.stdin)[3] & termios.ICANON
    desk.type("q")
    desk.program.join(timeout=10)
    assert termios.tcgetattr(desk.stdin)[3] & termios.ICANON
    desk.leave()


# ---- what is shown ----


def test_control_characters_of_a_pair_are_shown_and_not_sent(capsys):
    """ESC[2J would clear the screen. Line breaks stay."""
    show(Pair(0, "a\x1b[2Jb", "one\ntwo\x07", "\x9b31mred\r"), "0 done")
    shown = capsys.readouterr().out
    assert "\na\\x1b[2Jb\n" in shown
    assert "  1: one\n     two\\x07\n\n  2: \\x9b31mred\\r\n" in shown


def test_long_text_is_wrapped_below_its_label():
    text = "aaaa bbbb cccc dddd eeee ffff\n\n    code"
    expected = "  1: aaaa bbbb cccc dddd\n     eeee ffff\n\n         code"
    assert wrapped(text, 25, "  1: ") == expected
    assert wrapped("x" * 50, 25) == "\n".join(["x" * 25] * 2)  # one long word
    assert wrapped("aaaa bbbb", 3, "  1: ") == "  1: aaaa bbbb"  # at least 20 columns of text


def test_text_takes_the_width_of_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    show(Pair(0, "word " * 30, "long " * 30, "b"), "3 of 9, about 2 min left")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 40 and "3 of 9, about 2 min left" in lines
