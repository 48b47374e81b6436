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

# What the folder is compared on: prompts, and responses to them.
EXAMPLES = (
    ("What should I do about a sting?", "Cool it with water, and let it rest."),
    ("Hi!", "Hello."),
    ("Which of the two is larger: 12 or 34?", "34 is larger than 12."),
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


@dataclass(frozen=True)
class Trained:
    """What is exported."""

    network: GPT | RewardModel
    checkpoint: dict
    tokenizer: Tokenizer

    def setting(self, name: str, default=None):
        """One of those of the network; None if it has no such setting."""
        return self.checkpoint["model_config"].get(name, default)

    def kept(self) -> Tensor:
        """(V,): the whole vocabulary's id of each token."""
        return torch.tensor(getattr(self.tokenizer, "kept", range(self.tokenizer.vocab_size)))

    def ends(self) -> list[int]:
        """The whole vocabulary's ids of the tokens that end a response, the learned one first."""
        return self.kept()[list(self.tokenizer.stop_ids)].tolist()


def load(cfg: ExportConfig) -> Trained:
    """Raises InputError if --adapter is given and there are none that PEFT can hold."""
    path = Path(cfg.checkpoint)
    kind = load_checkpoint(path, "sft", "reward", "ppo")["kind"]
    network, checkpoint = load_reward_model(path) if kind == "reward" else load_policy(path, kind)
    data = cfg.data or checkpoint["config"]["data"]
    trained = Trained(network, checkpoint, tokenizer_of(path, checkpoint, data))
    base = trained.setting("init", "")
    if base and cfg.folder().resolve() == Path(base).resolve():
        raise InputError(f"--out {cfg.folder()} holds the base; give another folder")
    if cfg.adapter:
        package("peft")
        held = trained.setting("rank") and kind != "reward" and network.temperature == 1
        if not held or base.endswith(".gguf"):
            raise InputError(
                f"--adapter: {path} is no policy of --temperature 1 with adapters on a model of "
                f"transformers that is no GGUF file; leave out --adapter"
            )
    return trained


def write(folder: Path, cfg: ExportConfig, trained: Trained) -> float:
    """Write weights, settings and tokenizer. Returns what the scores of a reward model are short
    of; 0 of a policy."""
    made = exported_tokenizer(trained.tokenizer)
    ends = trained.ends()
    constant = 0.0
    if isinstance(trained.network, RewardModel):
        model, constant = exported_reward_model(trained.network)
        if trained.setting("pooled") != "first":
            separate_pad(made, model, ends[0])
        made.chat_template = score_template(made, trained.tokenizer, ends[0])
        model.save_pretrained(folder)
    elif cfg.adapter:
        save_adapter(trained.network, folder)
        generation_config(made, ends).save_pretrained(folder)
    else:
        model = exported_policy(trained.network)
        model.generation_config = generation_config(made, ends)
        model.save_pretrained(folder)
    made.save_pretrained(folder)
    return constant


@torch.no_grad()
def largest_difference(trained: Trained, model: nn.Module, constant: float) -> tuple[float, float]:
    """The largest difference between the checkpoint's logits or scores and an exported model's, and
    the largest of the checkpoint's. constant: is added to the scores."""
    kept = trained.kept()
    gpt = getattr(trained.network, "gpt", trained.network)
    difference = largest = 0.0
    for prompt, response in EXAMPLES:
        ids = trained.tokenizer.prompt_ids(prompt) + trained.tokenizer.response_ids(response)
        tokens = torch.tensor([ids[-gpt.config.block_size :]])  # (1, T)
        theirs = model(kept[tokens]).logits + constant
        if isinstance(trained.network, RewardModel):
            ours = trained.network(tokens, torch.tensor([tokens.size(1)])).view(1, 1)
        else:
            ours = gpt(tokens)[..., : len(kept)]  # (1, T, V)
            theirs = theirs[..., kept]
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, ours.abs().max().item())
    return difference, largest


def check(folder: Path, cfg: ExportConfig, trained: Trained, constant: float) -> str:
    """Load the folder as its user does. Returns a sentence about the largest difference.

    Raises InputError if that is too large.
    """
    kind = REWARD_MODEL if isinstance(trained.network, RewardModel) else POLICY
    options = base_options(trained.network.config) if cfg.adapter else {}
    model = from_pretrained(kind, str(folder), **options).eval()
    difference, largest = largest_difference(trained, model, constant)
    found = (
        f"Loaded again, its logits or scores differ from the checkpoint's by {difference:.2g} at "
        f"most; the largest is {largest:.2g}"
    )
    if not difference <= TOLERANCE[trained.setting("base_dtype", "float32")] * max(largest, 1):
        raise InputError(f"nothing was written. {found}, so {type(model).__name__} does not fit")
    return f"{found}."


def notes_on(cfg: ExportConfig, trained: Trained, constant: float) -> list[str]:
    """Sentences about the folder, for the terminal and the model card."""
    notes = []
    if trained.setting("kept"):
        notes.append(
            f"{len(trained.kept())} tokens were trained (--cut-vocab). The others have the base's "
            f"rows, and may be said again."
        )
    if trained.setting("four_bit") and not cfg.adapter:
        notes.append(
            "It was trained on a base in 4 bits. The weights are what these stand for, adapters "
            "merged; on the base in full precision the adapters give other logits."
        )
    if constant:
        notes.append(f"The checkpoint's scores are these plus {constant:.6g}.")
    return notes


def usage(cfg: ExportConfig, trained: Trained) -> str:
    """The lines of Python in the model card."""
    if isinstance(trained.network, RewardModel):
        return model_card.REWARD_MODEL
    if cfg.adapter:
        four_bit = trained.setting("four_bit")
        text = model_card.ADAPTER_ON_4_BITS if four_bit else model_card.ADAPTER
        return text.replace("DTYPE", trained.setting("base_dtype"))
    has_template = trained.setting("template") != "none"
    return model_card.POLICY if has_template else model_card.POLICY_OF_TEXT


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
        folder = Path(name)
        constant = write(folder, cfg, trained)
        notes = [*notes_on(cfg, trained, constant), check(folder, cfg, trained, constant)]
        card = model_card.model_card(str(out), trained.checkpoint, usage(cfg, trained), notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
        out.mkdir(exist_ok=True)
        for pattern in OLD:
            for file in out.glob(pattern):
                file.unlink()
        for file in folder.iterdir():
            os.replace(file, out / file.name)
    print(f"wrote {out}: {', '.join(sorted(os.listdir(out)))}")
    for note in notes:
        print(note)


if __name__ == "__main__":
    run(main, ExportConfig)
