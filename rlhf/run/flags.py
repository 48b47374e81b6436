"""Flags: each field of a frozen dataclass becomes one flag, with its default and one line of
help."""

import argparse
import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rlhf.run.errors import did_you_mean, fail

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "off", "bf16", "fp16")
# The types of flags that take several values, with the type of one and its name in --help.
SEVERAL = {
    tuple[str, ...]: (str, "FILE"),
    tuple[int, ...]: (int, "N"),
    tuple[float, ...]: (float, "X"),
}
NOT_IN_FILE = ("resume", "overwrite")  # only the command line may ask for these
LARGEST = 2**32 - 1  # the largest whole number that a flag takes


def arg(
    default,
    help: str,
    choices: tuple[str, ...] | None = None,
    group: str | None = None,
    flag: bool = True,
    allow: str = "",
):
    """A field of a config: `lr: float = arg(1e-3, "peak learning rate")` becomes the flag --lr.

    A field of type tuple[str, ...], of int or of float takes several values.

    Args: choices: the allowed values; group: the heading in --help from this field on; flag: False
        for positional arguments; allow: "inf" or "negative", which a number is not otherwise.
    """
    about = {"help": help, "choices": choices, "group": group, "flag": flag, "allow": allow}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainConfig:
    """The flags that all training programs share. A script changes a default by naming a field
    again."""

    kind: ClassVar[str] = ""  # the name of the run's checkpoint: "sft", "reward", "ppo" or "dpo"

    data: str = arg("data/tiny_assistant", "data set folder", group="run")
    heldout: float = arg(0.1, "share of prompts held out if *_heldout.csv is missing")
    out: str = arg("runs", "folder for checkpoints and metrics")
    resume: bool = arg(False, "resume from the checkpoint in --out")
    overwrite: bool = arg(False, "replace the results of another run in --out")
    tensorboard: bool = arg(False, "also write the metrics for TensorBoard")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", DEVICES)
    amp: str = arg("off", "mixed precision; auto: bf16 on a GPU that has it", PRECISIONS)
    seed: int = arg(0, "random seed")
    steps: int = arg(1, "number of steps", group="optimisation")
    batch_size: int = arg(1, "rows per step")
    micro_batch_size: int = arg(0, "micro-batch size for gradient accumulation (0: off)")
    lr: float = arg(1e-3, "peak learning rate")
    warmup: int = arg(0, "steps of linear warm-up; unless given, at most half")
    max_grad_norm: float = arg(1.0, "gradient clipping norm")
    lora_rank: int = arg(0, "LoRA rank (0: train all weights)")
    lora_alpha: float = arg(16.0, "LoRA alpha: adapters are scaled by alpha / rank")
    eval_every: int = arg(1, "steps between evaluations and checkpoints")

    def __post_init__(self):
        check_numbers(type(self), vars(self))
        check_positive(self, "batch_size", "lr", "max_grad_norm", "eval_every")
        # train_sft.py writes the model of --init as it is in 0 steps.
        if self.kind != "sft" or not getattr(self, "init", ""):
            check_positive(self, "steps")
        if not 0 < self.heldout < 1:
            raise ValueError(f"--heldout is {self.heldout}: it must lie between 0 and 1")
        if not self.data or not self.out:
            raise ValueError("--data and --out must name a folder")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues a run and --overwrite replaces it; give one of them"
            )

    @classmethod
    def from_flags(cls, given: dict):
        """The config of the flags that were given. A short run without --warmup has less of it."""
        steps = given.get("steps", cls.steps)
        warmup = given.get("warmup", min(cls.warmup, steps // 2))
        if warmup and warmup >= steps:
            raise ValueError(
                f"--warmup {warmup} must be below --steps {steps}, or --lr is not reached"
            )
        return cls(**{**given, "warmup": warmup})

    def lock_file(self) -> Path:
        return Path(self.out) / ".lock"

    def checkpoint(self, name: str) -> Path:
        """The file named by the flag --sft or --reward or, without such a flag, OUT/name.pt."""
        named = getattr(self, name, "")
        return Path(named) if named else Path(self.out) / f"{name}.pt"


@dataclass(frozen=True)
class InitConfig(TrainConfig):
    """The flags of a program that may start from a pretrained model."""

    init: str = arg(
        "", "pretrained weights: gpt2, ..., a folder, a GGUF file, a name", group="pretrained model"
    )
    template: str = arg("auto", "chat template: auto (the model's), none or FILE.jinja")
    system: str = arg("", "system message of prompts that have none")
    load_in_4bit: bool = arg(False, "hold the weights of --init in 4 bits")
    base_dtype: str = arg("float32", "precision of frozen weights", ("float32", "bfloat16"))

    def __post_init__(self):
        super().__post_init__()
        if self.init and getattr(self, "sft", ""):
            raise ValueError("--sft and --init are two models to start from; give one of them")
        names = ["template", "system", "load_in_4bit", "base_dtype"]
        if self.kind == "sft":  # the other programs put adapters on the network of sft.pt
            names += ["lora_rank", "cut_vocab"]
        for name in names:
            if not self.init and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{flag_name(name)} needs --init")
        if self.lora_rank:
            return
        if self.load_in_4bit and self.steps:
            raise ValueError("--load-in-4bit needs --lora-rank to train anything")
        if self.base_dtype != "float32" and not self.load_in_4bit:
            raise ValueError(f"--base-dtype {self.base_dtype} needs --lora-rank or --load-in-4bit")


def described(cls: type) -> Iterator[tuple[dataclasses.Field, dict]]:
    """Each field of a config with its metadata. A field that only changes the default has the
    metadata of its base class."""
    for field in dataclasses.fields(cls):
        for base in cls.__mro__:
            inherited = getattr(base, "__dataclass_fields__", {}).get(field.name)
            if inherited is not None and inherited.metadata:
                yield field, inherited.metadata
                break


def parse_cli(cls: type, argv: list[str] | None = None):
    """Read the flags into a config of this class.

    --help shows every default. A bad flag or value is printed as one line, with exit status 2.
    Flags replace the settings of the file that --config names.
    """
    given = parse_words(cls, argv)
    if "config" in given:
        path = given["config"]
        settings = parse_words(cls, read_config(path), f"{path}: ")
        if "steps" in given:
            settings.pop("warmup", None)  # it may be too long for them
        given = settings | given
        del given["config"]
    try:
        check_numbers(cls, given)
        return cls.from_flags(given) if hasattr(cls, "from_flags") else cls(**given)
    except ValueError as error:
        fail(f"{error} (--help shows all flags)")


def parse_words(cls: type, words: list[str] | None, source: str = "") -> dict:
    """{name: value} of the flags that are given. source: where, at the beginning of an error."""
    parser = make_parser(cls, source)
    found, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0].partition("=")[0]
        flags = [flag_name(field.name) for field in dataclasses.fields(cls)]
        parser.error(f"unknown flag {word}{did_you_mean(word, flags)}")
    given = vars(found)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    return given


def read_config(path: str) -> list[str]:
    """The settings in a file of --config, {name: value} in JSON, as flags. Any other file ends the
    program with one line."""
    words = []
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name in NOT_IN_FILE:
                continue
            if isinstance(value, bool):
                words.append(flag_name(name if value else f"no_{name}"))
                continue
            if value is None:
                raise ValueError(f"{name} has no value")
            values = value if isinstance(value, list) else [value]
            if len(values) > 1 and not isinstance(values[0], str):  # of numbers, the last counts
                words += [flag_name(name), *map(str, values)]
            else:
                words += [f"{flag_name(name)}={one}" for one in values]
    except (OSError, ValueError, AttributeError) as error:
        fail(f"{path} is no file of settings, such as OUT/KIND.json: {error}")
    return words


def to_json(cfg) -> dict:
    """{name: value} of a config, as flags spell it: infinity is "inf", and None "none"."""
    words = {math.inf: "inf", None: "none"}
    values = {}
    for name, value in vars(cfg).items():
        if name not in NOT_IN_FILE:
            values[name] = words.get(value, value)
    return values


def make_parser(cls: type, source: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=cls.__doc__,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    # argparse's own error prints the usage first, which would hide the message.
    parser.error = lambda message: fail(f"{source}{message} (--help shows all flags)")
    types = typing.get_type_hints(cls)
    group = parser
    for field, about in described(cls):
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        add_flag(group, field, types[field.name], about)
    if issubclass(cls, TrainConfig):
        text = "settings of a run, such as OUT/KIND.json; flags replace them"
        group.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)
    group.add_argument("-h", "--help", action="help", help="show this page")
    return parser


def add_flag(group, field: dataclasses.Field, value_type: type, about: dict) -> None:
    """Add one field of a config to a group of the parser."""
    name = flag_name(field.name) if about["flag"] else field.name
    several = SEVERAL.get(value_type)
    default = " ".join(map(str, field.default)) if several else str(field.default)
    text = f"{about['help']} (default: {default})" if default else about["help"]
    options = {"help": text, "default": argparse.SUPPRESS}
    if several:
        options |= {"type": several[0], "metavar": several[1]}
        count = "+" if about["flag"] else "*"
        # Files of a flag that comes twice add up; of numbers, the last count.
        action = "extend" if several[0] is str else "store"
        group.add_argument(name, nargs=count, action=action, **options)
    elif value_type == float | None:
        group.add_argument(name, type=number_or_none, metavar="X", **options)
    elif value_type is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
    else:
        choices = about["choices"]
        metavar = None if choices else {float: "X", int: "N"}.get(value_type, "S")
        group.add_argument(name, type=value_type, choices=choices, metavar=metavar, **options)


def number_or_none(text: str) -> float | None:
    """The number; None for "none". Raises ValueError, which argparse prints."""
    return None if text == "none" else float(text)


# ---- numbers in their range ----


def check_numbers(cls: type, values: dict) -> None:
    """Raise ValueError if one of the values of a config of this class is no number for its flag."""
    for field, about in described(cls):
        value = values.get(field.name)
        for number in value if isinstance(value, tuple) else [value]:
            needed = unmet(number, about["allow"]) if isinstance(number, int | float) else ""
            if needed:
                raise ValueError(f"{flag_name(field.name)} is {number}: it must be {needed}")


def unmet(value: int | float, allow: str) -> str:
    """What a number must be to fit its flag, or "" if it fits. See `arg` for allow."""
    if allow == "inf":
        return "" if value > 0 else "above 0"
    if allow == "negative":
        return "" if math.isfinite(value) else "finite"
    if not 0 <= value < math.inf:
        return "0 or more, and finite"
    if isinstance(value, int) and value > LARGEST:  # would overflow in torch
        return f"at most {LARGEST}"
    return ""


def check_positive(config, *names: str) -> None:
    """Raise ValueError unless these fields are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{flag_name(name)} is {value}: it must be above 0, and finite")


def check_range(name: str, values: tuple[int, ...]) -> None:
    """Raise ValueError unless there is one value, or two in order, of 1 or more."""
    if not (len(values) in (1, 2) and 1 <= values[0] <= values[-1]):
        flag = flag_name(name)
        raise ValueError(f"{flag} takes one number from 1, or a smaller and a larger one")


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")
