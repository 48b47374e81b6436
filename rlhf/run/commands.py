"""The programs by name: the command `rlhf NAME` of the installed package, and the next command to
type."""

import json
import runpy
import shlex
import sys
from pathlib import Path

from rlhf.run.errors import fail, printable
from rlhf.run.files import csv_path, data_folder
from rlhf.run.flags import TrainConfig, flag_name

PROGRAMS = {
    "sft": "train_sft",
    "reward": "train_reward",
    "ppo": "train_ppo",
    "prepare": "rlhf.tools.prepare",
    "optimality": "rlhf.tools.optimality",
    "report": "rlhf.tools.report",
    "sample": "rlhf.tools.sample",
    "label": "rlhf.tools.label",
    "export": "rlhf.tools.export",
}
# The flags that a tool gets from the run that it goes on from.
TOOL_FLAGS = {
    "optimality": ("data", "sft", "reward"),
    "report": ("data",),
    "sample": ("data", "reward", "reward_weights"),
    "export": ("data",),
}
NOT_INSTALLED = {"dpo": "docs.experiments.train_dpo"}  # only in a clone
INSTALLED = "rlhf "  # sys.argv[0] begins with it if `main` has started the program


def main() -> None:
    """Run the program that the first argument names, with the flags after it."""
    name = " ".join(sys.argv[1:2])
    usage = f"rlhf NAME [flags], with NAME one of {', '.join(PROGRAMS)}"
    if name in ("", "-h", "--help"):
        print(f"usage: {usage}\n\nrlhf NAME --help shows the flags of a program.")
        return
    if name not in PROGRAMS:
        fail(f"unknown program {name} ({usage})")
    sys.argv[:2] = [INSTALLED + name]
    runpy.run_module(PROGRAMS[name], run_name="__main__")


def command(name: str) -> str:
    """The command that starts a program, as this one was started: installed, or from a clone."""
    if sys.argv[0].startswith(INSTALLED) and name in PROGRAMS:
        return INSTALLED + name
    module = (PROGRAMS | NOT_INSTALLED)[name]
    if "." in module:
        return f"python -m {module}"
    script = Path(sys.argv[0])
    folder = script.parent if script.stem in PROGRAMS.values() else Path()
    return shlex.join(["python", f"{folder / module}.py"])


def next_command(cfg, name: str) -> str:
    """The command of a program that goes on from the run of this config.

    A stage gets the run's flags about data and folders, and those that `prepare` has chosen for it;
    a tool gets the checkpoint, and --sft and --reward if these files lie elsewhere. A model in 4
    bits without adapters can only be sampled.
    """
    if getattr(cfg, "load_in_4bit", False) and not cfg.lora_rank:
        name = "sample"
    if name == "reward" and not csv_path(cfg.data, "comparisons").is_file():
        return f"{next_command(cfg, 'ppo')} --reward FILE.py"
    words = []
    shared = ["data", "heldout", "out", "sft"]
    if "." in PROGRAMS[name]:
        words = ["--checkpoint", str(cfg.checkpoint(cfg.kind))]
        shared = TOOL_FLAGS[name]
    if name == "report":
        words = [cfg.out]
    for flag, value in vars(cfg).items():
        # An empty --sft or --reward means the file beside the checkpoint.
        if flag in shared and value and value != getattr(TrainConfig, flag, None):
            words += [flag_name(flag), *map(str, value if isinstance(value, tuple) else [value])]
    words += prepared_flags(cfg.data, name)
    return printable(f"{command(name)} {shlex.join(words)}".rstrip())


def prepared_flags(data: str, name: str) -> list[str]:
    """The flags in a data set's prepare.json for this program; none if it has no such file.

    A file of something else is ignored: a run that is done must not end with an error.
    """
    try:
        text = (data_folder(data) / "prepare.json").read_text(encoding="utf-8")
        return shlex.split(json.loads(text)["flags"][name].strip())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
