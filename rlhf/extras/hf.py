"""Any causal language model that Hugging Face's transformers reads, in the place of the GPT: `train_sft.py --init`.

    pip install .[hf]              # transformers, and what it needs for GGUF files and 4 bits
    python train_sft.py --init FOLDER_OR_NAME_OR_GGUF --lora-rank 16        # then the other two scripts, with the rank

HF has the interface that GPT has (hidden, logits, make_cache, config), so everything else works on it unchanged. With
--lora-rank a checkpoint holds adapters and heads and names the model under them. Then all networks of a run share that
model's weights, and each has its own adapters: those of the policy and of the reward model start as copies of
sft.pt's, those of the value network as copies of the reward model's, and the reference keeps sft.pt's.

The model brings its own tokenizer. If it expects a begin-of-text token, that is put before each row in here, so the
rest of the project does not see it.
"""

import copy
import functools
import hashlib
import importlib
import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.extras.lora import add_adapters
from rlhf.model import GPT
from rlhf.support.checkpoints import NETWORKS, digests
from rlhf.support.cli import InputError
from rlhf.support.tables import csv_path, read_csv


@dataclass(frozen=True)
class HFConfig:
    init: str  # what transformers loads: a folder, a GGUF file, or a name on the Hugging Face hub
    rank: int  # of the adapters; 0: none, all weights are in the checkpoint
    four_bit: bool
    kept: tuple[int, ...]  # the model's ids of the tokens that are left of its vocabulary; empty: all
    block_size: int = 0  # this and n_embd are the model's
    n_embd: int = 0


class HFTokenizer:
    """A model's own tokenizer, with the interface of rlhf.tokenizer.Tokenizer.

    With `kept`, token i is the model's token kept[i]. A token that is not kept is spelled out in bytes.
    """

    def __init__(self, init: str, kept: tuple[int, ...] = ()):
        self.name, self.theirs = init, their_tokenizer(init)
        self.vocab = self.theirs.get_vocab()
        self.kept = kept or range(max(self.vocab.values()) + 1)
        self.new = {old: new for new, old in enumerate(self.kept)}
        bos, eos = self.theirs.bos_token_id, self.theirs.eos_token_id
        if eos is None:
            raise InputError(f"--init {init}: the tokenizer names no end-of-text token; give it one (eos_token)")
        self.begin = self.new[bos] if bos is not None and self.theirs("")["input_ids"][:1] == [bos] else None
        # Any token but end-of-text can be the pad. The model's own may be end-of-text, or have no row in the embedding.
        self.vocab_size, self.eos_id, self.pad_id = len(self.kept), self.new[eos], int(self.new[eos] == 0)
        self.fingerprint = hashlib.sha256(f"{self.theirs.backend_tokenizer.to_str()}{kept}".encode()).hexdigest()[:16]

    def __deepcopy__(self, memo):
        return self  # nothing changes it

    def their_ids(self, text):
        """The model's ids of a text, or of each of several texts."""
        return self.theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def spelled(self, old: int) -> list[int]:
        """The bytes of a token: <0x41>, ... or, in a vocabulary of bytes, the letters that stand for them."""
        token = self.theirs.convert_ids_to_tokens(old).replace("\u2581", " ")
        names = map("<0x{:02X}>".format, token.encode())
        letters = token.translate({32: "Ġ", 9: "ĉ", 10: "Ċ"})  # a token that was added later holds spaces as they are
        return [self.vocab[byte] for byte in (names if "<0x41>" in self.vocab else letters)]

    def encode(self, text: str) -> list[int]:
        ids = self.their_ids(text)
        return [self.new[i] for old in ids for i in ([old] if old in self.new else self.spelled(old))]

    def decode(self, ids: list[int]) -> str:
        # A model may have logits of more than its tokens.
        return self.theirs.decode([self.kept[i] for i in ids if i < len(self.kept)], clean_up_tokenization_spaces=False)


