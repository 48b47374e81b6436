"""CSV files in and out, and the lines printed while a program runs."""

import contextlib
import csv
import os
import time
from pathlib import Path

import pandas

from rlhf.support import cli

# ---- files ----


def check_file(path: Path, fix: str = "give --data a folder that holds it, or the right name") -> Path:
    """The path. Raises InputError if there is no such file."""
    if not path.is_file():
        raise cli.InputError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}; {fix}")
    return path


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **options):
    """An open file with a temporary name, renamed to `path` in the end: a kill leaves the old file or the new one,
    never half of one.

    Raises InputError if it cannot be written; then the old file stays, and nothing temporary.
    """
    if not cli.writes:
        yield open(os.devnull, mode, **options)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, **options) as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch may make of a full disk
        raise cli.InputError(f"{path} cannot be written ({error}); free some space, or give another --out. What was "
                             f"there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_csv(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> pandas.DataFrame:
    """The named columns as text, and the optional ones if they are there. Raises InputError if the file is missing,
    garbled or empty, a column is missing, or a cell is empty."""
    check_file(path)
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pandas.errors.ParserError) as error:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        raise cli.InputError(f"{path} is not a CSV file in UTF-8: {str(error).strip()}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas reads an extra cell as a row's name
        raise cli.InputError(f"{path}: a row has more cells than the header; put quotes around text that holds a comma")
    missing = [column for column in columns if column not in frame]
    if missing:
        raise cli.InputError(f"{path}: no column {missing[0]!r} (found: {', '.join(map(str, frame.columns))}; needed: "
                             f"{', '.join(columns)})")
    columns = (*columns, *(column for column in optional if column in frame))
    frame = frame[list(columns)].fillna("")
    if frame.empty:
        raise cli.InputError(f"{path} has a header but no rows")
    for column in columns:
        if (wrong := (frame[column].str.strip() == "") | (frame[column].str.len() > 100_000)).any():
            raise cli.InputError(f"{path}, row {wrong.argmax() + 1}: {column} is empty, or longer than 100,000 "
                                 f"characters ({wrong.sum()} such rows); fix the row or remove it")
    return frame


def check_lengths(path: Path, lengths: list[int], limit: int, what: str, fix: str = "") -> None:
    """Raise InputError naming the first row that is longer than the model can read."""
    if too_long := [row for row, length in enumerate(lengths, start=1) if length > limit]:
        raise cli.InputError(f"{path}, row {too_long[0]}: {what} takes {lengths[too_long[0] - 1]} tokens and there is "
                             f"room for {limit} ({len(too_long)} such rows); shorten or remove them, {fix}or give SFT "
                             f"a larger --block-size")


def csv_path(folder: str | Path, name: str, heldout: bool = False) -> Path:
    return Path(folder) / f"{name}{'_heldout' if heldout else ''}.csv"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of the same keys; written whole to a temporary name and renamed."""
    # pandas reads a lone \r as the end of a row unless it is quoted, which Python's csv does only from 3.13 on.
    quoting = csv.QUOTE_ALL if any("\r" in str(x) for row in rows for x in row.values()) else csv.QUOTE_MINIMAL
    with replacing(path, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows([{name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows])


# ---- progress ----


def format_seconds(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


class Progress:
    """One row of metrics in a CSV for each logged step, and one aligned line on the screen with some of them.

    Args:
        path: the CSV; steps: of the whole run.
        begun: what `checkpoints.begin` returns: the steps done before a resume, and their rows.
        screen: the metrics on the screen; the others are only in the CSV.
        tensorboard: write them to a folder `tensorboard` beside the CSV as well.
    """

    def __init__(self, path: Path, steps: int, begun: dict, screen: tuple[str, ...], tensorboard: bool = False):
        self.path, self.steps, self.start, self.screen = path, steps, begun["step"], screen
        self.began, self.tokens, self.lines = time.perf_counter(), 0, 0
        self.rows, self.writer = list(begun["metrics"]), None
        self.seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        # These files stay until there is a checkpoint of the new run.
        self.replaced = begun.get("replaced", []) if cli.writes else []
        if self.rows:
            write_csv(path, self.rows)
        if tensorboard and cli.writes:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise cli.InputError("--tensorboard needs the package: pip install tensorboard") from error
            self.writer = SummaryWriter(path.parent / "tensorboard" / path.stem, purge_step=self.start + 1)

    def log(self, step: int, **metrics: float | None) -> None:
        """step: how many are done. None: not measured at this step."""
        elapsed = time.perf_counter() - self.began
        left = elapsed / max(1, step - self.start) * (self.steps - step)
        row = {"step": step, **metrics, "tokens_per_s": round(self.tokens / elapsed),
               "seconds": round(self.seconds_before + elapsed, 1)}
        cells = {"step": f"{step}/{self.steps}",
                 **{name: "" if metrics[name] is None else f"{metrics[name]:{'.1e' if name == 'lr' else '.3f'}}"
                    for name in self.screen},
                 "tokens/s": f"{row['tokens_per_s']:,}", "left": format_seconds(left)}
        if self.lines % 25 == 0:
            print("  ".join(name.rjust(8) for name in cells))
        print("  ".join(cell.rjust(max(8, len(name))) for name, cell in cells.items()), flush=True)
        self.lines += 1
        self.rows.append(row)
        if self.path not in self.replaced:
            write_csv(self.path, self.rows)
        if self.writer:
            for name, value in row.items():
                if value is not None:
                    self.writer.add_scalar(f"{self.path.stem}/{name}", value, step)
            self.writer.flush()

    def saved(self) -> None:
        """There is a checkpoint of this run: what is left of the one it replaces goes, and its metrics are written."""
        while self.replaced:
            self.replaced.pop().unlink(missing_ok=True)
        write_csv(self.path, self.rows)


def ticker(items, what: str, seconds: float = 10.0):
    """The items one by one, and every so many seconds a line that says how far it is."""
    began = told = time.perf_counter()
    for done, item in enumerate(items):
        if (now := time.perf_counter()) - told > seconds:
            left = format_seconds((now - began) / done * (len(items) - done))
            print(f"    {what}: {done} of {len(items)}, {left} left", flush=True)
            told = now
        yield item


class Means:
    """Weighted sums of named tensors. They stay on their device until they are read."""

    def __init__(self):
        self.sums = {}

    def add(self, weight, **values) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value.detach()

    def over(self, count: int) -> dict[str, float]:
        return {name: total.item() / count for name, total in self.sums.items()}
