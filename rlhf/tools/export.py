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
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
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
ADAPTERS_ON_4_BITS = (
    "The base was in 4 bits. Load it with quantization_config=BitsAndBytesConfig("
    "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True): on other "
    "weights, the adapters give other logits."
)
MERGED_INTO_4_BITS = (
    "The base was in 4 bits. These weights are the numbers that the 4 bits stand for, with the "
    "adapters merged."
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


@dataclass(frozen=True)
class Trained:
    """A checkpoint, loaded. settings: of its network; those of the own GPT are its sizes only."""

    network: GPT | RewardModel
    settings: dict
    checkpoint: dict
    tokenizer: Tokenizer

    @property
    def loader(self) -> str:
        """The class of transformers that loads it."""
        return REWARD_MODEL if isinstance(self.network, RewardModel) else POLICY

    @property
    def kept(self) -> Tensor:
        """(V,): the whole vocabulary's id of each token."""
        return torch.tensor(getattr(self.tokenizer, "kept", range(self.tokenizer.vocab_size)))


def load(cfg: ExportConfig) -> Trained:
    """Raises InputError if --out is the base, or --adapter is given and PEFT cannot hold them."""
    path = Path(cfg.checkpoint)
    kind = load_checkpoint(path, "sft", "reward", "ppo")["kind"]
    network, checkpoint = load_reward_model(path) if kind == "reward" else load_policy(path, kind)
    tokenizer = tokenizer_of(path, checkpoint, cfg.data or checkpoint["config"]["data"])
    settings = checkpoint["model_config"]
    base = settings.get("init", "")
    if base and Path(cfg.out).resolve() == Path(base).resolve():
        raise InputError(f"--out {cfg.out} holds the base; give another folder")
    if cfg.adapter:
        has_adapters = settings.get("rank") and not base.endswith(".gguf")
        if not has_adapters or kind == "reward" or network.temperature != 1:
            raise InputError(
                f"--adapter: {path} is no policy of --temperature 1 with adapters on a model of "
                f"transformers that is no GGUF file; leave out --adapter"
            )
        package("peft")  # which loads it again
    return Trained(network, settings, checkpoint, tokenizer)


# ---- written, and loaded again ----


def write(folder: Path, trained: Trained, adapter: bool) -> float:
    """Write weights, settings and tokenizer. Returns what the scores of a reward model are short
    of; 0 of a policy."""
    made = exported_tokenizer(trained.tokenizer)
    ends = trained.kept[list(trained.tokenizer.stop_ids)].tolist()
    constant = 0.0
    if trained.loader == REWARD_MODEL:
        model, constant = exported_reward_model(trained.network)
        if trained.settings.get("pooled") != "first":
            separate_pad(made, model, ends[0])
        made.chat_template = score_template(made, trained.tokenizer, ends[0])
        model.save_pretrained(folder)
    elif adapter:
        save_adapter(trained.network, folder)
        generation_config(made, ends).save_pretrained(folder)
    else:
        model = exported_policy(trained.network)
        model.generation_config = generation_config(made, ends)
        model.save_pretrained(folder)
    made.save_pretrained(folder)
    return constant


def load_again(folder: Path, trained: Trained, adapter: bool) -> nn.Module:
    """The model in the folder, loaded as its user does."""
    options = {}
    if adapter:
        base = trained.network.config
        options = loading_options(POLICY, base.init, base.four_bit, base.base_dtype)
    return from_pretrained(trained.loader, str(folder), **options).eval()


@torch.no_grad()
def compare(trained: Trained, model: nn.Module, constant: float) -> str:
    """A sentence about the largest difference between the checkpoint's logits or scores and an
    exported model's. constant: is added to the scores.

    Raises InputError if it is too large.
    """
    tokens = torch.arange(3 * LENGTH).view(3, LENGTH)  # (B, T): any will do
    tokens[:, -1] = trained.tokenizer.eos_id  # where a score is read
    theirs = model(trained.kept[tokens]).logits
    if trained.loader == REWARD_MODEL:
        ours = trained.network(tokens, torch.tensor([LENGTH] * 3))  # (B,)
        theirs = theirs[:, 0] + constant
    else:
        ours = trained.network(tokens)[..., : len(trained.kept)]  # (B, T, V)
        theirs = theirs[..., trained.kept]
    difference = (ours - theirs).abs().max().item()
    largest = ours.abs().max().item()
    found = (
        f"Loaded again, its logits or scores differ from the checkpoint's by {difference:.2g} at "
        f"most; the largest is {largest:.2g}"
    )
    tolerance = TOLERANCE[trained.settings.get("base_dtype", "float32")]
    if not difference <= tolerance * max(largest, 1):
        raise InputError(f"nothing was written. {found}, so {type(model).__name__} does not fit")
    return f"{found}."


# ---- the model card ----


def notes_on(trained: Trained, adapter: bool, constant: float) -> list[str]:
    """Sentences about the weights, for the terminal and the model card."""
    notes = []
    if trained.settings.get("kept"):
        notes.append(
            f"{len(trained.kept)} tokens were trained (--cut-vocab). The others have the base's "
            f"rows, and the model may say them."
        )
    if trained.settings.get("four_bit"):
        notes.append(ADAPTERS_ON_4_BITS if adapter else MERGED_INTO_4_BITS)
    if constant:
        notes.append(f"The checkpoint's scores are these plus {constant:.6g}.")
    return notes


def model_card(out: Path, trained: Trained, notes: list[str]) -> str:
    """README.md: what was trained from what, how to load it, and how it was trained."""
    checkpoint = trained.checkpoint
    flags = checkpoint["config"]
    run = json.dumps({"flags": flags, "metrics": checkpoint["metrics"][-1:]}, indent=2)
    return CARD.format(
        folder=out,
        kind=checkpoint["kind"],
        base=trained.settings.get("init") or flags.get("init") or "scratch",
        data=flags["data"],
        notes="\n- ".join(notes),
        loader=trained.loader,
        run=run,
    )


# ---- the program ----


def check_out(cfg: ExportConfig) -> None:
    """Raise InputError if --out holds anything that this program may not replace."""
    out = Path(cfg.out)
    card = out / "README.md"
    if not any(out.glob("*")):
        return
    if not (card.is_file() and "rlhf.tools.export" in card.read_text(encoding="utf-8")):
        raise InputError(f"--out {out} holds other files than an export's; give another folder")
    if not cfg.overwrite:
        raise InputError(f"--out {out} holds an export; give another folder, or --overwrite")


def main(cfg: ExportConfig) -> None:
    check_out(cfg)
    package("transformers").utils.logging.set_verbosity_error()
    trained = load(cfg)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as name:
        made = Path(name, "export")
        made.mkdir()
        constant = write(made, trained, cfg.adapter)
        notes = notes_on(trained, cfg.adapter, constant)
        notes.append(compare(trained, load_again(made, trained, cfg.adapter), constant))
        (made / "README.md").write_text(model_card(out, trained, notes), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    print(f"wrote {out}", *notes, sep="\n")


if __name__ == "__main__":
    run(main, ExportConfig)
