"""Any causal language model of Hugging Face's transformers in the place of the GPT:
`train_sft.py --init`.

    pip install .[hf]     # transformers, and what it needs for GGUF files and 4 bits
    python train_sft.py --init FOLDER_OR_NAME_OR_GGUF --lora-rank 16
                          # then the other two scripts, which find rank and model in sft.pt

HF has the interface of GPT (hidden, logits, make_cache, config, temperature), so everything else
works on it unchanged. With --lora-rank a checkpoint holds adapters and heads, and names the model
under them. Then all networks of a run share that model's weights, and each has its own adapters.
Those of the policy and of the reward model start as copies of sft.pt's, those of the value network
as copies of the reward model's, and the reference keeps sft.pt's.

The model brings its own tokenizer, and a chat model its chat template: HFTokenizer.
"""

import copy
import functools
import inspect
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.networks.hf_tokenizer import HFTokenizer
from rlhf.networks.lora import ALPHA, add_adapters
from rlhf.networks.pretrained import from_pretrained, local_files, package
from rlhf.run.errors import InputError
from rlhf.run.files import data_folder, digests
from rlhf.run.messages import read_prompt
from rlhf.run.tables import read_csv

ATTENTION = {"full_attention", "sliding_attention"}  # layers whose memory is keys and values
# bitsandbytes quantises blocks of 64 weights of a row. A row of another length goes wrong in its
# release 0.50 on AVX-512, so such layers stay as they are.
BLOCK = 64


@dataclass(frozen=True)
class HFConfig:
    init: str  # what transformers loads: a folder, a GGUF file, or a name on the Hugging Face hub
    rank: int  # of the adapters; 0: none, all weights are in the checkpoint
    four_bit: bool
    kept: tuple[int, ...]  # the model's ids of the tokens that are kept; empty: all
    block_size: int = 0  # this and n_embd are the model's
    n_embd: int = 0
    alpha: float = ALPHA  # of the adapters
    template: str = "none"  # of the tokenizer: see HFTokenizer
    system: str = ""
    base_dtype: str = "float32"  # or bfloat16: of the frozen weights
    pooled: str = ""  # a reward model's: the "first" or "last" token has the score

    @property
    def frozen_base(self) -> bool:
        """Whether the model's own weights are not trained, and not in the checkpoint."""
        return self.rank > 0 or self.four_bit


# ---- the network ----


class Cache:
    """The keys and values of the tokens read so far, as transformers keeps them: all of them, also
    in layers with a sliding window, because some of the last ones may be pads."""

    def __init__(self):
        self.past = package("transformers").DynamicCache()
        self.moved = False

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.past.batch_select_indices(rows)

    def pads_first(self, real: Tensor) -> Tensor:
        """real (B, columns), which is 0 at a pad, with each row's pads before its tokens.

        The first call moves the keys and values in the same way, because a sliding window counts
        columns.
        """
        if not self.moved:
            order = real[:, :-1].argsort(dim=1, stable=True)  # (B, columns so far)
            order = order[:, None, :, None]  # (B, 1, columns so far, 1)
            for layer in self.past.layers:
                layer.keys = layer.keys.take_along_dim(order, dim=2)
                layer.values = layer.values.take_along_dim(order, dim=2)
            self.moved = True
        return real.sort(dim=1).values


