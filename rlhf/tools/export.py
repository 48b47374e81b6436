"""Write a checkpoint as a folder for Hugging Face's transformers, or as an adapter for PEFT.

    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_model       # or sft.pt, reward.pt
    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_adapter --adapter

The folder holds weights, settings, the tokenizer with its chat template, the end tokens, and a
model card, README.md, which says how to load it. It is loaded again before it gets its name, and
its logits or scores are compared with the checkpoint's.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model import GPT, RewardModel
from rlhf.networks.export import (
    POLICY,
    REWARD_MODEL,
    exported_policy,
    exported_reward_model,
    save_adapter,
)
from rlhf.networks.export_tokenizer import (
    exported_tokenizer,
    generation_config,
    score_template,
    separate_pad,
)
from rlhf.networks.hf import loading_options
from rlhf.networks.pretrained import from_pretrained, package
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import arg
from rlhf.run.loading import load_policy, load_reward_model, tokenizer_of
from rlhf.run.program import run
from rlhf.tokenizer import Tokenizer

LENGTH = 16  # of the rows that are compared
# The largest difference allowed, as a share of the largest logit or score.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
CARD = """\
---
tags: [rlhf]
---
# {folder}

- Made by `train_{kind}.py`, and written by `python -m rlhf.tools.export`.
- Trained from: {base}. If that is a pretrained model, its licence holds here too.
- Data: {data}.
- {notes}

## How to load it

    from transformers import {loader}, AutoTokenizer

    model = {loader}.from_pretrained("{folder}")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")

## Flags and last metrics

```json
{run}
```
"""
FOUR_BITS = (
    "The base was in 4 bits. Merged weights are the numbers that these stand for. Load adapters "
    "with quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
    "bnb_4bit_use_double_quant=True): on other weights, they give other logits."
)


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint for transformers or PEFT."""

    checkpoint: str = arg("runs/ppo.pt", "sft.pt, reward.pt, ppo.pt or dpo.pt")
    out: str = arg("runs/exported", "folder to write to")
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    adapter: bool = arg(False, "write the adapters only, for PEFT")
    overwrite: bool = arg(False, "replace an earlier export in --out")


# ---- what is exported ----


def load(cfg: ExportConfig) -> tuple[GPT | RewardModel, dict, Tokenizer]:
    """The network, its checkpoint, and its tokenizer.

    Raises InputError if --out is the base, or --adapter is given and PEFT cannot hold them.
    """
    path = Path(cfg.checkpoint)
    kind = load_checkpoint(path, "sft", "reward", "ppo")["kind"]
    network, checkpoint = load_reward_model(path) if kind == "reward" else load_policy(path, kind)
    tokenizer = tokenizer_of(path, checkpoint, cfg.data or checkpoint["config"]["data"])
    settings = checkpoint["model_config"]
    base = settings.get("init", "")
    if base and Path(cfg.out).resolve() == Path(base).resolve():
        raise InputError(f"--out {cfg.out} holds the base; give another folder")
    has_adapters = settings.get("rank") and not base.endswith(".gguf") and kind != "reward"
    if cfg.adapter and not (has_adapters and network.temperature == 1):
        raise InputError(
            f"--adapter: {path} is no policy of --temperature 1 with adapters on a model of "
            f"transformers that is no GGUF file; leave out --adapter"
        )
    return network, checkpoint, tokenizer


def whole_ids(tokenizer: Tokenizer) -> Tensor:
    """(V,): the whole vocabulary's id of each token."""
    return torch.tensor(getattr(tokenizer, "kept", range(tokenizer.vocab_size)))


# ---- written, and loaded again ----


def write(folder: Path, network: GPT | RewardModel, tokenizer: Tokenizer, adapter: bool) -> float:
    """Write weights, settings and tokenizer. Returns what the scores of a reward model are short
    of; 0 of a policy."""
    made = exported_tokenizer(tokenizer)
    ends = whole_ids(tokenizer)[list(tokenizer.stop_ids)].tolist()
    constant = 0.0
    if isinstance(network, RewardModel):
        model, constant = exported_reward_model(network)
        if getattr(network.gpt.config, "pooled", "") != "first":
            separate_pad(made, model, ends[0])
        made.chat_template = score_template(made, ends[0])
        model.save_pretrained(folder)
    elif adapter:
        save_adapter(network, folder)
        generation_config(made, ends).save_pretrained(folder)
    else:
        model = exported_policy(network)
        model.generation_config = generation_config(made, ends)
        model.save_pretrained(folder)
    made.save_pretrained(folder)
    return constant


