"""What was trained, as a model of Hugging Face's transformers or an adapter of PEFT: the inverse of
rlhf/networks/gpt2.py and hf.py.

The own GPT becomes a GPT-2, any other network a copy of the model that it was made from, with the
trained weights. Adapters are merged, and 4-bit weights become the numbers that they stand for.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.networks.gpt2 import ARCHITECTURE, published_name
from rlhf.networks.hf import HF, HFConfig, quantised_loading
from rlhf.networks.lora import LoRALinear
from rlhf.networks.pretrained import from_pretrained, package

POLICY = "AutoModelForCausalLM"  # what loads an exported policy, and a reward model
REWARD_MODEL = "AutoModelForSequenceClassification"
HEAD = re.compile("score|classifier|pooler")  # the linear layers behind the hidden states
# tanh(x) is x for such a multiple of a hidden state, up to a relative error of 1e-6.
SMALL = 1e-4
# Settings of GPT-2's that the own GPT does without.
UNUSED = {
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}


# ---- models ----


@torch.no_grad()
def exported_policy(gpt: GPT):
    """A causal language model of transformers with the logits of a policy, temperature included.

    Of a cut vocabulary the kept tokens have the policy's rows, and the others the base's.
    """
    model = with_weights(gpt, POLICY)
    if isinstance(gpt, HF):
        output = model.get_output_embeddings()
        if gpt.lm_head is not None:
            copy_weights(gpt.lm_head, output, gpt.config.kept)
        if gpt.temperature != 1:
            model.config.tie_word_embeddings = False
            output.weight = nn.Parameter(output.weight / gpt.temperature)
            if output.bias is not None:
                output.bias /= gpt.temperature
    return model.eval()


@torch.no_grad()
def exported_reward_model(reward_model: RewardModel):
    """A sequence classifier of transformers with one label, and the number that its scores are
    short of: 0, if its head has a bias.

    An encoder's class has a dense layer and a tanh before the head. They become a multiple of the
    identity, so small that the tanh is linear.
    """
    model = with_weights(reward_model.gpt, REWARD_MODEL, num_labels=1, problem_type="regression")
    weight = reward_model.head.weight / reward_model.scale
    constant = (reward_model.head.bias - reward_model.mean) / reward_model.scale
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and HEAD.search(name):
            layers.append(layer)
    *dense, head = layers
    for layer in dense:
        nn.init.eye_(layer.weight).mul_(SMALL)
        layer.bias.zero_()
        weight = weight / SMALL
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(constant)
        constant.zero_()
    return model.eval(), constant.item()


def with_weights(gpt: GPT, kind: str, **settings):
    """A model of transformers of this kind with a network's weights; a score head stays as it is.

    settings: of its configuration.
    """
    if isinstance(gpt, HF):
        dtype = getattr(torch, gpt.config.base_dtype)
        model = from_pretrained(kind, gpt.config.init, dtype=dtype, **settings)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:  # it has read a GGUF file, and its settings would be written
            quantizer.remove_quantization_config(model)
        for name, layer in model.base_model.named_modules():
            copy_weights(gpt.trunk.get_submodule(name), layer, gpt.config.kept)
        return model
    transformers = package("transformers")
    config = transformers.GPT2Config(**published_config(gpt.config), **settings)
    model = getattr(transformers, kind).from_config(config)
    model.base_model.load_state_dict(published_weights(gpt))
    return model


def copy_weights(source: nn.Module, target: nn.Module, kept: tuple[int, ...]) -> None:
    """Copy the weights of a network's layer to the same layer of transformers, out of 4 bits and
    with its adapter merged.

    kept: the rows of the target that a source with fewer rows has.
    """
    linear = source.linear if isinstance(source, LoRALinear) else source
    for name, parameter in target.named_parameters(recurse=False):
        weight = getattr(linear, name)
        if hasattr(weight, "quant_state"):
            dequantize = package("bitsandbytes").functional.dequantize_4bit
            weight = dequantize(weight.data, weight.quant_state)
        if name == "weight" and linear is not source:
            weight = weight + source.scale * source.B @ source.A
        if name == "weight" and type(target).__name__ == "Conv1D":  # GPT-2's, (in, out)
            weight = weight.t()
        rows = ... if weight.shape == parameter.shape else list(kept)
        parameter[rows] = weight.to(parameter.dtype)


# ---- the own GPT as a GPT-2 ----


def published_config(config: GPTConfig) -> dict:
    sizes = dataclasses.asdict(config)
    sizes["n_positions"] = sizes.pop("block_size")
    return {**ARCHITECTURE, **UNUSED, **sizes}


def published_weights(gpt: GPT) -> dict[str, Tensor]:
    """The weights under GPT-2's names, matrices of linear layers as (in, out).

    The logits are linear in the last LayerNorm, which therefore takes the temperature.
    """
    published = {}
    for name, weight in gpt.state_dict().items():
        if name.startswith("ln_f."):
            weight = weight / gpt.temperature
        other_name, transposed = published_name(name)
        published[other_name] = weight.t().contiguous() if transposed else weight
    return published


# ---- PEFT's adapters ----


def save_adapter(gpt: HF, folder: Path) -> None:
    """Write a policy's adapters as PEFT does."""
    weights = {}
    layers = set()
    for name, layer in gpt.trunk.named_modules():
        if isinstance(layer, LoRALinear):
            full_name = f"base_model.model.{gpt.trunk.base_model_prefix}.{name}"
            weights[f"{full_name}.lora_A.weight"] = layer.A.detach()
            weights[f"{full_name}.lora_B.weight"] = layer.B.detach()
            layers.add(name.rpartition(".")[2])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": gpt.config.init,
        "r": gpt.config.rank,
        "lora_alpha": gpt.config.alpha,
        "target_modules": sorted(layers),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    package("safetensors.torch").save_file(weights, folder / "adapter_model.safetensors")


def base_options(config: HFConfig) -> dict:
    """The arguments with which transformers loads a base as it was in training."""
    dtype = getattr(torch, config.base_dtype)
    options = quantised_loading(POLICY, config.init, dtype) if config.four_bit else {}
    return {"dtype": dtype, **options}
