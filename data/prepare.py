"""Make a data set of the files that people have: `python -m rlhf.tools.prepare`.

The files may be JSON lines, JSON, CSV with any separator, parquet or lines of text, also packed by
gzip; data/formats.py knows their shapes. What they lack is taken from what they have: the better
responses become demonstrations, and all prompts are PPO's. About a tenth of the prompts is held
out, by a hash, so the same prompt is on the same side in every file and every run.
"""

import json
import math
import os
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from data.bpe import train_bpe, vocabulary_size, write_ranks
from data.formats import Row, plain_name, read_file
from data.tables import (
    DEFAULT,
    TABLES,
    Sizes,
    Split,
    Table,
    choose_sizes,
    make_tables,
    side_of,
    training_texts,
    write_tables,
)
from rlhf.networks.gpt2 import is_gpt2
from rlhf.run.commands import command
from rlhf.run.errors import InputError
from rlhf.run.files import check_file, csv_path, digests
from rlhf.run.flags import arg, check_positive
from rlhf.run.loading import BUNDLED
from rlhf.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = "tokenizer.tiktoken"

# For each stage: what it reads, rows per step, epochs (of a pretrained model), the fewest and the
# most steps. Few rows are read more often and many in part, so that a laptop takes minutes.
STEPS = {
    "sft": ("demonstrations.csv", 32, (6, 2), (60, 600)),
    "reward": ("comparisons.csv", 64, (4, 1), (40, 400)),
}
PRETRAINED_FLAGS = {  # of docs/models.md
    "sft": " --lora-rank 16 --lr 5e-4 --micro-batch-size 8",
    "reward": " --lora-rank 16 --lr 5e-4 --weight-decay 0 --micro-batch-size 4",
    "ppo": " --lora-rank 16 --lr 1e-4 --value-network shared --micro-batch-size 8",
}


@dataclass(frozen=True)
class PrepareConfig:
    """Make a data set of JSON, CSV, parquet or text files, and print how to train on it."""

    files: tuple[str, ...] = arg((), ".jsonl .json .csv .tsv .parquet .txt, or .gz", flag=False)
    out: str = arg("", "folder for the data set")
    overwrite: bool = arg(False, "replace the data set in --out")
    test: tuple[str, ...] = arg((), "more files, whose prompts are all held out")
    heldout: float = arg(0.1, "share of the other prompts that is held out")
    block_size: int = arg(512, "drop rows of more tokens")
    init: str = arg("", "pretrained model to train later, with its tokenizer")
    tokenizer: str = arg("own", "own (trained here), gpt2 or FILE.tiktoken")
    prompt: str = arg("", "column of the prompt", group="columns")
    response: str = arg("", "column of the response")
    chosen: str = arg("", "column of the better response")
    rejected: str = arg("", "column of the worse response")
    ranked: str = arg("", 'columns of responses, "worst,middle,best"')

    def __post_init__(self):
        check_positive(self, "block_size")
        if not (0 < self.heldout < 1 or self.heldout == 0 and self.test):
            raise ValueError(
                f"--heldout is {self.heldout}: it must lie between 0 and 1; 0 needs --test FILE"
            )
        if not self.files or not self.out:
            raise ValueError("give one or more files, and --out FOLDER")
        names = list(self.named().values())
        if len(set(names)) < len(names):
            raise ValueError("two of --prompt, --response, --chosen, --rejected name one column")

    def named(self) -> dict[str, str]:
        """{role: name of its column} of the flags that are given."""
        roles = ("prompt", "response", "chosen", "rejected", "ranked")
        return {role: getattr(self, role) for role in roles if getattr(self, role)}


def main(cfg: PrepareConfig) -> None:
    out = Path(cfg.out)
    if out.is_dir() and any(out.iterdir()) and not cfg.overwrite:
        raise InputError(f"--out {out} holds files; --overwrite replaces a data set there")
    if any(Path(file).resolve().parent == out.resolve() for file in (*cfg.files, *cfg.test)):
        raise InputError(f"--out {out} is the folder of a file that is read; give another one")
    about, rows, test, dropped = read_files(cfg)
    tables = make_tables(rows + test, dropped)
    split = Split(cfg.heldout, frozenset(side_of((row.prompt,)) for row in test))

    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        counts, flags = write_data_set(cfg, tables, split, about, dropped)
    except InputError:
        if not existed:
            out.rmdir()
        raise
    for name, count in [*counts.items(), *(+dropped).items()]:  # + leaves out zeros
        print(f"{name}: {count:,} rows")
    print_commands(cfg.out, counts, flags)


