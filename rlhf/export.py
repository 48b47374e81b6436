"""Write a checkpoint as GPT-2's published files are, so that Hugging Face's transformers reads it.

    python -m rlhf.export --checkpoint runs/ppo.pt --out my_model        # sft.pt or ppo.pt

    my_model/config.json, my_model/pytorch_model.bin
    then: transformers.GPT2LMHeadModel.from_pretrained("my_model"), or train_sft.py --init my_model

The logits are the same. The tokenizer is not part of it: with GPT-2's, use GPT-2's; the data set's own is in
tokenizer.tiktoken, which transformers does not read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rlhf.checkpoints import load_policy, tokenizer_of
from rlhf.cli import arg, run
from rlhf.common import save_tensors
from rlhf.model import GPT, published_name


@dataclass(frozen=True)
class ExportConfig:
    """Write sft.pt or ppo.pt as a folder that transformers reads."""

    checkpoint: str = arg("runs/ppo.pt", "what to write: an sft.pt or a ppo.pt")
    out: str = arg("runs/exported", "folder to write to")
    data: str = arg("", "data set folder, for the tokenizer; empty: the one it was trained on")


def save_pretrained(gpt: GPT, folder: Path, eos_id: int) -> None:
    """config.json and pytorch_model.bin of a GPT; the inverse of GPT.from_pretrained."""
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_inner": None, "vocab_size": gpt.config.vocab_size,
        "n_positions": gpt.config.block_size, "n_layer": gpt.config.n_layer, "n_head": gpt.config.n_head,
        "n_embd": gpt.config.n_embd, "bos_token_id": eos_id, "eos_token_id": eos_id, "attn_pdrop": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }
    state = {}
    for ours, weight in gpt.state_dict().items():
        name, turned = published_name(ours)
        state[f"transformer.{name}"] = (weight.t() if turned else weight).contiguous()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "pytorch_model.bin", state)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(cfg: ExportConfig) -> None:
    path = Path(cfg.checkpoint)
    gpt, checkpoint = load_policy(path, "sft", "ppo")
    tokenizer = tokenizer_of(path, checkpoint, cfg.data or checkpoint["config"]["data"])
    save_pretrained(gpt, Path(cfg.out), tokenizer.eos_id)
    print(f"wrote {cfg.out}/config.json and {cfg.out}/pytorch_model.bin: {sum(p.numel() for p in gpt.parameters()):,} "
          f"parameters")


if __name__ == "__main__":
    run(main, ExportConfig)
