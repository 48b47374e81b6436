"""Small models and a small data set for the tests."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "data" / "tiny_assistant"


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def bundled():
    return BUNDLED


def noisy(module, seed=0):
    """Replace every weight by noise, so that zero heads and near-zero attention hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return module


@pytest.fixture
def gpt():
    """A GPT of 11 tokens with random weights in float64."""
    return noisy(GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=8)).double())


@pytest.fixture
def policy(gpt):
    policy = PolicyWithValue(gpt).double()
    noisy(policy.value_head, seed=1)
    return policy


@pytest.fixture
def reward_model():
    config = GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=8)
    return noisy(RewardModel(GPT(config)).double(), seed=2)


@pytest.fixture
def small_data(tmp_path):
    """A folder with the first rows of the bundled data set, its tokenizer and its judge."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in BUNDLED.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[:41]
        with (folder / path.name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    for name in ("tokenizer.tiktoken", "judge.py"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    return folder


# ---- the three scripts, run as a user runs them ----

TINY = {
    "sft": "--n-layer 2 --n-head 2 --n-embd 16 --steps 8 --eval-every 4 --log-every 1 --batch-size 8",
    "reward": "--steps 6 --batch-size 8 --eval-every 3 --log-every 1",
    "ppo": "--kl-target 1 --steps 4 --batch-size 8 --minibatch-size 4 --max-new-tokens 8 --eval-every 2 "
           "--eval-prompts 10 --optimum-prompts 3 --optimum-samples 16",
}


def script(name, *flags, ok=True):
    command = [sys.executable, f"train_{name}.py", "--device", "cpu", *TINY[name].split(), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if ok:
        assert done.returncode == 0, done.stderr
    return done


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """All three stages once on 40 rows of each file; (data folder, output folder, what each script printed)."""
    folder = tmp_path_factory.mktemp("scripts")
    data = folder / "data"
    data.mkdir()
    for path in (ROOT / "data" / "tiny_assistant").glob("*"):
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                some = list(csv.reader(file))[:41]
            with (data / path.name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(some)
        elif path.name in ("tokenizer.tiktoken", "judge.py"):
            (data / path.name).write_bytes(path.read_bytes())
    out = folder / "runs"
    printed = {name: script(name, "--data", data, "--out", out).stdout for name in TINY}
    return data, out, printed
