"""Talk to what was trained.

    python -m rlhf.tools.sample --checkpoint runs/ppo.pt --prompt "What should I do about a bee sting?"
    python -m rlhf.tools.sample --checkpoint runs/sft.pt runs/ppo.pt    # a dialogue, side by side

Each response comes with the reward model's score and the judge's gold, if there are any. Top-k and top-p are only here:
PPO must train the distribution that it samples from.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.data import pad_rows
from rlhf.evaluate import decode_responses
from rlhf.extras.from_checkpoint import judge_of, tokenizer_of
from rlhf.extras.sampling import Sampler
from rlhf.model import GPT, RewardModel
from rlhf.rollout import generate, has_ended
from rlhf.support.checkpoints import check_tokenizer, load_policy, load_reward_model
from rlhf.support.cli import InputError, arg, check_not_negative, check_positive, run
from rlhf.support.judge import gold_scores
from rlhf.support.runtime import make_generator, pick_device
from rlhf.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Respond to a prompt, or to a dialogue typed at the terminal."""

    checkpoint: tuple[str, ...] = arg(("runs/ppo.pt",), "sft.pt or ppo.pt; several respond side by side")
    prompt: str = arg("", "the prompt (empty: typed at the terminal)")
    plain: bool = arg(False, "no Human: and Assistant: around the prompt")
    data: str = arg("", "data set folder (empty: the first checkpoint's, without its judge)")
    reward: str = arg("", "reward model (empty: reward.pt beside the first checkpoint)")
    temperature: float = arg(1.0, "sampling temperature")
    top_k: int = arg(0, "sample among the k likeliest tokens (0: all)")
    top_p: float = arg(1.0, "sample among the likeliest tokens of this total probability")
    max_new_tokens: int = arg(0, "longest response (0: half the context, at most 200)")
    samples: int = arg(1, "responses to each prompt")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "random seed")

    def __post_init__(self):
        check_positive(self, "temperature", "top_p", "samples")
        check_not_negative(self, "top_k", "max_new_tokens")
        if self.top_p > 1:
            raise ValueError(f"--top-p is {self.top_p}: it must be at most 1")


def find_reward_model(given: str, beside: Path, tokenizer: Tokenizer, device: torch.device) -> RewardModel | None:
    """The reward model named by a flag or, without the flag, reward.pt beside a policy, if it can be used."""
    path = Path(given or beside.with_name("reward.pt"))
    if not given and not path.is_file():
        return None
    try:
        model, checkpoint = load_reward_model(path)
        check_tokenizer(path, checkpoint, tokenizer)
        return model.to(device)
    except InputError as error:
        if given:
            raise
        print(f"going on without a reward model: {error}")
        return None


def shorten(prompt: str, tokenizer, limit: int) -> tuple[str, list[int]]:
    """The dialogue without its first turns, so that it fits. Raises InputError if the last turn does not fit."""
    while len(ids := tokenizer.encode(prompt)) > limit:
        if (at := prompt.find("\n\nHuman:", 1)) < 0:
            raise InputError(f"the prompt takes {len(ids)} tokens and there is room for {limit}; shorten it, or give a "
                             f"smaller --max-new-tokens")
        prompt = prompt[at:]
    return prompt, ids


@torch.no_grad()
def reply(gpt: GPT, prompt: str, tokenizer, reward_model: RewardModel | None, judge, cfg, turn: int) -> list[dict]:
    """cfg.samples responses to one prompt, each with its score and gold, None if they are not known."""
    device = next(gpt.parameters()).device
    room = cfg.max_new_tokens or min(200, gpt.config.block_size // 2)
    prompt, ids = shorten(prompt, tokenizer, gpt.config.block_size - room)
    tokens, prompt_lens = pad_rows([ids] * cfg.samples, tokenizer.pad_id, device)
    sampler = Sampler(gpt, cfg.temperature, cfg.top_k, cfg.top_p)
    tokens, mask = generate(sampler, tokens, prompt_lens, room, tokenizer.eos_id,
                            make_generator(device, cfg.seed, "sample", turn))
    texts = decode_responses(tokenizer, tokens, mask)
    fits = reward_model is not None and tokens.size(1) <= reward_model.gpt.config.block_size
    scores = reward_model(tokens, prompt_lens + mask.sum(dim=1)).tolist() if fits else [None] * cfg.samples
    golds = [None] * cfg.samples if judge is None else gold_scores(judge, [prompt] * cfg.samples, texts)
    ended = has_ended(tokens, mask, tokenizer.eos_id).tolist()
    return [{"response": text, "score": score, "gold": gold, "ended": end}
            for text, score, gold, end in zip(texts, scores, golds, ended)]


def typed():
    """The lines typed at the terminal until an empty one."""
    print("type a question; an empty line ends")
    with contextlib.suppress(EOFError):
        while line := input("\n> ").strip():
            yield line


def main(cfg: SampleConfig) -> None:
    device = pick_device(cfg.device)
    paths = [Path(name) for name in cfg.checkpoint]
    loaded = [load_policy(path, "sft", "ppo") for path in paths]
    data = cfg.data or loaded[0][1]["config"]["data"]
    tokenizers = [tokenizer_of(path, checkpoint, data) for path, (_, checkpoint) in zip(paths, loaded)]
    judge = judge_of(cfg.data, data, needed=False)
    reward_model = find_reward_model(cfg.reward, paths[0], tokenizers[0], device)

    dialogues = [""] * len(paths)  # each policy continues from its own responses
    for turn, text in enumerate([cfg.prompt] if cfg.prompt else typed()):
        for i, (path, (gpt, _), tokenizer) in enumerate(zip(paths, loaded, tokenizers)):
            prompt = text if cfg.plain else f"{dialogues[i]}\n\nHuman: {text}\n\nAssistant:"
            reads_it = tokenizer.fingerprint == tokenizers[0].fingerprint  # the reward model's tokens
            try:
                answers = reply(gpt.to(device), prompt, tokenizer, reward_model if reads_it else None, judge, cfg, turn)
            except InputError as error:  # a prompt that is too long does not end a dialogue
                if cfg.prompt:
                    raise
                print(f"{path}: {error}", flush=True)
                continue
            for one in answers:
                known = [f"{name} {one[name]:+.2f}" for name in ("score", "gold") if one[name] is not None]
                known += [] if one["ended"] else ["cut off"]
                print(f"{path}: {one['response']}" + (f"   ({', '.join(known)})" if known else ""), flush=True)
            dialogues[i] = f"{prompt} {answers[0]['response']}"


if __name__ == "__main__":
    run(main, SampleConfig)
