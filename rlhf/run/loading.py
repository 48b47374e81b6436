"""The network, the tokenizer and the judge that a checkpoint names.

The network's class is chosen in this file only; its optional packages are imported here, if needed.
"""

import copy
from pathlib import Path
from types import ModuleType

import torch

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.run.checkpoints import check_input, check_tokenizer, load_checkpoint, load_weights
from rlhf.run.errors import InputError, printable
from rlhf.run.files import BUNDLED, check_folder, data_folder, digests
from rlhf.run.judge import load_judge
from rlhf.tokenizer import Tokenizer, load_tokenizer

# ---- networks ----


def new_network(config: dict) -> GPT:
    """The network of a checkpoint's model_config, with new weights."""
    if "init" in config:
        from rlhf.networks.hf import HF, HFConfig

        return HF(HFConfig(**config))
    return GPT(GPTConfig(**config))


def start_from(cfg) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """The network that `train_sft.py --init` names, its tokenizer, and digests of its files.

    A GPT-2 is read by rlhf/networks/gpt2.py, any other model by transformers. The digests are empty
    for a network that is fetched by its name.
    """
    from rlhf.networks import gpt2, hf

    if not gpt2.is_gpt2(cfg.init):
        return hf.init_from(cfg)
    in_float32 = cfg.base_dtype == "float32" and not cfg.load_in_4bit
    if not in_float32 or cfg.cut_vocab or cfg.system or cfg.template != "auto":
        raise InputError(
            f"--init {cfg.init} is a GPT-2; --load-in-4bit, --base-dtype, --cut-vocab, --template "
            f"and --system are for models that transformers reads"
        )
    return gpt2.init_from(cfg.init, find_tokenizer(cfg.data, cfg.tokenizer))


def with_adapters(gpt: GPT, cfg, generator: torch.Generator) -> GPT:
    """The GPT to train, in place: with adapters (rlhf/networks/lora.py), unchanged if --lora-rank
    is 0.

    Raises InputError if it has adapters of another rank or alpha, or if it is in 4 bits and has
    none.
    """
    if cfg.steps and getattr(gpt.config, "four_bit", False) and not gpt.config.rank:
        raise InputError(
            "nothing to train: the model is in 4 bits and has no adapters; run train_sft.py with "
            "--lora-rank"
        )
    if cfg.lora_rank == 0 and not getattr(gpt.config, "rank", 0):
        return gpt
    from rlhf.networks.lora import add_adapters

    return add_adapters(gpt, cfg.lora_rank, generator, cfg.lora_alpha)


def trained_copy(gpt: GPT) -> GPT:
    """A copy of a GPT as it is now, to train. With adapters, it shares the weights under them."""
    shared = {id(p): p for p in gpt.parameters() if not p.requires_grad}
    return copy.deepcopy(gpt, shared)


def frozen_copy(gpt: GPT) -> GPT:
    """A trained_copy that is not trained."""
    return trained_copy(gpt).requires_grad_(False)


# ---- checkpoints ----


def load_policy(path: Path, *kinds: str) -> tuple[GPT, dict]:
    """The GPT of a checkpoint of one of these kinds, without its value network, and the checkpoint.

    A policy that was trained at another temperature than 1 keeps it.

    Args: kinds: "sft", "ppo" (which allows "dpo" as well). Raises: InputError as load_checkpoint.
    """
    checkpoint = load_checkpoint(path, *kinds)
    gpt = new_network(checkpoint["model_config"])
    prefix = "" if checkpoint["kind"] == "sft" else "gpt."
    load_weights(path, gpt, checkpoint["model"], prefix)
    gpt.temperature = checkpoint["config"].get("temperature", 1.0)
    return gpt, checkpoint


def load_reward_model(path: Path) -> tuple[RewardModel, dict]:
    """The reward model of reward.pt, and the checkpoint."""
    checkpoint = load_checkpoint(path, "reward")
    model = RewardModel(new_network(checkpoint["model_config"]))
    load_weights(path, model, checkpoint["model"])
    return model, checkpoint


def load_stages(
    cfg, reward_path: Path | None
) -> tuple[GPT, RewardModel | None, Tokenizer, dict[str, str]]:
    """The results of the first two stages: --sft, and reward.pt, if there is a path of it.

    Returns: the fine-tuned GPT, the reward model, their tokenizer, digests of the files.
    Raises: InputError if the reward model was made from another sft.pt.
    """
    sft_path = cfg.checkpoint("sft")
    gpt, sft = load_policy(sft_path, "sft")
    tokenizer = tokenizer_of(sft_path, sft, cfg.data)
    if reward_path is None:
        return gpt, None, tokenizer, digests(sft=sft_path)
    reward_model, reward = load_reward_model(reward_path)
    check_tokenizer(reward_path, reward, tokenizer)
    check_input(reward_path, reward, "sft", sft_path)
    return gpt, reward_model, tokenizer, digests(sft=sft_path, reward=reward_path)


# ---- what a checkpoint names besides weights ----


def tokenizer_of(path: Path, checkpoint: dict, folder: str) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    That of its pretrained model, of the data set in this folder or, failing that, the one that the
    checkpoint names. Raises InputError if none of them has its fingerprint.
    """
    config = checkpoint["model_config"]
    if "init" in config:
        from rlhf.networks.hf import HFConfig, HFTokenizer

        hf_config = HFConfig(**config)
        tokenizer = HFTokenizer(
            hf_config.init, hf_config.template, hf_config.system, hf_config.kept
        )
    else:
        tokenizer = find_own_tokenizer(checkpoint, folder)
    check_tokenizer(path, checkpoint, tokenizer)
    return tokenizer


def find_tokenizer(folder: str, choice: str = "auto") -> Tokenizer:
    """The tokenizer of a data set. auto: the folder's tokenizer.tiktoken if it has one, else
    GPT-2's."""
    check_folder(folder, for_rows=choice == "auto")
    own = data_folder(folder) / "tokenizer.tiktoken"
    default = str(own) if own.is_file() else "gpt2"
    return load_tokenizer(default if choice == "auto" else choice)


def find_own_tokenizer(checkpoint: dict, folder: str) -> Tokenizer:
    """The folder's tokenizer if the checkpoint was trained with it, else the one that it names.

    It may name any file. If that is no tokenizer, the InputError quotes nothing of its contents.
    """
    own = data_folder(folder) / "tokenizer.tiktoken"
    if own.is_file():
        tokenizer = load_tokenizer(str(own))
        if tokenizer.fingerprint == checkpoint["tokenizer"]:
            return tokenizer
    name = checkpoint["tokenizer_name"]
    try:
        return find_tokenizer(folder, name)
    except InputError:
        if name == "gpt2" or not data_folder(folder).is_dir():
            raise
        raise InputError(
            f"the checkpoint was trained with the tokenizer {name}, which cannot be loaded; give "
            f"--data the folder that it was trained on"
        ) from None


def judge_of(given: str, named: str, needed: bool = True) -> ModuleType | None:
    """The judge of the folder given with --data or, without the flag, named by a checkpoint.

    A folder that only the checkpoint names must be the bundled data set's, because a checkpoint
    must not decide which code runs. If it is another one and has a judge, raises InputError or, if
    no judge is needed, says so and returns None.
    """
    path = data_folder(named) / "judge.py"
    if not given and path.is_file() and path.resolve().parent != BUNDLED:
        text = f"{path} is code that only the checkpoint names; give --data {named} to run it"
        if needed:
            raise InputError(text)
        print(f"going on without gold: {printable(text)}")
        return None
    return load_judge(given or named)
