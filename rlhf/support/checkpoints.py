"""Checkpoints: save, resume, load for use. One file holds weights, model config, the run's config and its step.

While a run lasts, its checkpoint holds the trained parameters and the optimizer's state. A finished checkpoint holds
all weights and no optimizer state. Adapters (rlhf/extras/lora.py) are merged into the network when it is loaded.
"""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.support import cli
from rlhf.support.cli import InputError
from rlhf.support.tables import Progress, check_file, replacing
from rlhf.tokenizer import Tokenizer

FORMAT = 3  # of a checkpoint
NETWORKS = {"gpt": (GPTConfig, GPT)}  # rlhf/extras/hf.py adds its own
# What a run writes beside its checkpoint.
RESULTS = {"sft": ("sft.csv",), "reward": ("reward.csv", "reward_evaluation.csv"),
           **{of: (f"{of}.csv", "evaluation.csv", f"{of}_samples.csv", "optimality.csv") for of in ("ppo", "dpo")}}

# ---- save ----


def save(path: Path, kind: str, model: nn.Module, config, step: int, tokenizer, optimizer, scaler, inputs: dict,
         progress: Progress, **state) -> None:
    """Write a checkpoint, and after it the metrics that belong to it.

    Args: kind: "sft", "reward" or "ppo"; inputs: what the run is made from, see `digests`; progress: its metrics;
        state: what else the run needs to resume.
    """
    finished = step == config.steps
    with replacing(path, "wb") as file:
        torch.save({
            "format": FORMAT,
            "kind": kind,
            "model": model.state_dict() if finished else trained_state(model),
            "model_config": dataclasses.asdict(model.gpt.config if hasattr(model, "gpt") else model.config),
            "config": dataclasses.asdict(config),
            "step": step,
            "metrics": progress.rows,
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_name": tokenizer.name,
            "inputs": inputs,
            **({} if finished else {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}),
            **state,
        }, file)
    cli.resumable = path
    progress.saved()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained: all, or the adapters and the heads."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def digests(**paths: Path) -> dict[str, str]:
    """{name: SHA-256} of the files that a run is made from, so that it resumes with the same ones."""
    return {name: hashlib.sha256(check_file(path).read_bytes()).hexdigest() for name, path in paths.items()}


# ---- begin, or resume ----

# Settings that may change on --resume: they change no training step, or are compared by their contents (inputs).
MAY_CHANGE = {"resume", "overwrite", "tensorboard", "device", "out", "data", "sft", "reward", "comparison_files",
              "log_every", "eval_every", "eval_prompts"}


def begin(path: Path, config, tokenizer, inputs: dict[str, str], model, optimizer, scaler) -> dict:
    """Where a run starts: at step 0 or, with --resume, at its checkpoint, whose state model, optimizer and scaler get.

    Raises InputError if a new run would replace the results of another one without --overwrite.
    """
    if not config.resume:
        old = [file for file in (path, *map(path.with_name, RESULTS[path.stem])) if file.exists()]
        if old and not config.overwrite:
            raise InputError(f"{old[0]} is of another run; give --resume to go on, --overwrite or another --out")
        return {"step": 0, "metrics": [], "replaced": old[1:] if path in old else old}
    check_file(path, "so there is nothing to resume from; drop --resume")
    checkpoint = load_checkpoint(path, path.stem, unfinished=True)
    check_tokenizer(path, checkpoint, tokenizer)
    before = checkpoint["config"] | {f"{name} file": digest for name, digest in checkpoint["inputs"].items()}
    now = dataclasses.asdict(config) | {f"{name} file": digest for name, digest in inputs.items()}
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name) != now.get(name):
            raise InputError(f"--resume: {path} was begun with another {name} ({before.get(name)}, now "
                             f"{now.get(name)}); give the same, or --overwrite to start afresh")
    load_weights(path, model, checkpoint["model"], resume=True)
    if "optimizer" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    cli.resumable = path
    return checkpoint


# ---- load for use ----


def network(checkpoint: dict) -> GPT:
    """The network of a checkpoint, before its weights are loaded."""
    Config, Network = NETWORKS["hf" if "init" in checkpoint["model_config"] else "gpt"]
    return Network(Config(**checkpoint["model_config"]))


