"""From a checkpoint's path to a network, ready to be used or trained further.

A checkpoint made with --lora-rank holds adapters alone. The network below them is the one that its run started from: it
is loaded first, checked, and the adapters are merged into it, so that nothing that follows need know of them.
"""

from pathlib import Path

import torch

from rlhf.common import InputError, check_tokenizer, digests, load_checkpoint, load_trained_state
from rlhf.data import find_tokenizer
from rlhf.lora import add_adapters, merge_adapters
from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.tokenizer import Tokenizer


def load_pretrained(init: str) -> GPT:
    """GPT.from_pretrained, with its failures told in one line."""
    try:
        return GPT.from_pretrained(init)
    except Exception as error:  # no network, no such file, another architecture, a garbled file, ...
        raise InputError(f"--init {init} cannot be loaded: {type(error).__name__}: {error}") from error


def pretrained_digest(init: str) -> dict[str, str]:
    """{"init": SHA-256} of a local folder's weights; nothing for a published name, which does not change."""
    return digests(init=Path(init) / "pytorch_model.bin") if init and Path(init).is_dir() else {}


def load_policy(path: Path, *kinds: str) -> tuple[GPT, dict]:
    """The GPT of a checkpoint of one of the kinds "sft" and "ppo", without the value estimate, and the checkpoint."""
    checkpoint = load_checkpoint(path, *kinds)
    gpt, state = _below(path, checkpoint), checkpoint["model"]
    if checkpoint["kind"] == "ppo":
        state = {name.removeprefix("gpt."): tensor for name, tensor in state.items() if name.startswith("gpt.")}
    load_trained_state(gpt, state)
    return merge_adapters(gpt), checkpoint


def load_reward_model(path: Path) -> tuple[RewardModel, dict]:
    """The reward model of reward.pt, and the checkpoint."""
    checkpoint = load_checkpoint(path, "reward")
    model = RewardModel(_below(path, checkpoint))
    load_trained_state(model, checkpoint["model"])
    merge_adapters(model.gpt)
    return model, checkpoint


def tokenizer_of(path: Path, checkpoint: dict, folder: str) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: the data set's, or GPT-2's."""
    tokenizer = find_tokenizer(folder, checkpoint["config"].get("tokenizer", "auto"))
    if checkpoint["tokenizer"] != tokenizer.fingerprint and checkpoint["model_config"]["vocab_size"] == 50257:
        tokenizer = find_tokenizer(folder, "gpt2")
    check_tokenizer(path, checkpoint, tokenizer)
    return tokenizer


def _below(path: Path, checkpoint: dict) -> GPT:
    """The network that a checkpoint's weights go into: an empty one, or, for adapters, the one that they were made
    for, with fresh adapters on it."""
    config, rank = checkpoint["config"], checkpoint["config"].get("lora_rank", 0)
    if not rank:
        return GPT(GPTConfig(**checkpoint["model_config"]))
    if checkpoint["kind"] == "sft":
        gpt, found = load_pretrained(config["init"]), pretrained_digest(config["init"])
    else:
        sft_path = Path(config["sft"] or Path(config["out"]) / "sft.pt")
        if not sft_path.is_file():
            sft_path = path.parent / sft_path.name  # both may have been moved
        gpt, _ = load_policy(sft_path, "sft")
        found = digests(sft=sft_path)
    for name, digest in found.items():
        if checkpoint["inputs"][name] != digest:
            raise InputError(f"{path} holds adapters, and the network that they were trained on has changed since: put "
                             f"back the {name} file of then, or train it again")
    return add_adapters(gpt, rank, torch.Generator())
