"""Plumbing shared by the scripts: devices, seeds, checkpoints, CSV files and progress. No maths."""

import contextlib
import csv
import dataclasses
import hashlib
import os
import time
import zipfile
from pathlib import Path

import pandas
import torch

FORMAT = 1  # of a checkpoint


class InputError(Exception):
    """Something that the user can mend; shown as one line without a traceback."""


# ---- devices and seeds ----


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda. auto takes a CUDA GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA GPU here; use --device cpu")
    return torch.device(name)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of the matrix products under autocast; None for float32 throughout.

    auto: bfloat16 on a CUDA GPU that has it, else off.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, amp: torch.dtype | None):
    """Context for forward passes. Losses are taken outside of it, in float32."""
    return torch.autocast(device.type, dtype=amp) if amp else contextlib.nullcontext()


def make_scaler(device: torch.device, amp: torch.dtype | None) -> torch.amp.GradScaler:
    """Scales losses in float16, whose small gradients would be rounded to zero; elsewhere it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=amp == torch.float16)


def make_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A stream of random numbers that follows from its key alone, such as (seed, "rollout", step).

    Nothing random carries over from one step to the next, so a run that resumes at step 40 draws what the
    uninterrupted run drew there, and no generator's state needs saving.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# ---- checkpoints: one file with weights, model config, the run's config, step, and what resuming needs ----


def save_checkpoint(
    path: Path, kind: str, model: torch.nn.Module, config, step: int, tokenizer, optimizer, scaler, inputs: dict,
    **state,
) -> None:
    """Write to a temporary name and rename, so that a kill leaves the old file or the new one, never half of one.

    inputs: what the run was made from, as `digests` gives it. state: what else the run needs to go on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "format": FORMAT,
        "kind": kind,
        "model": trained_state(model),
        "model_config": dataclasses.asdict(model.gpt.config if hasattr(model, "gpt") else model.config),
        "config": dataclasses.asdict(config),
        "step": step,
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_name": tokenizer.name,
        "inputs": inputs,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        **state,
    }
    save_tensors(path, checkpoint)


def save_tensors(path: Path, content: dict) -> None:
    """torch.save to a temporary name, then rename. Raises InputError where there is no room."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
    except RuntimeError as error:  # what torch makes of a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written; free some space, or give another --out. What was there before is "
                         f"untouched ({str(error).splitlines()[0]})") from error
    os.replace(temporary, path)


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps: all but the frozen parameters (rlhf/lora.py freezes some; else all are trained)."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what trained_state gave. Raises RuntimeError where something is missing or too much."""
    missing = trained_state(model).keys() - state.keys()
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if missing or unknown:
        raise RuntimeError(f"weights missing: {sorted(missing)[:3]}; unknown: {unknown[:3]}")


def load_checkpoint(path: Path, *kinds: str, unfinished: bool = False) -> dict:
    """Read a checkpoint of one of the kinds "sft", "reward" and "ppo", on the CPU.

    Raises InputError where it is missing, garbled, another script's, or, unless that is wanted to resume, unfinished.
    """
    scripts = " or ".join(f"train_{kind}.py" for kind in kinds)
    if not path.is_file():
        raise InputError(f"{path} does not exist: run `python {scripts}` first, with the same --out")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = f"train_{checkpoint['kind']}.py"
        if checkpoint["format"] != FORMAT:
            raise InputError(f"{path} has format {checkpoint['format']}, this code reads {FORMAT}: run {script} again")
        step, steps = checkpoint["step"], checkpoint["config"]["steps"]
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # which torch does not look for
                raise InputError(f"{path} is damaged, in {damaged}: run `python {scripts}` again")
    except InputError:
        raise
    except Exception as error:  # a zip that is cut short, a pickle of something else, a missing key, ...
        raise InputError(f"{path} is not a checkpoint of this project ({type(error).__name__}): "
                         f"run `python {scripts}` again") from error
    if checkpoint["kind"] not in kinds:
        raise InputError(f"{path} was written by {script}; a checkpoint of {scripts} is needed here")
    if not unfinished and step < steps:
        raise InputError(f"{path} stopped at step {step} of {steps}: finish it with `python {script} --resume`")
    return checkpoint


def check_tokenizer(path: Path, checkpoint: dict, tokenizer) -> None:
    """Raise InputError where a checkpoint speaks of other tokens than this tokenizer."""
    if checkpoint["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"{path} was trained with another tokenizer than this data set's: "
                         f"give the same --data to all three scripts, or train it again")


# What shapes no training step, or is compared by its contents (inputs).
MAY_CHANGE = {"resume", "device", "out", "data", "sft", "reward", "comparison_files", "log_every", "eval_every",
              "eval_prompts", "optimum_prompts", "optimum_samples"}


