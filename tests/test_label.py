"""rlhf.label: answers kept whatever happens, resumed, undone; and several comparison files in train_reward."""

import io
import random
import sys
from types import SimpleNamespace

import pytest

import train_reward
from rlhf import label
from rlhf.cli import parse_cli
from rlhf.common import InputError
from rlhf.data import load_comparisons
from rlhf.label import COLUMNS, AnswerFile, LabelConfig, judge_answer
from rlhf.tokenizer import load_tokenizer
from tests.conftest import BUNDLED, TINY, rows

PROMPT = '\n\nHuman: say "hi", please\n\nAssistant:'


# ---- the file ----


def test_an_answer_is_on_the_disk_at_once_and_read_again(tmp_path):
    path = tmp_path / "new" / "answers.csv"
    file = AnswerFile(path)
    file.append(4, PROMPT, 'a, "b"\nc', "d", "first")
    assert rows(path) == [dict(zip(COLUMNS, ("4", PROMPT, 'a, "b"\nc', "d", "first")))]
    again = AnswerFile(path)
    assert again.answers == [["4", PROMPT, 'a, "b"\nc', "d", "first"]] and again.next_pair == 5
    assert file.answers == again.answers


def test_a_kill_at_any_byte_loses_at_most_the_last_answer(tmp_path):
    """Cut the file behind every byte of its last line: what is read is all answers before it, and new ones follow. Only
    without the line break at its end is the last line whole."""
    path = tmp_path / "answers.csv"
    file = AnswerFile(path)
    file.append(0, PROMPT, "a", "b", "first")
    before = len(path.read_bytes())
    file.append(1, PROMPT, "naïve", "d\n\ne", "second")
    whole = path.read_bytes()
    for end in range(before, len(whole) - 2):
        path.write_bytes(whole[:end])
        again = AnswerFile(path)
        assert [row[0] for row in again.answers] == ["0"], end
        again.append(1, PROMPT, "naïve", "d\n\ne", "second")
        assert path.read_bytes() == whole
    for end in (-2, -1):  # all but the last quotation mark, all but the line break
        path.write_bytes(whole[:end])
        assert [row[0] for row in AnswerFile(path).answers] == ["0", "1"] and path.read_bytes() == whole


def test_what_an_editor_does_to_the_file_is_not_lost(tmp_path, capsys):
    """Quotes taken off and one standing alone, no line break at the end: all answers stay. What breaks off is kept
    aside; a faulty row in the middle is an error, and the file stays as it was."""
    path = tmp_path / "answers.csv"
    header = ",".join(COLUMNS)
    path.write_text(f'{header}\n1,p,12" nail,bad,first\n2,p,a,b,tie')
    assert AnswerFile(path).answers == [["1", "p", '12" nail', "bad", "first"], ["2", "p", "a", "b", "tie"]]
    broken = f'{header}\n1,p,a,b,first\n2,p,"a,b,first\n3,p,a,b,tie\n'
    path.write_text(broken)
    assert [row[0] for row in AnswerFile(path).answers] == ["1"]
    assert "breaks off" in capsys.readouterr().out and (tmp_path / "answers.csv.cut").read_text() == broken
    for bad in ("x,p,a,b,first", "1,p,a,b,maybe", "1,p,a,b", "1,,a,b,first"):
        path.write_text(f"{header}\n{bad}\n2,p,a,b,first\n")
        with pytest.raises(InputError, match="row 1: expected a number"):
            AnswerFile(path)
        assert path.read_text() == f"{header}\n{bad}\n2,p,a,b,first\n"


def test_undo_takes_back_the_last_answer_alone(tmp_path):
    file = AnswerFile(tmp_path / "answers.csv")
    file.append(0, "p", "a", "b", "first")
    one = file.path.read_bytes()
    file.append(1, "p", "c", "d", "tie")
    assert file.undo() == ["1", "p", "c", "d", "tie"] and file.path.read_bytes() == one and len(file.answers) == 1