class HF(nn.Module):
    """A causal language model of transformers with the interface of rlhf.model.GPT.

    trunk: the model without its output matrix, from tokens to hidden states.
    lm_head: the output matrix; None if it is the token embedding.
    """

    temperature = 1.0

    def __init__(self, config: HFConfig):
        super().__init__()
        base = load_base(
            config.init, config.kept, config.four_bit, config.base_dtype, bool(config.pooled)
        )
        # All networks share the weights of a frozen base. Otherwise each has its own.
        shared = {id(p): p for p in base.parameters() if config.frozen_base}
        model = copy.deepcopy(base, shared)
        self.trunk = model.base_model
        output = model.get_output_embeddings()  # a reward model has none
        tied = output is None or output.weight is model.get_input_embeddings().weight
        self.lm_head = None if tied else output
        width = self.trunk.config.hidden_size if output is None else output.weight.size(1)
        self.config = replace(config, block_size=longest_text(self.trunk), n_embd=width)
        # Releases of transformers differ in the name of this argument.
        arguments = inspect.signature(self.trunk.forward).parameters
        self.cache_argument = "cache" if "cache" in arguments else "past_key_values"
        self.requires_grad_(not config.frozen_base)
        if config.frozen_base:
            add_adapters(self, config.rank, None, config.alpha)
            self.register_state_dict_post_hook(HF.leave_out_base)
            self.register_load_state_dict_post_hook(HF.allow_missing_base)

    def leave_out_base(self, state: dict, prefix: str, _) -> None:
        """Of a network on a frozen base, the state dict holds the adapters only."""
        for name in list(state):
            if name.startswith(prefix) and not name.endswith((".A", ".B", ".scale")):
                del state[name]

    def allow_missing_base(self, incompatible) -> None:
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if not name.endswith(tuple(frozen))]

    def hidden(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        readable: Tensor | None = None,
    ) -> Tensor:
        """As GPT.hidden: tokens (B, T) -> (B, T, C)."""
        mask = None
        if readable is not None:
            mask = cache.pads_first(readable[:, 0, 0].int())  # (B, columns)
        past = None if cache is None else cache.past
        output = self.trunk(
            tokens,
            attention_mask=mask,
            use_cache=cache is not None,
            position_ids=positions,
            **{self.cache_argument: past},
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V)"""
        output = self.lm_head or self.trunk.get_input_embeddings()
        bias = getattr(output, "bias", None)
        return F.linear(hidden, output.weight, bias) / self.temperature

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V); logits[:, t] are of token t+1."""
        return self.logits(self.hidden(tokens))

    def make_cache(self, batch_size: int, max_length: int) -> Cache:
        return Cache()


# ---- the model under it, loaded once ----


@functools.lru_cache(maxsize=2)  # the policy's, and the reward model's if it is another one
def load_base(
    init: str, kept: tuple[int, ...], four_bit: bool, base_dtype: str, trunk_only: bool = False
) -> nn.Module:
    """A model of transformers, with linear layers in 4 bits or not, and the rest in base_dtype.

    trunk_only: without an output matrix, for a reward model.
    Raises InputError if it cannot be loaded or used.
    """
    kind = "AutoModel" if trunk_only else "AutoModelForCausalLM"
    options = loading_options(kind, init, four_bit, base_dtype)
    model = from_pretrained(kind, init, **options).eval()
    replace_conv1d(model)
    for module in model.modules():
        if hasattr(module, "quant_state"):
            # In eval mode bitsandbytes passes no gradient to its input on CPUs with AVX-512.
            module.train()
            module.quant_state = None  # that of its weight, which would be copied with the layer
    if not trunk_only:
        check_usable(init, model)
    if kept:
        keep_tokens(model, list(kept))
    return model


def loading_options(kind: str, init: str, four_bit: bool, base_dtype: str) -> dict:
    """The options with which transformers loads a model in base_dtype, and quantises each linear
    layer as soon as it is read.

    NF4 with double quantisation (Dettmers et al. 2023). The output matrix stays as it is.
    """
    if not four_bit:
        return {"dtype": base_dtype}
    if init.endswith(".gguf"):
        raise InputError(
            f"--load-in-4bit needs a folder or a name on the Hugging Face hub; transformers reads "
            f"the GGUF file {init} in full precision"
        )
    package("bitsandbytes")  # or the error of transformers is about another package
    outline = from_pretrained(kind, init, dtype=base_dtype, device_map="meta")  # without weights
    replace_conv1d(outline)
    output = outline.get_output_embeddings()
    skipped = []
    for name, layer in outline.named_modules():
        if layer is output or isinstance(layer, nn.Linear) and layer.in_features % BLOCK:
            skipped.append(name)
    quantisation = package("transformers").BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base_dtype,
        llm_int8_skip_modules=skipped,
    )
    return {"dtype": base_dtype, "quantization_config": quantisation, "device_map": "cpu"}


