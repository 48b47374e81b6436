"""Checkpoints: save, resume, load for use. One file holds weights, model config, the run's config and its step.

While a run lasts, its checkpoint holds the trained parameters and the optimizer's state. A finished checkpoint holds
all weights and no optimizer state. Adapters (rlhf/extras/lora.py) are merged into the network when it is loaded.
"""

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.support.cli import InputError
from rlhf.tokenizer import Tokenizer, find_tokenizer

FORMAT = 2  # of a checkpoint

# ---- save ----


def save(path: Path, kind: str, model: nn.Module, config, step: int, tokenizer, optimizer, scaler, inputs: dict,
         **state) -> None:
    """Write a checkpoint.

    Args: kind: "sft", "reward" or "ppo"; inputs: what the run is made from, see `digests`; state: what else the run
        needs to resume.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = step == config.steps
    save_tensors(path, {
        "format": FORMAT,
        "kind": kind,
        "model": model.state_dict() if finished else trained_state(model),
        "model_config": dataclasses.asdict(model.gpt.config if hasattr(model, "gpt") else model.config),
        "config": dataclasses.asdict(config),
        "step": step,
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_name": tokenizer.name,
        "inputs": inputs,
        **({} if finished else {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}),
        **state,
    })


def save_tensors(path: Path, content: dict) -> None:
    """torch.save to a temporary name, then rename: a kill leaves the old file or the new one, never half of one.

    Raises InputError if the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
    except RuntimeError as error:  # what torch makes of a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written; free some space, or give another --out. What was there before is "
                         f"untouched ({str(error).splitlines()[0]})") from error
    os.replace(temporary, path)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained: all, or the adapters and the heads."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def digests(**paths: Path) -> dict[str, str]:
    """{name: SHA-256} of the files that a run is made from, so that it resumes with the same ones."""
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{path} does not exist; give --data a folder that holds it, or the right name")
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


# ---- resume ----

# Settings that may change on --resume: they change no training step, or are compared by their contents (inputs).
MAY_CHANGE = {"resume", "tensorboard", "device", "out", "data", "sft", "reward", "comparison_files", "log_every",
              "eval_every", "eval_prompts"}


def resume(path: Path, config, tokenizer, inputs: dict[str, str], model, optimizer, scaler) -> dict:
    """Put model, optimizer and scaler back to where the checkpoint left them. Returns the checkpoint."""
    checkpoint = load_resumable(path, config, tokenizer, inputs)
    load_state(model, checkpoint["model"])
    if "optimizer" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint


