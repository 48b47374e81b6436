"""CSV files, and the lines printed while a program runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.support import cli, tables
from rlhf.support.cli import InputError
from rlhf.support.tables import (
    Means,
    Progress,
    check_file,
    check_lengths,
    csv_path,
    format_seconds,
    read_csv,
    replacing,
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
        ("Prompt\na,b\nc,d\n", "a row has more cells than the header"),
        ('Prompt\nfine\n"  "\n""\n', r"row 2: Prompt is empty, or longer than .* \(2 such rows\)"),
        (f"Prompt\nfine\na{' ' * 10**6}b\n", r"row 2: .* longer than 100,000 characters \(1 such rows\)"),
    ],
)
def test_read_csv_rejects_bad_file(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_csv(write(tmp_path / "prompts.csv", content), ("Prompt",))


def test_read_csv_rejects_missing_file(tmp_path):
    with pytest.raises(InputError, match="prompts.csv does not exist"):
        read_csv(tmp_path / "prompts.csv", ("Prompt",))


def test_check_file_tells_a_folder_from_nothing(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(InputError, match="a.csv is a folder, not a file; fix it"):
        check_file(tmp_path / "a.csv", "fix it")
    with pytest.raises(InputError, match="b.csv does not exist; give --data"):
        check_file(tmp_path / "b.csv")


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


@pytest.mark.parametrize("error", [OSError("no room"), RuntimeError("unexpected pos 57792"), KeyboardInterrupt()])
def test_replacing_keeps_the_old_file_and_nothing_temporary(tmp_path, error):
    """A full disk, as Python and as torch put it, is one line that names the file. Ctrl-C stays Ctrl-C."""
    path = write(tmp_path / "x.csv", "before")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(expected) as raised, replacing(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    assert expected is KeyboardInterrupt or f"{path} cannot be written" in str(raised.value)


# ---- Progress ----

NEW = {"step": 0, "metrics": []}  # what checkpoints.begin returns for a new run
METRICS = {"loss": 0.125, "valid": None, "lr": 0.0005, "grad_norm": 2.0}


def test_progress_shows_only_the_metrics_of_screen_and_writes_all(tmp_path, clock, capsys):
    progress = Progress(tmp_path / "x.csv", steps=4, begun=NEW, screen=("loss", "lr", "valid"))
    clock.now += 10
    progress.log(1, **METRICS)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "lr", "valid", "tokens/s", "left"]
    assert line.split() == ["1/4", "0.125", "5.0e-04", "0", "30", "s"]  # valid was not measured
    assert rows(tmp_path / "x.csv") == [{"step": "1", "loss": "0.125", "valid": "", "lr": "0.0005", "grad_norm": "2",
                                         "tokens_per_s": "0", "seconds": "10"}]


def test_progress_lines_are_aligned_with_the_header(tmp_path, clock, capsys):
    progress = Progress(tmp_path / "x.csv", steps=999, begun=NEW, screen=("loss", "clip_fraction"))
    for step in (1, 999):
        clock.now += 5
        progress.log(step, loss=0.5, clip_fraction=0.25)
    header, *lines = capsys.readouterr().out.splitlines()
    for line in lines:
        assert len(line) == len(header)
        for name, cell in (("loss", "0.500"), ("clip_fraction", "0.250")):
            assert line[: header.index(name) + len(name)].endswith(cell)


def test_progress_repeats_the_header_every_25_lines(tmp_path, clock, capsys):
    progress = Progress(tmp_path / "x.csv", steps=60, begun=NEW, screen=("loss",))
    for step in range(1, 52):
        clock.now += 1
        progress.log(step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert [at for at, line in enumerate(lines) if "step" in line] == [0, 26, 52]


def test_progress_says_tokens_per_second_and_the_time_left(tmp_path, clock, capsys):
    """200 tokens in 10 seconds are 20 a second, and 3 more steps take 30 seconds. After 150 seconds and 2 steps, 2
    more take 150 seconds."""
    progress = Progress(tmp_path / "x.csv", steps=4, begun=NEW, screen=())
    progress.tokens += 200
    clock.now += 10
    progress.log(1)
    clock.now += 140
    progress.log(2)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["1/4", "20", "30", "s"], ["2/4", "1", "2.5", "min"]]


def test_progress_after_resume_estimates_the_time_left_from_its_own_steps(tmp_path, clock, capsys):
    """Steps 11 and 12 took 20 seconds. 8 more take 80."""
    progress = Progress(tmp_path / "x.csv", steps=20, begun={"step": 10, "metrics": []}, screen=())
    clock.now += 20
    progress.log(12)
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["1.3", "min"]


def test_progress_after_resume_keeps_the_rows_of_the_checkpoint(tmp_path):
    """The checkpoint is of step 2, so the row of step 3 is written again, whatever the file holds by now."""
    first = Progress(tmp_path / "x.csv", steps=4, begun=NEW, screen=())
    for step in (1, 2):
        first.log(step, loss=step / 8, valid=None)
    saved = {"step": 2, "metrics": list(first.rows)}
    first.log(3, loss=3 / 8, valid=None)
    for text in ("of another run", None):
        if text:
            write(tmp_path / "x.csv", text)
        again = Progress(tmp_path / "x.csv", steps=4, begun=saved, screen=())
        assert len(rows(tmp_path / "x.csv")) == 2
        again.log(3, loss=9.0, valid=1.0)
        got = [(row["step"], row["loss"], row["valid"]) for row in rows(tmp_path / "x.csv")]
        assert got == [("1", "0.125", ""), ("2", "0.25", ""), ("3", "9", "1")]


def test_progress_leaves_the_results_of_a_replaced_run_until_its_own_are_saved(tmp_path):
    old = [write(tmp_path / name, "old") for name in ("x.csv", "evaluation.csv")]
    progress = Progress(tmp_path / "x.csv", steps=4, begun={**NEW, "replaced": list(old)}, screen=())
    progress.log(1, loss=0.5)
    assert [path.read_text() for path in old] == ["old", "old"]
    progress.saved()
    assert [row["loss"] for row in rows(tmp_path / "x.csv")] == ["0.5"] and not old[1].exists()
    progress.log(2, loss=0.25)
    assert [row["loss"] for row in rows(tmp_path / "x.csv")] == ["0.5", "0.25"]


def test_process_that_does_not_write_changes_no_file(tmp_path, monkeypatch):
    """As all but one of several processes: neither a CSV of this run nor one of an earlier run."""
    monkeypatch.setattr(cli, "writes", False)
    for name in ("sft.csv", "old.csv"):
        (tmp_path / name).write_text("step\n1\n")
    before = {path: (path.read_text(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    begun = {"step": 0, "metrics": [], "replaced": [tmp_path / "old.csv"]}
    progress = Progress(tmp_path / "sft.csv", 2, begun, ("loss",), tensorboard=True)
    progress.log(1, loss=0.5)
    progress.saved()
    with replacing(tmp_path / "old.csv", "wb") as file:
        file.write(b"new")
    assert {path: (path.read_text(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_progress_after_resume_adds_the_seconds_before(tmp_path, clock):
    """200 seconds up to step 2, then 15."""
    saved = {"step": 2, "metrics": [{"step": step, "tokens_per_s": 9, "seconds": 100.0 * step} for step in (1, 2)]}
    again = Progress(tmp_path / "x.csv", steps=4, begun=saved, screen=())
    clock.now += 15
    again.log(3)
    assert again.rows[-1]["seconds"] == 215


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