def replace_conv1d(model: nn.Module) -> None:
    """Replace the Conv1D layers of GPT-2 in transformers by nn.Linear with the same weights."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":
            linear = nn.Linear(*layer.weight.shape, device="meta")  # in, out
            linear.weight = nn.Parameter(layer.weight.t())
            linear.bias = layer.bias
            model.set_submodule(name, linear)


@torch.no_grad()
def check_usable(init: str, model: nn.Module) -> None:
    """Raise InputError if HF cannot use a model of transformers.

    It can if all layers are attention, the weights were not quantised before, and the logits are
    the output matrix times the last hidden state.
    """
    layers = getattr(model.base_model.config, "layer_types", None) or ()
    quantizer = getattr(model, "hf_quantizer", None)
    # transformers makes float32 of the weights in a GGUF file.
    quantised = getattr(quantizer, "pre_quantized", False) and not init.endswith(".gguf")
    tokens = torch.arange(8).unsqueeze(0)  # (1, 8): any will do
    hidden = model.base_model(tokens)[0]  # (1, 8, C)
    product = model.get_output_embeddings()(hidden)  # (1, 8, V)
    plain = torch.allclose(model(tokens).logits, product, atol=1e-3)
    if quantised or not plain or not ATTENTION.issuperset(layers):
        raise InputError(
            f"--init {init}: cannot use this {type(model).__name__}; needed: only attention, "
            f"weights not quantised, and logits = a matrix times the hidden states"
        )


def longest_text(trunk: nn.Module) -> int:
    """The most tokens that a model reads. Raises InputError if it does not say so."""
    context = getattr(trunk.config, "max_position_embeddings", 0)
    if context < 1 or trunk.config.is_encoder_decoder:
        raise InputError(
            f"--init {trunk.name_or_path}: cannot use this {type(trunk).__name__}; needed: a "
            f"decoder or an encoder that says how many tokens it reads (max_position_embeddings)"
        )
    embedding = getattr(getattr(trunk, "embeddings", None), "position_embeddings", None)
    before = getattr(embedding, "padding_idx", None)  # RoBERTa's positions begin after this row
    return context if before is None else context - before - 1


def keep_tokens(model: nn.Module, kept: list[int]) -> None:
    """Keep only these tokens in the embedding and in the output matrix."""
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output.weight is embedding.weight
    embedding.padding_idx = None
    embedding.weight = nn.Parameter(embedding.weight[kept])
    output.weight = embedding.weight if tied else nn.Parameter(output.weight[kept])
    if output.bias is not None:
        output.bias = nn.Parameter(output.bias[kept])


# ---- train_sft.py --init ----


def init_from(cfg) -> tuple[HF, HFTokenizer, dict[str, str]]:
    """What `train_sft.py --init` starts from: the network, its tokenizer, and the digests of a
    local folder's files."""
    if cfg.tokenizer != "auto":
        raise InputError(
            f"--init {cfg.init} brings its own tokenizer; leave out --tokenizer {cfg.tokenizer}"
        )
    tokenizer = HFTokenizer(cfg.init, cfg.template, cfg.system)
    config = config_of(cfg, tokenizer)
    if cfg.cut_vocab:
        config = replace(config, kept=used_ids(tokenizer, cfg.data))
        tokenizer = HFTokenizer(cfg.init, config.template, cfg.system, config.kept)
    return HF(config), tokenizer, digests(**local_files(cfg.init))


def config_of(cfg, tokenizer: HFTokenizer) -> HFConfig:
    """The HFConfig of a script's flags."""
    return HFConfig(
        init=cfg.init,
        rank=cfg.lora_rank,
        four_bit=cfg.load_in_4bit,
        kept=(),
        alpha=cfg.lora_alpha,
        template=tokenizer.template or "none",
        system=cfg.system,
        base_dtype=cfg.base_dtype,
    )


def used_ids(tokenizer: HFTokenizer, data: str) -> tuple[int, ...]:
    """Sorted: the tokens of the data set's files, held-out ones too, those that spell bytes, and
    those that bound a text. tokenizer: with all tokens."""
    byte_name = "<0x..>" if tokenizer.has_byte_names else "."
    ids = {i for token, i in tokenizer.vocab.items() if re.fullmatch(byte_name, token)}
    ids.update(tokenizer.stop_ids, tokenizer.begin)
    for name in ("prompts", "demonstrations", "comparisons", "rankings"):
        for path in data_folder(data).glob(f"{name}*.csv"):
            frame = read_csv(path, ("Prompt",), ("Response", "Chosen", "Rejected"))
            for prompt in set(frame.pop("Prompt")):
                ids.update(tokenizer.prompt_ids(read_prompt(prompt)))
            for response in set(frame.stack()):
                ids.update(tokenizer.response_ids(response))
    return tuple(sorted(ids))
