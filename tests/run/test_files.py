"""CSV files, files that are replaced as a whole, digests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.run import processes
from rlhf.run.errors import InputError
from rlhf.run.files import (
    DEFAULT_DATA,
    append_csv,
    check_file,
    check_folder,
    csv_line,
    csv_path,
    data_folder,
    digests,
    replacing,
    write_csv,
)
from tests.helpers import BUNDLED, ROOT


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- what is missing ----


def test_check_file_tells_a_folder_from_nothing(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(InputError, match="a.csv is a folder, not a file; fix it"):
        check_file(tmp_path / "a.csv", "fix it")
    with pytest.raises(InputError, match="b.csv does not exist; give --data"):
        check_file(tmp_path / "b.csv")


def test_check_folder_says_what_a_folder_is_not(tmp_path):
    rows = write(tmp_path / "demonstrations.jsonl", "{}")
    with pytest.raises(InputError, match="nowhere: there is no such folder here"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="jsonl is a file; give the folder that holds demons"):
        check_folder(rows)
    with pytest.raises(InputError, match="or no CSV file in it"):
        check_folder(rows.parent)
    write(tmp_path / "demonstrations.csv", "Prompt,Response\na,b\n")
    check_folder(str(tmp_path))


# ---- the bundled data set ----


@pytest.mark.parametrize("name", ["data/tiny_assistant", "./data/tiny_assistant/", DEFAULT_DATA])
def test_default_data_folder_is_the_bundled_one_wherever_a_program_starts(
    tmp_path, monkeypatch, name
):
    """check_folder and csv_path find it too."""
    monkeypatch.chdir(tmp_path)
    assert data_folder(name) == BUNDLED
    assert csv_path(name, "prompts") == BUNDLED / "prompts.csv"
    check_folder(name)


def test_default_data_folder_that_exists_here_is_meant_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tiny_assistant").mkdir(parents=True)
    assert data_folder("data/tiny_assistant").resolve() == tmp_path / "data" / "tiny_assistant"


def test_another_folder_is_never_the_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_assistant", "data/other", tmp_path / "data" / "tiny_assistant"):
        assert data_folder(name) == Path(name)


# ---- writing CSV files ----


def test_csv_path_of_heldout_rows():
    assert csv_path("folder", "prompts") == Path("folder/prompts.csv")
    assert csv_path("folder", "prompts", heldout=True) == Path("folder/prompts_heldout.csv")


def test_csv_line_quotes_what_a_reader_could_take_otherwise():
    """A lone CR ends a row for pandas, and blanks at an end are dropped by some readers."""
    assert csv_line(["a", None, 3, "b c"]) == "a,,3,b c\n"
    assert csv_line(["a,b", 'say "c"', "d\re", "f\n"]) == '"a,b","say ""c""","d\re","f\n"\n'
    assert csv_line([" a", "b\t", "c"]) == '" a","b\t",c\n'


def test_write_csv_rounds_floats_to_six_digits(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": 1234567, "c": None}])
    assert (tmp_path / "x.csv").read_text() == "a,b,c\n0.333333,1234567,\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_write_csv_replaces_nul_in_what_a_model_says(tmp_path):
    """A model may say it, and no reader of CSV files takes it."""
    write_csv(tmp_path / "x.csv", [{"Prompt": "a", "After": "b\0c"}])
    assert (tmp_path / "x.csv").read_text(encoding="utf-8") == "Prompt,After\na,b\ufffdc\n"


# ---- tables that grow ----

TABLE = [{"step": step, "loss": step / 3, "valid": None} for step in (1, 2, 3)]
TEXT = "step,loss,valid\n1,0.333333,\n2,0.666667,\n3,1,\n"


def test_append_csv_gives_the_bytes_of_write_csv(tmp_path):
    for count in (1, 2, 3):
        append_csv(tmp_path / "x.csv", TABLE[:count])
    assert (tmp_path / "x.csv").read_bytes() == TEXT.encode()


def test_append_csv_writes_no_more_than_the_new_row(tmp_path):
    """What stands in the file already is neither read nor written: it is not the table."""
    path = write(tmp_path / "x.csv", "x" * 1000 + "\n")
    before = path.stat()
    append_csv(path, TABLE)
    assert path.read_text() == "x" * 1000 + "\n3,1,\n"
    assert path.stat().st_ino == before.st_ino  # the same file, not one that took its name


def test_append_csv_begins_with_the_first_row(tmp_path):
    """Whatever an earlier run has left."""
    path = write(tmp_path / "x.csv", "of another run")
    append_csv(path, TABLE[:1])
    assert path.read_text() == "step,loss,valid\n1,0.333333,\n"


def test_append_csv_writes_all_rows_if_the_file_has_been_removed(tmp_path):
    append_csv(tmp_path / "x.csv", TABLE)
    assert (tmp_path / "x.csv").read_text() == TEXT


@pytest.mark.parametrize("exists", [True, False])
def test_append_csv_does_not_write_through_a_link(tmp_path, exists):
    other = tmp_path / "other"
    if exists:
        write(other, "of somebody else")
    for count in (1, 2):
        (tmp_path / "x.csv").unlink(missing_ok=True)
        (tmp_path / "x.csv").symlink_to(other)
        append_csv(tmp_path / "x.csv", TABLE[:count])
        assert len((tmp_path / "x.csv").read_text().splitlines()) == 1 + count
        assert other.exists() == exists and (not exists or other.read_text() == "of somebody else")


def test_append_csv_names_the_file_that_cannot_be_written(tmp_path, monkeypatch):
    append_csv(tmp_path / "x.csv", TABLE[:1])

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match="x.csv cannot be written .*No space left on device"):
        append_csv(tmp_path / "x.csv", TABLE[:2])


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


@pytest.mark.parametrize("name", ["x.csv", ".x.csv.unfinished"])
def test_replacing_does_not_write_through_a_link(tmp_path, name):
    """As somebody else may have put it into a folder that all can write."""
    other = write(tmp_path / "other", "of somebody else")
    (tmp_path / name).symlink_to(other)
    with replacing(tmp_path / "x.csv") as file:
        file.write("new")
    assert (tmp_path / "x.csv").read_text() == "new" and not (tmp_path / "x.csv").is_symlink()
    assert other.read_text() == "of somebody else"


def test_replacing_leaves_the_permissions_to_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x.csv") as file:
            file.write("new")
    finally:
        os.umask(before)
    assert (tmp_path / "x.csv").stat().st_mode & 0o777 == 0o640


KILLED = """
import os, sys
from pathlib import Path
from rlhf.run.files import replacing
with replacing(Path("x.csv")) as first, replacing(Path("y.csv")):
    print("half", file=first, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_replacing_removes_what_a_killed_process_has_left(tmp_path):
    """But not what another path's process has left, which may be writing still."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".x.csv.unfinished", ".y.csv.unfinished"]
    with replacing(tmp_path / "x.csv", "wb") as file:
        file.write(b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".y.csv.unfinished", "x.csv"]
    assert (tmp_path / "x.csv").read_text() == "new"


def test_replacing_opens_no_file_that_somebody_puts_there_meanwhile(tmp_path, monkeypatch):
    """After the old one has been removed."""
    other = write(tmp_path / "other", "of somebody else")
    monkeypatch.setattr(Path, "unlink", lambda path, **options: path.symlink_to(other))
    with pytest.raises(InputError, match="x.csv cannot be written .*File exists"):
        with replacing(tmp_path / "x.csv") as file:
            file.write("new")
    assert other.read_text() == "of somebody else"


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