def load_checkpoint(path: Path, *kinds: str, unfinished: bool = False) -> dict:
    """Read a checkpoint of one of the kinds "sft", "reward" and "ppo", on the CPU. With "ppo" goes "dpo".

    Raises InputError if it is missing, garbled, another script's or, unless allowed, unfinished.
    """
    scripts = " or ".join(f"train_{kind}.py" for kind in kinds)
    check_file(path, f"run `python {scripts}` first, with the same --out")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # which torch does not look for
                raise ValueError(f"damaged in {damaged}")
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"of format {checkpoint['format']}, this code reads {FORMAT}")
        # Raises if the weights are no tensors, or the sizes make no network.
        config = checkpoint["model_config"]
        "init" in config or GPTConfig(**config), [weight.shape for weight in checkpoint["model"].values()]
        step, steps = checkpoint["step"], checkpoint["config"]["steps"]
        script = "-m rlhf.tools.train_dpo" if checkpoint["kind"] == "dpo" else f"train_{checkpoint['kind']}.py"
    except Exception as error:  # a zip that is cut short, a pickle of something else, a missing key, ...
        raise InputError(f"{path} is not a checkpoint of this project: run {scripts} again ({error!r})") from error
    if checkpoint["kind"] not in kinds and not (checkpoint["kind"] == "dpo" and "ppo" in kinds):
        raise InputError(f"{path} was written by {script}; a checkpoint of {scripts} is needed here")
    if not unfinished and step < steps:
        raise InputError(f"{path} stopped at step {step} of {steps}: finish it with `python {script} --resume`")
    return checkpoint


def merged(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The plain weights of a finished checkpoint, of the names that begin with prefix, without it.

    An adapter is folded into its matrix: weight = W + scale * B A (rlhf/extras/lora.py). If the matrix is not in the
    checkpoint, it stays an adapter (rlhf/extras/hf.py).
    """
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    for layer in [name.removesuffix(".linear.weight") for name in state if name.endswith(".linear.weight")]:
        A, B, scale = (state.pop(f"{layer}.{name}") for name in ("A", "B", "scale"))
        state[f"{layer}.linear.weight"] = state[f"{layer}.linear.weight"] + scale * B @ A
    return {name.replace(".linear.", "."): tensor for name, tensor in state.items()}


def load_weights(path: Path, model: nn.Module, state: dict[str, Tensor], prefix="", resume=False) -> None:
    """Load the weights of the checkpoint at path: for use, `merged`; to resume, the trained ones, as they are.

    Raises InputError if one is missing, unknown, of another shape, or NaN or infinite.
    """
    try:
        state = state if resume else merged(state, prefix)
        trained = trained_state(model) if resume else model.state_dict()
        model.load_state_dict({**{name: x for name, x in model.state_dict().items() if name not in trained}, **state})
    except (KeyError, RuntimeError) as error:  # torch names what is missing, unknown or of another shape
        raise InputError(f"{path} does not fit its own settings ({error}); train it again") from error
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise InputError(f"{path}: the weight {broken[0]} is NaN or infinite; train it again")


def load_policy(path: Path, *kinds: str) -> tuple[GPT, dict]:
    """The GPT of a checkpoint of one of the kinds "sft" and "ppo" (or "dpo"), without the value estimate, and the
    checkpoint.

    A policy that was trained at another temperature than 1 is sampled at it.
    """
    checkpoint = load_checkpoint(path, *kinds)
    gpt = network(checkpoint)
    load_weights(path, gpt, checkpoint["model"], prefix="" if checkpoint["kind"] == "sft" else "gpt.")
    gpt.temperature = checkpoint["config"].get("temperature", 1.0)
    return gpt, checkpoint


def load_reward_model(path: Path) -> tuple[RewardModel, dict]:
    """The reward model of reward.pt, and the checkpoint."""
    checkpoint = load_checkpoint(path, "reward")
    model = RewardModel(network(checkpoint))
    load_weights(path, model, checkpoint["model"])
    return model, checkpoint


def check_tokenizer(path: Path, checkpoint: dict, tokenizer: Tokenizer) -> None:
    """Raise InputError if a checkpoint was trained with another tokenizer than this one."""
    if checkpoint["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"{path} was trained with another tokenizer; give the same --data to all scripts")


def check_input(path: Path, checkpoint: dict, name: str, file: Path) -> None:
    """Raise InputError if a checkpoint was not made from this file, which is one of its inputs."""
    if checkpoint["inputs"][name] != digests(file=file)["file"]:
        raise InputError(f"{path} was made from another {name} file than {file}; name the right one, or train it again")
