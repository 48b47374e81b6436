"""Write a checkpoint as a folder for Hugging Face's transformers, or as an adapter for PEFT.

    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_model       # or sft.pt, reward.pt
    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_adapter --adapter

The folder holds weights, settings, the tokenizer with its chat template, the end tokens, and a
model card, README.md, which says how to load it. It is loaded again before it gets its name, and
its logits or scores are compared with the checkpoint's.
"""

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.model import GPT, RewardModel
from rlhf.networks import model_card
from rlhf.networks.export import (
    POLICY,
    REWARD_MODEL,
    adapter_of,
    base_options,
    exported_policy,
    exported_reward_model,
    load_adapter,
    model_ids,
)
from rlhf.networks.export_tokenizer import (
    exported_tokenizer,
    generation_config,
    separate_pad,
    with_end,
)
from rlhf.networks.pretrained import from_pretrained, package
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import arg
from rlhf.run.loading import load_policy, load_reward_model, tokenizer_of
from rlhf.run.messages import as_text
from rlhf.run.program import lock_of_run, run
from rlhf.tokenizer import Tokenizer

# What the folder is compared on: questions, and responses to them.
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

    @property
    def scores(self) -> bool:
        return isinstance(self.network, RewardModel)

    @property
    def gpt(self) -> GPT:
        return self.network.gpt if self.scores else self.network

    @property
    def ends(self) -> list[int]:
        """The model's ids of the tokens that end a response."""
        return model_ids(self.gpt, self.tokenizer.stop_ids)


def load(cfg: ExportConfig) -> Trained:
    path = Path(cfg.checkpoint)
    kind = load_checkpoint(path, "sft", "reward", "ppo")["kind"]
    if kind == "reward":
        network, checkpoint = load_reward_model(path)
    else:
        network, checkpoint = load_policy(path, kind)
    data = cfg.data or checkpoint["config"]["data"]
    return Trained(network, checkpoint, tokenizer_of(path, checkpoint, data))


def check_adapters(cfg: ExportConfig, trained: Trained) -> None:
    """Raise InputError if there are no adapters, or if they are not the whole policy."""
    config = trained.checkpoint["model_config"]
    if trained.scores or not config.get("rank"):
        raise InputError(
            f"--adapter: {cfg.checkpoint} is no policy with adapters on a model of transformers; "
            f"leave it out"
        )
    if trained.gpt.temperature != 1:
        raise InputError(
            f"--adapter: {cfg.checkpoint} was trained at the temperature {trained.gpt.temperature}, "
            f"and only its output matrix can hold that; leave out --adapter"
        )
    if config["init"].endswith(".gguf"):
        raise InputError(f"--adapter: {config['init']} is no base for PEFT; leave out --adapter")


# ---- write ----


def write_policy(folder: Path, trained: Trained) -> None:
    model = exported_policy(trained.gpt)
    made = exported_tokenizer(trained.tokenizer)
    model.generation_config = generation_config(made, trained.ends)
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def write_adapter(folder: Path, trained: Trained) -> None:
    config, weights = adapter_of(trained.gpt)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    package("safetensors.torch").save_file(weights, folder / "adapter_model.safetensors")
    made = exported_tokenizer(trained.tokenizer)
    generation_config(made, trained.ends).save_pretrained(folder)
    made.save_pretrained(folder)


def write_reward_model(folder: Path, trained: Trained) -> float:
    """Returns: the constant of exported_reward_model."""
    model, constant = exported_reward_model(trained.network)
    made = exported_tokenizer(trained.tokenizer)
    if trained.checkpoint["model_config"].get("pooled") != "first":
        separate_pad(model, made, trained.ends)
    if made.chat_template:
        end = made.convert_ids_to_tokens(trained.ends[0])
        made.chat_template = with_end(made.chat_template, end)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return constant


# ---- load it again ----


@torch.no_grad()
def largest_difference(trained: Trained, model, constant: float) -> tuple[float, float]:
    """The largest difference between the checkpoint's logits or scores and those of an exported
    model plus the constant, and the largest of the checkpoint's."""
    difference = largest = 0.0
    for question, response in EXAMPLES:
        prompt = trained.tokenizer.prompt_ids([{"role": "user", "content": question}])
        ids = prompt + trained.tokenizer.response_ids(response)
        ids = ids[-trained.gpt.config.block_size :]
        tokens = torch.tensor([ids])
        theirs = model(torch.tensor([model_ids(trained.gpt, ids)])).logits + constant
        if trained.scores:
            ours = trained.network(tokens, torch.tensor([len(ids)]))
        else:
            ours = trained.gpt(tokens)
            theirs = theirs[..., model_ids(trained.gpt, range(ours.size(-1)))]
        difference = max(difference, (ours - theirs.view_as(ours)).abs().max().item())
        largest = max(largest, ours.abs().max().item())
    return difference, largest


