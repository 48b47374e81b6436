"""Files: what is missing, digests, atomic replacement, writing CSVs, byte-pair ranks."""

import base64
import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from rlhf.run.errors import InputError
from rlhf.run.processes import is_first

# What RFC 4180 wants in quotation marks, and blanks that a reader might drop.
NEEDS_QUOTES = re.compile(r'[",\r\n]|^\s|\s$')
DEFAULT_DATA = Path("data/tiny_assistant")
BUNDLED = Path(__file__).resolve().parents[2] / DEFAULT_DATA  # in a clone, and in the wheel


def data_folder(name: str | Path) -> Path:
    """The folder of a data set. The default name means the bundled one, unless it exists here."""
    path = Path(name)
    return BUNDLED if path == DEFAULT_DATA and not path.exists() else path


PREPARE = "`python -m rlhf.tools.prepare FILE --out DIR` makes a data set of it"


def check_file(
    path: Path, fix: str = "give --data a folder that holds it, or the right name"
) -> Path:
    """The path. Raises InputError if there is no such file."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; {fix}")
    return path


def check_folder(folder: str | Path) -> None:
    """Raise InputError if the folder of a data set does not exist or holds no CSV file."""
    path = data_folder(folder)
    if path.is_file():
        raise InputError(
            f"--data {folder} is a file; give the folder that holds demonstrations.csv, "
            f"comparisons.csv and prompts.csv, or: {PREPARE}"
        )
    if not any(path.glob("*.csv")):
        raise InputError(f"--data {folder}: there is no such folder here, or no CSV file in it")


def digests(**paths: Path) -> dict[str, str]:
    """{name: SHA-256} of the files that a run is made from; --resume compares them."""
    return {name: digest(check_file(path)) for name, path in paths.items()}


def digest(path: Path) -> str:
    """The SHA-256 of a file, which may be larger than memory."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha.update(piece)
    return sha.hexdigest()


def numbered(name: str, paths: list[Path]) -> dict[str, Path]:
    """{"NAME 1": the first path, ...}"""
    return {f"{name} {number}": path for number, path in enumerate(paths, start=1)}


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **options):
    """Open a file under a temporary name; at the end, rename it to `path`.

    Killing the process leaves either the old file or the new one, never half of one. A file of the
    temporary name, which a killed process may have left, is removed first. The name must be free
    then, so that nobody else can have put a link there.

    Args: mode: "w" or "wb"; options: those of open().
    Raises: InputError if the file cannot be written; then the old file stays, and the temporary one
        is removed.
    """
    if not is_first():
        with open(os.devnull, mode, **options) as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            # "x": it must not exist
            with temporary.open(mode.replace("w", "x"), **options) as file:
                yield file
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def writing(path: Path):
    """Turn the errors of writing to this path into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch may make of a full disk
        raise InputError(
            f"{path} cannot be written ({error}); free some space, or give another --out"
        ) from error


# ---- CSV files ----


def csv_path(folder: str | Path, name: str, heldout: bool = False) -> Path:
    suffix = "_heldout" if heldout else ""
    return data_folder(folder) / f"{name}{suffix}.csv"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows of the same keys, `replacing` the file."""
    with replacing(path, newline="", encoding="utf-8") as file:
        file.write(csv_line(rows[0]))
        for row in rows:
            file.write(csv_line(row.values()))


def csv_line(cells: Iterable) -> str:
    """A row of a CSV file. None becomes an empty cell; floats are rounded to six digits.

    Up to Python 3.12 the csv module writes a lone CR without quotation marks, and for pandas that
    ends the row.
    """
    texts = [cell_text(cell) for cell in cells]
    return ",".join(quoted(text) if NEEDS_QUOTES.search(text) else text for text in texts) + "\n"


def cell_text(cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return str(cell).replace("\0", "\ufffd")  # a model may say NUL, no reader takes it


def quoted(text: str) -> str:
    """A cell in quotation marks."""
    return '"' + text.replace('"', '""') + '"'


def append_csv(path: Path, rows: list[dict]) -> None:
    """Add the last of these rows of numbers to the CSV that holds the others.

    Its bytes are those of write_csv, which writes it if there is no such file or only one row. The
    cost does not depend on the number of rows. Raises InputError if the file cannot be written.
    """
    if len(rows) == 1 or path.is_symlink() or not path.is_file():
        write_csv(path, rows)
    elif is_first():
        with writing(path), path.open("a", newline="", encoding="utf-8") as file:
            file.write(csv_line(rows[-1].values()))


# ---- byte-pair ranks ----


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a .tiktoken file with their ranks.

    tiktoken's own reader caches a copy under the path's name and would use it after the file has
    changed. Raises InputError if the file is missing or garbled. It quotes nothing of the file,
    which may be any that a checkpoint names.
    """
    if not path.is_file():
        raise InputError(
            f'{path}: no such tokenizer file; give a .tiktoken file or "gpt2", or --data the '
            f"folder that holds it"
        )
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            message = f"{path}, line {number}: expected `base64-token rank`"
            raise InputError(message) from None
    in_order = sorted(ranks.values()) == list(range(len(ranks)))
    single_bytes = {bytes([value]) for value in range(256)}
    if not in_order or single_bytes - ranks.keys():
        raise InputError(
            f"{path}: the ranks must be 0, 1, 2, ... and hold all of the 256 single bytes"
        )
    return ranks
