"""Models of Hugging Face's transformers in the place of the GPT. Expected numbers come from
transformers itself."""

import copy
import importlib
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from docs.experiments import toxicity
from rlhf.data import batch_indices, pad_rows
from rlhf.masked import token_logprobs
from rlhf.model import PolicyWithValue, RewardModel
from rlhf.networks import hf, hf_tokenizer
from rlhf.networks.lora import LoRALinear, add_adapters
from rlhf.run import program
from rlhf.run.device import setup
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.flags import TrainConfig, parse_cli
from rlhf.run.loading import (
    frozen_copy,
    load_policy,
    load_reward_model,
    start_from,
    tokenizer_of,
    with_adapters,
)
from rlhf.run.training import Training
from rlhf.sampling import generate
from rlhf.tools import optimality, sample
from tests.helpers import TINY, copy_some_rows, lora, rows, stopped_by_its_first_checkpoint

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[hf]"
)
tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: pip install .[hf]"
)

KINDS = ["llama", "mistral", "qwen2", "gemma3", "gpt2"]
TOKENS, VOCAB = (
    340,
    352,
)  # the models have logits of a few more tokens than their tokenizers know, as Qwen2 has
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=256,
    initializer_range=0.5,
)
WINDOW = 5  # of the sliding attention, shorter than the sequences
LINEAR = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
BOS, EOS, PAD = 0, 1, 2
TEXTS = [
    "\n\nHuman: Tell me about a wet tent.\n\nAssistant:",
    " naïve 漢字 \x00 <eos><bos>  <pad> ",
    "",
]


# ---- tiny models and tokenizers, made by transformers ----


def make_model(kind, **more):
    """A causal LM with random weights, also where transformers starts with zeros or ones."""
    T, sizes = (
        transformers,
        {**SIZES, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, **more},
    )
    torch.manual_seed(0)
    if kind == "llama":
        model = T.LlamaForCausalLM(T.LlamaConfig(**sizes))
    elif kind == "wide":  # rows of a multiple of 64, for 4 bits
        model = T.LlamaForCausalLM(
            T.LlamaConfig(
                **{
                    **sizes,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "head_dim": 16,
                    "initializer_range": 0.2,
                }
            )
        )
    elif kind == "mistral":
        model = T.MistralForCausalLM(T.MistralConfig(**sizes, sliding_window=WINDOW))
    elif kind == "qwen2":
        model = T.Qwen2ForCausalLM(T.Qwen2Config(**sizes))
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        model = T.Gemma3ForCausalLM(
            T.Gemma3TextConfig(
                **{**sizes, "num_hidden_layers": 3, "sliding_window": WINDOW, "layer_types": layers}
            )
        )
    elif kind == "gpt2":
        model = T.GPT2LMHeadModel(
            T.GPT2Config(
                vocab_size=VOCAB,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=64,
                initializer_range=0.5,
                bos_token_id=BOS,
                eos_token_id=EOS,
            )
        )
    elif kind == "phi":
        model = T.PhiForCausalLM(T.PhiConfig(**{**sizes, "num_key_value_heads": 4}))
    elif kind == "gemma2":
        model = T.Gemma2ForCausalLM(T.Gemma2Config(**sizes, final_logit_softcapping=1.0))
    elif kind == "cohere":
        model = T.CohereForCausalLM(T.CohereConfig(**sizes, logit_scale=0.5))
    elif kind == "lfm2":
        model = T.Lfm2ForCausalLM(
            T.Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_multiple_of=4)
        )
    elif kind == "bloom":
        model = T.BloomForCausalLM(
            T.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
        )
    elif kind == "opt":  # what the heads read is narrower than the layers, as in OPT-350m
        model = T.OPTForCausalLM(
            T.OPTConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                word_embed_proj_dim=8,
                ffn_dim=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                do_layer_norm_before=False,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def make_tokenizer(texts, begin=True, vocab_size=TOKENS, **special):
    """Byte-level BPE, with begin-of-text before each text if the model expects that."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<bos>", "<eos>", "<pad>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return with_special_tokens(tokenizer, begin, **special)


def with_special_tokens(tokenizer, begin, pad="<pad>", eos="<eos>"):
    if begin:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    unk = "<unk>" if tokenizer.token_to_id("<unk>") else None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>" if begin else None,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
    )


@dataclass
class Base:
    """A saved model, and the object of transformers that was saved."""

    folder: Path
    model: Any = None

    @torch.no_grad()
    def forward(self, row):
        """transformers' own forward on one unpadded row: hidden states (T, C), logits (T, V)."""
        output = self.model(torch.tensor([row]), output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1][0], output.logits[0]

    def __call__(self, tokens):
        """The logits (B, T, V) of rows padded on the right, one row at a time and without a
        cache."""
        return torch.stack([self.forward(row)[1] for row in tokens.tolist()])


def save_base(folder, kind, texts):
    transformers.utils.logging.disable_progress_bar()
    model, begin = make_model(kind), kind != "qwen2"
    model.save_pretrained(folder)
    make_tokenizer(texts, begin).save_pretrained(folder)
    return Base(folder, model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_some_rows(tmp_path_factory.mktemp("hf") / "data")


@pytest.fixture(scope="module")
def texts(data):
    return [
        cell for path in sorted(data.glob("*.csv")) for row in rows(path) for cell in row.values()
    ]


@pytest.fixture(scope="module")
def bases(texts, tmp_path_factory):
    """{kind: Base}."""
    return {
        kind: save_base(tmp_path_factory.mktemp(kind), kind, texts) for kind in [*KINDS, "wide"]
    }


@pytest.fixture
def new_process():
    """A function that forgets what was loaded, as if Python had been started anew."""

    def forget():
        hf.load_base.cache_clear()
        hf_tokenizer.load_tokenizer.cache_clear()

    yield forget
    forget()


def settings(base, **changes):
    """The flags of train_sft.py that say which network it is."""
    return SimpleNamespace(
        **{
            "init": str(base.folder),
            "tokenizer": "auto",
            "lora_rank": 0,
            "lora_alpha": 16.0,
            "template": "auto",
            "system": "",
            "load_in_4bit": False,
            "base_dtype": "float32",
            "cut_vocab": False,
            "data": "",
            **changes,
        }
    )


def network(base, **changes):
    return hf.init_from(settings(base, **changes))[0]


def random_rows(lens, seed=0):
    """Rows of random tokens of these lengths, and as tokens (B, T), padded on the right, with their
    lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, TOKENS, (n,), generator=generator).tolist() for n in lens]
    return made, *pad_rows(made, PAD, torch.device("cpu"))


def adapted(gpt, seed=1):
    """The network with adapters that change its output: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1, generator=generator)
    return gpt


def close(got, expected, atol=1e-4):
    assert_close(got, expected, atol=atol, rtol=0)


# ---- the same numbers as transformers ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_rows_have_the_hidden_states_logits_and_logprobs_of_unpadded_rows_in_transformers(
    bases, kind
):
    base = bases[kind]
    gpt, (made, tokens, _) = network(base), random_rows([3, 14, 1, 9])
    hidden, logits = gpt.hidden(tokens), gpt(tokens)
    logprobs = token_logprobs(logits, tokens, None)
    for i, row in enumerate(made):
        their_hidden, their_logits = base.forward(row)
        assert their_logits.std() > 0.5
        close(hidden[i, : len(row)], their_hidden)
        close(logits[i, : len(row)], their_logits)
        theirs = [their_logits.log_softmax(dim=1)[t, token] for t, token in enumerate(row[1:])]
        close(logprobs[i, : len(row) - 1], torch.tensor(theirs))


@torch.no_grad()
def test_temperature_divides_the_logits(bases):
    """A policy trained at temperature 1/2 has twice the logits."""
    gpt, (made, tokens, _) = network(bases["gemma3"]), random_rows([6])
    gpt.temperature = 0.5
    close(gpt(tokens)[0], 2 * bases["gemma3"].forward(made[0])[1])


