"""rlhf.tools.label: the file of answers, the keys, the judge as annotator; and training a reward
model on the file."""

import dataclasses
import io
import os
import sys
import threading
import time

import pytest
import torch

import train_reward
from data import label
from data.label import (
    COLUMNS,
    Choice,
    LabelConfig,
    Pair,
    Pairs,
    append_choice,
    read_choices,
    write_choices,
)
from rlhf.data import load_comparisons
from rlhf.run.errors import InputError, printable
from rlhf.run.flags import parse_cli
from rlhf.run.program import lock
from rlhf.run.program import run as cli_run
from rlhf.tokenizer import load_tokenizer
from tests.helpers import BUNDLED, rows, tiny

PROMPT = '\n\nHuman: say "hi", please\n\nAssistant:'


def first(pair, chosen="a", rejected="b", prompt=PROMPT):
    return Choice(pair, prompt, chosen, rejected, "first")


def cells(choice):
    """What a row of the file says, by column."""
    return dict(zip(COLUMNS, map(str, dataclasses.astuple(choice))))


# ---- the file ----


def test_answer_file_writes_each_answer_at_once_and_reads_it_again(tmp_path):
    path = tmp_path / "new" / "answers.csv"
    choice = first(4, chosen='a, "b"\nc', rejected="d")
    assert read_choices(path) == []
    append_choice(path, choice)
    assert rows(path) == [cells(choice)]
    assert read_choices(path) == [choice]


def test_answer_file_cut_at_any_byte_loses_at_most_the_last_answer(tmp_path):
    """The file is cut after each byte of its last line. All earlier answers are read, and new ones
    can follow. The last line is whole only if no more than its last quotation mark and its line
    break are missing."""
    path = tmp_path / "answers.csv"
    last = Choice(1, PROMPT, "naïve", "d\n\ne", "second")
    read_choices(path)
    append_choice(path, first(0))
    before = len(path.read_bytes())
    append_choice(path, last)
    whole = path.read_bytes()
    for end in range(before, len(whole) - 2):
        path.write_bytes(whole[:end])
        assert read_choices(path) == [first(0)], end
        append_choice(path, last)
        assert path.read_bytes() == whole
    for end in (-2, -1):  # all but the last quotation mark, all but the line break
        path.write_bytes(whole[:end])
        assert read_choices(path) == [first(0), last] and path.read_bytes() == whole


def test_answer_file_survives_an_editor(tmp_path, capsys):
    """Without the quotation marks that are not needed, with CRLF, and without the last line break,
    all answers stay. If the last line breaks off, the file is copied first. A faulty row in the
    middle is an error, and the file stays."""
    path = tmp_path / "answers.csv"
    header = ",".join(COLUMNS)
    path.write_bytes(f'\ufeff{header}\r\n1,p,"12"" nail",bad,first\r\n2,p,a,b,tie'.encode())
    assert read_choices(path) == [
        Choice(1, "p", '12" nail', "bad", "first"),
        Choice(2, "p", "a", "b", "tie"),
    ]
    broken = f'{header}\n1,p,a,b,first\n2,p,"a,b,first\n3,p,a,b,tie\n'
    path.write_text(broken)
    assert [choice.pair for choice in read_choices(path)] == [1]
    assert "breaks off" in capsys.readouterr().out
    assert (tmp_path / "answers.csv.cut").read_text() == broken
    expected = dict.fromkeys(
        ("x,p,a,b,first", "1,p,a,b,maybe", "1,p,a,b", "1,,a,b,first"), "row 1: expected a number"
    )
    for line in ('1,p,12" nail,b,first', '1,p,"12" nail",b,first', "1,p,a\rb,c,first"):
        expected[line] = "line 2: the quotation marks do not match, or a lone CR"
    expected["1,p,\udce9,b,first"] = "not text in UTF-8"
    for line, message in expected.items():
        content = f"{header}\n{line}\n2,p,a,b,first\n".encode(errors="surrogateescape")
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_choices(path)
        assert path.read_bytes() == content


