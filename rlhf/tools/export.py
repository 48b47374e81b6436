"""Write a checkpoint as a folder for Hugging Face's transformers, or as an adapter for PEFT.

    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_model       # or sft.pt, reward.pt
    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_adapter --adapter

The folder holds weights, settings, the tokenizer with its chat template, the end tokens, and a
model card, README.md, which says how to load it. It is loaded again before it gets its name, and
its logits or scores are compared with the checkpoint's.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model import GPT, RewardModel
from rlhf.networks import model_card
from rlhf.networks.export import (
    POLICY,
    REWARD_MODEL,
    base_options,
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
from rlhf.networks.pretrained import from_pretrained, package
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import arg
from rlhf.run.loading import load_policy, load_reward_model, tokenizer_of
from rlhf.run.program import lock_of_run, run
from rlhf.tokenizer import Tokenizer

# What is compared: the last tokens of prompts and responses.
LENGTH = 16
EXAMPLES = (
    ("What should I do about a sting?", "Cool it with water, and let it rest for an hour."),
    ("Which of the two is larger: 12 or 34?", "34 is larger than 12, and both are even."),
    ("Please name some colours.", "Red, orange, yellow, green, blue and violet are colours."),
)
# The largest difference allowed, as a share of the largest logit or score.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
# Files of an earlier export that would be read along with the new ones.
OLD = ("*.safetensors*", "adapter_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint for transformers or PEFT."""

    checkpoint: str = arg("runs/ppo.pt", "sft.pt, reward.pt, ppo.pt or dpo.pt")
    out: str = arg("", "folder to write to (empty: CHECKPOINT without .pt)")
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    adapter: bool = arg(False, "write the adapters only, for PEFT")
    overwrite: bool = arg(False, "replace an earlier export in --out")

    def folder(self) -> Path:
        return Path(self.out or Path(self.checkpoint).with_suffix(""))

    def lock_file(self) -> Path | None:
        return lock_of_run(self.folder())


# ---- what is exported ----


@dataclass(frozen=True)
class Trained:
    """A checkpoint, loaded. settings: of its network; those of the own GPT are its sizes only."""

    network: GPT | RewardModel
    settings: dict
    checkpoint: dict
    tokenizer: Tokenizer

    @property
    def scores(self) -> bool:
        return isinstance(self.network, RewardModel)

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
    if base and cfg.folder().resolve() == Path(base).resolve():
        raise InputError(f"--out {base} holds the base; give another folder")
    if cfg.adapter:
        has_adapters = settings.get("rank") and not base.endswith(".gguf")
        if not has_adapters or kind == "reward" or network.temperature != 1:
            raise InputError(
                f"--adapter: {path} is no policy of --temperature 1 with adapters on a model of "
                f"transformers that is no GGUF file; leave out --adapter"
            )
        package("peft")  # which loads it again
    return Trained(network, settings, checkpoint, tokenizer)


def notes_on(trained: Trained, constant: float) -> list[str]:
    """Sentences about merged weights, for the terminal and the model card."""
    notes = []
    if trained.settings.get("kept"):
        notes.append(
            f"{len(trained.kept)} tokens were trained (--cut-vocab). The others have the base's "
            f"rows, and the model may say them."
        )
    if trained.settings.get("four_bit"):
        notes.append(
            "It was trained on a base in 4 bits. Merged weights are what the 4 bits stand for. The "
            "base in full precision gives other logits, also under the adapters."
        )
    if constant:
        notes.append(f"The checkpoint's scores are these plus {constant:.6g}.")
    return notes


def usage(trained: Trained, adapter: bool) -> str:
    """The lines of Python in the model card."""
    if trained.scores:
        return model_card.REWARD_MODEL
    settings = trained.settings
    if adapter:
        text = model_card.ADAPTER_ON_4_BITS if settings["four_bit"] else model_card.ADAPTER
        return text.replace("DTYPE", settings["base_dtype"])
    prompt = '[{"role": "user", "content": "Hi!"}]'
    if settings.get("template") == "none":
        prompt = '"Once"'
    return model_card.POLICY.replace("PROMPT", prompt)


# ---- written, and loaded again ----


def write(folder: Path, trained: Trained, adapter: bool) -> float:
    """Write weights, settings and tokenizer. Returns what the scores of a reward model are short
    of; 0 of a policy."""
    made = exported_tokenizer(trained.tokenizer)
    ends = trained.kept[list(trained.tokenizer.stop_ids)].tolist()
    constant = 0.0
    if trained.scores:
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
    kind = REWARD_MODEL if trained.scores else POLICY
    options = base_options(trained.network.config) if adapter else {}
    return from_pretrained(kind, str(folder), **options).eval()


@torch.no_grad()
def compare(trained: Trained, model: nn.Module, constant: float) -> str:
    """A sentence about the largest difference between the checkpoint's logits or scores and an
    exported model's. constant: is added to the scores.

    Raises InputError if it is too large.
    """
    rows = []
    for prompt, response in EXAMPLES:
        ids = trained.tokenizer.prompt_ids(prompt) + trained.tokenizer.response_ids(response)
        rows.append(ids[-LENGTH:])
    tokens = torch.tensor(rows)  # (B, T)
    theirs = model(trained.kept[tokens]).logits
    if trained.scores:
        ours = trained.network(tokens, torch.tensor([LENGTH] * len(rows)))  # (B,)
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


def replace_files(made: Path, folder: Path) -> None:
    """Move files into a folder, in the place of an earlier export's."""
    folder.mkdir(exist_ok=True)
    for pattern in OLD:
        for file in folder.glob(pattern):
            file.unlink()
    for file in made.iterdir():
        os.replace(file, folder / file.name)


def main(cfg: ExportConfig) -> None:
    out = cfg.folder()
    if any(out.glob("*")) and not cfg.overwrite:
        raise InputError(f"--out {out} is not empty; give another folder, or --overwrite")
    logging = package("transformers").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trained = load(cfg)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as name:
        made = Path(name)
        constant = write(made, trained, cfg.adapter)
        found = compare(trained, load_again(made, trained, cfg.adapter), constant)
        notes = [*notes_on(trained, constant), found]
        card = model_card.model_card(out, trained.checkpoint, usage(trained, cfg.adapter), notes)
        (made / "README.md").write_text(card, encoding="utf-8")
        replace_files(made, out)
    print(f"wrote {out}: {', '.join(sorted(os.listdir(out)))}", *notes, sep="\n")


if __name__ == "__main__":
    run(main, ExportConfig)
