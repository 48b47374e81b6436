"""GPT-2's published weights: reading them, writing them, and the logits of transformers either
way."""

import hashlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf.model import GPT, GPTConfig
from rlhf.networks.gpt2 import PRETRAINED, init_from, is_gpt2, load_gpt2, published_name
from rlhf.run.errors import InputError
from rlhf.run.loading import start_from
from tests.helpers import noisy, save_gpt2

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
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in gpt.state_dict().items()
    )
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(
        state["transformer.h.1.attn.c_attn.weight"], gpt.blocks[1].attn.c_attn.weight.t()
    )
    assert torch.equal(state["transformer.h.0.mlp.c_fc.weight"], gpt.blocks[0].mlp.c_fc.weight.t())
    assert torch.equal(state["transformer.wpe.weight"], gpt.wpe.weight)
    assert torch.equal(state["lm_head.weight"], gpt.wte.weight)


def test_load_gpt2_reads_names_without_prefix_and_skips_buffers(folder):
    """The published gpt2 has no "transformer." before its names, and it holds each layer's causal
    mask."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    bare = {
        name.removeprefix("transformer."): tensor
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 12, 12)}, folder / "pytorch_model.bin")
    assert torch.equal(load_gpt2(str(folder))(TOKENS), noisy(GPT(CONFIG))(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'; GPT-2 has 'gelu_new'"),
        ({"n_layer": 3}, "KeyError"),
        ({"vocab_size": 20}, "RuntimeError"),
        ({"model_type": "llama"}, "model_type"),
    ],
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


def test_init_from_names_a_folder_without_weights(folder):
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no model\*.safetensors and no pytorch_model\*.bin in"):
        init_from(str(folder), SimpleNamespace(vocab_size=19))


def test_init_from_names_the_missing_package_safetensors(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (folder / "model.safetensors").touch()
    message = r"needs the package safetensors.torch: pip install .\[hf\]"
    with pytest.raises(InputError, match=message):
        init_from(str(folder), SimpleNamespace(vocab_size=19))


@pytest.mark.parametrize("vocab_size", [18, 20])
def test_init_from_rejects_another_vocabulary_size(folder, vocab_size):
    with pytest.raises(InputError, match=f"knows 19 tokens and the tokenizer {vocab_size}"):
        init_from(str(folder), SimpleNamespace(vocab_size=vocab_size))


def test_init_from_gives_network_and_digests_of_its_files(folder):
    gpt, _, digests = init_from(str(folder), SimpleNamespace(vocab_size=19))
    assert torch.equal(gpt(TOKENS), noisy(GPT(CONFIG))(TOKENS))
    assert digests == {
        "init pytorch_model.bin": hashlib.sha256(
            (folder / "pytorch_model.bin").read_bytes()
        ).hexdigest(),
        "init config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_init_from_fetches_published_weights(monkeypatch, name):
    """The address, the file in the cache, and weights_only. The weights are zeros, of few channels.
    A published name has no digests."""
    asked = {}
    monkeypatch.setitem(PRETRAINED, name, (PRETRAINED[name][0], 2, 8))

    def fetch(url, **options):
        asked.update(options, url=url)
        gpt = GPT(GPTConfig(50257, 1024, *PRETRAINED[name]))
        shapes = {key: tensor.shape for key, tensor in gpt.state_dict().items()}
        return {
            other: torch.zeros(shape[::-1] if transposed else shape)
            for key, shape in shapes.items()
            for other, transposed in [published_name(key)]
        }

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    gpt, _, digests = init_from(name, SimpleNamespace(vocab_size=50257))
    assert gpt.config.n_layer == {"gpt2": 12, "distilgpt2": 6}[name] and not gpt.wte.weight.any()
    owner = {"gpt2": "openai-community", "distilgpt2": "distilbert"}[name]
    assert asked["url"] == f"https://huggingface.co/{owner}/{name}/resolve/main/pytorch_model.bin"
    assert asked["weights_only"] is True and asked["file_name"] == f"{name}.bin"
    assert digests == {}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("distilgpt2", 82),
        ("gpt2", 124),
        ("gpt2-medium", 355),
        ("gpt2-large", 774),
        ("gpt2-xl", 1558),
    ],
)
def test_published_networks_have_their_known_sizes(name, millions):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(50257, 1024, *PRETRAINED[name]))
    assert round(sum(p.numel() for p in gpt.parameters()) / 1e6) == millions


# ---- the same numbers as transformers ----


@pytest.fixture
def original():
    """A GPT-2 of transformers with random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=19,
        n_positions=12,
        n_layer=2,
        n_head=2,
        n_embd=8,
        initializer_range=0.3,
        bos_token_id=18,
        eos_token_id=18,
    )
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def check_logits(gpt, original):
    expected = original(TOKENS).logits
    assert expected.std() > 0.1
    assert_close(gpt(TOKENS), expected, atol=1e-5, rtol=0)


