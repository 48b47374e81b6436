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
        reason = (str(error).splitlines() or [""])[0]  # torch adds pages
        raise InputError(f"--init {init} cannot be loaded: {type(error).__name__}: {reason}; a folder needs "
                         f"config.json and a whole pytorch_model.bin, a name an internet connection") from error


def pretrained_digests(init: str) -> dict[str, str]:
    """SHA-256 of a local folder's two files; nothing for a published name, which does not change."""
    folder = Path(init)
    if not init or not folder.is_dir():
        return {}
    return digests(**{"init": folder / "pytorch_model.bin", "init config": folder / "config.json"})


def load_policy(path: Path, *kinds: str) -> tuple[GPT, dict]:
    """The GPT of a checkpoint of one of the kinds "sft" and "ppo", without the value estimate, and the checkpoint.

    It is sampled as it was trained: a policy trained at another temperature than 1 has it folded into the last
    LayerNorm, from which the logits are made.
    """
    checkpoint = load_checkpoint(path, *kinds)
    gpt, state = base_model(path, checkpoint), checkpoint["model"]
    if checkpoint["kind"] == "ppo":
        state = {name.removeprefix("gpt."): tensor for name, tensor in state.items() if name.startswith("gpt.")}
    load_trained_state(gpt, state)
    merge_adapters(gpt)
    with torch.no_grad():
        for parameter in gpt.ln_f.parameters():
            parameter /= checkpoint["config"].get("temperature", 1.0)
    return gpt, checkpoint


def load_reward_model(path: Path) -> tuple[RewardModel, dict]:
    """The reward model of reward.pt, and the checkpoint."""
    checkpoint = load_checkpoint(path, "reward")
    model = RewardModel(base_model(path, checkpoint))
    load_trained_state(model, checkpoint["model"])
    merge_adapters(model.gpt)
    return model, checkpoint


def base_model(path: Path, checkpoint: dict) -> GPT:
    """The network that a checkpoint's weights go into: a fresh one or, for adapters, the one that they were trained on,
    with fresh adapters on it."""
    config, rank = checkpoint["config"], checkpoint["config"].get("lora_rank", 0)
    if not rank:
        return GPT(GPTConfig(**checkpoint["model_config"]))
    if checkpoint["kind"] == "sft":
        gpt, found = load_pretrained(config["init"]), pretrained_digests(config["init"])
    else:  # sft.pt is where it was, or both have been moved
        candidates = Path(config["sft"] or Path(config["out"]) / "sft.pt"), path.parent / "sft.pt"
        same = [sft for sft in candidates if sft.is_file() and digests(sft=sft)["sft"] == checkpoint["inputs"]["sft"]]
        if not same:
            raise InputError(f"{path} holds adapters, and neither {candidates[0]} nor {candidates[1]} is the sft.pt "
                             f"that they were trained on; put it back, or train them again")
        gpt, found = load_policy(same[0], "sft")[0], {}
    if any(checkpoint["inputs"][name] != digest for name, digest in found.items()):
        raise InputError(f"{path} holds adapters, and the files in {config['init']} have changed since they were "
                         f"trained; put those of then back, or train them again")
    return add_adapters(gpt, rank, None)


# ---- for programs that use what was trained ----


def tokenizer_of(path: Path, checkpoint: dict, folder: str) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: the data set's own or, failing that, the one it names."""
    name = checkpoint["tokenizer_name"]
    tokenizer = find_tokenizer(folder, "auto" if (Path(folder) / "tokenizer.tiktoken").is_file() else name)
    if checkpoint["tokenizer"] != tokenizer.fingerprint:
        tokenizer = find_tokenizer(folder, name)
    check_tokenizer(path, checkpoint, tokenizer)
    return tokenizer


def find_reward_model(given: str, beside: Path, tokenizer: Tokenizer) -> RewardModel | None:
    """The reward model named by a flag or, where none is, reward.pt beside a policy, if it can be used."""
    path = Path(given or beside.with_name("reward.pt"))
    if not given and not path.is_file():
        return None
    try:
        model, checkpoint = load_reward_model(path)
        check_tokenizer(path, checkpoint, tokenizer)
    except InputError as error:
        if given:
            raise
        print(f"going on without a reward model: {error}")
        return None
    return model