def test_rewritten_file_is_the_same_as_one_that_was_appended_to(tmp_path):
    """After undo, the file is that of the answers before."""
    path = tmp_path / "answers.csv"
    choices = [first(0, prompt="p"), Choice(1, "p", "c", "d", "tie")]
    read_choices(path)
    append_choice(path, choices[0])
    one = path.read_bytes()
    append_choice(path, choices[1])
    write_choices(path, choices[:1])
    assert path.read_bytes() == one and read_choices(path) == choices[:1]


@pytest.mark.parametrize("text", ["", "\n", "Prompt,Chosen,Rejected\na,b,c\n", '"Pair"\n'])
def test_answer_file_rejects_another_file_and_leaves_it_unchanged(tmp_path, text):
    path = tmp_path / "answers.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="not a file of this program|is empty"):
        read_choices(path)
    assert path.read_text() == text


# ---- the program ----


def run(trained, tmp_path, monkeypatch, keys, *flags):
    """Run the program with these keys typed, and return the rows of its file. The model is hardly
    trained and seldom ends a response, so here each response counts as ended."""
    data, out, _ = trained
    monkeypatch.setattr(label, "has_ended", lambda tokens, *_: tokens[:, 0] == tokens[:, 0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys)))
    path = tmp_path / "answers.csv"
    files = ["--checkpoint", out / "sft.pt", "--data", data, "--out", path]
    settings = ["--device", "cpu", "--max-new-tokens", 8]
    label.main(parse_cli(LabelConfig, [*map(str, [*files, *settings, *flags])]))
    return rows(path)


def test_keys_write_the_answers_they_stand_for(trained, tmp_path, monkeypatch, capsys):
    """First, second, a wrong key, tie, skip, undo of the skip, first in its place, quit. A second
    call adds two more. A run without wrong key, undo and break writes the same rows."""
    got = run(trained, tmp_path, monkeypatch, "12xtsu1q")
    shown = capsys.readouterr().out
    assert [row["Answer"] for row in got] == ["first", "second", "tie", "first"]
    assert "4 answered, 3 of them with a choice" in shown
    pairs = [shown.split("  1: ")[i + 1].split("\n")[0] for i in range(2)]
    assert printable(got[0]["Chosen"]) == pairs[0] and printable(got[1]["Rejected"]) == pairs[1]
    more = run(trained, tmp_path, monkeypatch, "2t")
    assert more[:4] == got and [row["Answer"] for row in more[4:]] == ["second", "tie"]
    assert "going on after 4 answered" in capsys.readouterr().out

    straight = tmp_path / "straight"
    straight.mkdir()
    assert run(trained, straight, monkeypatch, "12t12t") == more
    assert len({row["Pair"] for row in more}) == 6