def write_data_set(
    cfg: PrepareConfig,
    tables: dict[str, Table],
    split: Split,
    about: dict[str, str],
    dropped: Counter,
) -> tuple[dict[str, int], dict[str, str]]:
    """Write all files of the data set, or none. Returns: counts of rows; flags of the stages.

    Args: about: what each file was taken for; dropped: gets the count of rows that do not fit.
    """
    with tempfile.TemporaryDirectory(dir=cfg.out) as name:
        folder = Path(name)
        tokenizer = make_tokenizer(cfg, tables, split, folder)
        fitting, sizes = choose_sizes(tables, tokenizer, cfg.block_size, dropped)
        counts = write_tables(fitting, split, folder)
        flags = choose_flags(cfg.init, counts, sizes)
        record = {
            "sha256": digests(**{file: Path(file) for file in (*cfg.files, *cfg.test)}),
            "taken for": about,
            "rows": counts,
            "dropped": +dropped,
            "flags": flags,
            "options": asdict(cfg),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (folder / "prepare.json").write_text(text, encoding="utf-8")
        move_files(folder, Path(cfg.out))
    return counts, flags


def read_files(cfg: PrepareConfig) -> tuple[dict[str, str], list[Row], list[Row], Counter]:
    """What each file was taken for, the rows of the files, those of --test, and counts of dropped
    ones.

    Raises InputError if a column that is named is used in no file.
    """
    named = cfg.named()
    about = {}
    rows = []
    test = []
    dropped = Counter()
    used = set()
    for file in (*cfg.files, *cfg.test):
        source = read_file(Path(file), named)
        print(f"{file}: {source.about}")
        about[file] = source.about
        if file in cfg.test:
            test += source.rows
        else:
            rows += source.rows
        dropped += source.dropped
        used |= set(map(plain_name, source.columns))
    for names in named.values():
        for name in names.split(","):  # --ranked names several
            if plain_name(name) not in used:
                raise InputError(f"no file has a column {name.strip()!r} that is used, see above")
    return about, rows, test, dropped


def move_files(folder: Path, out: Path) -> None:
    """Replace the data set in `out` by that in `folder`."""
    for name in TABLES:
        csv_path(out, name).unlink(missing_ok=True)
        csv_path(out, name, heldout=True).unlink(missing_ok=True)
    (out / TOKENIZER).unlink(missing_ok=True)
    for path in folder.iterdir():
        os.replace(path, out / path.name)


# ---- tokens ----


def make_tokenizer(
    cfg: PrepareConfig, tables: dict[str, Table], split: Split, folder: Path
) -> Tokenizer:
    """The tokenizer of the later runs. If it is not a pretrained model's, its file is written."""
    if cfg.init and not is_gpt2(cfg.init):
        from rlhf.networks.hf import HFTokenizer

        return HFTokenizer(cfg.init)  # train_sft.py has the same --template by default
    if cfg.init or cfg.tokenizer == "gpt2":
        return load_tokenizer("gpt2")
    path = folder / TOKENIZER
    if cfg.tokenizer != "own":
        shutil.copyfile(check_file(Path(cfg.tokenizer)), path)
    elif "demonstrations" not in tables:
        shutil.copyfile(BUNDLED / TOKENIZER, path)  # the policy will start from the bundled set
    else:
        texts = training_texts(tables, split)
        size = vocabulary_size(texts)
        print(f"training a tokenizer of {size:,} tokens on {len(texts):,} texts", flush=True)
        write_ranks(train_bpe(texts, size - 2), path)  # end-of-text and pad come on top
    return load_tokenizer(str(path))


# ---- the next commands ----


def choose_flags(init: str, counts: dict[str, int], sizes: Sizes) -> dict[str, str]:
    """{"sft", "reward", "ppo": flags that fit the data}, without the stages that lack data."""
    flags = {
        "sft": f"--block-size {sizes.block_size}",
        "reward": "",
        "ppo": f"--max-new-tokens {sizes.max_new_tokens}",
    }
    if init:
        flags["sft"] = f"--init {shlex.quote(init)}"
        flags = {stage: flags[stage] + PRETRAINED_FLAGS[stage] for stage in flags}
    for stage, (table, batch_size, epochs, (fewest, most)) in STEPS.items():
        if table in counts:
            count = math.ceil(epochs[bool(init)] * counts[table] / batch_size)
            flags[stage] += f" --steps {min(most, max(fewest, count))}"
    # As many PPO steps as take as long as the default's, with its rows of 80 tokens.
    count = math.ceil(224 * DEFAULT.block_size / sizes.block_size)
    flags["ppo"] += f" --steps {min(224, max(40, count))}"
    return {stage: text.strip() for stage, text in flags.items() if text}


def print_commands(data: str, counts: dict[str, int], flags: dict[str, str]) -> None:
    """The commands that train on the data set. A stage whose file is missing gets a substitute."""
    print(f"\nwrote {data}; next:\n")
    runs = f"--out {shlex.quote(f'runs/{Path(data).resolve().name}')}"
    where = dict.fromkeys(flags, f"--data {shlex.quote(data)} {runs}")
    if "demonstrations.csv" not in counts:
        where["sft"] = runs
        print("    # first a policy: of the bundled data set or, by --init MODEL, another one")
    if "comparisons.csv" not in counts:
        where["ppo"] += " --reward FILE.py"
        print("    # PPO needs comparisons, votes or, as here, a reward function: docs/data.md")
    for stage, text in flags.items():
        print(f"    {command(stage)} {where[stage]} {text}")