def save_bin(original, folder):
    original.config.save_pretrained(folder)
    torch.save(original.state_dict(), folder / "pytorch_model.bin")


def save_safetensors(original, folder):
    original.save_pretrained(folder)
    assert not (folder / "pytorch_model.bin").exists()


def save_without_output_matrix(original, folder):
    """Its weights have no "transformer." before their names."""
    original.transformer.save_pretrained(folder)


def save_in_several_files(original, folder):
    original.save_pretrained(folder, max_shard_size="3KB")
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("*.safetensors"))) > 1


WRITERS = [save_bin, save_safetensors, save_without_output_matrix, save_in_several_files]


@pytest.mark.parametrize("save", WRITERS)
def test_load_gpt2_gives_the_logits_of_transformers(original, tmp_path, save):
    save(original, tmp_path)
    check_logits(load_gpt2(str(tmp_path)), original)


def test_model_safetensors_is_read_if_both_files_are_there(original, tmp_path):
    """As transformers does."""
    save_gpt2(noisy(GPT(CONFIG)), tmp_path, eos_id=18)
    original.save_pretrained(tmp_path)
    check_logits(load_gpt2(str(tmp_path)), original)


def test_init_from_gives_digests_of_every_file(original, tmp_path):
    save_in_several_files(original, tmp_path)
    _, _, digests = init_from(str(tmp_path), SimpleNamespace(vocab_size=19))
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.json")]  # with the index
    expected = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert set(digests.values()) == expected and len(digests) == len(files)


def test_logits_equal_those_of_transformers(original, tmp_path):
    """A GPT-2 with random weights is made by transformers, read and written by this code, and read
    by transformers again."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_bin(original, tmp_path / "original")
    gpt = load_gpt2(str(tmp_path / "original"))
    save_gpt2(gpt, tmp_path / "exported", eos_id=18)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "exported").eval()
    check_logits(gpt, original)
    check_logits(lambda tokens: again(tokens).logits, original)


@torch.no_grad()
def test_save_gpt2_keeps_the_temperature(tmp_path):
    """The logits of a policy trained at temperature 1/2 are twice those of its weights."""
    gpt = noisy(GPT(CONFIG))
    gpt.temperature = 0.5
    save_gpt2(gpt, tmp_path, eos_id=18)
    assert_close(load_gpt2(str(tmp_path))(TOKENS), gpt(TOKENS), atol=1e-5, rtol=0)


# ---- which --init is a GPT-2 ----


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama", "tokenizer_class": "gpt2"}, False),
        ({"vocab_size": 19}, False),
        (["gpt2"], False),
    ],
)
def test_folder_is_gpt2_if_its_config_says_so(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_gpt2(str(tmp_path)) is expected


def test_name_is_gpt2_if_it_is_published(tmp_path):
    assert all(is_gpt2(name) for name in PRETRAINED)
    assert not is_gpt2("gemma-3-270m") and not is_gpt2(str(tmp_path))


@pytest.mark.parametrize("contents", [b"{", b"\xff"])
def test_garbled_config_is_named(tmp_path, contents):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_bytes(contents)
    flags = {"tokenizer": "auto", "template": "auto", "system": ""}
    with pytest.raises(InputError, match=f"--init {re.escape(str(tmp_path))} cannot be loaded: "):
        start_from(SimpleNamespace(init=str(tmp_path), **flags))


@pytest.mark.parametrize("flag", ["load_in_4bit", "base_dtype", "cut_vocab", "template", "system"])
def test_flags_for_other_models_are_refused(folder, flag):
    flags = {"init": str(folder), "load_in_4bit": False, "cut_vocab": False}
    flags |= {"base_dtype": "float32", "template": "auto", "system": "", flag: True}
    message = "is a GPT-2; --load-in-4bit, --base-dtype, .* are for models that transformers reads"
    with pytest.raises(InputError, match=message):
        start_from(SimpleNamespace(**flags))