def load_resumable(path: Path, config, tokenizer, inputs: dict[str, str]) -> dict:
    """The checkpoint of the run to resume. Raises InputError if the tokenizer, an input file or a setting differs."""
    if not path.is_file():
        raise InputError(f"--resume: {path} does not exist, so there is nothing to resume from; drop --resume")
    checkpoint = load_checkpoint(path, path.stem, unfinished=True)
    check_tokenizer(path, checkpoint, tokenizer)
    theirs = checkpoint["config"]
    for name, ours in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE and theirs.get(name) != ours:
            raise InputError(f"--resume: {path} was trained with --{name.replace('_', '-')} {theirs.get(name)}, "
                             f"not {ours}; give the same flags, or start afresh without --resume")
    for name in sorted(inputs.keys() | checkpoint["inputs"].keys()):
        if checkpoint["inputs"].get(name) != inputs.get(name):
            raise InputError(f"--resume: {path} was begun with another {name} file; give the one that it was begun "
                             f"with, or start afresh without --resume")
    return checkpoint


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights. Raises RuntimeError if a trained parameter is missing or a name is unknown."""
    missing = trained_state(model).keys() - state.keys()
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if missing or unknown:
        raise RuntimeError(f"weights missing: {sorted(missing)[:3]}; unknown: {unknown[:3]}")


# ---- load for use ----


def load_checkpoint(path: Path, *kinds: str, unfinished: bool = False) -> dict:
    """Read a checkpoint of one of the kinds "sft", "reward" and "ppo", on the CPU. With "ppo" goes "dpo".

    Raises InputError if it is missing, garbled, another script's or, unless allowed, unfinished.
    """
    scripts = " or ".join(f"train_{kind}.py" for kind in kinds)
    if not path.is_file():
        raise InputError(f"{path} does not exist: run `python {scripts}` first, with the same --out")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = "-m rlhf.tools.train_dpo" if checkpoint["kind"] == "dpo" else f"train_{checkpoint['kind']}.py"
        if checkpoint["format"] != FORMAT:
            raise InputError(f"{path} has format {checkpoint['format']}, this code reads {FORMAT}: "
                             f"run `python {script}` again")
        step, steps = checkpoint["step"], checkpoint["config"]["steps"]
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # which torch does not look for
                raise InputError(f"{path} is damaged, in {damaged}: run `python {scripts}` again")
    except InputError:
        raise
    except Exception as error:  # a zip that is cut short, a pickle of something else, a missing key, ...
        raise InputError(f"{path} is not a checkpoint of this project ({type(error).__name__}): "
                         f"run `python {scripts}` again") from error
    if checkpoint["kind"] not in kinds and not (checkpoint["kind"] == "dpo" and "ppo" in kinds):
        raise InputError(f"{path} was written by {script}; a checkpoint of {scripts} is needed here")
    if not unfinished and step < steps:
        raise InputError(f"{path} stopped at step {step} of {steps}: finish it with `python {script} --resume`")
    return checkpoint


def merged(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The plain weights of a finished checkpoint, of the names that begin with prefix, without it.

    An adapter is folded into its matrix: weight = W + scale * B A (rlhf/extras/lora.py).
    """
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    for layer in [name.removesuffix(".A") for name in state if name.endswith(".A")]:
        A, B, scale = (state.pop(f"{layer}.{name}") for name in ("A", "B", "scale"))
        state[f"{layer}.weight"] = state.pop(f"{layer}.linear.weight") + scale * B @ A
        state[f"{layer}.bias"] = state.pop(f"{layer}.linear.bias")
    return state


def load_policy(path: Path, *kinds: str) -> tuple[GPT, dict]:
    """The GPT of a checkpoint of one of the kinds "sft" and "ppo" (or "dpo"), without the value estimate, and the
    checkpoint.

    A policy that was trained at another temperature than 1 is sampled at it: the temperature is folded into the last
    LayerNorm, from which the logits are made.
    """
    checkpoint = load_checkpoint(path, *kinds)
    gpt = GPT(GPTConfig(**checkpoint["model_config"]))
    gpt.load_state_dict(merged(checkpoint["model"], prefix="" if checkpoint["kind"] == "sft" else "gpt."))
    with torch.no_grad():
        for parameter in gpt.ln_f.parameters():
            parameter /= checkpoint["config"].get("temperature", 1.0)
    return gpt, checkpoint


def load_reward_model(path: Path) -> tuple[RewardModel, dict]:
    """The reward model of reward.pt, and the checkpoint."""
    checkpoint = load_checkpoint(path, "reward")
    model = RewardModel(GPT(GPTConfig(**checkpoint["model_config"])))
    model.load_state_dict(merged(checkpoint["model"]))
    return model, checkpoint


def check_tokenizer(path: Path, checkpoint: dict, tokenizer: Tokenizer) -> None:
    """Raise InputError if a checkpoint was trained with another tokenizer than this one."""
    if checkpoint["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"{path} was trained with another tokenizer than this data set's: "
                         f"give the same --data to all three scripts, or train it again")


def tokenizer_of(path: Path, checkpoint: dict, folder: str) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: the data set's or, failing that, the one it names."""
    name = checkpoint["tokenizer_name"]
    tokenizer = find_tokenizer(folder, "auto" if (Path(folder) / "tokenizer.tiktoken").is_file() else name)
    if checkpoint["tokenizer"] != tokenizer.fingerprint:
        tokenizer = find_tokenizer(folder, name)
    check_tokenizer(path, checkpoint, tokenizer)
    return tokenizer
