"""data/label_votes.py: the file of votes, and the agreement of two passes."""

import dataclasses

import pytest

from data import label_votes
from data.label_pairs import ListedPairs
from data.label_votes import (
    COLUMNS,
    Labelling,
    Pair,
    Vote,
    agreement,
    append_vote,
    read_votes,
    vote_for,
    wilson,
    write_votes,
)
from rlhf.run.errors import InputError
from tests.helpers import rows

PROMPT = '\n\nHuman: say "hi", please\n\nAssistant:'


def first(pair, chosen="a", rejected="b", prompt=PROMPT):
    return Vote(pair, prompt, chosen, rejected, "first")


def cells(vote):
    """What a row of the file says, by column."""
    return dict(zip(COLUMNS, map(str, dataclasses.astuple(vote))))


# ---- the file ----


def test_answer_file_writes_each_answer_at_once_and_reads_it_again(tmp_path):
    path = tmp_path / "new" / "answers.csv"
    vote = first(4, chosen='a, "b"\nc', rejected="d")
    assert read_votes(path) == []
    append_vote(path, vote)
    assert rows(path) == [cells(vote)]
    assert read_votes(path) == [vote]


def test_answer_file_cut_at_any_byte_loses_at_most_the_last_answer(tmp_path):
    """The file is cut after each byte of its last line. All earlier answers are read, and new ones
    can follow. The last line is whole only if no more than its last quotation mark and its line
    break are missing."""
    path = tmp_path / "answers.csv"
    last = Vote(1, PROMPT, "naïve", "d\n\ne", "second")
    read_votes(path)
    append_vote(path, first(0))
    before = len(path.read_bytes())
    append_vote(path, last)
    whole = path.read_bytes()
    for end in range(before, len(whole) - 2):
        path.write_bytes(whole[:end])
        assert read_votes(path) == [first(0)], end
        append_vote(path, last)
        assert path.read_bytes() == whole
    for end in (-2, -1):  # all but the last quotation mark, all but the line break
        path.write_bytes(whole[:end])
        assert read_votes(path) == [first(0), last] and path.read_bytes() == whole


def test_answer_file_survives_an_editor(tmp_path, capsys):
    """Without the quotation marks that are not needed, with CRLF, and without the last line break,
    all answers stay. If the last line breaks off, the file is copied first. A faulty row in the
    middle is an error, and the file stays."""
    path = tmp_path / "answers.csv"
    header = ",".join(COLUMNS)
    path.write_bytes(f'\ufeff{header}\r\n1,p,"12"" nail",bad,first\r\n2,p,a,b,tie'.encode())
    assert read_votes(path) == [
        Vote(1, "p", '12" nail', "bad", "first"),
        Vote(2, "p", "a", "b", "tie"),
    ]
    broken = f'{header}\n1,p,a,b,first\n2,p,"a,b,first\n3,p,a,b,tie\n'
    path.write_text(broken)
    assert [vote.pair for vote in read_votes(path)] == [1]
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
            read_votes(path)
        assert path.read_bytes() == content


def test_rewritten_file_is_the_same_as_one_that_was_appended_to(tmp_path):
    """After undo, the file is that of the answers before."""
    path = tmp_path / "answers.csv"
    votes = [first(0, prompt="p"), Vote(1, "p", "c", "d", "tie")]
    read_votes(path)
    append_vote(path, votes[0])
    one = path.read_bytes()
    append_vote(path, votes[1])
    write_votes(path, votes[:1])
    assert path.read_bytes() == one and read_votes(path) == votes[:1]


@pytest.mark.parametrize("text", ["", "\n", "Prompt,Chosen,Rejected\na,b,c\n", '"Pair"\n'])
def test_answer_file_rejects_another_file_and_leaves_it_unchanged(tmp_path, text):
    path = tmp_path / "answers.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="not a file of this program|is empty"):
        read_votes(path)
    assert path.read_text() == text


