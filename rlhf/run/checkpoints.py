"""The checkpoint file: weights, the model's config, the run's config, its step and its metrics.

While a run lasts, its checkpoint holds the trained parameters and the optimizer's state. A finished
checkpoint holds all weights and no optimizer state. Adapters (rlhf/networks/lora.py) are merged
into the network when it is loaded.
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
    other = ", or give --reward a function, FILE.py" if kinds == ("reward",) else ""
    check_file(path, f"run {programs} first, with the same --out{other}")
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


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter} of those that are trained: all, or the adapters and the heads."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.detach()
    return trained


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
    check_finite_weights(path, weights)


def load_trained(path: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the trained parameters of the checkpoint at path, to resume; the others stay.

    Raises InputError as load_weights does.
    """
    trained = trained_state(model)
    untrained = {name: x for name, x in model.state_dict().items() if name not in trained}
    with fitting(path):
        model.load_state_dict({**untrained, **state})
    check_finite_weights(path, state)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the state of AdamW in the checkpoint at path, to resume.

    torch takes moments of any shape, and the next step would write beyond their memory. Raises
    InputError if a moment has another shape than its parameter.
    """
    with fitting(path):
        optimizer.load_state_dict(state)
        for parameter, moments in optimizer.state.items():
            shape = parameter.shape
            expected = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            found = {name: x.shape for name, x in moments.items()}
            if found != expected or not all(x.is_contiguous() for x in moments.values()):
                raise ValueError(f"the optimizer's state has other shapes: {found}")


@contextlib.contextmanager
def fitting(path: Path):
    """Turn the errors of weights that do not fit their network into an InputError."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:  # it names what does not fit
        raise InputError(
            f"{path} does not fit its own settings ({error}); train it again"
        ) from error


def check_finite_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Raise InputError if a weight is NaN or infinite."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: the weight {name} is NaN or infinite; train it again")


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
