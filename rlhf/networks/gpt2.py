"""GPT-2's weights, read without transformers: `train_sft.py --init`. (rlhf/networks/export.py
makes them of a GPT.)

    python train_sft.py --init gpt2 --tokenizer gpt2      # a published name, downloaded once
    python train_sft.py --init FOLDER                     # config.json, and model.safetensors or
                                                          # pytorch_model.bin
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from rlhf.model import GPT, GPTConfig
from rlhf.networks.pretrained import loading, local_files, package
from rlhf.run.errors import InputError
from rlhf.run.files import digests
from rlhf.tokenizer import Tokenizer

# The published GPT-2s: layers, heads, channels. All have 50,257 tokens and a context of 1,024.
PRETRAINED = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "distilgpt2": (6, 12, 768),
}
# What a config.json must say, or leave out, for the network to be the one of rlhf/model.py.
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
# The files that transformers writes, one or several. It reads the first kind that is there.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def published_name(name: str) -> tuple[str, bool]:
    """What GPT-2's published files call a weight of rlhf.model.GPT, and whether they hold it
    transposed: they keep the matrices of linear layers as (in, out).

    >>> published_name("blocks.0.mlp.c_fc.weight")
    ('h.0.mlp.c_fc.weight', True)
    """
    transposed = ".c_" in name and name.endswith("weight")
    return name.replace("blocks.", "h.", 1), transposed


def load_gpt2(name_or_path: str) -> GPT:
    """A GPT with GPT-2's weights.

    Args: name_or_path: a name of PRETRAINED, fetched once and kept in torch.hub's cache; or a
        folder that holds config.json and WEIGHTS, in one file or several.
    Raises: OSError if they cannot be fetched or read, ValueError if they are of another
        architecture, KeyError or RuntimeError if weights are missing or have another shape than the
        config says, KeyError if there is neither a folder nor a model of this name, InputError if
        the package safetensors is missing.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        config = read_config(folder / "config.json")
        published = read_weights(folder)
    else:
        config = GPTConfig(50257, 1024, *PRETRAINED[name_or_path])
        published = fetch_weights(name_or_path)
    gpt = GPT(config)
    gpt.load_state_dict(renamed(published, list(gpt.state_dict())))
    return gpt


def read_config(path: Path) -> GPTConfig:
    """The sizes in a config.json. Raises ValueError if it is of another architecture."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in ARCHITECTURE.items():
        value = config.get(name, expected)
        if value != expected:
            raise ValueError(f"{path}: {name} is {value!r}; GPT-2 has {expected!r}")
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    return GPTConfig(*[config[name] for name in names])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Raises FileNotFoundError if there are none."""
    kinds = [sorted(folder.glob(pattern)) for pattern in WEIGHTS]
    weights = {}
    for path in kinds[0] or kinds[1]:  # a whole model.safetensors is the last, and counts
        if path.suffix == ".safetensors":
            weights |= package("safetensors.torch").load_file(path)
        else:
            weights |= torch.load(path, map_location="cpu", weights_only=True)
    if not weights:
        raise FileNotFoundError(f"no {' and no '.join(WEIGHTS)} in {folder}")
    return weights


def fetch_weights(name: str) -> dict[str, Tensor]:
    """The weights of a published GPT-2, from torch.hub's cache or the internet."""
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    url = f"https://huggingface.co/{owner}/{name}/resolve/main/pytorch_model.bin"
    return torch.hub.load_state_dict_from_url(
        url, map_location="cpu", file_name=f"{name}.bin", weights_only=True
    )


def renamed(published: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The weights of these names of a rlhf.model.GPT, from GPT-2's published ones. Raises KeyError
    if one is missing.

    transformers puts "transformer." before the names if it saves the output matrix, too.
    """
    bare = {name.removeprefix("transformer."): weight for name, weight in published.items()}
    weights = {}
    for name in names:
        other_name, transposed = published_name(name)
        weight = bare[other_name]
        weights[name] = weight.t() if transposed else weight
    return weights


# ---- train_sft.py --init ----


def is_gpt2(init: str) -> bool:
    """Whether --init is a GPT-2: a name of PRETRAINED, or a folder whose config.json says so."""
    path = Path(init) / "config.json"
    if not path.is_file():
        return init in PRETRAINED
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_type"] == "gpt2"
    except (ValueError, KeyError, TypeError):  # a faulty file: transformers will say so
        return False


def init_from(name_or_path: str, tokenizer: Tokenizer) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """GPT-2's weights, the tokenizer, and the digests of a local folder's files. (A published name
    always means the same files.)

    Raises InputError if the weights cannot be loaded or have another vocabulary.
    """
    with loading(name_or_path):
        gpt = load_gpt2(name_or_path)
    if gpt.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"--init {name_or_path} knows {gpt.config.vocab_size} tokens and the tokenizer "
            f"{tokenizer.vocab_size}; give --tokenizer gpt2, or the file it was trained with"
        )
    return gpt, tokenizer, digests(**local_files(name_or_path))
