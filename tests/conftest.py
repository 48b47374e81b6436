"""Fixtures: small models, a small data set, the three stages run once on it, and GPT-2's
tokenizer."""

import os
import signal

import pytest

from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from tests.helpers import BUNDLED, ROOT, TINY, copy_some_rows, noisy, real_data, script

# A shell starts what it runs in the background deaf to Ctrl-C, and programs that the tests start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No search for doctests there: to import it registers a device for the whole process.
collect_ignore = ["fake_device.py"]


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def bundled():
    return BUNDLED


@pytest.fixture
def gpt():
    """A GPT of 11 tokens with random weights in float64."""
    return noisy(
        GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=8)).double()
    )


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
    """A folder with the first 40 rows of each file of the bundled data set, its tokenizer and its
    judge."""
    return copy_some_rows(tmp_path / "data")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """All three stages once on the small data set; (data folder, output folder, what each script
    printed)."""
    folder = tmp_path_factory.mktemp("scripts")
    data, out = copy_some_rows(folder / "data"), folder / "runs"
    printed = {name: script(name, "--data", data, "--out", out).stdout for name in TINY}
    return data, out, printed


@pytest.fixture
def gpt2_ranks(monkeypatch):
    """Lets tiktoken find GPT-2's ranks without the internet."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real_data("gpt2_bpe")))
