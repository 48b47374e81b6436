"""CSV files in and out, the lines printed while a program runs, and printed tables."""

import csv
import os
import time
from pathlib import Path

import pandas

from rlhf.support.cli import InputError

# ---- CSV files ----


def read_csv(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> pandas.DataFrame:
    """The named columns as text, and the optional ones if they are there. Raises InputError if the file is missing,
    garbled or empty, a column is missing, or a cell is empty."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give --data a folder that holds it, or the right name")
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pandas.errors.ParserError) as error:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        raise InputError(f"{path} is not a CSV file in UTF-8: {str(error).strip()}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas reads an extra cell as a row's name
        raise InputError(f"{path}: its rows have more cells than the {len(frame.columns)} columns of its header; put "
                         f"quotes around text that holds a comma")
    missing = [column for column in columns if column not in frame]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r} (found: {', '.join(map(str, frame.columns))}; needed: "
                         f"{', '.join(columns)})")
    columns = (*columns, *(column for column in optional if column in frame))
    frame = frame[list(columns)].fillna("")
    if frame.empty:
        raise InputError(f"{path} has a header but no rows")
    empty = frame.apply(lambda column: column.str.strip() == "")
    if empty.any(axis=None):
        row = int(empty.any(axis=1).to_numpy().argmax())
        raise InputError(f"{path}, row {row + 1}: {columns[int(empty.iloc[row].to_numpy().argmax())]} is empty "
                         f"({int(empty.any(axis=1).sum())} such rows); fill it or remove the row")
    return frame


def check_lengths(path: Path, lengths: list[int], limit: int, what: str, fix: str = "") -> None:
    """Raise InputError naming the first row that is longer than the model can read."""
    too_long = [row for row, length in enumerate(lengths, start=1) if length > limit]
    if too_long:
        row = too_long[0]
        raise InputError(f"{path}, row {row}: {what} takes {lengths[row - 1]} tokens and there is room for {limit} "
                         f"({len(too_long)} such rows); shorten or remove them, {fix}or train_sft.py with a larger "
                         f"--block-size")


def csv_path(folder: str | Path, name: str, heldout: bool = False) -> Path:
    return Path(folder) / f"{name}{'_heldout' if heldout else ''}.csv"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of the same keys; written whole to a temporary name and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    # pandas reads a lone \r as the end of a row unless it is quoted, which Python's csv does only from 3.13 on.
    quoting = csv.QUOTE_ALL if any("\r" in str(x) for row in rows for x in row.values()) else csv.QUOTE_MINIMAL
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows([{name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows])
    os.replace(temporary, path)


# ---- progress ----


def format_seconds(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


class Progress:
    """One row of metrics in a CSV for each logged step, and one aligned line on the screen with some of them.

    Args:
        path: the CSV; steps: of the whole run; start: steps done before a resume, whose rows are kept.
        screen: the metrics on the screen; the others are only in the CSV.
        tensorboard: write them to a folder `tensorboard` beside the CSV as well.
    """

    def __init__(self, path: Path, steps: int, start: int, screen: tuple[str, ...], tensorboard: bool = False):
        self.path, self.steps, self.start, self.screen = path, steps, start, screen
        self.began, self.tokens, self.lines = time.perf_counter(), 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.seconds_before = [], 0.0
        if start > 0 and path.is_file():
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
                self.seconds_before = max((float(row["seconds"]) for row in self.rows), default=0.0)
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise InputError(f"{path} is not the record of this run ({type(error).__name__}: {error}); move it "
                                 f"away, and the run goes on without its earlier rows") from error
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("--tensorboard needs the package: pip install tensorboard") from error
            self.writer = SummaryWriter(path.parent / "tensorboard" / path.stem, purge_step=start + 1)
        self.header = "  ".join(name.rjust(8) for name in ("step", *screen, "tokens/s", "left"))
        print(self.header, flush=True)

    def log(self, step: int, **metrics: float | None) -> None:
        """step: how many are done. None: not measured at this step."""
        elapsed = time.perf_counter() - self.began
        left = elapsed / max(1, step - self.start) * (self.steps - step)
        row = {"step": step, **metrics, "tokens_per_s": round(self.tokens / elapsed),
               "seconds": round(self.seconds_before + elapsed, 1)}
        if self.rows and self.rows[0].keys() != row.keys():
            raise InputError(f"{self.path} has other columns than this run writes; move it away, and the run goes on "
                             f"without its earlier rows")
        cells = {"step": f"{step}/{self.steps}"}
        for name in self.screen:
            value = metrics[name]
            cells[name] = "" if value is None else f"{value:{'.1e' if name == 'lr' else '.3f'}}"
        cells |= {"tokens/s": f"{row['tokens_per_s']:,}", "left": format_seconds(left)}
        if self.lines and self.lines % 25 == 0:
            print(self.header)
        print("  ".join(cell.rjust(max(8, len(name))) for name, cell in cells.items()), flush=True)
        self.lines += 1
        self.rows.append(row)
        write_csv(self.path, self.rows)
        if self.writer:
            for name, value in row.items():
                if value is not None:
                    self.writer.add_scalar(f"{self.path.stem}/{name}", value, step)
            self.writer.flush()


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


# ---- what is printed after training ----


def sample_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of ppo_samples.csv: a response to each prompt before and after."""
    return [{"Prompt": a["prompt"], "Before": a["response"], "After": b["response"],
             "score_before": round(a["score"], 4), "score_after": round(b["score"], 4),
             "gold_before": a["gold"], "gold_after": b["gold"]} for a, b in zip(before, after)]


def shown(value) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def print_table(rows: list[dict]) -> None:
    """The rows of evaluation.csv, aligned."""
    rows = [{name: shown(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print("  ".join(name.rjust(width) for name, width in widths.items()))
    for row in rows:
        print("  ".join(row[name].rjust(width) for name, width in widths.items()))


def verdict(one: dict) -> str:
    return f"score {one['score']:+.2f}" + ("" if one["gold"] is None else f", gold {one['gold']:+.1f}")


def print_responses(responses: list[dict]) -> None:
    for one in responses:
        print(f"    {one['prompt'].strip().splitlines()[0]}\n        -> {one['response']}   ({verdict(one)})")


def print_pairs(before: list[dict], after: list[dict], count: int) -> None:
    for a, b in list(zip(before, after))[:count]:
        print(f"\n    {' / '.join(a['prompt'].split(chr(10) * 2)).strip(' /')}")
        for name, one in (("before", a), ("after", b)):
            print(f"      {name:>6} ({verdict(one)}): {one['response']}")