def test_a_field_too_long_to_read_is_one_line(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text('"Pair","Prompt","Chosen","Rejected","Answer"\n"0","' + "p" * 140_000 + '","a","b","first"\n')
    with pytest.raises(InputError, match="cannot be read: field larger than"):
        AnswerFile(path)


@pytest.mark.parametrize("text", ["", "Prompt,Chosen,Rejected\na,b,c\n", '"Pair"\n'])
def test_another_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "answers.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="not a file of this program"):
        AnswerFile(path)
    assert path.read_text() == text


# ---- the program ----


def run(trained, tmp_path, monkeypatch, keys, *flags):
    """The model is hardly trained and seldom ends an answer, so here every answer counts as ended."""
    data, out, _ = trained
    monkeypatch.setattr(label, "has_ended", lambda tokens, *_: tokens[:, 0] == tokens[:, 0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys)))
    label.main(parse_cli(LabelConfig, ["--device", "cpu", "--checkpoint", str(out / "sft.pt"), "--data", str(data),
                                       "--out", str(tmp_path / "answers.csv"), "--max-new-tokens", "8",
                                       *map(str, flags)]))
    return rows(tmp_path / "answers.csv")


def test_keys_and_what_they_write(trained, tmp_path, monkeypatch, capsys):
    """First, second, a wrong key, tie, skip, undo of the skip, first in its place, quit; two more in a second call.
    The same pairs, answered without the detour, are the same."""
    got = run(trained, tmp_path, monkeypatch, "12xtsu1q")
    shown = capsys.readouterr().out
    assert [row["Answer"] for row in got] == ["first", "second", "tie", "first"]
    assert "4 answered, 3 of them with a choice; the reward model agrees with" in shown
    pairs = [shown.split("  1: ")[i + 1].split("\n")[0] for i in range(2)]
    assert got[0]["Chosen"] == pairs[0] and got[1]["Rejected"] == pairs[1]
    more = run(trained, tmp_path, monkeypatch, "2t")
    assert more[:4] == got and [row["Answer"] for row in more[4:]] == ["second", "tie"]
    assert "going on after 4 answered" in capsys.readouterr().out

    straight = tmp_path / "straight"
    straight.mkdir()
    assert run(trained, straight, monkeypatch, "12t12t") == more
    assert len({row["Pair"] for row in more}) == 6


def test_a_pair_that_the_reward_model_cannot_read_is_no_agreement(reward_model):
    """Its context holds 16 tokens; the second pair takes more. Of two short answers it agrees with one order alone."""
    tokenizer = SimpleNamespace(encode=lambda text: [len(text) % 7 + 1] * len(text), eos_id=9, pad_id=10)
    agreement = label.Agreement(reward_model, tokenizer)
    assert agreement.agrees(["0", "p", "aa", "a", "first"]) != agreement.agrees(["1", "p", "a", "aa", "first"])
    assert not agreement.agrees(["2", "p", "a" * 20, "a", "first"])
    assert not agreement.agrees(["3", "p", "a", "a" * 20, "first"])


def test_agreement_is_that_of_the_answer_that_stands(trained, tmp_path, monkeypatch, capsys):
    """One answer, undone and given the other way: the reward model agrees with exactly one of the two."""
    run(trained, tmp_path, monkeypatch, "1u2q")
    shares = [line.split("agrees with ")[1].split("%")[0] for line in capsys.readouterr().out.splitlines()
              if "agrees with" in line]
    assert sorted(shares[:2]) == ["0", "100"]


def test_answers_that_were_cut_off_or_alike_are_not_shown(trained, monkeypatch):
    """Prompt i of a block has answers 2i and 2i + 1. Of four pairs the first was cut off, the second says the same
    twice, the third does not fit when it is read again; the fourth is shown. With no fourth, there is an end to it."""
    cfg = LabelConfig(max_new_tokens=8)
    gpt, checkpoint = label.load_policy(trained[1] / "sft.pt", "sft")
    tokenizer = label.tokenizer_of(trained[1] / "sft.pt", checkpoint, str(trained[0]))
    texts = ["cut", "a", "same", "same", "x " * 90, "b", "good", "bad"] + ["same"] * 24
    monkeypatch.setattr(label, "decode_responses", lambda *_: list(texts))
    monkeypatch.setattr(label, "has_ended", lambda tokens, *_: tokens.new_tensor([0] + [1] * 31) > 0)
    prompts = [label.Prompt("p", [1, 2])]
    number, pair = next(label.pairs_from(0, gpt, prompts, tokenizer, cfg))
    assert (number, pair) == (3, ("p", "good", "bad"))
    texts[6] = "bad"
    with pytest.raises(InputError, match="left nothing to choose"):
        next(label.pairs_from(0, gpt, prompts, tokenizer, cfg))


