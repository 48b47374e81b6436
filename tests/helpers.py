"""What several tests use: numbers, noise, a small tokenizer, the small data set, the three
scripts."""

import contextlib
import csv
import io
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.networks.export import published_config, published_weights
from rlhf.run import program
from rlhf.run.device import Compute
from rlhf.run.files import digests
from rlhf.run.loading import find_tokenizer
from rlhf.run.training import Training

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "data" / "tiny_assistant"
# What may stand in a pad and must reach neither a loss nor a gradient.
POISON = [math.nan, math.inf, -math.inf, 1e6]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CPU = Compute(torch.device("cpu"), None, torch.amp.GradScaler("cpu", enabled=False))


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def noisy(module, seed=0):
    """Replace every weight by noise, so that zero heads and near-zero attention hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
            )
    return module


def some_prompts(count, width):
    """Random tokens of a vocabulary of 11."""
    return torch.randint(11, (count, width), generator=torch.Generator().manual_seed(0))


def lora(rank, alpha=16.0):
    """The flags that say which adapters a network gets."""
    return SimpleNamespace(lora_rank=rank, lora_alpha=alpha, steps=1)


class Digits:
    """A tokenizer whose tokens are numbers: decode([1, 2]) is "12". Enough for what only needs
    ids."""

    name, fingerprint, pad_id = "digits", "abc", 0

    def __init__(self, eos_id=10):
        self.eos_id = eos_id
        self.stop_ids = (eos_id,)

    @staticmethod
    def decode(ids):
        return "".join(map(str, ids))


def rows(path):
    """A CSV as a list of dicts."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def real_data(name):
    """A file or folder of other people's data, in the folder that RLHF_TEST_DATA names. Skips the
    test if it is not there."""
    path = Path(os.environ.get("RLHF_TEST_DATA", "")) / name
    if "RLHF_TEST_DATA" not in os.environ or not path.exists():
        pytest.skip(f"needs {name}: set RLHF_TEST_DATA to a folder that holds it")
    return path


def save_gpt2(gpt, folder, eos_id):
    """Write a GPT as a folder of GPT-2's published format, without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"transformer.{name}": x for name, x in published_weights(gpt).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    config = {**published_config(gpt.config), "eos_token_id": eos_id}
    (folder / "config.json").write_text(json.dumps(config))


def copy_some_rows(folder):
    """Write the first 40 rows of each file of the bundled data set, its tokenizer and its judge
    into a new folder."""
    folder.mkdir()
    for path in BUNDLED.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            first_rows = list(csv.reader(file))[:41]
        with (folder / path.name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(first_rows)
    for name in ("tokenizer.tiktoken", "judge.py"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    return folder


def change_sft(source, folder, change):
    """Write sft.pt of the folder `source`, changed, and its reward.pt, as if that had been trained
    from it."""
    sft = torch.load(source / "sft.pt", weights_only=True)
    change(sft["model"])
    torch.save(sft, folder / "sft.pt")
    reward = torch.load(source / "reward.pt", weights_only=True)
    reward["inputs"] |= digests(sft=folder / "sft.pt")
    torch.save(reward, folder / "reward.pt")


def end_earlier(source, folder, data):
    """change_sft, with 5 added to the logit of end-of-text. So little trained, the model hardly
    ever says it, and all scores are equal."""

    def change(weights):
        eos = weights["wte.weight"][find_tokenizer(str(data)).eos_id]
        weights["ln_f.bias"] = 5 * eos / eos.square().sum()

    change_sft(source, folder, change)


@contextlib.contextmanager
def stopped_by_its_first_checkpoint():
    """What runs inside is interrupted after it has saved for the first time."""
    save = Training.save

    def save_and_stop(run, step, **state):
        save(run, step, **state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "save", save_and_stop)
        yield


# ---- the three scripts ----

TINY = {
    "sft": "--n-layer 2 --n-head 2 --n-embd 16 --steps 8 --eval-every 4 --log-every 1 "
    "--batch-size 8",
    "reward": "--steps 6 --batch-size 8 --eval-every 3 --log-every 1",
    "ppo": "--kl-target 1 --steps 4 --batch-size 8 --minibatch-size 4 --max-new-tokens 8 "
    "--log-every 1 --eval-every 2 --eval-prompts 10",
}


def script(name, *flags, ok=True):
    """Run a script with tiny flags on the CPU, as from the command line. It runs in this process,
    because a new one takes seconds to import torch; `process` starts one. Ctrl-C is raised and does
    not end this process."""
    command, out, err = [f"train_{name}.py", *tiny(name, *flags)], io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", command)
        patch.setattr(program, "end_interrupted", raise_interrupt)
        try:
            runpy.run_path(command[0], run_name="__main__")
            status = 0
        except SystemExit as stop:  # with a number, None for 0, or a text for 1
            status = 1 if isinstance(stop.code, str) else stop.code or 0
    assert status == 0 or not ok, err.getvalue()
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def raise_interrupt(*args):
    raise KeyboardInterrupt


def process(*command):
    """Run Python with these arguments in the root of the repository, as a user does."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def tiny(name, *flags):
    """The flags of a tiny run of a script, then the given ones, which replace those of the same
    name."""
    return ["--device", "cpu", *TINY[name].split(), *map(str, flags)]