def check_tokens(trained: Trained, made) -> None:
    """Raise InputError if the exported tokenizer reads a dialogue as other tokens."""
    question, response = EXAMPLES[0]
    messages = [{"role": "user", "content": question}]
    ours = trained.tokenizer.prompt_ids(messages)
    text = as_text(messages)
    if trained.scores:
        messages.append({"role": "assistant", "content": response})
        ours += trained.tokenizer.response_ids(response)
        text += f" {response}"
    if made.chat_template:
        theirs = made.apply_chat_template(
            messages, add_generation_prompt=not trained.scores, return_dict=False
        )
    else:
        theirs = made(text)["input_ids"]  # without an end
    if model_ids(trained.gpt, ours)[: len(theirs)] != theirs:
        raise InputError(
            f"the exported tokenizer reads {messages} as the tokens {theirs}, and the checkpoint "
            f"{ours}; nothing was written"
        )


def check_export(folder: Path, cfg: ExportConfig, trained: Trained, constant: float) -> str:
    """Load a folder as its user does, and compare it with the checkpoint. Returns what was found.

    Raises InputError if it differs.
    """
    if not trained.checkpoint["model_config"].get("kept"):  # else bytes may spell a token
        check_tokens(trained, from_pretrained("AutoTokenizer", str(folder)))
    if cfg.adapter and importlib.util.find_spec("peft") is None:
        return "not loaded again: that needs pip install peft"
    if cfg.adapter:
        model = load_adapter(folder, trained.gpt.config)
    else:
        model = from_pretrained(REWARD_MODEL if trained.scores else POLICY, str(folder))
    difference, largest = largest_difference(trained, model.eval(), constant)
    dtype = trained.checkpoint["model_config"].get("base_dtype", "float32")
    what = "scores" if trained.scores else "logits"
    found = (
        f"loaded again, its {what} differ from the checkpoint's by {difference:.2g} at most "
        f"(the largest is {largest:.2g})"
    )
    if not difference <= TOLERANCE[dtype] * max(largest, 1):
        raise InputError(f"nothing was written: {found}; this {type(model).__name__} is another")
    return found


# ---- the program ----


def notes_on(cfg: ExportConfig, trained: Trained, constant: float) -> list[str]:
    """Sentences about what the folder holds, for the terminal and the model card."""
    config = trained.checkpoint["model_config"]
    notes = []
    if config.get("kept"):
        notes.append(
            f"{len(config['kept'])} tokens were trained (--cut-vocab). The others have the rows of "
            f"the base, so they may be said, too."
        )
    if config.get("four_bit") and not cfg.adapter:
        notes.append(
            "Trained on a base in 4 bits. These weights are what the 4 bits stand for, adapters "
            "merged; on the base itself the adapters do something else."
        )
    if constant:
        notes.append(f"The checkpoint's scores are these plus {constant:.6g}.")
    return notes


def usage_of(cfg: ExportConfig, trained: Trained, chat: bool) -> str:
    """The lines of Python in the model card."""
    if cfg.adapter:
        config = trained.gpt.config
        options = [f'dtype="{config.base_dtype}"']
        if config.four_bit:
            quantisation = base_options(config)["quantization_config"].to_diff_dict()
            options.append(f"quantization_config=BitsAndBytesConfig(**{quantisation})")
        usage = model_card.ADAPTER.replace("OPTIONS", ", ".join(options))
        return usage.replace("BASE", config.init)
    if not trained.scores:
        return model_card.CHAT if chat else model_card.TEXT
    if chat:
        return model_card.SCORE + model_card.SCORE_CHAT
    if trained.checkpoint["model_config"].get("pooled") == "first":  # its tokenizer adds an end
        return model_card.SCORE + model_card.SCORE_TEXT.replace(" + tokenizer.eos_token", "")
    return model_card.SCORE + model_card.SCORE_TEXT


def replace_files(made: Path, folder: Path) -> None:
    """Move files into a folder, in the place of an earlier export's."""
    folder.mkdir(exist_ok=True)
    for pattern in OLD:
        for old in folder.glob(pattern):
            old.unlink()
    for file in made.iterdir():
        os.replace(file, folder / file.name)


def main(cfg: ExportConfig) -> None:
    out = cfg.folder()
    if any(out.glob("*")) and not cfg.overwrite:
        raise InputError(f"--out {out} is not empty; give another folder, or --overwrite")
    package("transformers").utils.logging.set_verbosity_error()
    trained = load(cfg)
    base = trained.checkpoint["model_config"].get("init")
    if base and out.resolve() == Path(base).resolve():
        raise InputError(f"--out {out} is the model that was trained; give another folder")
    if cfg.adapter:
        check_adapters(cfg, trained)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as temporary:
        made = Path(temporary)
        constant = 0.0
        if trained.scores:
            constant = write_reward_model(made, trained)
        elif cfg.adapter:
            write_adapter(made, trained)
        else:
            write_policy(made, trained)
        found = check_export(made, cfg, trained, constant)
        notes = [*notes_on(cfg, trained, constant), f"{found[0].upper()}{found[1:]}."]
        chat = (made / "chat_template.jinja").is_file()
        usage = usage_of(cfg, trained, chat)
        card = model_card.model_card(str(out), trained.checkpoint, usage, notes)
        (made / "README.md").write_text(card, encoding="utf-8")
        replace_files(made, out)
    print(f"wrote {out}: {', '.join(sorted(os.listdir(out)))}")
    for note in notes:
        print(note)


if __name__ == "__main__":
    run(main, ExportConfig)