def test_control_characters_of_a_pair_are_shown_and_not_sent(monkeypatch, capsys):
    """ESC[2J would clear the screen. Line breaks and tabs stay."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    label.ask(Pair(0, "a\x1b[2Jb", "one\n\ttwo\x07", "\x9b31mred\r"))
    shown = capsys.readouterr().out
    assert "\na\\x1b[2Jb\n" in shown
    assert "  1: one\n\ttwo\\x07\n  2: \\x9b31mred\\r\n" in shown


# ---- keys of a terminal ----

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
XTERM += [f"\x1b[27;{m};{ord(letter)}~" for letter in "12tsuq" for m in MODIFIERS]
XTERM += [f"\x1b[{ord(letter)};{m}u" for letter in "12tsuq" for m in MODIFIERS]
LINUX = ["\x1b[[" + letter for letter in "ABCDE"]
ALT = ["\x1b" + letter for letter in "12tsuqxTSUQ~\r\t\x7f"]
ALT += ["\x1b" + sequence for sequence in ("\x1b[A", "\x1b[1~", "\x1bOP", "\x1b[[A")]


def keys_of(*parts, pause=0.0):
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
        keys.append(label.next_key(terminal))
    typing.join()
    os.close(terminal)
    return keys[:-1]


def test_letters_are_keys_in_lower_case():
    assert keys_of("12tSuQ") == ["1", "2", "t", "s", "u", "q"]


@pytest.mark.parametrize("sequences", [VT100, XTERM, LINUX, ALT], ids=len)
def test_key_that_sends_several_bytes_is_one_key_and_no_answer(sequences):
    """The key after it counts."""
    for sequence in sequences:
        got = keys_of(f"{sequence}1{sequence}{sequence}t")
        assert got == ["\x1b", "1", "\x1b", "\x1b", "t"], repr(sequence)
    assert label.ESCAPE not in label.KEYS


@pytest.mark.parametrize(
    "sequence", ["\x1b[1~", "\x1b[2;5~", "\x1bOP", "\x1b[[A", "\x1b1"], ids=repr
)
def test_key_whose_bytes_arrive_one_by_one_is_no_answer(sequence):
    assert keys_of(*sequence, "2", pause=0.05) == ["\x1b", "2"]


@pytest.mark.parametrize("sequence", ["\x1b[1~", "\x1bOq", "\x1b[[A"], ids=repr)
def test_sequence_that_arrives_long_after_its_escape_is_no_answer(monkeypatch, sequence):
    monkeypatch.setattr(label, "ALT_SECONDS", 0.01)
    assert keys_of(*sequence, "2", pause=0.1) == ["\x1b", "\x1b", "2"]


def test_escape_by_itself_does_nothing(monkeypatch):
    """Not even to the key that comes later."""
    monkeypatch.setattr(label, "ALT_SECONDS", 0.01)
    assert keys_of("\x1b", "1", pause=0.2) == ["\x1b", "1"]
    assert keys_of("\x1b") == ["\x1b"]


def test_keys_at_a_terminal_are_read_without_enter(monkeypatch):
    """Home, which sends ESC [ 1 ~, is not the answer 1."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    keyboard, terminal = pty.openpty()
    with os.fdopen(terminal, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        typing = threading.Timer(0.5, os.write, [keyboard, b"\x1b[1~"])
        typing.start()
        assert label.read_key() == "\x1b"
        typing = threading.Timer(0.5, os.write, [keyboard, b"T"])
        typing.start()
        assert label.read_key() == "t"
    os.close(keyboard)


def test_pairs_with_cut_off_or_equal_responses_are_not_shown(trained, monkeypatch):
    """Prompt i of a block has responses 2i and 2i + 1. In the first pair one was cut off. The
    second pair has two equal responses. In the third, one does not fit when it is read again. In
    the fourth, one holds a NUL byte, which no reader takes. The fifth is shown. Without it, nothing
    is left to show, which is an error."""
    cfg = LabelConfig(max_new_tokens=8)
    gpt, checkpoint = label.load_policy(trained[1] / "sft.pt", "sft")
    tokenizer = label.tokenizer_of(trained[1] / "sft.pt", checkpoint, str(trained[0]))
    bad_pairs = ["cut", "a", "same", "same", "x " * 90, "b", "a", "b\0"]
    texts = [*bad_pairs, "good", "bad"] + ["same"] * 22
    monkeypatch.setattr(label, "decode_responses", lambda *_: list(texts))
    ended = torch.tensor([False] + [True] * 31)
    monkeypatch.setattr(label, "has_ended", lambda *_: ended)
    prompts = [label.Prompt("p", [1, 2])]
    pair = Pairs(gpt, prompts, tokenizer, cfg).first_from(0)
    assert pair == Pair(4, "p", "good", "bad")
    texts[8] = "bad"
    with pytest.raises(InputError, match="left nothing to choose"):
        Pairs(gpt, prompts, tokenizer, cfg).first_from(0)


def test_undo_without_an_answer_does_nothing(trained, tmp_path, monkeypatch):
    assert [row["Answer"] for row in run(trained, tmp_path, monkeypatch, "u1q")] == ["first"]


def test_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label.os, "fsync", full)
    with pytest.raises(InputError, match="answers.csv cannot be written .*No space left on device"):
        append_choice(tmp_path / "answers.csv", first(1))


def test_second_program_on_the_same_file_is_refused(tmp_path, monkeypatch, capsys):
    """While the first runs. Another file in the same folder is free."""
    path = tmp_path / "answers.csv"
    lines = {
        "answers.csv": "another program writes here",
        "other.csv": "nowhere.pt does not exist",
    }
    with lock(LabelConfig(out=str(path)).lock_file()):
        for name, line in lines.items():
            flags = ["--checkpoint", "nowhere.pt", "--out", str(tmp_path / name)]
            monkeypatch.setattr(sys, "argv", ["label", *flags])
            with pytest.raises(SystemExit) as stop:
                cli_run(label.main, LabelConfig)
            assert stop.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--count", "-1"], ["--max-new-tokens", "0"]])
def test_label_config_rejects_impossible_values(flags):
    with pytest.raises(SystemExit) as stop:
        parse_cli(LabelConfig, flags)
    assert stop.value.code == 2


# ---- learning from the answers ----


def test_load_comparisons_drops_ties_and_skips(tmp_path, capsys):
    path = tmp_path / "answers.csv"
    read_choices(path)
    for number, answer in enumerate(("first", "tie", "second", "skip")):
        choice = Choice(number, PROMPT, f"good {number}", f"bad {number}", answer)
        append_choice(path, choice)
    tokenizer = load_tokenizer(str(BUNDLED / "tokenizer.tiktoken"))
    (tmp_path / "other.csv").write_text("Prompt,Chosen,Rejected\np,x,y\n")
    (tmp_path / "comparisons_heldout.csv").write_text("Prompt,Chosen,Rejected\nq,x,y\n")
    other = tmp_path / "other.csv"
    got = load_comparisons(str(tmp_path), tokenizer, 80, files=(path, other))
    assert [tokenizer.decode(row.chosen[:-1]) for row in got] == [" good 0", " good 2", " x"]
    assert [tokenizer.decode(row.rejected[:-1]) for row in got] == [" bad 0", " bad 2", " y"]
    assert "2 of 4 rows are ties or skipped" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("Prompt,Chosen,Rejected,Answer\np,x,y,first\np,x,y,Tie\n")
    with pytest.raises(InputError, match="row 2: Answer is 'Tie'"):
        load_comparisons(str(tmp_path), tokenizer, 80, files=(other,))


def test_train_reward_learns_from_several_files(trained, tmp_path, capsys):
    """The data set's 40 comparisons and 2 more. 6 steps of 8 are 48/42 = 1.1 epochs. A run does not
    resume with a changed file or with one file fewer."""
    data, out, _ = trained
    (tmp_path / "mine.csv").write_text("Prompt,Chosen,Rejected\np,x,y\nq,x,y\n")
    folders = ["--data", data, "--sft", out / "sft.pt", "--out", tmp_path]
    files = ["--comparison-files", data / "comparisons.csv", tmp_path / "mine.csv"]
    flags = tiny("reward", *folders, *files)

    def train(*flags):
        train_reward.main(parse_cli(train_reward.RewardConfig, [*flags]))

    train(*flags)
    assert "42 comparisons, 1.1 epochs" in capsys.readouterr().out
    (tmp_path / "mine.csv").write_text("Prompt,Chosen,Rejected\np,y,x\nq,x,y\n")
    with pytest.raises(InputError, match="another comparisons 2 file"):
        train(*flags, "--resume")
    with pytest.raises(InputError, match="another comparisons 2 file"):  # one file fewer
        train(*flags[:-1], "--resume")