def load_again(folder: Path, network: GPT | RewardModel, adapter: bool) -> nn.Module:
    """The model in the folder, loaded as its user does."""
    options = {}
    if adapter:
        base = network.config
        options = loading_options(POLICY, base.init, base.four_bit, base.base_dtype)
    return from_pretrained(loader_of(network), str(folder), **options).eval()


def loader_of(network: GPT | RewardModel) -> str:
    """The class of transformers that loads it."""
    return REWARD_MODEL if isinstance(network, RewardModel) else POLICY


@torch.no_grad()
def compare(
    network: GPT | RewardModel, tokenizer: Tokenizer, model: nn.Module, constant: float
) -> str:
    """A sentence about the largest difference between the checkpoint's logits or scores and an
    exported model's. constant: is added to the scores.

    Raises InputError if it is too large.
    """
    whole = whole_ids(tokenizer)
    tokens = torch.arange(3 * LENGTH).view(3, LENGTH)  # (B, T): any will do
    tokens[:, -1] = tokenizer.eos_id  # where a score is read
    theirs = model(whole[tokens]).logits
    if isinstance(network, RewardModel):
        ours = network(tokens, torch.tensor([LENGTH] * 3))  # (B,)
        theirs = theirs[:, 0] + constant
    else:
        ours = network(tokens)[..., : len(whole)]  # (B, T, V)
        theirs = theirs[..., whole[: ours.size(-1)]]  # a token may have no logit
    difference = (ours - theirs).abs().max().item()
    largest = ours.abs().max().item()
    found = (
        f"Loaded again, its logits or scores differ from the checkpoint's by {difference:.2g} at "
        f"most; the largest is {largest:.2g}"
    )
    if not difference <= TOLERANCE[model.dtype] * max(largest, 1):
        raise InputError(f"nothing was written. {found}, so {type(model).__name__} does not fit")
    return f"{found}."


# ---- the model card ----


def notes_on(settings: dict, constant: float) -> list[str]:
    """Sentences about the weights, for the terminal and the model card. settings: the network's."""
    notes = []
    if settings.get("kept"):
        notes.append(
            f"{len(settings['kept'])} tokens were trained (--cut-vocab). The others have the "
            f"base's rows, and the model may say them."
        )
    if settings.get("four_bit"):
        notes.append(FOUR_BITS)
    if constant:
        notes.append(f"The checkpoint's scores are these plus {constant:.6g}.")
    return notes


def model_card(out: Path, loader: str, checkpoint: dict, notes: list[str]) -> str:
    """README.md: what was trained from what, how to load it, and how it was trained."""
    flags = checkpoint["config"]
    run = json.dumps({"flags": flags, "metrics": checkpoint["metrics"][-1:]}, indent=2)
    return CARD.format(
        folder=out,
        kind=checkpoint["kind"],
        base=checkpoint["model_config"].get("init") or flags.get("init") or "scratch",
        data=flags["data"],
        notes="\n- ".join(notes),
        loader=loader,
        run=run,
    )


# ---- the program ----


def check_out(cfg: ExportConfig) -> None:
    """Raise InputError if --out holds anything that this program may not replace."""
    out = Path(cfg.out)
    card = out / "README.md"
    is_export = card.is_file() and b"rlhf.tools.export" in card.read_bytes()
    if any(out.glob("*")) and not (is_export and cfg.overwrite):
        raise InputError(
            f"--out {out} is not empty; give another folder, or --overwrite, which only replaces "
            f"an earlier export"
        )


def main(cfg: ExportConfig) -> None:
    check_out(cfg)
    package("transformers").utils.logging.set_verbosity_error()
    network, checkpoint, tokenizer = load(cfg)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as name:
        made = Path(name, "export")
        made.mkdir()
        constant = write(made, network, tokenizer, cfg.adapter)
        model = load_again(made, network, cfg.adapter)
        notes = notes_on(checkpoint["model_config"], constant)
        notes.append(compare(network, tokenizer, model, constant))
        card = model_card(out, loader_of(network), checkpoint, notes)
        (made / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    print(f"wrote {out}", *notes, sep="\n")


if __name__ == "__main__":
    run(main, ExportConfig)
