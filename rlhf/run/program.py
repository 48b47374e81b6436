"""How a program begins and ends: flags, one program per folder, one line for an error or Ctrl-C.

A user error ends with status 2, Ctrl-C with status 130. A bug keeps its traceback.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf.run import processes
from rlhf.run.errors import InputError, fail
from rlhf.run.flags import TrainConfig, parse_cli

OUT_OF_MEMORY = re.compile("out of memory|can't allocate|MemoryError")


def run(main: Callable, cls: type) -> None:
    """Read the flags into a config of class cls, and run main(config).

    Under torchrun, on each of its processes (rlhf/run/processes.py).
    """
    replace_unknown_characters()
    processes.silence_all_but_the_first()
    cfg = parse_cli(cls)
    try:
        with folder_lock(cfg):
            processes.run(main, cfg)
        print(end="", flush=True)  # a full disk shows here and not while Python shuts down
    except KeyboardInterrupt:
        end_interrupted(cfg)
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os._exit(141)  # what a shell reports; an ordinary exit would try to write what is left
    except InputError as error:
        fail(str(error))
    except OSError as error:
        end_without_file(error)
    except (MemoryError, RuntimeError) as error:
        if not OUT_OF_MEMORY.search(f"{error} {type(error).__name__}"):
            raise
        fail(f"not enough memory: give a smaller --micro-batch-size, or a smaller model ({error})")


def replace_unknown_characters() -> None:
    """Print ? for a character that the terminal's or the log's encoding lacks, and do not fail."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


# ---- one program per folder ----


def folder_lock(cfg):
    """`lock` for a config that has a lock_file, on the process that writes; else no lock."""
    path = cfg.lock_file() if hasattr(cfg, "lock_file") else None
    if path is None or not processes.is_first():
        return contextlib.nullcontext()
    return lock(path)


def lock_of_run(folder: Path) -> Path | None:
    """The lock_file of a program that writes to this folder; None if no run has written there."""
    path = folder / ".lock"
    return path if path.exists() else None


@contextlib.contextmanager
def lock(path: Path):
    """Hold a lock on the file at path, so that one program at a time writes in its folder.

    The lock ends with the process, also if that is killed.

    Raises InputError if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise InputError(
            f"another program writes here and holds {path}; wait, or give another --out"
        ) from None


# ---- how a program ends ----


def end_interrupted(cfg) -> None:
    """One line for Ctrl-C. It names the last checkpoint in --out if there is one."""
    text = "\ninterrupted"
    if isinstance(cfg, TrainConfig) and cfg.checkpoint(cfg.kind).is_file():
        text += f"; --resume continues from {cfg.checkpoint(cfg.kind)}"
    try:
        print(text, file=sys.stderr)
        sys.stdout.flush()
    finally:
        os._exit(130)  # without waiting for threads


def end_without_file(error: OSError) -> None:
    """One line for a file that cannot be read or written."""
    if error.filename:
        fail(f"{error.filename} cannot be read or written: {error.strerror}")
    message = f"error: standard output or a file cannot be written: {error.strerror}"
    print(message, file=sys.stderr)
    os._exit(2)
