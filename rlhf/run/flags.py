"""Flags: each field of a frozen dataclass becomes one flag, with its default and one line of
help."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rlhf.run.errors import did_you_mean, fail

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "off", "bf16", "fp16")
NOT_IN_FILE = ("config", "resume", "overwrite")  # only the command line may ask for these


def arg(
    default,
    help: str,
    choices: tuple[str, ...] | None = None,
    group: str | None = None,
    flag: bool = True,
):
    """A field of a config: `lr: float = arg(1e-3, "peak learning rate")` becomes the flag --lr.

    A field of a type in READERS takes one value, and a tuple of such a type several. A bool becomes
    --NAME and --no-NAME.

    Args: choices: the allowed values; group: the heading in --help from this field on; flag: False
        for positional arguments.
    """
    about = {"help": help, "choices": choices, "group": group, "flag": flag}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainConfig:
    """The flags that all training programs share. A script changes a default by naming a field
    again."""

    kind: ClassVar[str] = ""  # the name of the run's checkpoint: "sft", "reward", "ppo" or "dpo"

    config: str = arg("", "settings of a run, as in OUT/KIND.json; flags replace them", group="run")
    data: str = arg("data/tiny_assistant", "data set folder")
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
    warmup: int = arg(0, "steps of linear warm-up, at most two thirds of --steps")
    max_grad_norm: float = arg(1.0, "gradient clipping norm")
    lora_rank: int = arg(0, "LoRA rank (0: train all weights)")
    lora_alpha: float = arg(16.0, "LoRA alpha: adapters are scaled by alpha / rank")
    log_every: int = arg(1, "steps between lines of metrics")
    eval_every: int = arg(1, "steps between evaluations and checkpoints")

    def __post_init__(self):
        check_positive(self, "batch_size", "lr", "max_grad_norm", "log_every", "eval_every")
        if self.kind != "sft":  # train_sft.py writes the model as it is in 0 steps
            check_positive(self, "steps")
        if not 0 < self.heldout < 1:
            raise ValueError(f"--heldout is {self.heldout}: it must lie between 0 and 1")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues a run and --overwrite replaces it; give one of them"
            )

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
        about = field.metadata
        bases = iter(cls.__mro__)
        while not about:
            about = next(bases).__dataclass_fields__[field.name].metadata
        yield field, about


def parse_cli(cls: type, argv: list[str] | None = None):
    """Read the flags into a config of this class.

    --help shows every default. A bad flag or value is printed as one line, with exit status 2.
    Flags replace the settings of the file that --config names.
    """
    given = parse_words(cls, argv)
    path = given.pop("config", "")
    if path:
        given = parse_words(cls, read_config(path), f"{path}: ") | given
    try:
        return cls(**given)
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
    given = {}
    for name, value in vars(found).items():
        given[name] = tuple(value) if isinstance(value, list) else value
    return given


def to_json(cfg) -> dict:
    """{name: value} of a config, as `read_config` reads them, and under "changed" the names of
    those that differ from the defaults."""
    settings = {name: value for name, value in vars(cfg).items() if name not in NOT_IN_FILE}
    changed = [name for name in settings if settings[name] != getattr(type(cfg), name)]
    return {"changed": changed, **settings}


def read_config(path: str) -> list[str]:
    """The settings in a file of --config, {name: value} in JSON, as flags. Any other file ends the
    program with one line."""
    words = []
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name == "changed":
                continue
            if isinstance(value, bool):
                words.append(flag_name(name if value else f"no_{name}"))
            elif not isinstance(value, list):
                words.append(f"{flag_name(name)}={value}")
            elif value:
                words += [flag_name(name), *map(str, value)]
    except (OSError, ValueError, AttributeError) as error:
        fail(f"{path} is no file of settings, such as OUT/KIND.json: {error}")
    return words


def make_parser(cls: type, source: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=cls.__doc__,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
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
    return parser


def add_flag(group, field: dataclasses.Field, value_type: type, about: dict) -> None:
    """Add one field of a config to a group of the parser."""
    name = flag_name(field.name) if about["flag"] else field.name
    several = typing.get_origin(value_type) is tuple
    default = " ".join(map(str, field.default)) if several else str(field.default)
    text = f"{about['help']} (default: {default})" if default else about["help"]
    options = {"help": text, "default": argparse.SUPPRESS}
    if value_type is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        return
    one_type = typing.get_args(value_type)[0] if several else value_type
    options["type"], metavar = READERS[one_type]
    if several:
        options["nargs"] = "+" if about["flag"] else "*"
        # Files of a flag that comes twice add up; of numbers, the last count.
        options["action"] = "extend" if one_type is str else "store"
    elif not about["flag"]:
        options["nargs"] = "?"  # the default stands for it
    choices = about["choices"]
    group.add_argument(name, choices=choices, metavar=None if choices else metavar, **options)


# ---- numbers in their range ----


def whole_number(text: str) -> int:
    return in_range(int(text), 0, 2**32 - 1)  # more overflows in torch


def number(text: str) -> float:
    return in_range(float(text), 0, LARGEST)


def number_or_none(text: str) -> float | None:
    """None for "none". The number may be negative."""
    return None if text.lower() == "none" else in_range(float(text), -LARGEST, LARGEST)


def in_range(value: float, least: float, most: float) -> float:
    """The value. Raises argparse.ArgumentTypeError if it does not lie from least to most."""
    if not least <= value <= most:  # or if it is NaN
        raise argparse.ArgumentTypeError(f"{value} does not lie from {least} to {most}")
    return value


LARGEST = 1e38  # about the largest number in float32
# How the value of a flag is read, and its name in --help.
READERS = {
    str: (str, "S"),
    int: (whole_number, "N"),
    float: (number, "X"),
    float | None: (number_or_none, "X"),
}


def check_positive(config, *names: str) -> None:
    """Raise ValueError unless these fields are above 0."""
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{flag_name(name)} is {value}: it must be above 0")


def check_range(name: str, values: tuple[int, ...]) -> None:
    """Raise ValueError unless there is one value, or two in order, of 1 or more."""
    if not (len(values) in (1, 2) and 1 <= values[0] <= values[-1]):
        raise ValueError(
            f"{flag_name(name)} takes one number from 1, or a smaller and a larger one"
        )


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")
