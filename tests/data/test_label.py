"""rlhf.tools.label: sampled pairs, pairs of a file, a second pass, and training a reward model on
the votes."""

import io
import json
import sys

import pytest
import torch

import train_reward
from data import label, label_pairs, label_reward
from data.label import LabelConfig
from data.label_pairs import SampledPairs
from data.label_votes import Pair, Vote, append_vote, read_votes
from rlhf.data import Prompt, load_comparisons
from rlhf.run.errors import InputError, printable
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_reward_model
from rlhf.run.program import lock
from rlhf.run.program import run as cli_run
from rlhf.tokenizer import load_tokenizer
from tests.helpers import BUNDLED, rows, tiny

PROMPT = '\n\nHuman: say "hi", please\n\nAssistant:'


# ---- sampled pairs ----


def type_keys(monkeypatch, keys):
    """Each key as a line, since the input is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys)))


def run(trained, tmp_path, monkeypatch, keys, *flags):
    """Run the program with these keys typed, and return the rows of its file. The model is hardly
    trained and seldom ends a response, so here each response counts as ended."""
    data, out, _ = trained
    monkeypatch.setattr(label_pairs, "has_ended", lambda tokens, *_: tokens[:, 0] == tokens[:, 0])
    type_keys(monkeypatch, keys)
    path = tmp_path / "answers.csv"
    files = ["--checkpoint", out / "sft.pt", "--data", data, "--out", path]
    settings = ["--device", "cpu", "--max-new-tokens", 8]
    label.main(parse_cli(LabelConfig, [*map(str, [*files, *settings, *flags])]))
    return rows(path)


def test_keys_write_the_answers_they_stand_for(trained, tmp_path, monkeypatch, capsys):
    """First, second, a wrong key, tie, skip, undo of the skip, both bad in its place, quit. Another
    call adds two more. A run without wrong key, undo and break writes the same rows."""
    got = run(trained, tmp_path, monkeypatch, "12xtsubq")
    shown = capsys.readouterr().out
    assert [row["Answer"] for row in got] == ["first", "second", "tie", "both bad"]
    assert "4 answered, 2 of them with a choice" in shown
    pairs = [shown.split("  1: ")[i + 1].split("\n")[0] for i in range(2)]
    assert printable(got[0]["Chosen"]) == pairs[0] and printable(got[1]["Rejected"]) == pairs[1]
    more = run(trained, tmp_path, monkeypatch, "2t")
    assert more[:4] == got and [row["Answer"] for row in more[4:]] == ["second", "tie"]
    assert "going on after 4 answered" in capsys.readouterr().out

    straight = tmp_path / "straight"
    straight.mkdir()
    assert run(trained, straight, monkeypatch, "12tb2t") == more
    assert len({row["Pair"] for row in more}) == 6


def test_pairs_with_cut_off_or_equal_responses_are_not_shown(trained, monkeypatch):
    """Prompt i of a block has responses 2i and 2i + 1. In the first pair one was cut off. The
    second pair has two equal responses. In the third, one does not fit when it is read again. In
    the fourth, one holds a NUL byte, which no reader takes. The fifth is shown. Without it, nothing
    is left to show, which is an error."""
    gpt, checkpoint = label.load_policy(trained[1] / "sft.pt", "sft")
    tokenizer = label.tokenizer_of(trained[1] / "sft.pt", checkpoint, str(trained[0]))
    bad_pairs = ["cut", "a", "same", "same", "x " * 90, "b", "a", "b\0"]
    texts = [*bad_pairs, "good", "bad"] + ["same"] * 22
    monkeypatch.setattr(label_pairs, "decode_responses", lambda *_: list(texts))
    ended = torch.tensor([False] + [True] * 31)
    monkeypatch.setattr(label_pairs, "has_ended", lambda *_: ended)
    prompts = [Prompt("p", [1, 2])]
    pair = SampledPairs(gpt, prompts, tokenizer, 8, 0).next_pair([])
    assert pair == Pair(4, "p", "good", "bad")
    texts[8] = "bad"
    with pytest.raises(InputError, match="left nothing to choose"):
        SampledPairs(gpt, prompts, tokenizer, 8, 0).next_pair([])


def test_undo_without_an_answer_does_nothing(trained, tmp_path, monkeypatch):
    assert [row["Answer"] for row in run(trained, tmp_path, monkeypatch, "u1q")] == ["first"]


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--count", "-1"],
        ["--max-new-tokens", "0"],
        ["--pairs", "pairs.csv", "--again"],
        ["--port", "8000"],
        ["--web", "--port", "65536"],
        ["--out", ""],
    ],
    ids=" ".join,
)
def test_label_config_rejects_impossible_values(flags):
    with pytest.raises(SystemExit) as stop:
        parse_cli(LabelConfig, flags)
    assert stop.value.code == 2


# ---- pairs of a file ----


def label_pairs_of(tmp_path, monkeypatch, keys, *flags):
    """What is in the file of votes after these keys; flags: say where the pairs come from."""
    type_keys(monkeypatch, keys)
    words = ["--out", tmp_path / "votes.csv", *flags]
    label.main(parse_cli(LabelConfig, list(map(str, words))))
    return rows(tmp_path / "votes.csv")


@pytest.mark.parametrize("form", ["csv", "jsonl", "thumbs"])
def test_pairs_of_a_file_are_labelled_in_its_order(tmp_path, monkeypatch, capsys, form):
    """Each once, also if it is in the file twice, until none is left. A second call has nothing to
    show. In the file the better side is always good; the sides that are shown are drawn."""
    count = 40
    path = tmp_path / f"pairs.{form.replace('thumbs', 'jsonl')}"
    records = []
    for i in range(count):
        sides = {"chosen": f"good {i}", "rejected": f"bad {i}"}
        if form == "thumbs":
            for side, thumb in (("chosen", True), ("rejected", False)):
                records.append({"prompt": f"p{i}", "completion": sides[side], "label": thumb})
        else:
            records.append({"prompt": f"p{i}"} | sides)
    if form == "csv":
        lines = [",".join(records[0]), *(",".join(record.values()) for record in records)]
        path.write_text("\n".join([*lines, lines[1]]))
    else:
        path.write_text("\n".join(json.dumps(record) for record in [*records, records[0]]))
    got = label_pairs_of(tmp_path, monkeypatch, "1" * (count + 5), "--pairs", path)
    assert [row["Prompt"] for row in got] == [f"p{i}" for i in range(count)]
    for i, row in enumerate(got):
        assert {row["Chosen"], row["Rejected"]} == {f"good {i}", f"bad {i}"}
    first_is_good = sum(row["Chosen"].startswith("good") for row in got)
    assert 10 <= first_is_good <= 30  # of 40 fair draws, outside this with probability 0.001
    assert label_pairs_of(tmp_path, monkeypatch, "2", "--pairs", path) == got
    shown = capsys.readouterr().out
    assert "0 of 40\n" in shown and "39 of 40, about 1 min left\n" in shown
    assert "40 answered, 40 of them with a choice" in shown


def test_pairs_that_are_added_to_the_file_are_shown_next(tmp_path, monkeypatch):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\np,a,b\nq,c,d\n")
    label_pairs_of(tmp_path, monkeypatch, "1s", "--pairs", path)
    path.write_text("prompt,chosen,rejected\nr,e,f\nq,c,d\np,b,a\n")
    got = label_pairs_of(tmp_path, monkeypatch, "t", "--pairs", path)
    assert [row["Prompt"] for row in got] == ["p", "q", "r"]
    assert [row["Answer"] for row in got] == ["first", "skip", "tie"]


def test_file_without_comparisons_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,response\np,a\n")
    with pytest.raises(InputError, match="pairs.csv has no comparisons: name two columns"):
        label_pairs_of(tmp_path, monkeypatch, "1", "--pairs", path)
    assert not (tmp_path / "votes.csv").exists()


# ---- a second pass ----


def test_second_pass_measures_agreement_and_keeps_the_first(tmp_path, monkeypatch, capsys):
    """20 pairs, of which the person finds the longer side better; one is a tie and one is skipped.
    In the second pass the person always takes the first side. By hand: the same answer where the
    longer side is first."""
    path = tmp_path / "votes.csv"
    read_votes(path)
    answers = ["tie", "skip"] + ["first"] * 9 + ["second"] * 9
    for number, answer in enumerate(answers):
        append_vote(path, Vote(number, f"p{number}", "longer", "long", answer))
    before = path.read_bytes()
    label_pairs_of(tmp_path, monkeypatch, "1" * 30, "--again")
    shown = capsys.readouterr().out
    assert path.read_bytes() == before
    again = rows(tmp_path / "votes_again.csv")
    order = [int(row["Pair"]) for row in again]
    assert sorted(order) == [0, *range(2, 20)] and order != sorted(order)
    same = sum(row["Chosen"] == "longer" for row in again if row["Pair"] != "0")
    assert 1 <= same <= 17  # the sides are drawn
    assert f"the same answer in both passes: {same} of 19, " in shown
    assert f"where both name a better side, the same one: {same} of 18, " in shown


def test_second_pass_needs_a_first(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="votes.csv does not exist; give --out the file of the"):
        label_pairs_of(tmp_path, monkeypatch, "1", "--again")
    read_votes(tmp_path / "votes.csv")
    append_vote(tmp_path / "votes.csv", Vote(0, "p", "a", "b", "skip"))
    with pytest.raises(InputError, match="no votes to repeat"):
        label_pairs_of(tmp_path, monkeypatch, "1", "--again")


# ---- what the reward model thinks ----


def test_reward_model_is_compared_after_the_last_vote(trained, tmp_path, monkeypatch, capsys):
    """A stand-in whose score is the number of tokens: the longer side is better to it. It is right
    in pairs 0 and 1 of three. The tie does not count, and neither does a pair that does not fit
    the model's context."""
    data, out, _ = trained

    class LongerIsBetter(torch.nn.Module):
        def __init__(self, gpt):
            super().__init__()
            self.gpt = gpt

        def forward(self, tokens, lengths):
            return lengths.float()

    def load(path):
        model, checkpoint = load_reward_model(path)
        return LongerIsBetter(model.gpt), checkpoint

    monkeypatch.setattr(label_reward, "load_reward_model", load)
    monkeypatch.setattr(label_reward, "PAIRS", 2)
    check = label_reward.RewardCheck(out / "reward.pt", str(data), torch.device("cpu"))
    room = check.model.gpt.config.block_size
    votes = [
        Vote(0, "p", "good " * 9, "bad", "first"),
        Vote(1, "p", "good " * 3, "bad", "second"),
        Vote(2, "p", "good", "bad " * 9, "first"),
        Vote(3, "p", "good " * 9, "bad", "tie"),
        Vote(4, "p", "good " * room, "bad", "first"),
    ]
    line = check.agreement(votes)
    assert line.endswith("the higher score: 2 of 3, 67 % (95 % interval: 21 to 94 %)")
    assert check.agreement([]).endswith("no pairs yet")