class Cache:
    """The keys and values of the tokens read so far, as transformers keeps them: all of them, also in layers with a
    sliding window, because some of the last ones may be pads."""

    def __init__(self):
        self.past, self.moved = package("transformers").DynamicCache(), False

    def keep(self, rows: Tensor) -> None:
        self.past.batch_select_indices(rows)

    def pads_first(self, real: Tensor) -> Tensor:
        """real (B, columns), which is 0 at a pad, with each row's pads before its tokens. The first call moves the keys
        and values in the same way, because a sliding window counts columns."""
        order = real[:, :-1].argsort(dim=1, stable=True)[:, None, :, None]  # (B, 1, columns so far, 1)
        for layer in self.past.layers if not self.moved else []:
            layer.keys, layer.values = (x.take_along_dim(order, dim=2) for x in (layer.keys, layer.values))
        self.moved = True
        return real.sort(dim=1).values


class HF(GPT):
    """A causal language model of transformers: a GPT whose hidden states and logits are that model's."""

    def __init__(self, config: HFConfig):
        nn.Module.__init__(self)  # and not a GPT's weights
        trunk, output, self.tokenizer = base(config.init, config.kept, config.four_bit)
        # Releases of transformers differ in the name of this argument.
        self.cache_argument = "cache" if "cache" in inspect.signature(trunk.forward).parameters else "past_key_values"
        context = trunk.config.max_position_embeddings - (self.tokenizer.begin is not None)
        self.config = replace(config, block_size=context, n_embd=output.weight.size(1))
        # With adapters, all networks share the weights of the base. Without, each has its own.
        shared = {id(p): p for module in (trunk, output) for p in module.parameters() if config.rank}
        self.trunk, output = copy.deepcopy([part.requires_grad_(not config.rank) for part in (trunk, output)], shared)
        self.lm_head = None if output.weight is self.trunk.get_input_embeddings().weight else output
        if config.rank:
            add_adapters(self, config.rank, None)
            self.register_state_dict_post_hook(HF.leave_out_base)
            self.register_load_state_dict_post_hook(HF.allow_missing_base)

    def leave_out_base(self, state: dict, prefix: str, _) -> None:
        for name in [name for name in state if name.startswith(prefix) and not name.endswith((".A", ".B", ".scale"))]:
            del state[name]

    def allow_missing_base(self, incompatible) -> None:
        base = tuple(name for name, parameter in self.named_parameters() if not parameter.requires_grad)
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(base)]

    def hidden(self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None,
               readable: Tensor | None = None) -> Tensor:
        """As GPT.hidden: tokens (B, T) -> (B, T, C)."""
        begin, past = self.tokenizer.begin, None if cache is None else cache.past
        shift = int(begin is not None)  # begin-of-text takes a column
        first = 0 if past is not None and past.get_seq_length() else shift
        mask = None if readable is None else cache.pads_first(F.pad(readable[:, 0, 0].int(), (shift, 0), value=1))
        output = self.trunk(
            F.pad(tokens, (first, 0), value=begin), attention_mask=mask, use_cache=bool(cache),  # (B, first + T)
            position_ids=None if positions is None else positions + shift, **{self.cache_argument: past})
        return output.last_hidden_state[:, first:]

    def logits(self, hidden: Tensor) -> Tensor:
        weight = self.trunk.get_input_embeddings().weight
        return (F.linear(hidden, weight) if self.lm_head is None else self.lm_head(hidden)) / self.temperature

    def make_cache(self, batch_size: int, max_length: int) -> Cache:
        return Cache()


NETWORKS["hf"] = HFConfig, HF


