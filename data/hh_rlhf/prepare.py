"""Make a data set of Anthropic's HH-RLHF (Bai et al. 2022): fetch a subset, and read it as
rlhf.tools.prepare reads any file of preference pairs.

    python data/hh_rlhf/prepare.py                   # harmless-base, into its folder here
    python data/hh_rlhf/prepare.py --source DIR      # from train.jsonl.gz and test.jsonl.gz
                                                     # (or .jsonl, or one of them) in DIR

A line of the set is {"chosen": dialogue, "rejected": dialogue}, two dialogues that differ in their
last reply. README.md here has the rules, and how to train on the result.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # where rlhf/ is
from data.download import fetch
from rlhf.run.errors import InputError
from rlhf.run.flags import arg
from rlhf.run.program import run
from data import prepare

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}/{split}.jsonl.gz"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class HHConfig:
    """Make prompts, demonstrations and comparisons of Anthropic's HH-RLHF."""

    subset: str = arg("harmless-base", "which part to download", SUBSETS)
    source: str = arg(
        "", "folder with train and test as .jsonl.gz or .jsonl, instead of a download"
    )
    out: str = arg("", "folder to write to; empty: one of the subset's name, here")
    overwrite: bool = arg(False, "replace the data set in --out")
    block_size: int = arg(512, "drop rows of more tokens")
    tokenizer: str = arg("gpt2", "gpt2, or own: one trained on the training side", ("gpt2", "own"))

    def settings(self, files: list[str]) -> prepare.PrepareConfig:
        return prepare.PrepareConfig(
            files=tuple(files),
            out=self.out or str(HERE / self.subset),
            overwrite=self.overwrite,
            block_size=self.block_size,
            tokenizer=self.tokenizer,
        )


def find_files(cfg: HHConfig) -> list[str]:
    """The files of the set: those of --source, or downloaded ones."""
    if not cfg.source:
        folder = HERE / "downloads" / cfg.subset
        urls = [URL.format(subset=cfg.subset, split=split) for split in SPLITS]
        return [str(fetch(url, folder)) for url in urls]
    found = []
    for split in SPLITS:
        paths = [Path(cfg.source) / f"{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl")]
        found += [str(path) for path in paths if path.is_file()][:1]
    if not found:
        raise InputError(f"--source {cfg.source} holds no train or test, as .jsonl.gz or .jsonl")
    return found


def main(cfg: HHConfig) -> None:
    prepare.main(cfg.settings(find_files(cfg)))


if __name__ == "__main__":
    run(main, HHConfig)