def test_reward_model_says_nothing_before_the_end(trained, tmp_path, monkeypatch, capsys):
    _, out, _ = trained
    got = run(trained, tmp_path, monkeypatch, "12tq", "--reward", out / "reward.pt")
    lines = capsys.readouterr().out.splitlines()
    [at] = [i for i, line in enumerate(lines) if "reward.pt" in line]
    assert len(got) == 3 and at == len(lines) - 2 and "higher score: " in lines[at]
    assert " of 2, " in lines[at]
    with pytest.raises(InputError, match="nowhere.pt does not exist"):
        run(trained, tmp_path, monkeypatch, "1", "--reward", "nowhere.pt")
    assert rows(tmp_path / "answers.csv") == got


# ---- learning from the answers ----


def test_load_comparisons_drops_ties_and_skips(tmp_path, capsys):
    path = tmp_path / "answers.csv"
    read_votes(path)
    for number, answer in enumerate(("first", "tie", "second", "skip", "both bad")):
        vote = Vote(number, PROMPT, f"good {number}", f"bad {number}", answer)
        append_vote(path, vote)
    tokenizer = load_tokenizer(str(BUNDLED / "tokenizer.tiktoken"))
    (tmp_path / "other.csv").write_text("Prompt,Chosen,Rejected\np,x,y\n")
    (tmp_path / "comparisons_heldout.csv").write_text("Prompt,Chosen,Rejected\nq,x,y\n")
    other = tmp_path / "other.csv"
    got = load_comparisons(str(tmp_path), tokenizer, 80, files=(path, other))
    assert [tokenizer.decode(row.chosen[:-1]) for row in got] == [" good 0", " good 2", " x"]
    assert [tokenizer.decode(row.rejected[:-1]) for row in got] == [" bad 0", " bad 2", " y"]
    assert "3 of 5 rows name no better side" in capsys.readouterr().out
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
