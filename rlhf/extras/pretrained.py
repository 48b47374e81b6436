"""GPT-2's published weights, in and out: `train_sft.py --init` reads them, `rlhf.tools.export` writes them."""

import json
from pathlib import Path

import torch

from rlhf.extras import hf
from rlhf.model import GPT, GPTConfig
from rlhf.support.checkpoints import digests
from rlhf.support.cli import InputError
from rlhf.support.tables import replacing
from rlhf.tokenizer import Tokenizer, find_tokenizer

# The published GPT-2s: layers, heads, channels. All know 50,257 tokens and read 1,024.
PRETRAINED = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
              "gpt2-xl": (48, 25, 1600), "distilgpt2": (6, 12, 768)}
# What a config.json must say, or leave out, for the network to be the one of rlhf/model.py.
ARCHITECTURE = {"model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None, "layer_norm_epsilon": 1e-5,
                "tie_word_embeddings": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def published_name(name: str) -> tuple[str, bool]:
    """What GPT-2's published files call one of our weights, and whether they hold it transposed: they keep the matrices
    of linear layers as (in, out).

    >>> published_name("blocks.0.mlp.c_fc.weight")
    ('h.0.mlp.c_fc.weight', True)
    """
    return name.replace("blocks.", "h.", 1), ".c_" in name and name.endswith("weight")


def load_gpt2(name_or_path: str) -> GPT:
    """A GPT with GPT-2's weights.

    Args: name_or_path: a name of PRETRAINED, fetched once and kept in torch.hub's cache; or a folder that holds
        config.json and pytorch_model.bin. (Hugging Face's transformers writes model.safetensors unless told otherwise;
        torch.save(model.state_dict(), "pytorch_model.bin") adds the file that is read here.)
    Raises: OSError if they cannot be fetched or read, ValueError if they are of another architecture, KeyError or
        RuntimeError if weights are missing or have another shape than the config says.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, ours in ARCHITECTURE.items():
            if config.get(name, ours) != ours:
                raise ValueError(f"{folder / 'config.json'}: {name} is {config[name]!r}; GPT-2 has {ours!r}")
        config = GPTConfig(*(config[name] for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")))
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    elif name_or_path in PRETRAINED:
        config = GPTConfig(50257, 1024, *PRETRAINED[name_or_path])
        owner = "distilbert" if name_or_path == "distilgpt2" else "openai-community"
        url = f"https://huggingface.co/{owner}/{name_or_path}/resolve/main/pytorch_model.bin"
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=f"{name_or_path}.bin",
                                                   weights_only=True)
    else:
        raise ValueError(f"{name_or_path!r} is no folder and none of {', '.join(PRETRAINED)}")
    gpt, state = GPT(config), {name.removeprefix("transformer."): weight for name, weight in state.items()}
    theirs = {name: published_name(name) for name in gpt.state_dict()}
    gpt.load_state_dict({name: state[other].t() if transposed else state[other]
                         for name, (other, transposed) in theirs.items()})
    return gpt


def start_from(cfg) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """What `train_sft.py --init` starts from: GPT-2's weights, or what rlhf/extras/hf.py makes of other models'."""
    config = "".join(file.read_text(encoding="utf-8", errors="replace") for file in Path(cfg.init).glob("config.json"))
    by_hand = cfg.init in PRETRAINED or '"gpt2"' in config and (Path(cfg.init) / "pytorch_model.bin").is_file()
    if not by_hand or cfg.load_in_4bit or cfg.cut_vocab:
        return hf.init_from(cfg)
    return init_from(cfg.init, find_tokenizer(cfg.data, cfg.tokenizer))


def init_from(name_or_path: str, tokenizer: Tokenizer) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """GPT-2's weights, the tokenizer, and the digests of a local folder's files. (A published name always means the
    same files.) Raises InputError if the weights cannot be loaded or know other tokens."""
    try:
        gpt = load_gpt2(name_or_path)
    except Exception as error:  # no network, no such file, another architecture, a garbled file, ...
        reason = (str(error).splitlines() or [""])[0]  # torch adds pages
        raise InputError(f"--init {name_or_path} cannot be loaded: {type(error).__name__}: {reason}; a folder needs "
                         f"config.json and a whole pytorch_model.bin, a name an internet connection") from error
    if gpt.config.vocab_size != tokenizer.vocab_size:
        raise InputError(f"--init {name_or_path} knows {gpt.config.vocab_size} tokens and the tokenizer "
                         f"{tokenizer.vocab_size}; give --tokenizer gpt2, or the file it was trained with")
    files = {"init": "pytorch_model.bin", "init config": "config.json"} if Path(name_or_path).is_dir() else {}
    return gpt, tokenizer, digests(**{key: Path(name_or_path) / name for key, name in files.items()})


def save_gpt2(gpt: GPT, folder: Path, eos_id: int) -> None:
    """Write config.json and pytorch_model.bin; the inverse of load_gpt2."""
    config = {**ARCHITECTURE, "architectures": ["GPT2LMHeadModel"], "vocab_size": gpt.config.vocab_size,
              "n_positions": gpt.config.block_size, "n_layer": gpt.config.n_layer, "n_head": gpt.config.n_head,
              "n_embd": gpt.config.n_embd, "bos_token_id": eos_id, "eos_token_id": eos_id, "attn_pdrop": 0.0,
              "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    state = {}
    for ours, weight in gpt.state_dict().items():
        name, transposed = published_name(ours)
        weight = weight / gpt.temperature if ours.startswith("ln_f.") else weight  # the logits are linear in it
        state[f"transformer.{name}"] = (weight.t() if transposed else weight).contiguous()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    with replacing(folder / "pytorch_model.bin", "wb") as file:
        torch.save(state, file)
    with replacing(folder / "config.json", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")
