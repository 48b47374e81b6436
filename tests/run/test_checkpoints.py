"""Checkpoint files: which are rejected, how weights are merged and loaded."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf.model import GPT
from rlhf.run.checkpoints import (
    check_input,
    check_tokenizer,
    load_checkpoint,
    load_weights,
    merged,
)
from rlhf.run.errors import InputError
from rlhf.run.files import digests
from tests.helpers import Digits, f64
from tests.run.small_run import SHAPE, DPOConfig, finished, saved

# ---- load_checkpoint ----


def test_load_checkpoint_rejects_another_scripts_checkpoint(run):
    message = "written by `python train_sft.py`; a checkpoint of `python train_reward.py` is needed"
    with pytest.raises(InputError, match=message):
        load_checkpoint(saved(run, 9), "reward")


def test_load_checkpoint_takes_one_of_several_kinds(run):
    assert load_checkpoint(saved(run, 9), "ppo", "sft")["kind"] == "sft"


def test_load_checkpoint_takes_dpo_wherever_it_takes_ppo(tmp_path):
    path = finished(tmp_path, GPT(SHAPE), DPOConfig)
    assert load_checkpoint(path, "sft", "ppo")["kind"] == "dpo"
    assert load_checkpoint(path, "dpo")["kind"] == "dpo"
    message = "by `python -m docs.experiments.train_dpo`; a checkpoint of `python train_sft.py` is"
    with pytest.raises(InputError, match=message):
        load_checkpoint(path, "sft")


def test_load_checkpoint_rejects_an_unfinished_one(run):
    message = "stopped at step 7 of 9: finish it with `python train_sft.py --resume`"
    with pytest.raises(InputError, match=message):
        load_checkpoint(saved(run, 7), "sft")
    assert load_checkpoint(run.path, "sft", unfinished=True)["step"] == 7


def test_load_checkpoint_rejects_missing_file(tmp_path):
    with pytest.raises(InputError, match="run `python train_ppo.py` first"):
        load_checkpoint(tmp_path / "ppo.pt", "ppo")


def test_load_checkpoint_rejects_a_file_that_is_cut_short(run):
    run.path.write_bytes(saved(run, 9).read_bytes()[:500])
    with pytest.raises(InputError, match="is not a checkpoint of this project"):
        load_checkpoint(run.path, "sft")


@pytest.mark.parametrize("content", [{"model": 1}, {"kind": "sft"}, [1]])
def test_load_checkpoint_rejects_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "sft.pt")
    with pytest.raises(InputError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "sft.pt", "sft")


def test_load_checkpoint_rejects_another_format(run):
    content = torch.load(saved(run, 9), weights_only=True)
    torch.save({**content, "format": 1}, run.path)
    with pytest.raises(
        InputError, match="run `python train_sft.py` again .*of format 1, this code reads 3"
    ):
        load_checkpoint(run.path, "sft")


def test_load_checkpoint_rejects_a_flipped_bit(run):
    """In the middle of a weight, which torch reads as another number."""
    content = bytearray(saved(run, 9).read_bytes())
    weights = run.model.wte.weight.detach().numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    run.path.write_bytes(content)
    assert torch.load(run.path, weights_only=True)["kind"] == "sft"
    with pytest.raises(InputError, match="run `python train_sft.py` again .*damaged in"):
        load_checkpoint(run.path, "sft")


# ---- weights ----

BROKEN = {
    "missing": (lambda state: state.pop("wte.weight"), 'Missing key.*"wte.weight"'),
    "unknown": (lambda state: state.update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
    "of another shape": (
        lambda state: state.update({"ln_f.bias": torch.zeros(9)}),
        "size mismatch for ln_f.bias",
    ),
    "NaN": (
        lambda state: state["ln_f.bias"].fill_(torch.nan),
        "the weight ln_f.bias is NaN or infinite",
    ),
    "infinite": (
        lambda state: state["ln_f.bias"].fill_(torch.inf),
        "the weight ln_f.bias is NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_load_weights_names_the_file_and_what_does_not_fit(name):
    state = {name: tensor.clone() for name, tensor in GPT(SHAPE).state_dict().items()}
    load_weights(Path("x.pt"), GPT(SHAPE), state)
    change, message = BROKEN[name]
    change(state)
    with pytest.raises(InputError, match=f"(?s)x.pt.*{message}.*train it again"):
        load_weights(Path("x.pt"), GPT(SHAPE), state)


@pytest.mark.parametrize("change", [{"c.B": None}, {"c.A": f64([1, 2, 3])}])
def test_load_weights_rejects_adapters_that_fit_no_layer(change):
    """B is missing, or A is of another width than B."""
    state = {
        "c.A": f64([1, -1]),
        "c.B": f64([2], [0]),
        "c.scale": torch.tensor(0.5),
        "c.linear.bias": f64(5, 6),
        "c.linear.weight": f64([1, 2], [3, 4]),
    }
    state = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
    with pytest.raises(InputError, match="x.pt does not fit its own settings"):
        load_weights(Path("x.pt"), GPT(SHAPE), state)


def test_merged_folds_an_adapter_into_its_matrix():
    """W = 1 2 | 3 4, B A = 2 -2 | 0 0, scale 1/2: W + scale * B A = 2 1 | 3 4. The names of other
    networks are left out."""
    state = {
        "gpt.fc.linear.weight": f64([1, 2], [3, 4]),
        "gpt.fc.linear.bias": f64(5, 6),
        "gpt.fc.A": f64([1, -1]),
        "gpt.fc.B": f64([2], [0]),
        "gpt.fc.scale": torch.tensor(0.5),
        "gpt.ln.weight": f64(7),
        "head": f64(8),
    }
    before = copy.deepcopy(state)
    got = merged(state, prefix="gpt.")
    assert got.keys() == {"fc.weight", "fc.bias", "ln.weight"}
    assert_close(got["fc.weight"], f64([2, 1], [3, 4]))
    assert torch.equal(got["fc.bias"], f64(5, 6)) and torch.equal(got["ln.weight"], f64(7))
    assert_close(state, before, atol=0, rtol=0)


# ---- what a checkpoint was made from ----


def test_check_input_rejects_another_file_than_the_checkpoint_was_made_from(run, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abd")
    checkpoint = {"inputs": digests(sft=tmp_path / "a")}
    check_input(run.path, checkpoint, "sft", tmp_path / "a")
    with pytest.raises(InputError, match="sft.pt was made from another sft file than .*b"):
        check_input(run.path, checkpoint, "sft", tmp_path / "b")


def test_check_tokenizer_rejects_another_tokenizer(run):
    checkpoint = load_checkpoint(saved(run, 9), "sft")
    check_tokenizer(run.path, checkpoint, Digits())
    with pytest.raises(InputError, match="another tokenizer"):
        check_tokenizer(run.path, checkpoint, SimpleNamespace(fingerprint="xyz"))
