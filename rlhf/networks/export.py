"""A GPT as a folder in the format of GPT-2's published files, which transformers reads: the
inverse of rlhf/networks/gpt2.py."""

import json
from pathlib import Path

import torch
from torch import Tensor

from rlhf.model import GPT, GPTConfig
from rlhf.networks.gpt2 import ARCHITECTURE, published_name
from rlhf.run.files import replacing


def save_gpt2(gpt: GPT, folder: Path, eos_id: int) -> None:
    """Write config.json and pytorch_model.bin; the inverse of load_gpt2."""
    with replacing(folder / "pytorch_model.bin", "wb") as file:
        torch.save(published_weights(gpt), file)
    with replacing(folder / "config.json", encoding="utf-8") as file:
        file.write(json.dumps(published_config(gpt.config, eos_id), indent=2) + "\n")


def published_config(config: GPTConfig, eos_id: int) -> dict:
    return {
        **ARCHITECTURE,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def published_weights(gpt: GPT) -> dict[str, Tensor]:
    """The weights under GPT-2's names, matrices of linear layers as (in, out).

    The logits are linear in the last LayerNorm, which therefore takes the temperature.
    """
    published = {}
    for name, weight in gpt.state_dict().items():
        if name.startswith("ln_f."):
            weight = weight / gpt.temperature
        other_name, transposed = published_name(name)
        if transposed:
            weight = weight.t()
        published[f"transformer.{other_name}"] = weight.contiguous()
    published["lm_head.weight"] = published["transformer.wte.weight"]
    return published