def package(name: str):
    """The imported package. Raises InputError if the extra is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--init of this kind needs the package {name}: pip install .[hf] ({error})") from error


def loaded(kind: str, init: str, **options):
    """transformers.KIND.from_pretrained(init). Raises InputError if that fails."""
    where, options["gguf_file"] = (Path(init).parent, Path(init).name) if init.endswith(".gguf") else (init, None)
    load = getattr(package("transformers"), kind).from_pretrained
    try:
        return load(where, **options)
    except Exception as error:  # no such folder, no connection, a damaged file, ...
        raise InputError(f"--init {init} cannot be loaded: {type(error).__name__}: {error}; give a model's folder, a "
                         f"GGUF file, or a name on the Hugging Face hub and an internet connection") from error


their_tokenizer = functools.lru_cache(maxsize=2)(functools.partial(loaded, "AutoTokenizer"))  # takes up to a minute


@functools.lru_cache(maxsize=1)
def base(init: str, kept: tuple[int, ...], four_bit: bool) -> tuple[nn.Module, nn.Module, HFTokenizer]:
    """A model without its output matrix, that matrix, and the tokenizer. Float32, or linear layers in 4 bits: NF4 with
    double quantisation (Dettmers et al. 2023).

    Raises InputError if the logits are not just the output matrix times the last hidden state, if there are layers
    whose memory is not keys and values, if the weights are quantised already, or if the model does not say how long a
    text may be.
    """
    model = loaded("AutoModelForCausalLM", init, dtype=torch.float32).eval()
    trunk, output, embedding = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
    tokens = torch.arange(8)[None]  # any will do
    layers, limit = (getattr(trunk.config, name, None) for name in ("layer_types", "max_position_embeddings"))
    others = {*(layers or ()), *(p.dtype for p in model.parameters())}
    others -= {"full_attention", "sliding_attention", torch.float32}
    with torch.no_grad():
        if others or not limit or not torch.allclose(model(tokens).logits, output(trunk(tokens)[0]), atol=1e-3):
            raise InputError(f"--init {init}: cannot use this {type(model).__name__}; needed: only attention, weights "
                             f"not quantised, max_position_embeddings, and logits = a matrix times the hidden states")
    if kept:
        tied, embedding.padding_idx = output.weight is embedding.weight, None
        embedding.weight = nn.Parameter(embedding.weight[list(kept)].detach())
        output.weight = embedding.weight if tied else nn.Parameter(output.weight[list(kept)].detach())
        output.bias = None if output.bias is None else nn.Parameter(output.bias[list(kept)].detach())
    for module in list(trunk.modules()) if four_bit else []:
        for name, linear in list(module.named_children()):
            # Blocks of 64 weights in a row. A row of another length goes wrong in bitsandbytes 0.50 on AVX-512.
            if isinstance(linear, nn.Linear) and linear.in_features % 64 == 0:
                # Leave it in training mode: in eval mode bitsandbytes passes no gradient to its input on such CPUs.
                layer = package("bitsandbytes").nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, torch.float32, True, "nf4")
                layer.load_state_dict(linear.state_dict())
                setattr(module, name, layer.to(linear.weight.device))  # which is where it is quantised
    return trunk, output, HFTokenizer(init, kept)


def used_ids(tokenizer: HFTokenizer, data: str) -> tuple[int, ...]:
    """Sorted: the tokens of the data set's training files, those that spell bytes, and those that bound a text."""
    texts = set()
    for path in (csv_path(data, name) for name in ("prompts", "demonstrations", "comparisons", "rankings")):
        if path.is_file():
            cells = read_csv(path, ("Prompt",), ("Response", "Chosen", "Rejected")).stack()
            texts |= {*cells, *(" " + text.strip() for text in cells)}  # as rlhf/data.py encodes them
    ids = {i for token, i in tokenizer.vocab.items() if re.fullmatch("<0x..>" if "<0x41>" in tokenizer.vocab else ".",
                                                                     token)}
    ids |= {i for row in tokenizer.their_ids(list(texts)) for i in row} | {tokenizer.eos_id, tokenizer.begin} - {None}
    return tuple(sorted(ids))


def init_from(cfg) -> tuple[HF, HFTokenizer, dict[str, str]]:
    """What `train_sft.py --init` starts from: the network, its tokenizer, and the digests of a local folder's files."""
    if cfg.tokenizer != "auto":
        raise InputError(f"--init {cfg.init} brings its own tokenizer; leave out --tokenizer {cfg.tokenizer}")
    kept = used_ids(HFTokenizer(cfg.init), cfg.data) if cfg.cut_vocab else ()
    gpt = HF(HFConfig(cfg.init, cfg.lora_rank, cfg.load_in_4bit, kept))
    sizes = {name: parameter.numel() for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    print(f"{cfg.init}: trains {sum(sizes.values()):,} numbers: {', '.join(sorted({n.split('.')[-2] for n in sizes}))}")
    files = [file for file in (Path(cfg.init), *sorted(Path(cfg.init).glob("*.[bjs]*"))) if file.is_file()]
    return gpt, gpt.tokenizer, digests(**{f"init {file.name}": file for file in files})
