"""GPT-2's published weights: reading them, writing them, and the same logits as transformers on both ways."""

import hashlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf.extras.pretrained import PRETRAINED, init_from, load_gpt2, published_name, save_gpt2
from rlhf.model import GPT, GPTConfig
from rlhf.support.cli import InputError
from tests.helpers import noisy

CONFIG = GPTConfig(vocab_size=19, block_size=12, n_layer=2, n_head=2, n_embd=8)
TOKENS = torch.randint(19, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    save_gpt2(noisy(GPT(CONFIG)), tmp_path, eos_id=18)
    return tmp_path


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_load_gpt2_reads_what_save_gpt2_writes(folder):
    """Weight by weight. On the disk the matrices are (in, out), under GPT-2's own names."""
    gpt = noisy(GPT(CONFIG))
    again = load_gpt2(str(folder))
    assert again.config == CONFIG
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in gpt.state_dict().items())
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(state["transformer.h.1.attn.c_attn.weight"], gpt.blocks[1].attn.c_attn.weight.t())
    assert torch.equal(state["transformer.h.0.mlp.c_fc.weight"], gpt.blocks[0].mlp.c_fc.weight.t())
    assert torch.equal(state["transformer.wpe.weight"], gpt.wpe.weight)
    assert torch.equal(state["lm_head.weight"], gpt.wte.weight)


def test_load_gpt2_reads_names_without_prefix_and_skips_buffers(folder):
    """The published gpt2 has no "transformer." before its names, and it holds each layer's causal mask."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 12, 12)}, folder / "pytorch_model.bin")
    assert torch.equal(load_gpt2(str(folder))(TOKENS), noisy(GPT(CONFIG))(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"activation_function": "relu"}, "activation_function is 'relu'; GPT-2 has 'gelu_new'"),
     ({"n_layer": 3}, "KeyError"), ({"vocab_size": 20}, "RuntimeError"), ({"model_type": "llama"}, "model_type")],
)
def test_init_from_rejects_another_architecture(folder, change, message):
    edit(folder, **change)
    with pytest.raises(InputError, match=message):
        init_from(str(folder), SimpleNamespace(vocab_size=19))


def test_init_from_reports_unreadable_weights(folder, monkeypatch):
    """A garbled file, a folder that does not exist, an unknown name, and no connection."""
    (folder / "pytorch_model.bin").write_bytes(b"garbled")
    for name in (str(folder), str(folder / "nowhere"), "gpt3"):
        with pytest.raises(InputError, match=f"--init {re.escape(name)} cannot be loaded"):
            init_from(name, SimpleNamespace(vocab_size=19))

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="gpt2 cannot be loaded: OSError: no route to host"):
        init_from("gpt2", SimpleNamespace(vocab_size=50257))


@pytest.mark.parametrize("vocab_size", [18, 20])
def test_init_from_rejects_another_vocabulary_size(folder, vocab_size):
    with pytest.raises(InputError, match=f"knows 19 tokens and the tokenizer {vocab_size}"):
        init_from(str(folder), SimpleNamespace(vocab_size=vocab_size))


def test_init_from_gives_network_and_digests_of_its_files(folder):
    gpt, _, digests = init_from(str(folder), SimpleNamespace(vocab_size=19))
    assert torch.equal(gpt(TOKENS), noisy(GPT(CONFIG))(TOKENS))
    assert digests == {"init": hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest(),
                       "init config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_init_from_fetches_published_weights(monkeypatch, name):
    """The address, the file in the cache, and weights_only. The weights are zeros, of few channels. A published name
    has no digests."""
    asked = {}
    monkeypatch.setitem(PRETRAINED, name, (PRETRAINED[name][0], 2, 8))

    def fetch(url, **options):
        asked.update(options, url=url)
        gpt = GPT(GPTConfig(50257, 1024, *PRETRAINED[name]))
        shapes = {key: tensor.shape for key, tensor in gpt.state_dict().items()}
        return {other: torch.zeros(shape[::-1] if transposed else shape)
                for key, shape in shapes.items() for other, transposed in [published_name(key)]}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    gpt, _, digests = init_from(name, SimpleNamespace(vocab_size=50257))
    assert gpt.config.n_layer == {"gpt2": 12, "distilgpt2": 6}[name] and not gpt.wte.weight.any()
    owner = {"gpt2": "openai-community", "distilgpt2": "distilbert"}[name]
    assert asked["url"] == f"https://huggingface.co/{owner}/{name}/resolve/main/pytorch_model.bin"
    assert asked["weights_only"] is True and asked["file_name"] == f"{name}.bin"
    assert digests == {}


@pytest.mark.parametrize(("name", "millions"), [("distilgpt2", 82), ("gpt2", 124), ("gpt2-medium", 355),
                                                ("gpt2-large", 774), ("gpt2-xl", 1558)])
def test_published_networks_have_their_known_sizes(name, millions):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(50257, 1024, *PRETRAINED[name]))
    assert round(sum(p.numel() for p in gpt.parameters()) / 1e6) == millions


def test_logits_equal_those_of_transformers(tmp_path):
    """A GPT-2 with random weights is made by transformers, read and written by this code, and read by transformers
    again."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=19, n_positions=12, n_layer=2, n_head=2, n_embd=8,
                                     initializer_range=0.3, bos_token_id=18, eos_token_id=18)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.config.save_pretrained(tmp_path / "theirs")
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    gpt = load_gpt2(str(tmp_path / "theirs"))
    save_gpt2(gpt, tmp_path / "ours", eos_id=18)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert expected.std() > 0.1
        assert_close(gpt(TOKENS), expected, atol=1e-5, rtol=0)
        assert_close(again(TOKENS).logits, expected, atol=1e-5, rtol=0)
