"""Flags: what they are read into, which are rejected, and the help page."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from docs.experiments.train_dpo import DPOConfig
from rlhf.run.flags import (
    TrainConfig,
    arg,
    check_positive,
    described,
    parse_cli,
    to_json,
)
from rlhf.tools.sample import SampleConfig
from train_ppo import PPOConfig
from train_reward import RewardConfig
from train_sft import SFTConfig


@dataclass(frozen=True)
class Config:
    """A config."""

    lr: float = arg(0.5, "the rate", group="optimisation")
    steps: int = arg(9, "the steps")
    resume: bool = arg(False, "go on", group="run")
    amp: str = arg("off", "precision", ("off", "bf16"))
    block_size: int = arg(8, "context")
    files: tuple[str, ...] = arg(("a", "b"), "some files")
    init: str = arg("", "where to start")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("--steps must be at least 1")


@dataclass(frozen=True)
class Derived(Config):
    """Another config."""

    steps: int = 20
    rank: int = arg(4, "the rank")


def help_page(cls, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(cls, ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def groups(page):
    """{heading: lines of flags below it}"""
    found, heading = {}, None
    for line in page.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line.rstrip(":")
            found[heading] = []
        elif line.startswith("  -"):
            found[heading].append(line.strip())
    return found


# ---- flags ----


def test_parse_cli_without_flags_gives_the_defaults():
    assert parse_cli(Config, []) == Config()


def test_parse_cli_reads_flags_into_the_config():
    got = parse_cli(Config, ["--lr", "1e-3", "--resume", "--amp", "bf16", "--block-size", "4"])
    assert got == Config(lr=1e-3, resume=True, amp="bf16", block_size=4)


def test_parse_cli_collects_repeated_flags_of_several_values():
    got = parse_cli(Config, ["--files", "c", "d", "--lr", "0.5", "--files", "e"])
    assert got == Config(files=("c", "d", "e"))


def test_parse_cli_reads_values_without_a_flag():
    @dataclass(frozen=True)
    class Folders:
        """Values without a flag."""

        names: tuple[str, ...] = arg(("runs",), "folders", flag=False)
        out: str = arg("x.png", "figure")

    assert parse_cli(Folders, []) == Folders()
    got = parse_cli(Folders, ["a", "b", "--out", "y.png"])
    assert got == Folders(names=("a", "b"), out="y.png")


def test_parse_cli_reads_choices_in_the_type_of_the_field():
    @dataclass(frozen=True)
    class Bits:
        """Choices of numbers."""

        bits: int = arg(8, "bits of a weight", (4, 8))

    assert parse_cli(Bits, ["--bits", "4"]) == Bits(bits=4)


@pytest.mark.parametrize(
    "argv",
    [
        ["--stepz", "3"],
        ["--steps", "many"],
        ["--steps", "0"],
        ["--steps", "9" * 5000],
        ["--amp", "fp8"],
        ["--step", "3"],
        ["--lr", "much"],
    ],
)
def test_parse_cli_rejects_impossible_flags_with_one_line_and_status_2(argv, capsys):
    """An unknown flag, a value of the wrong type, a value out of range, a number of 5,000 digits,
    an abbreviation."""
    with pytest.raises(SystemExit) as stop:
        parse_cli(Config, argv)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in shown
    assert shown.startswith("error: ") and shown.count("\n") == 1 and len(shown) < 700


@pytest.mark.parametrize("value", [0, -1])
def test_check_positive_rejects_zero_and_negative_numbers(value):
    check_positive(Config(lr=1e-9), "lr")
    with pytest.raises(ValueError, match="--lr is .*: it must be above 0"):
        check_positive(Config(lr=value), "lr")


def test_score_may_be_negative_or_none():
    cases = {"-7": -7.0, "none": None, "-0.5": -0.5, "2": 2.0}
    for text, value in cases.items():
        assert parse_cli(PPOConfig, ["--missing-eos-score", text]).missing_eos_score == value


def number_flags(cls):
    """Each flag of a config that takes a number."""
    kinds = {tuple[int, ...]: int, tuple[float, ...]: float, float | None: float}
    for field, _ in described(cls):
        kind = kinds.get(field.type, field.type)
        if kind in (int, float):
            yield "--" + field.name.replace("_", "-"), field.type, kind


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig, DPOConfig, SampleConfig])
def test_every_flag_refuses_numbers_beyond_its_range_with_one_line(cls, capsys):
    """A whole number of 64 bits or more overflows in torch; no flag takes NaN."""
    assert len(list(number_flags(cls))) >= 4
    for flag, field_type, kind in number_flags(cls):
        for value in ("18446744073709551616", "99999999999999999999", "-1", "nan", "inf", "-inf"):
            if value == "-1" and field_type == float | None:
                continue
            if value[0] in "19" and kind is float:
                continue
            with pytest.raises(SystemExit) as stop:
                parse_cli(cls, [flag, value])
            shown = capsys.readouterr().err
            assert stop.value.code == 2 and flag in shown and shown.count("\n") == 1
            assert shown.startswith("error: ")


# ---- words that are no flags ----


@pytest.mark.parametrize(
    ("cls", "argv", "message"),
    [
        (PPOConfig, ["--kl_coef", "0.1"], "unknown flag --kl_coef; did you mean --kl-coef?"),
        (PPOConfig, ["--kl_coef=0.1"], "unknown flag --kl_coef; did you mean --kl-coef?"),
        (SampleConfig, ["--temprature", "2"], "unknown flag --temprature; did you mean --temp"),
        (SFTConfig, ["--quantum", "2"], "unknown flag --quantum (--help"),
        (SampleConfig, ["--prompt", "Hello", "there"], "unknown flag there (--help"),
    ],
)
def test_unknown_flag_names_the_nearest(cls, argv, message, capsys):
    """The last one lacks quotation marks."""
    with pytest.raises(SystemExit) as stop:
        parse_cli(cls, argv)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith(f"error: {message}")
    assert shown.endswith("(--help shows all flags)\n") and shown.count("\n") == 1


# ---- --config ----


def config_file(folder, content):
    path = folder / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_config_gives_back_the_settings_that_to_json_wrote(tmp_path):
    """Numbers with an exponent, infinity, text that begins with a dash, several values."""
    cfg = RewardConfig(lr=1e-20, out="-x y", comparison_files=("a b", "c"))
    assert parse_cli(RewardConfig, ["--config", config_file(tmp_path, to_json(cfg))]) == cfg
    cfg = PPOConfig(missing_eos_score=None, reward=("r.pt", "x.py:f"), reward_weights=(0.5, 2.0))
    assert parse_cli(PPOConfig, ["--config", config_file(tmp_path, to_json(cfg))]) == cfg
    cfg = PPOConfig(
        missing_eos_score=-1e-20,
        max_new_tokens=(3, 9),
        tensorboard=True,
        steps=3,
        warmup=1,
    )
    assert parse_cli(PPOConfig, ["--config", config_file(tmp_path, to_json(cfg))]) == cfg


def test_to_json_is_standard_json():
    """With the names and values of the config."""
    settings = json.loads(json.dumps(to_json(PPOConfig()), allow_nan=False))
    assert settings["missing_eos_score"] == -3.0 and settings["reward"] == []
    assert not {"config", "resume", "overwrite"} & settings.keys()
    assert settings["changed"] == []


def test_to_json_names_the_settings_that_differ_from_the_defaults():
    """PPO's own default of --lr is no change; --resume is not in the file."""
    cfg = PPOConfig(lr=4e-4, seed=3, max_new_tokens=(3, 9), resume=True)
    assert to_json(cfg)["changed"] == ["seed", "max_new_tokens"]


