"""GPT-2's published weights: reading them, writing them, and the same logits as transformers on both ways."""

import json

import pytest
import torch
from torch.testing import assert_close

from rlhf.checkpoints import load_pretrained
from rlhf.common import InputError
from rlhf.export import save_pretrained
from rlhf.model import GPT, PRETRAINED, GPTConfig, published_name
from tests.conftest import noisy

CONFIG = GPTConfig(vocab_size=19, block_size=12, n_layer=2, n_head=2, n_embd=8)
TOKENS = torch.randint(19, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    save_pretrained(noisy(GPT(CONFIG)), tmp_path, eos_id=18)
    return tmp_path


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_is_written_is_read(folder):
    """Weight by weight; and on the disk the matrices stand as (in, out), under GPT-2's own names."""
    gpt = noisy(GPT(CONFIG))
    again = GPT.from_pretrained(str(folder))
    assert again.config == CONFIG
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in gpt.state_dict().items())
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(state["transformer.h.1.attn.c_attn.weight"], gpt.blocks[1].attn.c_attn.weight.t())
    assert torch.equal(state["transformer.h.0.mlp.c_fc.weight"], gpt.blocks[0].mlp.c_fc.weight.t())
    assert torch.equal(state["transformer.wpe.weight"], gpt.wpe.weight)
    assert torch.equal(state["lm_head.weight"], gpt.wte.weight)


def test_names_without_the_prefix_and_with_buffers(folder):
    """The published gpt2 has no "transformer." before its names, and holds each layer's causal mask."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 12, 12)}, folder / "pytorch_model.bin")
    assert torch.equal(GPT.from_pretrained(str(folder))(TOKENS), noisy(GPT(CONFIG))(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"activation_function": "relu"}, "activation_function is 'relu'; GPT-2 has 'gelu_new'"),
     ({"n_layer": 3}, "KeyError"), ({"vocab_size": 20}, "RuntimeError"), ({"model_type": "llama"}, "model_type")],
)
def test_another_architecture_is_refused(folder, change, message):
    edit(folder, **change)
    with pytest.raises(InputError, match=message):
        load_pretrained(str(folder))


def test_what_cannot_be_read_is_told_in_a_line(folder, monkeypatch):
    (folder / "pytorch_model.bin").write_bytes(b"garbled")
    for init in (str(folder), str(folder / "nowhere"), "gpt3"):
        with pytest.raises(InputError, match="cannot be loaded"):
            load_pretrained(init)

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="gpt2 cannot be loaded: OSError: no route to host"):
        load_pretrained("gpt2")


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_where_published_names_are_fetched(monkeypatch, name):
    """The address, the file in the cache, and weights_only. The weights are zeros, of few channels."""
    asked = {}
    monkeypatch.setitem(PRETRAINED, name, (PRETRAINED[name][0], 2, 8))

    def fetch(url, **options):
        asked.update(options, url=url)
        gpt = GPT(GPTConfig(50257, 1024, *PRETRAINED[name]))
        shapes = {key: tensor.shape for key, tensor in gpt.state_dict().items()}
        return {other: torch.zeros(shape[::-1] if turned else shape)
                for key, shape in shapes.items() for other, turned in [published_name(key)]}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    gpt = GPT.from_pretrained(name)
    assert gpt.config.n_layer == {"gpt2": 12, "distilgpt2": 6}[name] and not gpt.wte.weight.any()
    owner = {"gpt2": "openai-community", "distilgpt2": "distilbert"}[name]
    assert asked["url"] == f"https://huggingface.co/{owner}/{name}/resolve/main/pytorch_model.bin"
    assert asked["weights_only"] is True and asked["file_name"] == f"{name}.bin"


@pytest.mark.parametrize(("name", "millions"), [("distilgpt2", 82), ("gpt2", 124), ("gpt2-medium", 355),
                                                ("gpt2-large", 774), ("gpt2-xl", 1558)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(50257, 1024, *PRETRAINED[name]))
    assert round(sum(p.numel() for p in gpt.parameters()) / 1e6) == millions


def test_logits_are_those_of_transformers(tmp_path):
    """A GPT-2 of random weights made by transformers, read by us, written by us, read by transformers again."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=19, n_positions=12, n_layer=2, n_head=2, n_embd=8,
                                     initializer_range=0.3, bos_token_id=18, eos_token_id=18)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.config.save_pretrained(tmp_path / "theirs")
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    gpt = GPT.from_pretrained(str(tmp_path / "theirs"))
    save_pretrained(gpt, tmp_path / "ours", eos_id=18)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert expected.std() > 0.1
        assert_close(gpt(TOKENS), expected, atol=1e-5, rtol=0)
        assert_close(again(TOKENS).logits, expected, atol=1e-5, rtol=0)
