"""The network, the tokenizer and the judge that a checkpoint names.

The network's class is chosen in this file only; its optional packages are imported here, if needed.
"""

import copy
import functools
from pathlib import Path
from types import ModuleType

import torch

from rlhf.model import GPT, GPTConfig, RewardModel
from rlhf.run.checkpoints import check_input, check_tokenizer, load_checkpoint, load_weights
from rlhf.run.errors import InputError
from rlhf.run.files import BUNDLED, check_folder, data_folder, digests
from rlhf.run.judge import load_judge
from rlhf.run.reward_functions import RewardFunction, Rewards, load_function
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
    not_float32 = cfg.base_dtype != "float32" or cfg.load_in_4bit
    if not_float32 or cfg.cut_vocab or cfg.system or cfg.template != "auto":
        raise InputError(
            f"--init {cfg.init} is a GPT-2; --load-in-4bit, --base-dtype, --cut-vocab, --template "
            f"and --system are for models that transformers reads"
        )
    return gpt2.init_from(cfg.init, find_tokenizer(cfg.data, cfg.tokenizer))


def start_reward_model(cfg) -> tuple[RewardModel, Tokenizer, dict[str, str]]:
    """The reward model that `train_reward.py --init` names, its tokenizer, and digests of its
    files."""
    from rlhf.networks.hf_reward import init_from

    return init_from(cfg)


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
    if cfg.lora_rank == 0:  # a network of rlhf/networks/hf.py keeps the adapters of sft.pt
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
    network = new_network(checkpoint["model_config"])
    if reads_text(checkpoint):
        from rlhf.networks.hf_reward import HFReward

        model = HFReward(network)
    else:
        model = RewardModel(network)
    load_weights(path, model, checkpoint["model"])
    return model, checkpoint


def reads_text(checkpoint: dict) -> bool:
    """Whether a reward model was made by train_reward.py --init: it has another tokenizer than the
    policy, and no sft.pt under it."""
    return bool(checkpoint["model_config"].get("pooled"))


def load_rewards(
    rewards: Rewards, tokenizer: Tokenizer, device: torch.device, sft_path: Path | None = None
) -> tuple[RewardModel | None, tuple[RewardFunction, ...]]:
    """The reward model that reads the policy's tokens, if there is one, and the functions of text.

    A reward model that reads text is the first of the functions.

    Args: tokenizer: the policy's; sft_path: what the reward model must have been made from.
    Raises: InputError if it was made from another sft.pt or has another tokenizer.
    """
    functions = tuple(map(load_function, rewards.functions))
    path = rewards.model
    if path is None:
        return None, functions
    model, checkpoint = load_reward_model(path)
    model.to(device)
    if reads_text(checkpoint):
        from rlhf.networks.hf_reward import score_texts

        own_tokenizer = tokenizer_of(path, checkpoint, "")
        score = functools.partial(score_texts, model, own_tokenizer)
        return None, (RewardFunction("model", path, score), *functions)
    check_tokenizer(path, checkpoint, tokenizer)
    if sft_path is not None:
        check_input(path, checkpoint, "sft", sft_path)
    return model, functions


def load_stages(
    cfg, rewards: Rewards, device: torch.device
) -> tuple[GPT, RewardModel | None, tuple[RewardFunction, ...], Tokenizer, dict[str, str]]:
    """The result of the first stage, --sft, and the rewards.

    Returns: the fine-tuned GPT; as load_rewards; the GPT's tokenizer; digests of the files.
    Raises: InputError if the reward model was made from another sft.pt.
    """
    sft_path = cfg.checkpoint("sft")
    gpt, sft = load_policy(sft_path, "sft")
    tokenizer = tokenizer_of(sft_path, sft, cfg.data)
    reward_model, functions = load_rewards(rewards, tokenizer, device, sft_path)
    inputs = digests(sft=sft_path, **rewards.files())
    return gpt, reward_model, functions, tokenizer, inputs


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
    check_folder(folder)
    own = data_folder(folder) / "tokenizer.tiktoken"
    default = str(own) if own.is_file() else "gpt2"
    return load_tokenizer(default if choice == "auto" else choice)


def find_own_tokenizer(checkpoint: dict, folder: str) -> Tokenizer:
    """The folder's tokenizer if the checkpoint was trained with it, else the one that it names."""
    own = data_folder(folder) / "tokenizer.tiktoken"
    if own.is_file():
        tokenizer = load_tokenizer(str(own))
        if tokenizer.fingerprint == checkpoint["tokenizer"]:
            return tokenizer
    return find_tokenizer(folder, checkpoint["tokenizer_name"])


def judge_of(given: str, named: str) -> ModuleType | None:
    """The judge of the folder given with --data or, without the flag, named by a checkpoint.

    A folder that only the checkpoint names must be the bundled data set's, because a checkpoint
    must not decide which code runs. Raises InputError if it is another one and has a judge.
    """
    path = data_folder(named) / "judge.py"
    if not given and path.is_file() and path.resolve().parent != BUNDLED:
        raise InputError(
            f"{path} is code that only the checkpoint names; give --data {named} to run it"
        )
    return load_judge(given or named)