def test_undo_with_nothing_to_undo(trained, tmp_path, monkeypatch):
    assert [row["Answer"] for row in run(trained, tmp_path, monkeypatch, "u1q")] == ["first"]


def test_a_judge_answers_and_a_count_ends_it(trained, tmp_path, monkeypatch, capsys):
    """In two calls what one call gives."""
    run(trained, tmp_path, monkeypatch, "", "--annotator", "judge", "--count", 7)
    got = run(trained, tmp_path, monkeypatch, "", "--annotator", "judge", "--count", 20)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(trained, whole, monkeypatch, "", "--annotator", "judge", "--count", 20) == got and len(got) == 20
    assert "next: python train_reward.py --comparison-files" in capsys.readouterr().out


def test_a_judges_vote():
    """Without a known noise the higher gold wins, and equals tie; with it, the share of votes is its probability."""
    golds = {"a": 1.0, "b": 0.0, "c": 0.0}
    judge = SimpleNamespace(__file__="judge.py", score=lambda _, responses: [golds[r] for r in responses])
    rng = random.Random(0)
    assert [judge_answer(judge, "p", *pair, rng) for pair in ("ab", "ba", "bc")] == ["first", "second", "tie"]
    judge.preference_probability = lambda a, b: 0.8 if a > b else 0.2
    votes = [judge_answer(judge, "p", "a", "b", rng) for _ in range(4000)]
    assert votes.count("first") / 4000 == pytest.approx(0.8, abs=0.02)  # three standard deviations: 0.019
    assert votes.count("tie") == 0


@pytest.mark.parametrize("flags", [["--annotator", "judge"], ["--annotator", "cat"], ["--max-new-tokens", "0"]])
def test_impossible_flags(flags):
    with pytest.raises(SystemExit) as stop:
        parse_cli(LabelConfig, flags)
    assert stop.value.code == 2


# ---- learning from the answers ----


def test_ties_and_skips_teach_nothing(tmp_path, capsys):
    file = AnswerFile(tmp_path / "answers.csv")
    for number, answer in enumerate(("first", "tie", "second", "skip")):
        file.append(number, PROMPT, f"good {number}", f"bad {number}", answer)
    tokenizer = load_tokenizer(str(BUNDLED / "tokenizer.tiktoken"))
    (tmp_path / "other.csv").write_text("Prompt,Chosen,Rejected\np,x,y\n")
    got = load_comparisons("", tokenizer, 80, files=(str(file.path), str(tmp_path / "other.csv")))
    assert [tokenizer.decode(row.chosen[:-1]) for row in got] == [" good 0", " good 2", " x"]
    assert [tokenizer.decode(row.rejected[:-1]) for row in got] == [" bad 0", " bad 2", " y"]
    assert "2 of 4 pairs dropped" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("Prompt,Chosen,Rejected,Answer\np,x,y,first\np,x,y,Tie\n")
    with pytest.raises(InputError, match="row 2: Answer is 'Tie'"):
        load_comparisons("", tokenizer, 80, files=(str(tmp_path / "other.csv"),))


def test_train_reward_takes_several_files(trained, tmp_path, capsys):
    """The data set's 40 comparisons and another 2; a resumed run with a changed file is refused."""
    data, out, _ = trained
    (tmp_path / "mine.csv").write_text("Prompt,Chosen,Rejected\np,x,y\nq,x,y\n")
    flags = ["--device", "cpu", *TINY["reward"].split(), "--data", data, "--sft", out / "sft.pt", "--out", tmp_path,
             "--comparison-files", data / "comparisons.csv", tmp_path / "mine.csv"]
    train_reward.main(parse_cli(train_reward.RewardConfig, list(map(str, flags))))
    assert "42 comparisons, 1.1 times over" in capsys.readouterr().out
    (tmp_path / "mine.csv").write_text("Prompt,Chosen,Rejected\np,y,x\nq,x,y\n")
    with pytest.raises(InputError, match="another comparisons 2 file"):
        train_reward.main(parse_cli(train_reward.RewardConfig, [*map(str, flags), "--resume"]))
    with pytest.raises(InputError, match="another comparisons 2 file"):  # one file fewer
        train_reward.main(parse_cli(train_reward.RewardConfig, [*map(str, flags[:-1]), "--resume"]))
