"""Reading and writing files: CSVs, byte-pair ranks, atomic replacement, digests."""

import base64
import contextlib
import csv
import hashlib
import os
from pathlib import Path

import pandas

from rlhf.run.errors import InputError
from rlhf.run.processes import is_first

LONGEST_CELL = 100_000  # characters


def check_file(
    path: Path, fix: str = "give --data a folder that holds it, or the right name"
) -> Path:
    """The path. Raises InputError if there is no such file."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; {fix}")
    return path


def digests(**paths: Path) -> dict[str, str]:
    """{name: SHA-256} of the files that a run is made from; --resume compares them."""
    found = {}
    for name, path in paths.items():
        found[name] = hashlib.sha256(check_file(path).read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **options):
    """Open a file under a temporary name; at the end, rename it to `path`.

    Killing the process leaves either the old file or the new one, never half of one.

    Args: mode: "w" or "wb"; options: those of open().
    Raises: InputError if the file cannot be written; then the old file stays, and the temporary one
        is removed.
    """
    if not is_first():
        with open(os.devnull, mode, **options) as file:
            yield file
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a process that was killed
        # "x" creates the file. "w" would write through a link that somebody else has put there.
        with temporary.open(mode.replace("w", "x"), **options) as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch may make of a full disk
        raise InputError(
            f"{path} cannot be written ({error}); free some space, or give another --out. "
            f"What was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ---- CSV files ----


def csv_path(folder: str | Path, name: str, heldout: bool = False) -> Path:
    suffix = "_heldout" if heldout else ""
    return Path(folder) / f"{name}{suffix}.csv"


def read_csv(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()
) -> pandas.DataFrame:
    """The named columns as text, and the optional ones if they are there.

    Raises InputError if the file is missing, garbled or empty, a column is missing, or a cell is
    empty.
    """
    check_file(path)
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pandas.errors.ParserError) as error:  # a UnicodeDecodeError is a ValueError
        reason = str(error).strip()
        raise InputError(f"{path} is not a CSV file in UTF-8: {reason}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas reads an extra cell as a row's name
        raise InputError(
            f"{path}: a row has more cells than the header; put quotes around text that holds "
            f"a comma"
        )
    for column in columns:
        if column not in frame:
            found = ", ".join(map(str, frame.columns))
            needed = ", ".join(columns)
            raise InputError(f"{path}: no column {column!r} (found: {found}; needed: {needed})")
    present = [column for column in optional if column in frame]
    frame = frame[[*columns, *present]].fillna("")
    if frame.empty:
        raise InputError(f"{path} has a header but no rows")
    for column in frame:
        check_cells(path, frame[column])
    return frame


def check_cells(path: Path, cells: pandas.Series) -> None:
    """Raise InputError if a cell of a column is empty or too long."""
    wrong = (cells.str.strip() == "") | (cells.str.len() > LONGEST_CELL)
    if wrong.any():
        raise InputError(
            f"{path}, row {wrong.argmax() + 1}: {cells.name} is empty, or longer than "
            f"{LONGEST_CELL:,} characters ({wrong.sum()} such rows); fix the row or remove it"
        )


def check_lengths(path: Path, lengths: list[int], limit: int, what: str, fix: str = "") -> None:
    """Raise InputError if a row is longer than limit, in tokens. It names the first such row.

    Args: lengths: of the rows; what: is measured; fix: one more way out, for the message.
    """
    too_long = [row for row, length in enumerate(lengths, start=1) if length > limit]
    if too_long:
        first = too_long[0]
        raise InputError(
            f"{path}, row {first}: {what} takes {lengths[first - 1]} tokens and there is room for "
            f"{limit} ({len(too_long)} such rows); shorten or remove them, {fix}or give SFT a "
            f"larger --block-size"
        )


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows of the same keys, `replacing` the file. Floats are rounded to six digits."""
    lines = []
    quoting = csv.QUOTE_MINIMAL
    for row in rows:
        lines.append({name: rounded(cell) for name, cell in row.items()})
        if any("\r" in str(cell) for cell in row.values()):
            # pandas ends a row at a lone \r unless it is quoted, which csv does only from 3.13 on.
            quoting = csv.QUOTE_ALL
    with replacing(path, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(lines)


def rounded(cell):
    """A float as text of six digits; anything else unchanged."""
    return f"{cell:.6g}" if isinstance(cell, float) else cell


# ---- byte-pair ranks ----


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a .tiktoken file with their ranks.

    tiktoken's own reader caches a copy under the path's name and would use it after the file has
    changed. Raises InputError if the file is missing or garbled.
    """
    if not path.is_file():
        raise InputError(f'{path}: no such tokenizer file; give a .tiktoken file, or "gpt2"')
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            shown = repr(line[:60])
            message = f"{path}, line {number}: expected `base64-token rank`, got {shown}"
            raise InputError(message) from None
    in_order = sorted(ranks.values()) == list(range(len(ranks)))
    single_bytes = [bytes([value]) for value in range(256)]
    if not in_order or any(byte not in ranks for byte in single_bytes):
        raise InputError(
            f"{path}: the ranks must be 0, 1, 2, ... and hold all of the 256 single bytes"
        )
    return ranks