def test_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label_votes.os, "fsync", full)
    with pytest.raises(InputError, match="answers.csv cannot be written .*No space left on device"):
        append_vote(tmp_path / "answers.csv", first(1))


# ---- labelling ----


def test_vote_keeps_which_side_was_better_and_which_was_first():
    pair = Pair(3, "p", "a", "b")
    expected = {answer: ("a", "b") for answer in ("first", "tie", "both bad", "skip")}
    expected["second"] = ("b", "a")
    for answer, (chosen, rejected) in expected.items():
        vote = vote_for(pair, answer)
        assert vote == Vote(3, "p", chosen, rejected, answer) and vote.shown == pair


def test_progress_goes_by_the_median_vote(tmp_path, monkeypatch):
    """Votes take 10, 20 and 30 seconds, and one 1000: a break. The median of four is 25 seconds, so
    the other 16 of 20 pairs take 400 seconds, 6.7 minutes."""
    now = iter([0, 10, 10, 30, 30, 60, 60, 1060, 1060])
    monkeypatch.setattr(label_votes.time, "monotonic", lambda: next(now))
    pairs = ListedPairs([Pair(i, "p", f"a{i}", "b") for i in range(20)])
    labelling = Labelling(pairs, tmp_path / "votes.csv")
    assert labelling.progress() == "0 of 20"
    for _ in range(4):
        labelling.answer("first")
    assert labelling.progress() == "4 of 20, about 7 min left"


def test_labelling_ends_at_the_count_or_without_pairs(tmp_path):
    pairs = ListedPairs([Pair(i, "p", f"a{i}", "b") for i in range(3)])
    labelling = Labelling(pairs, tmp_path / "votes.csv", count=2)
    assert labelling.progress() == "0 of 2"
    labelling.answer("first")
    labelling.answer("tie")
    assert labelling.pair is None and labelling.progress() == "2 of 2"
    labelling.answer("undo")
    assert labelling.pair == Pair(1, "p", "a1", "b")
    assert read_votes(tmp_path / "votes.csv") == [Vote(0, "p", "a0", "b", "first")]
    labelling = Labelling(pairs, tmp_path / "votes.csv", count=9)
    assert labelling.progress() == "1 of 3"


# ---- agreement ----


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96: (0.8 + 0.19208) / 1.38416 = 0.7167, and
    1.96 * sqrt(0.016 + 0.009604) / 1.38416 = 0.2266."""
    assert wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-4)
    low, high = wilson(0, 10)  # 3.8416 / 10 / 1.38416
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_agreement_compares_texts_and_not_sides():
    """Pairs 0 and 1 are the same choice, once with the sides swapped; 2 is another one; 3 is a tie
    twice; 4 a tie, then a choice; 5 a tie, then both bad; 6 was skipped, and 7 was not repeated. A
    prompt with other sides is another pair."""

    def votes(*answers):
        return [Vote(i, "p", *row) for i, row in enumerate(answers)]

    earlier = votes(
        ("a", "b", "first"),
        ("c", "d", "first"),
        ("e", "f", "second"),
        ("g", "h", "tie"),
        ("i", "j", "tie"),
        ("k", "l", "tie"),
        ("m", "n", "skip"),
        ("o", "p", "first"),
    )
    later = votes(
        ("a", "b", "first"),
        ("c", "d", "second"),
        ("f", "e", "first"),
        ("h", "g", "tie"),
        ("i", "j", "first"),
        ("k", "l", "both bad"),
        ("m", "n", "first"),
    )
    assert agreement(earlier, later[::-1]).splitlines() == [
        "the same answer in both passes: 3 of 6, 50 % (95 % interval: 19 to 81 %)",
        "where both name a better side, the same one: 2 of 3, 67 % (95 % interval: 21 to 94 %)",
    ]
    assert agreement(earlier, []).splitlines()[0].endswith("no pairs yet")