def test_block_size_is_the_models_context(bases):
    """Begin-of-text, if there is one, is part of a prompt."""
    gpt = network(bases["llama"])
    cache = gpt.make_cache(1, 256)
    gpt.hidden(torch.full((1, 255), 5), cache)
    gpt.hidden(torch.tensor([[5]]), cache)
    assert gpt.config.block_size == 256 == cache.past.get_seq_length()


def write_gguf(base, path):
    """The model and its tokenizer as one GGUF file. It keeps the rows of q and k in another order
    (the two halves of a head's channels alternate)."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install .[hf]")
    config = base.model.config
    writer = gguf.GGUFWriter(path, "llama")
    for name, theirs in {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "head_count": "num_attention_heads",
        "head_count_kv": "num_key_value_heads",
        "rope_dimension_count": "head_dim",
        "layer_norm_rms_eps": "rms_norm_eps",
    }.items():
        getattr(writer, f"add_{name}")(getattr(config, theirs))
    add_tokenizer(writer, base.folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in base.model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = (
                weight.view(-1, 2, config.head_dim // 2, config.hidden_size)
                .transpose(1, 2)
                .reshape(weight.shape)
            )  # (heads, halves, channels of a half, in)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy()
        )
    write(writer)


def add_tokenizer(writer, folder):
    gguf = importlib.import_module("gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_gguf_file_gives_the_tokens_and_logits_of_the_model_in_it(bases, tmp_path, monkeypatch):
    """Also one in the folder that the program runs in."""
    base = bases["llama"]
    write_gguf(base, tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    gpt, tokenizer, inputs = hf.init_from(settings(base, init="tiny.gguf"))
    ids = tokenizer.encode(TEXTS[0])
    assert ids == hf.HFTokenizer(str(base.folder)).encode(TEXTS[0])
    assert (tokenizer.begin, tokenizer.eos_id) == ([BOS], EOS) and inputs.keys() == {
        "init tiny.gguf"
    }
    close(gpt(torch.tensor([ids]))[0], base.forward(ids)[1])


# ---- sampling ----


class Watching(nn.Module):
    """A network that notes the logits that `generate` samples from."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.make_cache, self.hidden, self.seen = gpt, gpt.make_cache, gpt.hidden, []

    def logits(self, hidden):
        self.seen.append(self.gpt.logits(hidden))
        return self.seen[-1]


LENS = [[7, 1, 10, 3, 12, 6], [8, 8, 8, 8, 8, 8]]  # ragged, and all the same


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_logits_equal_the_full_forward_of_transformers(bases, kind, lens):
    """Of every row at every step, also once a row is longer than the sliding window."""
    base, model = bases[kind], Watching(network(bases[kind]))
    _, prompts, prompt_lens = random_rows(lens)
    tokens, _ = generate(model, prompts, prompt_lens, 9, -1, torch.Generator().manual_seed(1))
    order = sorted(range(len(lens)), key=lambda i: lens[i])  # shorter prompts come first
    for place, i in enumerate(order):
        theirs = base.forward(tokens[i, : lens[i] + 9].tolist())[1]
        for t in range(9):
            close(model.seen[t][place], theirs[lens[i] - 1 + t])


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_sampling_gives_the_tokens_of_transformers_without_a_cache(bases, kind, lens):
    """The same random numbers give the same responses, with few rows at a time too. A random number
    of 0 chooses token 0, which stands for end-of-text: four rows end early, and the cache drops
    them."""
    base, model, (_, prompts, prompt_lens) = (
        bases[kind],
        Watching(network(bases[kind])),
        random_rows(lens),
    )
    uniforms = torch.rand(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[[0, 2, 3, 5], [2, 5, 0, 3]] = 0
    tokens, mask = generate(lambda tokens: base(tokens), prompts, prompt_lens, 9, 0, uniforms)
    assert mask.sum(dim=1).tolist() == [3, 9, 6, 1, 9, 4]
    for limit in (0, 2, 4):
        model.seen.clear()
        got = generate(model, prompts, prompt_lens, 9, 0, uniforms, limit)
        assert torch.equal(got[0], tokens) and torch.equal(got[1], mask)
        assert len(model.seen[-1]) < (limit or 6)


# ---- the tokenizer ----


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_decodes_what_it_encoded(bases, kind, text):
    """No text becomes one of the special tokens, whose names may be in it, and no begin-of-text is
    put before it."""
    tokenizer = hf.HFTokenizer(str(bases[kind].folder))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {BOS, EOS, PAD} & set(ids) and all(i < tokenizer.vocab_size for i in ids)
    assert (len(ids) > 0) == (text != "")


def test_tokenizer_encodes_as_transformers_does(bases):
    text = TEXTS[0]
    theirs = transformers.AutoTokenizer.from_pretrained(bases["llama"].folder)
    tokenizer = hf.HFTokenizer(str(bases["llama"].folder))
    assert theirs(text)["input_ids"] == tokenizer.prompt_ids(text) == [BOS, *tokenizer.encode(text)]
    assert len(tokenizer.encode(text)) < len(text)


@pytest.mark.parametrize(
    ("kind", "begin"), [("llama", [BOS]), ("mistral", [BOS]), ("gemma3", [BOS]), ("qwen2", [])]
)
def test_begin_of_text_is_set_if_the_model_expects_it(bases, kind, begin):
    assert hf.HFTokenizer(str(bases[kind].folder)).begin == begin


def test_there_is_no_begin_of_text_if_the_tokenizer_has_one_and_does_not_use_it(texts, tmp_path):
    """As GPT-2, whose <|endoftext|> is called begin-of-text too."""
    tokenizer = make_tokenizer(texts, begin=False)
    tokenizer.bos_token = "<bos>"
    tokenizer.save_pretrained(tmp_path)
    assert hf.HFTokenizer(str(tmp_path)).begin == []


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None, "[PAD]"])
def test_pad_and_end_of_text_differ(texts, tmp_path, pad):
    """Also if the model's tokenizer has no pad token, pads with end-of-text, or got a pad token
    that the embedding of its model has no row for."""
    make_tokenizer(texts, pad=pad).save_pretrained(tmp_path)
    tokenizer = hf.HFTokenizer(str(tmp_path))
    assert tokenizer.vocab_size == TOKENS + (pad == "[PAD]") and (
        tokenizer.eos_id,
        tokenizer.pad_id,
    ) == (EOS, 0)


def test_pad_differs_from_an_end_of_text_that_is_token_0(texts, tmp_path):
    make_tokenizer(texts, pad=None).save_pretrained(tmp_path)
    tokenizer = hf.HFTokenizer(str(tmp_path), kept=(EOS, BOS, 7))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.prompt_ids("")) == (0, 1, [1])


