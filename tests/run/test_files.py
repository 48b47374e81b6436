"""CSV files, files that are replaced as a whole, digests."""

from pathlib import Path

import pytest

from rlhf.run import processes
from rlhf.run.errors import InputError
from rlhf.run.files import (
    check_file,
    check_lengths,
    csv_path,
    digests,
    read_csv,
    replacing,
    write_csv,
)


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
        (
            f"Prompt\nfine\na{' ' * 10**6}b\n",
            r"row 2: .* longer than 100,000 characters \(1 such rows\)",
        ),
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
    path = write(tmp_path / "x.csv", "Prompt,Response\n1.50,nan\nNA,None\n")
    frame = read_csv(path, ("Prompt", "Response"))
    assert frame.values.tolist() == [["1.50", "nan"], ["NA", "None"]]


def test_read_csv_takes_optional_columns_if_they_are_there(tmp_path):
    path = write(tmp_path / "x.csv", "Answer,Other,Prompt\ntie,x,a\n")
    frame = read_csv(path, ("Prompt",), optional=("Answer", "Votes"))
    assert frame.to_dict("records") == [{"Prompt": "a", "Answer": "tie"}]


def test_check_lengths_names_the_first_row_that_is_too_long():
    check_lengths(Path("x.csv"), [3, 5], 5, "the prompt")
    message = r"x.csv, row 2: the prompt takes 6 tokens and there is room for 5 \(2 such"
    with pytest.raises(InputError, match=message):
        check_lengths(Path("x.csv"), [3, 6, 7], 5, "the prompt")


def test_csv_path_of_heldout_rows():
    assert csv_path("folder", "prompts") == Path("folder/prompts.csv")
    assert csv_path("folder", "prompts", heldout=True) == Path("folder/prompts_heldout.csv")


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", 'a "b", c'])
def test_read_csv_gives_back_what_write_csv_wrote(tmp_path, text):
    table = [{"Prompt": text, "Response": "after"}, {"Prompt": "plain", "Response": text}]
    write_csv(tmp_path / "table.csv", table)
    frame = read_csv(tmp_path / "table.csv", ("Prompt", "Response"))
    assert frame.values.tolist() == [[text, "after"], ["plain", text]]


def test_write_csv_rounds_floats_to_six_digits(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": 1234567, "c": None}])
    assert (tmp_path / "x.csv").read_text() == "a,b,c\n0.333333,1234567,\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


# ---- files that are replaced as a whole ----


@pytest.mark.parametrize(
    "error", [OSError("no room"), RuntimeError("unexpected pos 57792"), KeyboardInterrupt()]
)
def test_replacing_keeps_the_old_file_and_nothing_temporary(tmp_path, error):
    """A full disk, as Python and as torch put it, is one line that names the file. Ctrl-C stays
    Ctrl-C."""
    path = write(tmp_path / "x.csv", "before")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(expected) as raised, replacing(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    assert expected is KeyboardInterrupt or f"{path} cannot be written" in str(raised.value)


def test_replacing_does_not_write_through_a_link_at_its_temporary_name(tmp_path):
    """As somebody else may have put it into a folder that all can write."""
    other = write(tmp_path / "other", "of somebody else")
    (tmp_path / "x.csv.tmp").symlink_to(other)
    with replacing(tmp_path / "x.csv") as file:
        file.write("new")
    assert (tmp_path / "x.csv").read_text() == "new" and not (tmp_path / "x.csv").is_symlink()
    assert other.read_text() == "of somebody else"


def test_replacing_removes_what_a_killed_process_has_left(tmp_path):
    write(tmp_path / "x.csv.tmp", "half")
    with replacing(tmp_path / "x.csv", "wb") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    assert (tmp_path / "x.csv").read_text() == "new"


def test_replacing_writes_only_on_the_first_process(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "RANK", 1)
    path = write(tmp_path / "x.csv", "before")
    with replacing(path, "wb") as file:
        file.write(b"new")
    write_csv(tmp_path / "y.csv", [{"a": 1}])
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# ---- digests ----


def test_digests_follow_from_the_contents(tmp_path):
    """SHA-256 of the three bytes "abc", from FIPS 180-2, appendix B.1."""
    (tmp_path / "x").write_bytes(b"abc")
    assert digests(x=tmp_path / "x")["x"].startswith("ba7816bf8f01cfea414140de5dae2223")


def test_digests_reject_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="x does not exist; give --data"):
        digests(x=tmp_path / "x")
