"""The checkpoint file: weights, the model's config, the run's config, its step and its metrics.

While a run lasts, its checkpoint holds the optimizer's state as well. Adapters
(rlhf/networks/lora.py) are merged into the network when it is loaded.
"""

import contextlib
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.run.commands import command
from rlhf.run.errors import InputError
from rlhf.run.files import check_file, digests
from rlhf.tokenizer import Tokenizer

FORMAT = 3  # of a checkpoint


def load_checkpoint(path: Path, *kinds: str, unfinished: bool = False) -> dict:
    """Read a checkpoint onto the CPU.

    Args: kinds: those allowed, of "sft", "reward", "ppo" and "dpo"; "ppo" allows "dpo" as well;
        unfinished: allow one of a run that has not finished.
    Raises: InputError if it is missing, garbled, of another kind or unfinished.
    """
    programs = " or ".join(f"`{command(kind)}`" for kind in kinds)
    check_file(path, f"run {programs} first, with the same --out")
    try:
        checkpoint = read_checkpoint(path)
    except Exception as error:  # a zip that is cut short, a pickle of something else, ...
        raise InputError(
            f"{path} is not a checkpoint of this project: run {programs} again ({error!r})"
        ) from error
    kind = checkpoint["kind"]
    accepted = (*kinds, "dpo") if "ppo" in kinds else kinds
    if kind not in accepted:
        raise InputError(
            f"{path} was written by `{command(kind)}`; a checkpoint of {programs} is needed here"
        )
    step = checkpoint["step"]
    steps = checkpoint["config"]["steps"]
    if not unfinished and step < steps:
        raise InputError(
            f"{path} stopped at step {step} of {steps}: finish it with `{command(kind)} --resume`"
        )
    return checkpoint


def read_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint file. Raises an exception of any kind if they are not whole."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch does not compare checksums
    if damaged:
        raise ValueError(f"damaged in {damaged}")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"of format {checkpoint['format']}, this code reads {FORMAT}")
    return checkpoint


# ---- weights ----


def merged(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of a finished checkpoint whose names begin with prefix, adapters merged.

        weight = W + scale * B A        (rlhf/networks/lora.py)

    An adapter whose W is not in the checkpoint stays an adapter (rlhf/networks/hf.py).

    Returns: {name without prefix: weight}. Raises: KeyError or RuntimeError if an adapter does not
        fit its W.
    """
    matrix = ".linear.weight"  # what LoRALinear calls the matrix under an adapter
    weights = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = tensor
    for name in [name for name in weights if name.endswith(matrix)]:
        layer = name.removesuffix(matrix)
        A = weights.pop(f"{layer}.A")
        B = weights.pop(f"{layer}.B")
        scale = weights.pop(f"{layer}.scale")
        weights[name] = weights[name] + scale * B @ A
    return {name.replace(".linear.", "."): tensor for name, tensor in weights.items()}


def load_weights(path: Path, model: nn.Module, state: dict[str, Tensor], prefix: str = "") -> None:
    """Load the `merged` weights of the finished checkpoint at path into the model.

    Raises InputError if one is missing, unknown, of another shape, or NaN or infinite.
    """
    with fitting(path):
        weights = merged(state, prefix)
        model.load_state_dict(weights)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: the weight {name} is NaN or infinite; train it again")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state of AdamW, to resume.

    torch takes moments of any shape, and the next step would write beyond their memory. Raises
    ValueError, KeyError or RuntimeError if a moment is missing or has another shape than its
    parameter, or if a step is not one number.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        moments["step"].item()
        for name in ("exp_avg", "exp_avg_sq"):
            moment = moments[name]
            if moment.shape != parameter.shape or not moment.is_contiguous():
                raise ValueError(f"{name} has another shape than its parameter")


@contextlib.contextmanager
def fitting(path: Path):
    """Turn the errors of a state that does not fit its network or optimizer into an InputError."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:  # it names what does not fit
        raise InputError(
            f"{path} does not fit its own settings ({error}); train it again"
        ) from error


# ---- what a checkpoint was made from ----


def check_tokenizer(path: Path, checkpoint: dict, tokenizer: Tokenizer) -> None:
    """Raise InputError if a checkpoint was trained with another tokenizer than this one."""
    if checkpoint["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"{path} was trained with another tokenizer; give the same --data to all scripts"
        )


def check_input(path: Path, checkpoint: dict, name: str, file: Path) -> None:
    """Raise InputError if a checkpoint was made from another file than this one.

    name: of the file among the checkpoint's inputs, such as "sft".
    """
    if checkpoint["inputs"][name] != digests(file=file)["file"]:
        raise InputError(
            f"{path} was made from another {name} file than {file}; name the right one, or train "
            f"it again"
        )
