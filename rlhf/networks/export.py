"""What was trained, as a model of Hugging Face's transformers or an adapter of PEFT: the inverse of
rlhf/networks/gpt2.py and hf.py.

The own GPT becomes a GPT-2, any other network a copy of the model that it was made from, with the
trained weights. Adapters are merged, and 4-bit weights become the numbers that they stand for.
"""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.networks.gpt2 import ARCHITECTURE, published_name
from rlhf.networks.hf import HF
from rlhf.networks.pretrained import from_pretrained, package
from rlhf.run.checkpoints import merged

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
    if isinstance(gpt, HF) and gpt.temperature != 1:
        output = model.get_output_embeddings()
        model.config.tie_word_embeddings = False
        output.weight = nn.Parameter(output.weight / gpt.temperature)
        if output.bias is not None:
            output.bias /= gpt.temperature
    return model


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
    layers = [layer for name, layer in model.named_modules() if HEAD.search(name)]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    *dense, head = linears
    for layer in dense:
        nn.init.eye_(layer.weight).mul_(SMALL)
        layer.bias.zero_()
        weight = weight / SMALL
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(constant)
        constant.zero_()
    return model, constant.item()


def with_weights(gpt: GPT, kind: str, **settings):
    """A model of transformers of this kind with a network's weights; a score head stays as it is.

    settings: of its configuration.
    """
    if isinstance(gpt, HF):
        dtype = gpt.config.base_dtype
        model = from_pretrained(kind, gpt.config.init, dtype=dtype, **settings)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:  # it has read a GGUF file, and its settings would be written
            quantizer.remove_quantization_config(model)
        copy_weights(gpt, model)
        return model
    transformers = package("transformers")
    config = transformers.GPT2Config(**published_config(gpt.config), **settings)
    model = getattr(transformers, kind).from_config(config)
    model.base_model.load_state_dict(published_weights(gpt))
    return model


def copy_weights(gpt: HF, model) -> None:
    """Copy a network's weights to a model of transformers, out of 4 bits and with adapters merged.

    A network with a cut vocabulary has fewer rows, those of its kept tokens.
    """
    weights = dict(gpt.named_parameters()) | dict(gpt.named_buffers())
    for name, weight in weights.items():
        if hasattr(weight, "quant_state"):
            dequantize = package("bitsandbytes").functional.dequantize_4bit
            weights[name] = dequantize(weight.data, weight.quant_state)
    weights = merged(weights)
    target = nn.ModuleDict({"trunk": model.base_model, "lm_head": model.get_output_embeddings()})
    for name, layer in target.named_modules():
        for full_name, parameter in layer.named_parameters(name, recurse=False):
            weight = weights.get(full_name, parameter)  # a tied output matrix has been copied
            if type(layer).__name__ == "Conv1D":  # GPT-2's, (in, out)
                weight = weight.t()
            rows = ... if weight.shape == parameter.shape else list(gpt.config.kept)
            parameter[rows] = weight


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
    model = f"base_model.model.{gpt.trunk.base_model_prefix}"
    weights = {}
    layers = set()
    for name, weight in gpt.state_dict().items():
        layer, matrix = name.removeprefix("trunk.").rsplit(".", 1)
        if matrix != "scale":
            weights[f"{model}.{layer}.lora_{matrix}.weight"] = weight
            layers.add(layer.rpartition(".")[2])
    config = package("peft").LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=gpt.config.init,
        r=gpt.config.rank,
        lora_alpha=gpt.config.alpha,
        target_modules=sorted(layers),
    )
    config.save_pretrained(folder)
    package("safetensors.torch").save_file(weights, folder / "adapter_model.safetensors")