def digests(**paths: Path) -> dict[str, str]:
    """{name: SHA-256} of the files that a run is made from. A run that resumes with others would be neither run."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def load_resumable(path: Path, kind: str, config, tokenizer, inputs: dict[str, str]) -> dict:
    """The checkpoint of a run that is to go on. It must be the same run: raises InputError where the tokenizer, an
    input file or a setting that shapes it differs."""
    if not path.is_file():
        raise InputError(f"--resume: {path} does not exist, so there is nothing to go on from; drop --resume")
    checkpoint = load_checkpoint(path, kind, unfinished=True)
    check_tokenizer(path, checkpoint, tokenizer)
    theirs = checkpoint["config"]
    for name, ours in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE and theirs.get(name) != ours:
            raise InputError(f"--resume: {path} was trained with --{name.replace('_', '-')} {theirs.get(name)}, "
                             f"not {ours}; give the same flags, or start afresh without --resume")
    for name in sorted(inputs.keys() | checkpoint["inputs"].keys()):
        if checkpoint["inputs"].get(name) != inputs.get(name):
            raise InputError(f"--resume: {path} was begun with another {name} file; give the one that it was begun "
                             f"with, or start afresh without --resume")
    return checkpoint


def resume(path: Path, kind: str, config, tokenizer, inputs: dict[str, str], model, optimizer, scaler) -> dict:
    """Put model, optimizer and scaler back to where load_resumable's checkpoint left them. Returns the checkpoint."""
    checkpoint = load_resumable(path, kind, config, tokenizer, inputs)
    load_trained_state(model, checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Raise InputError where a weight is NaN or infinite: nothing that follows would mean anything."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise InputError(f"the weights are no longer finite after step {step}: the run has diverged. Lower --lr, or "
                         f"use --amp bf16 instead of fp16; the last checkpoint, if there is one, is from before")


# ---- CSV files ----


def read_csv(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> pandas.DataFrame:
    """The named columns as text, and the optional ones where they are. Raises InputError where the file is missing,
    garbled or empty, a column is missing, or a cell is empty."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give --data a folder that holds it, or the right name")
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pandas.errors.ParserError) as error:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        raise InputError(f"{path} is not a CSV file in UTF-8: {str(error).strip()}") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas takes a cell too many for a name of the row
        raise InputError(f"{path}: its rows have more cells than the {len(frame.columns)} columns of its header; put "
                         f"quotes around text that holds a comma")
    missing = [column for column in columns if column not in frame]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; it needs {', '.join(columns)} and has "
                         f"{', '.join(map(str, frame.columns))}")
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
    # A lone \r ends a row for pandas unless it is quoted, which Python's csv does of itself from 3.13 only.
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
    """One aligned line a logged step on the screen, under a header now and then, and the same row in a CSV.

    The columns named in csv_only are in the CSV alone, so that the line on the screen does not wrap.
    """

    def __init__(self, path: Path, steps: int, start: int, csv_only: tuple[str, ...] = ()):
        self.path, self.steps, self.start, self.csv_only = path, steps, start, csv_only
        self.began, self.tokens, self.lines = time.perf_counter(), 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.seconds_before = [], 0.0
        if start > 0 and path.is_file():  # resuming: keep the rows up to the checkpoint
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
                self.seconds_before = max((float(row["seconds"]) for row in self.rows), default=0.0)
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise InputError(f"{path} is not the record of this run ({type(error).__name__}: {error}); move it "
                                 f"away, and the run goes on without its earlier rows") from error

    def log(self, step: int, **values: float) -> None:
        """step counts from 1: what was done so far."""
        elapsed = time.perf_counter() - self.began
        left = elapsed / max(1, step - self.start) * (self.steps - step)
        row = {"step": step, **values, "tokens_per_s": round(self.tokens / elapsed),
               "seconds": round(self.seconds_before + elapsed, 1)}
        if self.rows and self.rows[0].keys() != row.keys():
            raise InputError(f"{self.path} has other columns than this run writes; move it away, and the run goes on "
                             f"without its earlier rows")
        cells = {"step": f"{step}/{self.steps}"}
        for name, value in values.items():
            if name not in self.csv_only:
                cells[name] = "" if value is None else f"{value:{'.1e' if name == 'lr' else '.3f'}}"
        cells |= {"tokens/s": f"{row['tokens_per_s']:,}", "left": format_seconds(left)}
        if self.lines % 25 == 0:
            print(" | ".join(name.rjust(9) for name in cells))
        print(" | ".join(cell.rjust(max(9, len(name))) for name, cell in cells.items()), flush=True)
        self.lines += 1
        self.rows.append(row)
        write_csv(self.path, self.rows)