def test_flags_replace_the_settings_of_the_file(tmp_path):
    """Several values are replaced as a whole; what neither names keeps its default."""
    content = {"lr": 0.5, "seed": 7, "tensorboard": True, "comparison_files": ["a", "b"]}
    flags = ["--lr", "0.25", "--no-tensorboard", "--comparison-files", "c"]
    got = parse_cli(RewardConfig, [*flags, "--config", config_file(tmp_path, content)])
    assert got == RewardConfig(lr=0.25, seed=7, comparison_files=("c",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kl_coeff": 0.1}, "my.json: unknown flag --kl-coeff; did you mean --kl-coef?"),
        ({"steps": "many"}, "my.json: argument --steps: invalid whole_number value: 'many'"),
        ({"steps": 2.5}, "my.json: argument --steps: invalid whole_number value: '2.5'"),
        ({"steps": True}, "my.json: argument --steps: expected one argument"),
        ({"tensorboard": "yes"}, "my.json: argument --tensorboard"),
        ({"advantage": "a2c"}, "my.json: argument --advantage: invalid choice: 'a2c'"),
        ({"kl_coef": -1}, "argument --kl-coef: -1.0 does not lie from 0 to 1e+38"),
        ({"kl_coef": None}, "argument --kl-coef: invalid number value: 'None'"),
        ("[1]", "my.json is no file of settings"),
        ("{", "my.json is no file of settings"),
    ],
)
def test_config_refuses_what_is_no_setting_with_one_line(tmp_path, content, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(PPOConfig, ["--config", config_file(tmp_path, content)])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1
    assert message in shown


def test_config_names_a_file_that_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(PPOConfig, ["--config", str(tmp_path / "gone.json")])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and f"{tmp_path}/gone.json is no file of settings" in shown


def test_only_training_programs_have_config(capsys):
    assert "--config" in help_page(DPOConfig, capsys)
    assert "--config" not in help_page(SampleConfig, capsys)


# ---- the help page ----


def test_help_shows_defaults(capsys):
    page = help_page(Config, capsys)
    assert "the rate (default: 0.5)" in page
    assert "some files (default: a b)" in page
    assert "--no-resume" in page


def test_help_shows_no_default_if_it_is_empty(capsys):
    line = next(line for line in help_page(Config, capsys).splitlines() if "--init" in line)
    assert line.endswith("where to start")


def test_help_has_a_heading_for_each_group_and_a_line_for_each_flag(capsys):
    """A group lasts until the next field that names one."""
    found = groups(help_page(Config, capsys))
    assert [line.split()[0] for line in found["optimisation"]] == ["--lr", "--steps"]
    assert [line.split()[0].rstrip(",") for line in found["run"]] == [
        "--resume",
        "--amp",
        "--block-size",
        "--files",
        "--init",
    ]


def test_help_of_a_field_with_another_default_is_that_of_the_base(capsys):
    """Derived names steps again without help. It keeps the help and the group of Config and shows
    its own default."""
    found = groups(help_page(Derived, capsys))
    assert [line.split()[0] for line in found["optimisation"]] == ["--lr", "--steps"]
    assert found["optimisation"][1].endswith("the steps (default: 20)")
    assert parse_cli(Derived, []).steps == 20


def test_help_is_110_columns_wide_in_any_terminal(capsys, monkeypatch):
    @dataclass(frozen=True)
    class Long:
        """A config."""

        rate: int = arg(1, "word " * 100)

    monkeypatch.setenv("COLUMNS", "40")
    assert 100 < max(map(len, help_page(Long, capsys).splitlines())) <= 110


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_help_of_a_script_is_short(cls, capsys):
    """At most 60 lines of at most 110 columns. The help of a flag is on one line."""
    lines = help_page(cls, capsys).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 110
    for field, about in described(cls):
        assert sum(about["help"] in line for line in lines) == 1, field.name


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_help_of_a_script_has_every_flag_once_under_the_groups_of_train_config(cls, capsys):
    found = groups(help_page(cls, capsys))
    flags = [line.split()[0].rstrip(",") for lines in found.values() for line in lines]
    names = [field.name.replace("_", "-") for field, _ in described(cls)]
    assert sorted(flags) == sorted(["-h", *[f"--{name}" for name in names]])
    shared = {"run": ["--data", "--seed"], "optimisation": ["--steps", "--lr", "--eval-every"]}
    for heading, names in shared.items():
        assert set(names) <= {line.split()[0] for line in found[heading]}


def test_help_of_a_script_shows_its_own_default_with_the_help_of_train_config(capsys):
    """SFTConfig gives steps another default and no help."""
    lines = help_page(SFTConfig, capsys).splitlines()
    line = next(line for line in lines if line.startswith("  --steps"))
    help_of_base = TrainConfig.__dataclass_fields__["steps"].metadata["help"]
    assert not SFTConfig.__dataclass_fields__["steps"].metadata
    assert TrainConfig().steps != SFTConfig().steps
    assert line.endswith(f"{help_of_base} (default: {SFTConfig().steps})")


# ---- TrainConfig ----


def test_train_config_rejects_resume_with_overwrite():
    with pytest.raises(ValueError, match="give one of them"):
        TrainConfig(resume=True, overwrite=True)


def test_checkpoint_is_the_file_of_its_flag_or_in_out():
    assert PPOConfig(out="x").checkpoint("sft") == Path("x/sft.pt")
    assert PPOConfig(out="x", sft="y/z.pt").checkpoint("sft") == Path("y/z.pt")
    assert PPOConfig(out="x").checkpoint(PPOConfig.kind) == Path("x/ppo.pt")


@pytest.mark.parametrize(
    ("cls", "kind"), [(SFTConfig, "sft"), (RewardConfig, "reward"), (PPOConfig, "ppo")]
)
def test_kind_is_no_flag(cls, kind):
    assert cls.kind == kind
    assert "kind" not in [field.name for field, _ in described(cls)]
