"""CSV files, the lines printed while a program runs, and printed tables."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.support import tables
from rlhf.support.cli import InputError
from rlhf.support.tables import (
    Means,
    Progress,
    check_lengths,
    csv_path,
    format_seconds,
    print_pairs,
    print_responses,
    print_table,
    read_csv,
    sample_rows,
    ticker,
    write_csv,
)
from tests.helpers import rows


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves clock.now."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tables, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- CSV files ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Question\nhello\n", r"no column 'Prompt' \(found: Question; needed: Prompt\)"),
        ("Prompt\n", "has a header but no rows"),
        ("", "is not a CSV file"),
        (b"Prompt\n\xff\xfe\x00bad\n", "is not a CSV file in UTF-8"),
        ('Prompt\n"never closed\n', "is not a CSV file"),
        ("Prompt\na\nb,c\n", "is not a CSV file"),
        ("Prompt\na,b\nc,d\n", "more cells than the 1 columns"),
        ('Prompt\nfine\n"  "\n""\n', r"row 2: Prompt is empty \(2 such rows\)"),
    ],
)
def test_read_csv_rejects_bad_file(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_csv(write(tmp_path / "prompts.csv", content), ("Prompt",))


def test_read_csv_rejects_missing_file(tmp_path):
    with pytest.raises(InputError, match="prompts.csv does not exist"):
        read_csv(tmp_path / "prompts.csv", ("Prompt",))


def test_read_csv_keeps_numbers_and_nan_as_text(tmp_path):
    frame = read_csv(write(tmp_path / "x.csv", "Prompt,Response\n1.50,nan\nNA,None\n"), ("Prompt", "Response"))
    assert frame.values.tolist() == [["1.50", "nan"], ["NA", "None"]]


def test_read_csv_takes_optional_columns_if_they_are_there(tmp_path):
    path = write(tmp_path / "x.csv", "Answer,Other,Prompt\ntie,x,a\n")
    assert read_csv(path, ("Prompt",), optional=("Answer", "Votes")).to_dict("records") == [
        {"Prompt": "a", "Answer": "tie"}]


def test_check_lengths_names_the_first_row_that_is_too_long():
    check_lengths(Path("x.csv"), [3, 5], 5, "the prompt")
    with pytest.raises(InputError, match=r"x.csv, row 2: the prompt takes 6 tokens and there is room for 5 \(2 such"):
        check_lengths(Path("x.csv"), [3, 6, 7], 5, "the prompt")


def test_csv_path_of_heldout_rows():
    assert csv_path("folder", "prompts") == Path("folder/prompts.csv")
    assert csv_path("folder", "prompts", heldout=True) == Path("folder/prompts_heldout.csv")


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", 'a "b", c'])
def test_read_csv_gives_back_what_write_csv_wrote(tmp_path, text):
    write_csv(tmp_path / "table.csv", [{"Prompt": text, "Response": "after"}, {"Prompt": "plain", "Response": text}])
    frame = read_csv(tmp_path / "table.csv", ("Prompt", "Response"))
    assert frame.values.tolist() == [[text, "after"], ["plain", text]]


def test_write_csv_rounds_floats_to_six_digits(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": 1234567, "c": None}])
    assert (tmp_path / "x.csv").read_text() == "a,b,c\n0.333333,1234567,\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


# ---- Progress ----

METRICS = {"loss": 0.125, "valid": None, "lr": 0.0005, "grad_norm": 2.0}


def test_progress_shows_only_the_metrics_of_screen_and_writes_all(tmp_path, clock, capsys):
    progress = Progress(tmp_path / "x.csv", steps=4, start=0, screen=("loss", "lr", "valid"))
    clock.now += 10
    progress.log(1, **METRICS)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "lr", "valid", "tokens/s", "left"]
    assert line.split() == ["1/4", "0.125", "5.0e-04", "0", "30", "s"]  # valid was not measured
    assert rows(tmp_path / "x.csv") == [{"step": "1", "loss": "0.125", "valid": "", "lr": "0.0005", "grad_norm": "2",
                                         "tokens_per_s": "0", "seconds": "10"}]


def test_progress_lines_are_aligned_with_the_header(tmp_path, clock, capsys):
    progress = Progress(tmp_path / "x.csv", steps=999, start=0, screen=("loss", "clip_fraction"))
    for step in (1, 999):
        clock.now += 5
        progress.log(step, loss=0.5, clip_fraction=0.25)
    header, *lines = capsys.readouterr().out.splitlines()
    for line in lines:
        assert len(line) == len(header)
        for name, cell in (("loss", "0.500"), ("clip_fraction", "0.250")):
            assert line[: header.index(name) + len(name)].endswith(cell)


def test_progress_repeats_the_header_every_25_lines(tmp_path, clock, capsys):
    progress = Progress(tmp_path / "x.csv", steps=60, start=0, screen=("loss",))
    for step in range(1, 52):
        clock.now += 1
        progress.log(step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert [at for at, line in enumerate(lines) if "step" in line] == [0, 26, 52]


def test_progress_says_tokens_per_second_and_the_time_left(tmp_path, clock, capsys):
    """200 tokens in 10 seconds are 20 a second, and 3 more steps take 30 seconds. After 150 seconds and 2 steps, 2
    more take 150 seconds."""
    progress = Progress(tmp_path / "x.csv", steps=4, start=0, screen=())
    progress.tokens += 200
    clock.now += 10
    progress.log(1)
    clock.now += 140
    progress.log(2)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["1/4", "20", "30", "s"], ["2/4", "1", "2.5", "min"]]


def test_progress_after_resume_estimates_the_time_left_from_its_own_steps(tmp_path, clock, capsys):
    """Steps 11 and 12 took 20 seconds. 8 more take 80."""
    progress = Progress(tmp_path / "x.csv", steps=20, start=10, screen=())
    clock.now += 20
    progress.log(12)
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["1.3", "min"]


def test_progress_after_resume_keeps_the_rows_up_to_the_checkpoint(tmp_path):
    """The checkpoint is of step 2, so the row of step 3 is written again."""
    first = Progress(tmp_path / "x.csv", steps=4, start=0, screen=())
    for step in (1, 2, 3):
        first.log(step, loss=step / 8, valid=None)
    again = Progress(tmp_path / "x.csv", steps=4, start=2, screen=())
    again.log(3, loss=9.0, valid=1.0)
    got = [(row["step"], row["loss"], row["valid"]) for row in rows(tmp_path / "x.csv")]
    assert got == [("1", "0.125", ""), ("2", "0.25", ""), ("3", "9", "1")]


def test_progress_of_a_new_run_drops_the_old_rows(tmp_path):
    for loss in (0.5, 0.25):
        Progress(tmp_path / "x.csv", steps=4, start=0, screen=()).log(1, loss=loss)
    assert [row["loss"] for row in rows(tmp_path / "x.csv")] == ["0.25"]


def test_progress_after_resume_adds_the_seconds_before(tmp_path, clock):
    """200 seconds up to step 2, then 15."""
    path = write(tmp_path / "x.csv", "step,loss,tokens_per_s,seconds\n1,0.5,9,100\n2,0.4,9,200\n3,0.3,9,300\n")
    again = Progress(path, steps=4, start=2, screen=())
    clock.now += 15
    again.log(3, loss=0.3)
    assert again.rows[-1]["seconds"] == 215


@pytest.mark.parametrize("text", ["step,loss,seconds\none,0.5,100\n", "loss,seconds\n0.5,100\n", "step\n1\n"])
def test_progress_rejects_the_csv_of_something_else(tmp_path, text):
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(InputError, match="not the record of this run"):
        Progress(path, steps=4, start=2, screen=())
    assert path.read_text() == text


def test_progress_rejects_a_csv_with_other_columns(tmp_path):
    text = "step,loss,tokens_per_s,seconds\n1,0.5,9,100\n"
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(InputError, match="other columns than this run writes"):
        Progress(path, steps=4, start=1, screen=()).log(2, loss=0.3, valid=0.4)
    assert path.read_text() == text


# ---- ticker, format_seconds, Means ----


def test_ticker_prints_a_line_after_every_ten_seconds(clock, capsys):
    """Five items of 6 seconds each. At 12 seconds two are done, and three more take 18. At 24 seconds four are done."""
    seen = []
    for item in ticker("abcde", "letters", seconds=10):
        seen.append(item)
        clock.now += 6
    assert seen == list("abcde")
    assert capsys.readouterr().out == "    letters: 2 of 5, 18 s left\n    letters: 4 of 5, 6 s left\n"


def test_ticker_prints_nothing_if_the_loop_is_short(clock, capsys):
    for _ in ticker(range(5), "numbers", seconds=10):
        clock.now += 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1.0 min"), (90, "1.5 min")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_means_weigh_micro_batches_and_average_over_minibatches():
    """One minibatch of two micro-batches, 1/4 * 2 + 3/4 * 6 = 5, and one whole minibatch, 3. The mean is 4."""
    means = Means()
    for weight, loss, norm in ((0.25, 2.0, 8.0), (0.75, 6.0, 0.0), (1.0, 3.0, 1.0)):
        means.add(torch.tensor(weight), loss=torch.tensor(loss), norm=torch.tensor(norm))
    assert means.over(2) == {"loss": 4.0, "norm": 1.5}


def test_means_hold_no_gradient():
    means = Means()
    means.add(1.0, loss=torch.tensor(2.0, requires_grad=True) * 3)
    assert not means.sums["loss"].requires_grad and means.over(1) == {"loss": 6.0}


# ---- what is printed after training ----

BEFORE = {"prompt": "\n\nHuman: Hi.\n\nAssistant:", "response": "Go away.", "score": -0.123456, "gold": -1.0}
AFTER = {**BEFORE, "response": "Hello.", "score": 1.5, "gold": 2.0}


def test_print_table_is_aligned_and_leaves_missing_numbers_empty(capsys):
    print_table([{"policy": "sft", "score": 0.25, "prompts": 500}, {"policy": "optimum", "score": None, "prompts": 3}])
    assert capsys.readouterr().out.splitlines() == [
        " policy  score  prompts",
        "    sft  0.250      500",
        "optimum               3"]


def test_sample_rows_put_both_responses_side_by_side():
    assert sample_rows([BEFORE], [AFTER]) == [{
        "Prompt": BEFORE["prompt"], "Before": "Go away.", "After": "Hello.", "score_before": -0.1235,
        "score_after": 1.5, "gold_before": -1.0, "gold_after": 2.0}]


def test_print_responses_shows_prompt_response_and_numbers(capsys):
    print_responses([AFTER, {**BEFORE, "gold": None}])
    assert capsys.readouterr().out.splitlines() == [
        "    Human: Hi.", "        -> Hello.   (score +1.50, gold +2.0)",
        "    Human: Hi.", "        -> Go away.   (score -0.12)"]


def test_print_pairs_shows_the_first_pairs(capsys):
    print_pairs([BEFORE, BEFORE], [AFTER, AFTER], 1)
    assert capsys.readouterr().out.splitlines() == [
        "", "    Human: Hi. / Assistant:", "      before (score -0.12, gold -1.0): Go away.",
        "       after (score +1.50, gold +2.0): Hello."]