def test_fingerprint_follows_from_the_tokens_and_those_that_are_kept(
    bases, texts, tmp_path, new_process
):
    folder = str(bases["llama"].folder)
    make_tokenizer(texts, vocab_size=TOKENS - 1).save_pretrained(tmp_path)
    first = hf.HFTokenizer(folder)
    first.encode(TEXTS[0])
    others = [
        hf.HFTokenizer(folder, kept=tuple(range(300))),
        hf.HFTokenizer(folder, kept=tuple(range(301))),
        hf.HFTokenizer(str(tmp_path)),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    new_process()
    assert hf.HFTokenizer(folder).fingerprint == first.fingerprint


def test_tokens_of_the_model_that_its_tokenizer_does_not_know_are_no_text(bases):
    """The network may sample them: the matrix of Qwen2, for example, has more rows than its
    tokenizer has tokens."""
    gpt, tokenizer, _ = hf.init_from(settings(bases["llama"]))
    ids = tokenizer.encode("wet")
    assert gpt(torch.tensor([ids])).size(2) == VOCAB > tokenizer.vocab_size == TOKENS
    assert tokenizer.decode([*ids, TOKENS, VOCAB - 1]) == "wet"


# ---- a part of the vocabulary ----


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
@torch.no_grad()
def test_logits_of_a_cut_vocabulary_are_columns_of_all_logits(bases, data, kind):
    """Gemma's output matrix is its embedding, those of the others are not."""
    base = bases[kind]
    gpt, tokenizer, _ = hf.init_from(settings(base, cut_vocab=True, data=str(data)))
    kept = list(gpt.config.kept)
    ids = torch.randint(len(kept), (9,), generator=torch.Generator().manual_seed(0)).tolist()
    hidden, logits = base.forward([kept[i] for i in ids])
    assert 260 < len(kept) == tokenizer.vocab_size < TOKENS
    close(gpt.hidden(torch.tensor([ids]))[0], hidden)
    close(gpt(torch.tensor([ids]))[0], logits[:, kept])
    assert (gpt.lm_head is None) == (kind == "gemma3")
    assert sum(p.numel() for p in gpt.parameters()) == sum(
        p.numel() for p in base.model.parameters()
    ) - ((VOCAB - len(kept)) * 16 * (1 if kind == "gemma3" else 2))


@torch.no_grad()
def test_cut_vocabulary_keeps_the_bias_of_the_output_matrix(texts, tmp_path):
    """Phi has one."""
    base = save_base(tmp_path, "phi", texts)
    kept = tuple(range(3, 300, 2))
    with_special = (BOS, EOS, PAD, *kept)
    model = hf.load_base(str(tmp_path), with_special, False, "float32")
    ids = torch.tensor([[1, 5, 7, 40]])
    expected = base.model(torch.tensor([[with_special[i] for i in ids[0]]])).logits[
        ..., with_special
    ]
    close(model(ids).logits, expected)


def data_set(folder, **prompts):
    """A folder of CSVs: {file: the prompts in it}. A comparison's Chosen is the word " tent"
    without its space."""
    folder.mkdir()
    for name, texts in prompts.items():
        more = {"comparisons": {"Chosen": "tent", "Rejected": "tent"}}.get(name, {})
        write_csv(folder / f"{name}.csv", [{"Prompt": text, **more} for text in texts])
    return str(folder)


def test_used_ids_are_those_of_the_data_set_and_the_bytes(tmp_path):
    """All 256 bytes stay, and the two tokens that bound a text. Of the merged tokens " tent" stays,
    which only a response has, and " wet", which only a held-out file has. " tea" goes."""
    made = make_tokenizer(["a wet tent, a hot tea"] * 9, vocab_size=280)
    made.save_pretrained(tmp_path)
    tokenizer = hf.HFTokenizer(str(tmp_path))
    heldout, response, other = (tokenizer.encode(text) for text in (" wet", " tent", " tea"))
    assert len(heldout) == len(response) == len(other) == 1
    folder = data_set(
        tmp_path / "data", prompts=["hot"], comparisons=["hot"], prompts_heldout=["a wet"]
    )
    got = hf.used_ids(tokenizer, folder)
    assert got == tuple(
        sorted(
            {
                BOS,
                EOS,
                *range(3, 259),
                *tokenizer.encode("hot"),
                *response,
                *heldout,
            }
        )
    )
    assert other[0] not in got


@torch.no_grad()
def test_heldout_loss_of_a_cut_vocabulary_is_that_of_the_whole_but_for_the_tokens_that_went(
    bases, data
):
    """Held-out rows have the model's own tokens. Each has the log-probability that the whole model
    gives it, minus the logarithm of the probability of all kept tokens there."""
    cut, tokenizer, _ = hf.init_from(
        settings(bases["gemma3"], cut_vocab=True, data=str(data), template="none")
    )
    whole = hf.HFTokenizer(str(bases["gemma3"].folder))
    kept = list(cut.config.kept)
    shares = []
    for line in rows(data / "demonstrations_heldout.csv")[:10]:
        theirs = whole.prompt_ids(line["Prompt"]) + whole.response_ids(line["Response"])
        ids = tokenizer.prompt_ids(line["Prompt"]) + tokenizer.response_ids(line["Response"])
        assert [kept[i] for i in ids] == theirs
        logprobs = bases["gemma3"].forward(theirs)[1].log_softmax(dim=1)[:-1]  # (T-1, V)
        share = logprobs[:, kept].exp().sum(dim=1)  # (T-1,)
        expected = logprobs.gather(1, torch.tensor(theirs[1:]).unsqueeze(1)).squeeze(1)
        tokens = torch.tensor([ids])
        close(token_logprobs(cut(tokens), tokens, None)[0], expected - share.log())
        shares.append(share)
    assert 0.1 < torch.cat(shares).min() < 0.9


def test_used_ids_of_a_folder_without_training_files_are_the_bytes(tmp_path):
    """The error that says so comes from loading the demonstrations."""
    make_tokenizer(["a wet tent, a hot tea"] * 9, vocab_size=280).save_pretrained(tmp_path)
    got = hf.used_ids(hf.HFTokenizer(str(tmp_path)), str(tmp_path / "nowhere"))
    assert got == (BOS, EOS, *range(3, 259))


def test_special_tokens_that_the_embedding_has_no_row_for_are_not_kept(bases, data, tmp_path):
    """Gemma 3's tokenizer has one for images, and its text models have no such row."""
    folder = shutil.copytree(bases["gemma3"].folder, tmp_path / "base")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens(
        {"additional_special_tokens": [f"<image{i}>" for i in range(VOCAB - TOKENS + 1)]}
    )
    theirs.save_pretrained(folder)
    assert max(transformers.AutoTokenizer.from_pretrained(folder).all_special_ids) == VOCAB
    kept = network(Base(folder), cut_vocab=True, data=str(data)).config.kept
    assert kept == network(bases["gemma3"], cut_vocab=True, data=str(data)).config.kept


def test_an_added_token_of_spaces_is_spelled_in_bytes(tmp_path):
    """As Pythia's tokenizer has them for runs of spaces. It writes them as they are, not as Ġ."""
    made = make_tokenizer(["a wet tent, a hot tea"] * 9, vocab_size=280)
    others = tuple(range(len(made)))
    made.add_tokens([" \n\t "])
    made.save_pretrained(tmp_path)
    tokenizer = hf.HFTokenizer(str(tmp_path), kept=others)
    assert hf.HFTokenizer(str(tmp_path)).encode("a \n\t a")[1] == len(others)
    assert tokenizer.encode("a \n\t a") == [made.get_vocab()[byte] for byte in "aĠĊĉĠa"]
    assert tokenizer.decode(tokenizer.encode("a \n\t a")) == "a \n\t a"


def test_a_token_that_is_not_kept_is_spelled_in_bytes(tmp_path):
    """In a byte-level vocabulary: " wet" is one token, then the four of its bytes, of which the
    space is written Ġ."""
    made = make_tokenizer(["a wet tent, a hot tea"] * 9, vocab_size=280)
    made.save_pretrained(tmp_path)
    vocab, every = made.get_vocab(), hf.HFTokenizer(str(tmp_path))
    old = every.encode(" wet")
    assert len(old) == 1
    kept = tuple(i for i in range(every.vocab_size) if i != old[0])
    tokenizer = hf.HFTokenizer(str(tmp_path), kept=kept)
    assert [kept[i] for i in tokenizer.encode("a wet")] == [vocab[byte] for byte in "aĠwet"]
    for text in ("a wet tent", *TEXTS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def byte_fallback(folder):
    """A vocabulary as SentencePiece makes them: special tokens, 256 bytes, letters, and merges of
    letters."""
    letters = ["\u2581", *"wetnü"]
    merges = [("e", "t"), ("w", "et"), ("\u2581", "wet"), ("e", "n"), ("ü", "et")]
    vocab = [
        "<bos>",
        "<eos>",
        "<pad>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *(a + b for a, b in merges),
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(vocab)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    with_special_tokens(tokenizer, begin=True).save_pretrained(folder)
    return {token: i for i, token in enumerate(vocab)}


def test_a_token_that_is_not_kept_is_spelled_in_a_vocabulary_with_byte_fallback(tmp_path):
    """ " wet" and "üet" are one token each. The bytes of ü are C3 BC, and 20 is a space."""
    vocab = byte_fallback(tmp_path)
    assert hf.HFTokenizer(str(tmp_path)).encode(" wetüetx") == [
        vocab["\u2581wet"],
        vocab["üet"],
        vocab["<0x78>"],
    ]  # x is no letter of the vocabulary
    folder = data_set(tmp_path / "data", prompts=["et", "n"])
    kept = hf.used_ids(hf.HFTokenizer(str(tmp_path)), folder)
    assert kept == (
        BOS,
        EOS,
        *range(4, 260),
        *sorted(vocab[token] for token in ("et", "n")),
    )
    tokenizer = hf.HFTokenizer(str(tmp_path), kept=kept)
    expected = [f"<0x{byte}>" for byte in ("20", "77", "65", "74", "C3", "BC", "65", "74", "78")]
    assert [kept[i] for i in tokenizer.encode(" wetüetx")] == [vocab[token] for token in expected]
    for text in (" wet üet", "wet  tenet", *TEXTS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- adapters ----

ADAPTERS = {
    f"trunk.layers.{layer}.{name}.{matrix}"
    for layer in (0, 1)
    for name in LINEAR
    for matrix in "AB"
}
SCALES = {f"trunk.layers.{layer}.{name}.scale" for layer in (0, 1) for name in LINEAR}
ROW = [5, 80, 300, 7, 7, 41]


def with_gradient(gpt):
    return {name for name, p in gpt.named_parameters() if p.grad is not None and p.grad.any()}


def test_only_adapters_are_trained(bases):
    """Rank 2 has 2 * (in + out) numbers a matrix: 64 for q and o, 48 for k and v, 80 for each of
    the three of the MLP. Two layers have 928. The output matrix has no adapter."""
    gpt = adapted(network(bases["llama"], lora_rank=2))
    gpt(torch.tensor([ROW])).square().mean().backward()
    trained = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    assert trained.keys() == ADAPTERS == with_gradient(gpt)
    assert sum(p.numel() for p in trained.values()) == 928
    assert not isinstance(gpt.lm_head, LoRALinear)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_new_adapters_leave_the_logits_of_transformers_unchanged(bases, kind):
    """B is 0. With another B they change."""
    gpt, (_, logits) = network(bases[kind], lora_rank=2), bases[kind].forward(ROW)
    assert not any(p.any() for name, p in gpt.named_parameters() if name.endswith(".B"))
    close(gpt(torch.tensor([ROW]))[0], logits)
    assert (adapted(gpt)(torch.tensor([ROW]))[0] - logits).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "scale"), [(16.0, 8), (5.0, 2.5)])
def test_an_adapter_adds_alpha_over_rank_times_b_a(bases, alpha, scale):
    """The network is the one of transformers with W + scale B A in place of each W."""
    gpt = adapted(network(bases["llama"], lora_rank=2, lora_alpha=alpha))
    changed = make_model("llama")
    for name, module in gpt.named_modules():
        if isinstance(module, LoRALinear):
            changed.get_submodule(name.replace("trunk", "model")).weight += (
                scale * module.B @ module.A
            )
    expected = Base(Path(), changed).forward(ROW)[1]
    close(gpt(torch.tensor([ROW]))[0], expected)


def test_networks_with_adapters_share_the_weights_of_the_base(bases):
    """Each has adapters of its own. Without adapters, each has its own weights, and trains them."""
    one, other, full, another = (
        dict(network(bases["llama"], lora_rank=rank).named_parameters()) for rank in (2, 2, 0, 0)
    )
    for name, parameter in one.items():
        assert (parameter.data_ptr() == other[name].data_ptr()) == (name not in ADAPTERS), name
    assert full.keys() == another.keys() and all(p.requires_grad for p in full.values())
    assert not {p.data_ptr() for p in full.values()} & {
        p.data_ptr() for p in [*another.values(), *one.values()]
    }


@pytest.mark.parametrize("rank", [0, 2])
def test_frozen_copy_keeps_its_output_while_the_network_trains(bases, rank):
    """With adapters it shares the base's weights. Without, it has a copy of all."""
    gpt = with_adapters(adapted(network(bases["gemma3"], lora_rank=rank)), lora(rank), None)
    frozen = frozen_copy(gpt)
    tokens = torch.tensor([ROW])
    before = frozen(tokens)
    assert torch.equal(before, gpt(tokens)) and not any(
        p.requires_grad for p in frozen.parameters()
    )
    gpt(tokens).square().mean().backward()
    torch.optim.SGD([p for p in gpt.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(frozen(tokens), before) and not torch.allclose(
        gpt(tokens), before, atol=1e-3
    )
    shared = {p.data_ptr() for p in gpt.parameters()} & {p.data_ptr() for p in frozen.parameters()}
    assert shared == {p.data_ptr() for p in gpt.parameters() if not p.requires_grad} and bool(
        shared
    ) == bool(rank)


def prefixed(prefix, names):
    return {f"{prefix}.{name}" for name in names}


def test_state_dict_holds_adapters_and_heads_only(bases):
    gpt, other = (network(bases["llama"], lora_rank=2) for _ in range(2))
    own = ADAPTERS | SCALES
    assert gpt.state_dict().keys() == own
    assert RewardModel(gpt).state_dict().keys() == prefixed("gpt", own) | {
        "head.weight",
        "head.bias",
        "mean",
        "scale",
    }
    assert PolicyWithValue(gpt, other).state_dict().keys() == prefixed("gpt", own) | prefixed(
        "value_gpt", own
    ) | {"value_head.weight", "value_head.bias"}


@dataclass(frozen=True)
class Config(TrainConfig):
    kind: str = "sft"
    temperature: float = 1.0


def save_finished(folder, kind, model, temperature=1.0):
    """The finished checkpoint of a run of one step."""
    cfg = Config(out=str(folder), kind=kind, temperature=temperature)
    optimizer = torch.optim.SGD(model.parameters())
    network = getattr(model, "gpt", model)
    tokenizer = hf.HFTokenizer(network.config.init, "none", kept=network.config.kept)
    run = Training(cfg, model, optimizer, None, tokenizer, {})
    run.rows = [{"step": 1}]
    run.save(1)
    return run.path


@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_loaded_checkpoints_give_exactly_the_same_logits_and_scores(
    bases, tmp_path, rank, new_process
):
    tokens, lengths = torch.tensor([ROW]), torch.tensor([6])
    sft, policy, reward, value = (
        adapted(network(bases["gemma3"], lora_rank=rank), seed) for seed in range(4)
    )
    policy.temperature = 0.5
    model, ppo = RewardModel(reward), PolicyWithValue(policy, value)
    for parameter in (model.head.weight, model.mean, ppo.value_head.weight):
        parameter.fill_(0.7)
    expected = sft(tokens), policy(tokens), model(tokens, lengths)
    save_finished(tmp_path, "sft", sft)
    save_finished(tmp_path, "ppo", ppo, temperature=0.5)
    save_finished(tmp_path, "reward", model)
    new_process()
    (sft, checkpoint), (policy, _) = (
        load_policy(tmp_path / f"{name}.pt", name) for name in ("sft", "ppo")
    )
    model, _ = load_reward_model(tmp_path / "reward.pt")
    assert all(map(torch.equal, (sft(tokens), policy(tokens), model(tokens, lengths)), expected))
    assert len({float(x.sum()) for x in expected[:2]}) == 2
    tokenizer = tokenizer_of(tmp_path / "sft.pt", checkpoint, "")
    assert tokenizer.encode(TEXTS[0]) == hf.HFTokenizer(str(bases["gemma3"].folder)).encode(
        TEXTS[0]
    )


def test_adapters_of_sft_stay_and_another_rank_or_alpha_is_refused(bases, tmp_path):
    """The later scripts need no flags."""
    path = save_finished(tmp_path, "sft", network(bases["llama"], lora_rank=2, lora_alpha=32.0))
    gpt, _ = load_policy(path, "sft")
    flags = SimpleNamespace(steps=1, lora_rank=0, lora_alpha=16.0)
    assert with_adapters(gpt, flags, None) is gpt
    assert add_adapters(gpt, 2, None) is gpt and add_adapters(gpt, 2, None, 32.0) is gpt
    text = "and sft.pt has adapters of rank 2 and alpha 32; leave the flags out"
    with pytest.raises(InputError, match=f"^--lora-rank 4 --lora-alpha 16, {text}"):
        add_adapters(gpt, 4, None)
    with pytest.raises(InputError, match="^--lora-rank 2 --lora-alpha 8, and"):
        add_adapters(gpt, 2, None, 8.0)


# ---- 4 bits ----


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install .[hf]"
    )


def in_nf4(model, bitsandbytes):
    """The model of transformers with each weight of its blocks rounded to NF4, in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.base_model.modules():
            if isinstance(layer, (nn.Linear, transformers.pytorch_utils.Conv1D)):
                linear = isinstance(layer, nn.Linear)
                weight = layer.weight if linear else layer.weight.t()
                packed, state = bitsandbytes.functional.quantize_4bit(
                    weight.contiguous(), compress_statistics=True, quant_type="nf4"
                )
                rounded = bitsandbytes.functional.dequantize_4bit(packed, state)
                layer.weight.copy_(rounded if linear else rounded.t())
    return Base(Path(), model)


@torch.no_grad()
def test_logits_in_4_bits_are_those_of_the_rounded_weights(bases, bitsandbytes, new_process):
    """With adapters and without."""
    new_process()
    expected = in_nf4(bases["wide"].model, bitsandbytes).forward(ROW)[1]
    for rank in (0, 2):
        gpt = network(bases["wide"], lora_rank=rank, load_in_4bit=True)
        close(gpt(torch.tensor([ROW]))[0], expected)


def test_4_bits_of_a_gguf_file_are_refused(bases, tmp_path):
    write_gguf(bases["wide"], tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match="4bit needs a folder .* GGUF file .*tiny.gguf in full"):
        network(bases["wide"], init=str(tmp_path / "tiny.gguf"), load_in_4bit=True)


def test_linear_layers_are_held_in_4_bits(bases, bitsandbytes):
    """NF4 with double quantisation, computed in float32. Embedding and output matrix stay as they
    are. The weights are near those of transformers: within half of the widest gap between two of
    NF4's 16 levels, 0.30 of the largest of 64 weights, and its scale has 8 bits."""
    gpt = network(bases["wide"], lora_rank=2, load_in_4bit=True)
    layers = {
        name: module.linear
        for name, module in gpt.named_modules()
        if isinstance(module, LoRALinear)
    }
    assert {f"{name}.{matrix}" for name in layers for matrix in "AB"} == ADAPTERS
    for name, layer in layers.items():
        assert type(layer) is bitsandbytes.nn.Linear4bit and layer.weight.dtype == torch.uint8
        # In eval mode no gradient passes on CPUs with AVX-512. The weight has its quant_state, and
        # a copy of the layer would copy another.
        assert layer.training and layer.quant_state is None
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features  # two in a byte
        weight = bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        theirs = bases["wide"].model.get_submodule(name.replace("trunk", "model")).weight.detach()
        assert 0 < (weight - theirs).abs().max() < 0.18 * theirs.abs().max(), name
    assert type(gpt.lm_head) is nn.Linear and gpt.lm_head.weight.dtype == torch.float32


def test_in_4_bits_outputs_are_close_and_only_adapters_get_gradients(bases, bitsandbytes):
    gpt, (_, expected) = (
        network(bases["wide"], lora_rank=2, load_in_4bit=True),
        bases["wide"].forward(ROW),
    )
    logits = gpt(torch.tensor([ROW]))[0]
    assert 0 < (logits - expected).std() < 0.5 * expected.std()
    adapted(gpt)(torch.tensor([ROW])).square().mean().backward()
    assert with_gradient(gpt) == ADAPTERS


def test_rows_that_are_no_multiple_of_64_are_not_held_in_4_bits(bases, bitsandbytes):
    gpt, (_, expected) = (
        network(bases["llama"], lora_rank=2, load_in_4bit=True),
        bases["llama"].forward(ROW),
    )
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in gpt.modules())
    assert_close(gpt(torch.tensor([ROW]))[0], expected, atol=1e-4, rtol=0)


def test_networks_in_4_bits_share_the_base_without_adapters_too(bases, bitsandbytes):
    """There is nothing to train in it, and nothing to save."""
    gpt, other = (network(bases["wide"], load_in_4bit=True) for _ in range(2))
    places = [[p.data_ptr() for p in each.parameters()] for each in (gpt, other)]
    assert places[0] == places[1] and not any(p.requires_grad for p in gpt.parameters())
    assert gpt.state_dict() == {}


# ---- a base in bfloat16 ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_base_in_bfloat16_has_the_logits_of_transformers_in_bfloat16(bases, kind):
    """With new adapters, which are in float32 and leave them unchanged."""
    gpt = network(bases[kind], lora_rank=2, base_dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        bases[kind].folder, dtype=torch.bfloat16
    )
    expected = model(torch.tensor([ROW])).logits
    assert expected.dtype == torch.bfloat16
    assert torch.equal(gpt(torch.tensor([ROW])), expected)
    for name, parameter in gpt.named_parameters():
        adapter = name.endswith((".A", ".B"))
        assert parameter.dtype == (torch.float32 if adapter else torch.bfloat16), name
    assert (adapted(gpt)(torch.tensor([ROW])) - expected).abs().max() > 0.01


def test_in_bfloat16_heads_and_logprobs_are_in_float32_and_only_adapters_get_gradients(bases):
    gpt = adapted(network(bases["llama"], lora_rank=2, base_dtype="bfloat16"))
    policy, tokens = PolicyWithValue(gpt), torch.tensor([ROW])
    logits, values = policy(tokens)
    logprobs = token_logprobs(logits, tokens)
    scores = RewardModel(gpt)(tokens, torch.tensor([6]))
    assert {x.dtype for x in (values, logprobs, scores)} == {torch.float32}
    logprobs.sum().backward()
    assert with_gradient(gpt) == ADAPTERS


@torch.no_grad()
def test_4_bits_compute_in_the_dtype_of_the_base(bases, bitsandbytes):
    gpt = network(bases["wide"], lora_rank=2, load_in_4bit=True, base_dtype="bfloat16")
    layer = gpt.trunk.layers[0].mlp.up_proj.linear
    assert (layer.weight.dtype, layer.compute_dtype) == (torch.uint8, torch.bfloat16)
    assert gpt.trunk.embed_tokens.weight.dtype == torch.bfloat16
    expected = in_nf4(bases["wide"].model, bitsandbytes).forward(ROW)[1]
    difference = gpt(torch.tensor([ROW]))[0].float() - expected
    assert 0 < difference.std() < 0.2 * expected.std()


def test_config_of_an_older_checkpoint_is_in_float32():
    assert hf.HFConfig("model", 2, False, ()).base_dtype == "float32"


# ---- GPT-2 in transformers ----


@torch.no_grad()
def test_adapters_of_a_gpt2_are_on_its_layers(bases):
    """Conv1D, which holds W transposed, has become nn.Linear: the network is that of transformers
    with W + scale B A."""
    gpt = adapted(network(bases["gpt2"], lora_rank=2))
    changed, layers = copy.deepcopy(bases["gpt2"].model), set()
    for name, module in gpt.named_modules():
        if isinstance(module, LoRALinear):
            layers.add(name.removeprefix("trunk.h.0."))
            weight = changed.get_submodule(name.replace("trunk", "transformer")).weight
            weight += 8 * (module.B @ module.A).t()
    assert layers == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    close(gpt(torch.tensor([ROW]))[0], Base(Path(), changed).forward(ROW)[1])


@torch.no_grad()
def test_a_gpt2_in_a_gguf_file_gets_adapters(texts, tmp_path):
    """Such a file holds W as nn.Linear does, and transformers does not read its context."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install .[hf]")
    config = transformers.GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=1, n_head=2)
    base = Base(tmp_path / "base", transformers.GPT2LMHeadModel(config).eval())
    make_tokenizer(texts).save_pretrained(base.folder)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gpt2")
    writer.add_block_count(1)
    writer.add_embedding_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    add_tokenizer(writer, base.folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 1)
    for name, weight in base.model.transformer.state_dict(prefix="transformer.").items():
        if ".c_" in name and name.endswith("weight"):
            weight = weight.t()
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, weight.contiguous().numpy())
    write(writer)
    gpt, _, _ = start_from(settings(base, init=str(tmp_path / "tiny.gguf"), lora_rank=2))
    assert isinstance(gpt.trunk.h[0].mlp.c_fc, LoRALinear) and gpt.config.block_size == 1024
    close(gpt(torch.tensor([ROW]))[0], base.forward(ROW)[1])


@torch.no_grad()
def test_a_gpt2_in_4_bits_has_the_logits_of_the_rounded_weights(texts, bitsandbytes, tmp_path):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    )
    model.save_pretrained(tmp_path)
    make_tokenizer(texts).save_pretrained(tmp_path)
    gpt = network(Base(tmp_path), load_in_4bit=True)
    assert isinstance(gpt.trunk.h[0].attn.c_attn, bitsandbytes.nn.Linear4bit)
    close(gpt(torch.tensor([ROW]))[0], in_nf4(model.eval(), bitsandbytes).forward(ROW)[1])


# ---- the scripts ----

SCRIPTS = {
    "sft": (train_sft, train_sft.SFTConfig),
    "reward": (train_reward, train_reward.RewardConfig),
    "ppo": (train_ppo, train_ppo.PPOConfig),
}
RUNS = {
    "full": [],
    "adapters": ["--lora-rank", "2"],
    "four_bit": ["--lora-rank", "2", "--load-in-4bit", "--cut-vocab"],
    "bfloat16": ["--lora-rank", "2", "--base-dtype", "bfloat16"],
}


def train(name, data, out, *flags):
    """Run a script in this process, with its tiny flags but for the sizes, which come with
    --init."""
    module, config = SCRIPTS[name]
    tiny = "--steps" + TINY[name].split("--steps")[1]
    module.main(
        parse_cli(
            config,
            [
                "--device",
                "cpu",
                *tiny.split(),
                "--data",
                str(data),
                "--out",
                str(out),
                *map(str, flags),
            ],
        )
    )


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def finished(bases, data, tmp_path_factory):
    """A function: the folder of the three scripts with the flags of one of RUNS. Each runs once."""
    folders = {}

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            base = bases["wide" if name == "four_bit" else "llama"]
            train("sft", data, folders[name], "--init", base.folder, *RUNS[name])
            for script in ("reward", "ppo"):
                train(script, data, folders[name], *RUNS[name][:2])
        return folders[name]

    return run


@pytest.fixture(params=RUNS)
def run(request, finished):
    """The folder of a run."""
    if request.param == "four_bit":
        request.getfixturevalue("bitsandbytes")
    return SimpleNamespace(name=request.param, folder=finished(request.param))


def test_facts_of_the_first_step_hold(run):
    """The loss of the reward model is ln 2, the policy is its reference, and old and new policy are
    the same. Later the policy has left the reference."""
    assert float(rows(run.folder / "reward.csv")[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    ppo = rows(run.folder / "ppo.csv")
    assert abs(float(ppo[0]["kl_ref"])) < 1e-4 < abs(float(ppo[-1]["kl_ref"]))
    assert all(float(row["first_log_ratio"]) < 1e-4 for row in ppo)


@torch.no_grad()
def test_first_loss_of_fine_tuning_is_that_of_transformers(finished, bases, data):
    """With adapters: they are 0 at first. The mean over the response tokens of the first batch's
    rows."""
    base, lines = bases["llama"], rows(data / "demonstrations.csv")
    encode = transformers.AutoTokenizer.from_pretrained(base.folder).backend_tokenizer.encode
    losses = []
    for i in batch_indices(len(lines), 8, step=0, seed=0):
        prompt = encode(lines[i]["Prompt"]).ids  # with begin-of-text
        response = encode(" " + lines[i]["Response"].strip(), add_special_tokens=False).ids
        logprobs = base.forward([*prompt, *response, EOS])[1].log_softmax(dim=1)
        losses += [
            -logprobs[len(prompt) - 1 + t, token] for t, token in enumerate([*response, EOS])
        ]
    expected = torch.stack(losses).mean().item()
    assert float(rows(finished("adapters") / "sft.csv")[0]["loss"]) == pytest.approx(
        expected, abs=1e-4
    )


def test_finished_checkpoints_with_adapters_hold_no_base_weights(run):
    """Without adapters they hold all weights. A cut vocabulary is in the config."""
    kept = saved(run.folder / "sft.pt")["model_config"]["kept"]
    assert (260 < len(kept) < TOKENS) if run.name == "four_bit" else kept == ()
    for name, networks in (("sft", [""]), ("reward", ["gpt."]), ("ppo", ["gpt.", "value_gpt."])):
        checkpoint = saved(run.folder / f"{name}.pt")
        small = {prefix + weight for prefix in networks for weight in ADAPTERS | SCALES}
        heads = {
            "sft": set(),
            "reward": {"head.weight", "head.bias", "mean", "scale"},
            "ppo": {"value_head.weight", "value_head.bias"},
        }[name]
        if run.name == "full":
            assert checkpoint["model"].keys() > heads | {
                prefix + "lm_head.weight" for prefix in networks
            }
        else:
            assert checkpoint["model"].keys() == small | heads
        assert "optimizer" not in checkpoint


def test_each_stage_starts_from_the_adapters_before_it(finished, data):
    """Policy and reference from those of sft.pt, the value network from those of reward.pt. All
    share the base."""
    folder = finished("adapters")
    cfg = parse_cli(
        train_ppo.PPOConfig, ["--data", str(data), "--out", str(folder), "--lora-rank", "2"]
    )
    policy, frozen, _ = train_ppo.load_models(cfg, setup("cpu", "off"))
    sft, reward = (saved(folder / f"{name}.pt")["model"] for name in ("sft", "reward"))
    assert any(sft[name].any() for name in ADAPTERS if name.endswith(".B"))
    for name in ADAPTERS:
        assert torch.equal(policy.gpt.state_dict()[name], sft[name])
        assert torch.equal(frozen.reference.state_dict()[name], sft[name])
        assert torch.equal(policy.value_gpt.state_dict()[name], reward[f"gpt.{name}"])
        assert torch.equal(frozen.reward_model.gpt.state_dict()[name], reward[f"gpt.{name}"])
    networks = policy.gpt, policy.value_gpt, frozen.reference, frozen.reward_model.gpt
    for name in dict(policy.gpt.named_parameters()):
        places = {gpt.get_parameter(name).data_ptr() for gpt in networks}
        assert len(places) == (4 if name in ADAPTERS else 1), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_resumed_run_equals_the_uninterrupted_run(
    finished, bases, data, tmp_path, new_process, name
):
    """Bit for bit. The unfinished checkpoint holds no weights of the base either."""
    folder = finished("adapters")
    flags = {
        "sft": ["--init", bases["llama"].folder],
        "reward": ["--sft", folder / "sft.pt"],
        "ppo": ["--sft", folder / "sft.pt", "--reward", folder / "reward.pt"],
    }[name]
    new_process()
    with stopped_by_its_first_checkpoint():
        train(name, data, tmp_path, "--lora-rank", 2, *flags)
    unfinished = saved(tmp_path / f"{name}.pt")
    assert (
        unfinished["step"] < unfinished["config"]["steps"]
        and len(unfinished["optimizer"]["state"]) > 0
    )
    ends = (".A", ".B", ".scale", "head.weight", "head.bias", "mean", "scale")
    assert all(weight.endswith(ends) for weight in unfinished["model"])
    new_process()
    train(name, data, tmp_path, "--lora-rank", 2, *flags, "--resume")
    whole, resumed = (saved(out / f"{name}.pt")["model"] for out in (folder, tmp_path))
    assert whole.keys() == resumed.keys() and all(
        torch.equal(whole[key], resumed[key]) for key in whole
    )
    assert any(not torch.equal(whole[key], weight) for key, weight in unfinished["model"].items())


def test_programs_run_on_the_result(run, data, tmp_path, capsys):
    """In a folder that has been moved, too."""
    folder = shutil.copytree(run.folder, tmp_path / "moved")
    sample.main(
        parse_cli(
            sample.SampleConfig,
            [
                "--device",
                "cpu",
                "--data",
                str(data),
                "--checkpoint",
                str(folder / "sft.pt"),
                str(folder / "ppo.pt"),
                "--prompt",
                "Hello?",
                "--max-new-tokens",
                "5",
                "--n",
                "2",
            ],
        )
    )
    shown = capsys.readouterr().out
    assert [
        shown.count(text)
        for text in (f"{folder / 'sft.pt'}: ", f"{folder / 'ppo.pt'}: ", "(score ")
    ] == [2, 2, 4]
    optimality.main(
        parse_cli(
            optimality.OptimalityConfig,
            [
                "--device",
                "cpu",
                "--data",
                str(data),
                "--checkpoint",
                str(folder / "ppo.pt"),
                "--prompts",
                "2",
                "--samples",
                "4",
            ],
        )
    )
    assert [row["policy"] for row in rows(folder / "evaluation.csv")] == [
        "sft",
        "ppo",
        "best_of_n",
        "optimum",
    ]


@torch.no_grad()
def test_a_model_in_4_bits_can_be_sampled_without_adapters(
    bases, bitsandbytes, data, tmp_path, capsys, error
):
    """train_sft.py --steps 0 writes it, without its weights. There is nothing to train."""
    init = ["--init", bases["wide"].folder, "--load-in-4bit", "--steps", 0]
    train("sft", data, tmp_path, *init)
    path = tmp_path / "sft.pt"
    assert saved(path)["model"] == {}
    gpt, _ = load_policy(path, "sft")
    expected = in_nf4(bases["wide"].model, bitsandbytes).forward(ROW)[1]
    close(gpt(torch.tensor([ROW]))[0], expected)
    capsys.readouterr()
    flags = ["--checkpoint", str(path), "--prompt", "Hello?", "--max-new-tokens", "5"]
    sample.main(parse_cli(sample.SampleConfig, ["--device", "cpu", "--data", str(data), *flags]))
    assert f"{path}: " in capsys.readouterr().out
    for rank in (0, 2):
        for name in ("reward", "ppo"):
            module, config = SCRIPTS[name]
            flags = ["--data", data, "--out", tmp_path, "--lora-rank", rank]
            if name == "ppo":
                (tmp_path / "rule.py").write_text("def score(p, r): return [0.0] * len(r)\n")
                flags += ["--reward", tmp_path / "rule.py"]
            text = error(module.main, config, *flags)
            assert "nothing to train: the model is in 4 bits and has no adapters; run " in text


def test_the_scripts_print_which_layers_are_trained(finished, bases, data, tmp_path, capsys):
    """With adapters of rank 2: see test_only_adapters_are_trained. A head of 16 and a bias more in
    the other two. PPO trains policy and value network."""
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    folder = finished("adapters")
    lines = {
        "sft": f"LoRA trains 928 numbers, with adapters in {layers}\n",
        "reward": f"LoRA trains 945 numbers, with adapters in {layers}\n",
        "ppo": f"LoRA trains 1,873 numbers, with adapters in {layers}\n",
    }
    flags = {
        "sft": ["--init", bases["llama"].folder],
        "reward": ["--sft", folder / "sft.pt"],
        "ppo": ["--sft", folder / "sft.pt", "--reward", folder / "reward.pt"],
    }
    for name, line in lines.items():
        capsys.readouterr()
        with stopped_by_its_first_checkpoint():
            train(name, data, tmp_path, "--lora-rank", 2, *flags[name])
        assert capsys.readouterr().out.count(line) == 1


# ---- errors ----


@pytest.fixture
def error(monkeypatch, capsys, data, tmp_path):
    """A function: the one line that a program ends with, with exit status 2."""

    def of(main, config, *flags):
        monkeypatch.setattr(sys, "argv", ["program", "--device", "cpu", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            program.run(main, config)
        text = capsys.readouterr().err
        assert stop.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
        return text

    return of


@pytest.fixture
def sft_error(error, data, tmp_path, new_process):
    """error, of train_sft.py."""
    new_process()
    return lambda *flags: error(
        train_sft.main, train_sft.SFTConfig, "--data", data, "--out", tmp_path / "out", *flags
    )


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf"])
def test_init_that_does_not_exist_is_named(sft_error, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"--init {tmp_path / name} cannot be loaded: " in sft_error("--init", tmp_path / name)


def test_init_that_is_neither_a_folder_nor_on_this_machine_is_named(sft_error, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = sft_error("--init", "nobody/no-such-model")
    assert "--init nobody/no-such-model cannot be loaded: " in text and "a model's folder" in text


def test_folder_with_a_pytorch_model_bin_is_read_by_transformers_unless_it_is_gpt2(bases, tmp_path):
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    torch.save(bases["llama"].model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    gpt, tokenizer, inputs = start_from(settings(Base(folder)))
    close(gpt(torch.tensor([ROW]))[0], bases["llama"].forward(ROW)[1])
    assert isinstance(tokenizer, hf.HFTokenizer) and "init pytorch_model.bin" in inputs


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_init_with_a_file_that_is_cut_short_is_named(sft_error, bases, tmp_path, name):
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    (folder / name).write_bytes((folder / name).read_bytes()[:300])
    assert f"--init {folder} cannot be loaded: " in sft_error("--init", folder)


CODE = """
import pathlib
pathlib.Path("MARK").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""
OWN_CODE = {  # what auto_map may name, by the file that it stands in
    "config.json": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
}


@pytest.mark.parametrize("file", OWN_CODE)
@pytest.mark.parametrize("answer", ["y", "n"])
def test_code_in_the_folder_of_a_model_is_neither_run_nor_asked_about(
    sft_error, bases, tmp_path, monkeypatch, file, answer
):
    """transformers would ask at the terminal, and run it if the answer is y."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    (folder / "code.py").write_text(CODE.replace("MARK", str(tmp_path / "ran")))
    config = json.loads((folder / file).read_text())
    config |= {"auto_map": OWN_CODE[file], "model_type": "own", "tokenizer_class": "Own"}
    (folder / file).write_text(json.dumps(config))
    assert "needs Python code that comes with the model" in sft_error("--init", folder)
    assert not asked and not (tmp_path / "ran").exists()


def test_code_for_a_class_that_transformers_has_is_not_run(bases, tmp_path, new_process):
    """The class of transformers is taken."""
    new_process()
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    (folder / "code.py").write_text(CODE.replace("MARK", str(tmp_path / "ran")))
    for file, names in OWN_CODE.items():
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, "auto_map": names}))
    gpt = network(Base(folder))
    close(gpt(torch.tensor([ROW]))[0], bases["llama"].forward(ROW)[1])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer", "gpt2"], "brings its own tokenizer; leave out --tokenizer gpt2"),
        (["--load-in-4bit"], "--load-in-4bit needs --lora-rank to train"),
        (["--base-dtype", "bfloat16"], "bfloat16 needs --lora-rank or --load-in-4bit"),
    ],
)
def test_flags_that_do_not_fit_init_are_refused(sft_error, bases, flags, message):
    assert re.search(message, sft_error("--init", bases["llama"].folder, *flags))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma2", "Gemma2ForCausalLM"),  # capped by tanh
        ("cohere", "CohereForCausalLM"),  # multiplied by logit_scale
        ("lfm2", "Lfm2ForCausalLM"),  # its convolutions keep no keys and values
        ("bloom", "BloomModel"),  # has no limit: its config does not name one
    ],
)
def test_model_of_another_kind_is_refused(sft_error, texts, tmp_path, kind, name):
    base = save_base(tmp_path / kind, kind, texts)
    text = sft_error("--init", base.folder, "--lora-rank", 0)
    assert f"--init {base.folder}" in text and f"cannot use this {name}" in text


def test_model_whose_weights_are_quantised_already_is_refused(
    sft_error, bases, bitsandbytes, tmp_path
):
    folder = shutil.copytree(bases["wide"].folder, tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        device_map="cpu",
    ).save_pretrained(folder)
    text = sft_error("--init", folder, "--lora-rank", 2)
    assert f"--init {folder}: " in text and "cannot use this LlamaForCausalLM; needed:" in text


@torch.no_grad()
def test_heads_read_as_many_channels_as_the_output_matrix(texts, tmp_path):
    gpt = network(save_base(tmp_path, "opt", texts))
    assert gpt.config.n_embd == 8
    assert RewardModel(gpt)(torch.tensor([ROW]), torch.tensor([6])).shape == (1,)


def test_tokenizer_without_end_of_text_is_refused(sft_error, bases, texts, tmp_path):
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    make_tokenizer(texts, eos=None).save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # may name one too
    assert f"--init {folder}: the tokenizer names no end-of-text token" in sft_error(
        "--init", folder
    )


@pytest.mark.parametrize("name", ["transformers", "bitsandbytes"])
def test_missing_package_is_named_with_the_command_that_installs_it(
    sft_error, bases, monkeypatch, name
):
    find = importlib.import_module

    def without(wanted, *args):
        if wanted == name:
            raise ImportError(f"No module named '{name}'")
        return find(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    text = sft_error("--init", bases["wide"].folder, "--lora-rank", 2, "--load-in-4bit")
    assert f"needs the package {name}: pip install .[hf]" in text


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_scripts_refuse_another_rank(error, finished, data, tmp_path, name):
    module, config = SCRIPTS[name]
    folder = finished("adapters")
    text = error(
        module.main,
        config,
        "--data",
        data,
        "--out",
        tmp_path,
        "--sft",
        folder / "sft.pt",
        "--lora-rank",
        4,
        *(["--reward", folder / "reward.pt"] if name == "ppo" else []),
    )
    assert "and sft.pt has adapters of rank 2 and alpha 16; leave the flags out" in text


def test_base_that_is_gone_is_named(error, bases, data, tmp_path, new_process):
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    path = save_finished(tmp_path, "sft", network(Base(folder), lora_rank=2))
    shutil.rmtree(folder)
    new_process()
    for module, config, *flags in (
        (sample, sample.SampleConfig, "--checkpoint", path, "--prompt", "Hi"),
        (train_reward, train_reward.RewardConfig, "--sft", path, "--out", tmp_path / "out"),
    ):
        assert f"{folder} cannot be loaded: " in error(module.main, config, "--data", data, *flags)


def test_tokenizer_of_the_base_that_has_changed_is_noticed(bases, texts, tmp_path, new_process):
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    path = save_finished(tmp_path, "sft", network(Base(folder), lora_rank=2))
    checkpoint = saved(path)
    assert tokenizer_of(path, checkpoint, "").fingerprint == checkpoint["tokenizer"]
    make_tokenizer(texts, vocab_size=TOKENS - 1).save_pretrained(folder)
    new_process()
    with pytest.raises(InputError, match="sft.pt was trained with another tokenizer"):
        tokenizer_of(path, checkpoint, "")


def test_checkpoint_that_has_moved_is_named(error, tmp_path):
    text = error(
        sample.main,
        sample.SampleConfig,
        "--checkpoint",
        tmp_path / "gone" / "ppo.pt",
        "--prompt",
        "Hi",
    )
    path = tmp_path / "gone" / "ppo.pt"
    message = "does not exist; run `python train_sft.py` or `python train_ppo.py` first"
    assert f"{path} {message}" in text


def test_resume_with_another_base_is_refused(bases, data, tmp_path, new_process):
    """The digests of the folder's files are among what a run is made from."""
    folder = shutil.copytree(bases["llama"].folder, tmp_path / "base")
    with stopped_by_its_first_checkpoint():
        train("sft", data, tmp_path, "--lora-rank", 2, "--init", folder)
    other = make_model("llama")
    nn.init.ones_(other.model.norm.weight)
    other.save_pretrained(folder)
    new_process()
    with pytest.raises(InputError, match="begun with another init model.safetensors file"):
        train("sft", data, tmp_path, "--lora-rank", 2, "--init", folder, "--resume")


# ---- is it English, and about the question? ----


@torch.no_grad()
def logprobs_of_transformers(base, prompt, response):
    """Of the response's tokens after the prompt, without end-of-text."""
    theirs = transformers.AutoTokenizer.from_pretrained(base.folder)
    read = theirs(prompt)["input_ids"]
    given = theirs(f"{prompt} {response}")["input_ids"]
    assert given[: len(read)] == read
    logprobs = base.model(torch.tensor([given])).logits[0].log_softmax(dim=-1)  # (T, V)
    return [logprobs[t - 1, given[t]].item() for t in range(len(read), len(given))]


def test_english_is_the_mean_over_the_tokens_of_each_response(bases):
    base = bases["llama"]
    prompt = "Why is the tent wet?"
    expected = logprobs_of_transformers(base, prompt, "Rain fell.")
    table = pandas.DataFrame({"prompt": [prompt], "response": ["Rain fell."]})
    means = toxicity.english(toxicity.Base(str(base.folder)), table)
    assert means.item() == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert len(expected) > 2


def test_information_compares_each_question_with_the_next_of_its_checkpoint(bases):
    base = bases["llama"]
    prompts = ["Why is the tent wet?", "Who are you?"]
    responses = {"sft.pt": ["Rain fell.", "A bird."], "ppo.pt": ["It did.", "Rain fell."]}
    table = pandas.DataFrame(
        [(name, prompts[i], responses[name][i]) for i in (0, 1) for name in responses],
        columns=["checkpoint", "prompt", "response"],
    )
    found = toxicity.information(toxicity.Base(str(base.folder)), table)
    for index, row in enumerate(table.itertuples()):
        other = prompts[1 - prompts.index(row.prompt)]
        own = sum(logprobs_of_transformers(base, row.prompt, row.response))
        gain = own - sum(logprobs_of_transformers(base, other, row.response))
        assert found[index] == pytest.approx(gain, abs=1e-3) and abs(gain) > 0.01
