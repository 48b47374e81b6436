"""Talk to what was trained.

    python -m rlhf.sample --checkpoint runs/ppo.pt --prompt "What should I do about a bee sting?"
    python -m rlhf.sample --checkpoint runs/sft.pt runs/ppo.pt      # side by side; a dialogue, until an empty line

Each answer comes with the reward model's score and the judge's gold, where there are such. Top-k and top-p live here
alone: PPO must train the very distribution that it samples from.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.checkpoints import find_reward_model, load_policy, tokenizer_of
from rlhf.cli import arg, check_not_negative, check_positive, run
from rlhf.common import InputError, make_generator, pick_device
from rlhf.data import pad_rows
from rlhf.evaluate import decode_responses
from rlhf.judge import gold_scores, load_judge
from rlhf.model import GPT, KVCache, RewardModel
from rlhf.rollout import generate, has_ended


@dataclass(frozen=True)
class SampleConfig:
    """Answer a prompt, or a dialogue typed at the terminal."""

    checkpoint: tuple[str, ...] = arg(("runs/ppo.pt",), "an sft.pt or ppo.pt; several answer side by side")
    prompt: str = arg("", "what to answer; empty: what is typed at the terminal")
    plain: bool = arg(False, "take the prompt as it is, without Human: and Assistant: around it")
    data: str = arg("", "data set folder, for tokenizer and judge; empty: the one of the first checkpoint")
    reward: str = arg("", "reward model; empty: reward.pt beside the first checkpoint, if there is one")
    temperature: float = arg(1.0, "divides the logits: below 1 the likely becomes likelier")
    top_k: int = arg(0, "sample among the k likeliest tokens alone; 0: among all")
    top_p: float = arg(1.0, "sample among the likeliest tokens that have this probability together")
    max_new_tokens: int = arg(0, "longest answer in tokens; 0: half of the context, and 200 at most")
    samples: int = arg(1, "answers to each prompt")
    device: str = arg("auto", "where to run; auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "of the samples")

    def __post_init__(self):
        check_positive(self, "temperature", "top_p", "samples")
        check_not_negative(self, "top_k", "max_new_tokens")
        if self.top_p > 1:
            raise ValueError(f"--top-p is {self.top_p}: it must be at most 1")


def filter_top_k_top_p(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for all but the likeliest tokens: (B, V) -> (B, V). The single likeliest always stays.

    top_k: the k likeliest. top_p: of those, likeliest first, as many as it takes to reach the probability top_p
    (nucleus sampling, Holtzman et al. 2020).
    """
    if not top_k and top_p == 1:
        return logits
    ordered, order = logits.sort(dim=1, descending=True, stable=True)  # (B, V)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_p < 1:
        ahead = ordered.double().softmax(dim=1).cumsum(dim=1)[:, :-1]  # (B, V-1): probability of all that are likelier
        drop[:, 1:] = ahead >= top_p
    if top_k:
        drop[:, top_k:] = True
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)


class Sampler:
    """A GPT whose logits are narrowed before a token is drawn; `generate` uses it like a GPT."""

    def __init__(self, gpt: GPT, temperature: float, top_k: int, top_p: float):
        self.gpt, self.temperature, self.top_k, self.top_p = gpt, temperature, top_k, top_p

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        return self.gpt.make_cache(batch_size, max_length)

    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self.gpt.hidden(tokens, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return filter_top_k_top_p(self.gpt.logits(hidden) / self.temperature, self.top_k, self.top_p)  # (B, V)


def shorten(prompt: str, tokenizer, limit: int) -> tuple[str, list[int]]:
    """A dialogue whose first turns are left out until it fits; InputError where the last one alone does not."""
    ids = tokenizer.encode(prompt)
    while len(ids) > limit:
        at = prompt.find("\n\nHuman:", 1)
        if at < 0:
            raise InputError(f"the prompt takes {len(ids)} tokens and there is room for {limit}; shorten it, or give a "
                             f"smaller --max-new-tokens")
        prompt = prompt[at:]
        ids = tokenizer.encode(prompt)
    return prompt, ids


@torch.no_grad()
def reply(gpt: GPT, prompt: str, tokenizer, reward_model: RewardModel | None, judge, cfg, turn: int) -> list[dict]:
    """cfg.samples answers to one prompt, each with its score and gold, None where they are not known."""
    device = next(gpt.parameters()).device
    room = cfg.max_new_tokens or min(200, gpt.config.block_size // 2)
    prompt, ids = shorten(prompt, tokenizer, gpt.config.block_size - room)
    tokens, prompt_lens = pad_rows([ids] * cfg.samples, tokenizer.pad_id, device)
    sampler = Sampler(gpt, cfg.temperature, cfg.top_k, cfg.top_p)
    tokens, mask = generate(sampler, tokens, prompt_lens, room, tokenizer.eos_id,
                            make_generator(device, cfg.seed, "sample", turn))
    texts = decode_responses(tokenizer, tokens, mask)
    scores = golds = [None] * cfg.samples
    if reward_model is not None and tokens.size(1) <= reward_model.gpt.config.block_size:
        scores = reward_model(tokens, prompt_lens + mask.sum(dim=1)).tolist()
    if judge is not None:
        golds = gold_scores(judge, [prompt] * cfg.samples, texts)
    ended = has_ended(tokens, mask, tokenizer.eos_id).tolist()
    return [{"response": text, "score": score, "gold": gold, "ended": end}
            for text, score, gold, end in zip(texts, scores, golds, ended)]


def turns(cfg: SampleConfig):
    """What to answer, one after another: the flag, or the lines typed until an empty one."""
    if cfg.prompt:
        yield cfg.prompt
        return
    print("type a question; an empty line ends")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def main(cfg: SampleConfig) -> None:
    device = pick_device(cfg.device)
    paths = [Path(name) for name in cfg.checkpoint]
    loaded = [load_policy(path, "sft", "ppo") for path in paths]
    data = cfg.data or loaded[0][1]["config"]["data"]
    tokenizers = [tokenizer_of(path, checkpoint, data) for path, (_, checkpoint) in zip(paths, loaded)]
    policies = [gpt.to(device) for gpt, _ in loaded]
    judge, reward_model = load_judge(data), find_reward_model(cfg.reward, paths[0], tokenizers[0])
    if reward_model is not None:
        reward_model.to(device)

    dialogues = [""] * len(policies)  # each policy goes on from its own answers
    for turn, text in enumerate(turns(cfg)):
        for i, (path, gpt, tokenizer) in enumerate(zip(paths, policies, tokenizers)):
            prompt = text if cfg.plain else f"{dialogues[i]}\n\nHuman: {text}\n\nAssistant:"
            reads_it = tokenizer.fingerprint == tokenizers[0].fingerprint  # the reward model knows the first's tokens
            try:
                answers = reply(gpt, prompt, tokenizer, reward_model if reads_it else None, judge, cfg, turn)
            except InputError as error:  # a question that is too long is no end of a dialogue
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
