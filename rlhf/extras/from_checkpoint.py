"""What a checkpoint names besides weights: the tokenizer and the judge, for programs that open one."""

from pathlib import Path
from types import ModuleType

from rlhf.extras import hf
from rlhf.support.checkpoints import check_tokenizer
from rlhf.support.cli import InputError
from rlhf.support.judge import load_judge
from rlhf.tokenizer import Tokenizer, find_tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "data" / "tiny_assistant"


def tokenizer_of(path: Path, checkpoint: dict, folder: str) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: its model's own, the data set's or, failing that, the one it
    names."""
    config, name = checkpoint["model_config"], checkpoint["tokenizer_name"]
    tokenizer = (hf.HFTokenizer(config["init"], config["kept"]) if "init" in config
                 else find_tokenizer(folder, "auto" if (Path(folder) / "tokenizer.tiktoken").is_file() else name))
    if checkpoint["tokenizer"] != tokenizer.fingerprint and "init" not in config:
        tokenizer = find_tokenizer(folder, name)
    check_tokenizer(path, checkpoint, tokenizer)
    return tokenizer


def judge_of(given: str, named: str, needed: bool = True) -> ModuleType | None:
    """The judge of the folder given with --data or, without the flag, of the folder that a checkpoint names. That one
    has to be the bundled data set: a checkpoint must not decide which code runs.

    If it is another one and has a judge, raises InputError or, if a judge is not needed, says so and returns None.
    """
    path = Path(named) / "judge.py"
    if not given and path.is_file() and path.resolve().parent != BUNDLED:
        text = f"{path} is code that only the checkpoint names; give --data {named} to run it"
        if needed:
            raise InputError(text)
        print(f"going on without gold: {text}")
        return None
    return load_judge(given or named)
