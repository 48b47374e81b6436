"""Talk to what was trained.

    python -m rlhf.tools.sample --checkpoint runs/ppo.pt --prompt "What should I do about a sting?"
    python -m rlhf.tools.sample --checkpoint runs/sft.pt runs/ppo.pt    # a dialogue, side by side

Each response comes with the reward model's score, those of the functions that --reward names, and
the judge's gold, if there are any.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from rlhf.data import Prompt, pad_prompts
from rlhf.model import GPT, RewardModel
from rlhf.rollout import decode_responses
from rlhf.run.checkpoints import check_tokenizer
from rlhf.run.device import make_generator, pick_device
from rlhf.run.errors import InputError, printable
from rlhf.run.flags import arg, check_positive
from rlhf.run.judge import gold_scores
from rlhf.run.loading import judge_of, load_policy, load_reward_model, tokenizer_of
from rlhf.run.program import run
from rlhf.run.reward_functions import RewardFunction, Rewards, named_rewards
from rlhf.run.tables import strip_blanks
from rlhf.sampling import generate, has_ended
from rlhf.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Respond to a prompt, or to a dialogue typed at the terminal."""

    checkpoint: tuple[str, ...] = arg(
        ("runs/ppo.pt",), "sft.pt or ppo.pt; several respond side by side"
    )
    prompt: str = arg("", "the prompt (empty: typed at the terminal)")
    plain: bool = arg(False, "no Human: and Assistant: around the prompt")
    data: str = arg("", "data set folder (empty: the first checkpoint's, without its judge)")
    reward: tuple[str, ...] = arg((), "rewards (empty: reward.pt beside the first checkpoint)")
    temperature: float = arg(1.0, "sampling temperature")
    max_new_tokens: int = arg(0, "longest response (0: half the context, at most 200)")
    samples: int = arg(1, "responses to each prompt")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "random seed")

    def __post_init__(self):
        check_positive(self, "temperature", "samples")
        self.rewards()  # refuses two reward models

    def rewards(self) -> Rewards:
        beside = Path(self.checkpoint[0]).with_name("reward.pt")
        return named_rewards(self.reward, (), beside)


@dataclass
class Policy:
    """The policy of a checkpoint, and the dialogue that it has had so far."""

    path: Path
    gpt: GPT
    tokenizer: Tokenizer
    reward_model: RewardModel | None = None  # None: there is none, or it reads other tokens
    functions: tuple[RewardFunction, ...] = ()
    dialogue: str = ""

    def prompt_for(self, question: str, plain: bool) -> str:
        if plain:
            return strip_blanks(question)
        return f"{self.dialogue}\n\nHuman: {question}\n\nAssistant:"


@dataclass(frozen=True)
class Response:
    text: str
    scores: dict[str, float]  # of the reward model, if it can read the response, and the functions
    gold: float | None  # None without a judge
    ended: bool


# ---- what is loaded ----


def load_policies(cfg: SampleConfig) -> tuple[list[Policy], str]:
    """The policies that respond, on their device, and the data set's folder."""
    device = pick_device(cfg.device)
    paths = [Path(name) for name in cfg.checkpoint]
    loaded = [load_policy(path, "sft", "ppo") for path in paths]
    first_checkpoint = loaded[0][1]
    data = cfg.data or first_checkpoint["config"]["data"]
    policies = []
    for path, (gpt, checkpoint) in zip(paths, loaded):
        tokenizer = tokenizer_of(path, checkpoint, data)
        gpt.temperature *= cfg.temperature
        policies.append(Policy(path, gpt.to(device), tokenizer))
    return policies, data


def find_reward_model(
    path: Path | None, given: bool, tokenizer: Tokenizer, device: torch.device
) -> RewardModel | None:
    """The reward model of the file at path. None if there is none, or it cannot be used; an
    InputError then, if the user has given the path."""
    if path is None or not given and not path.is_file():
        return None
    try:
        model, checkpoint = load_reward_model(path)
        check_tokenizer(path, checkpoint, tokenizer)
    except InputError as error:
        if given:
            raise
        print(f"going on without a reward model: {printable(str(error))}")
        return None
    return model.to(device)


def give_rewards(policies: list[Policy], cfg: SampleConfig) -> None:
    """Give the functions to all policies, and the reward model to those with the first one's
    tokenizer."""
    first = policies[0]
    device = next(first.gpt.parameters()).device
    rewards = cfg.rewards()
    functions = rewards.load_functions()
    reward_model = find_reward_model(rewards.model, bool(cfg.reward), first.tokenizer, device)
    for policy in policies:
        policy.functions = functions
        if policy.tokenizer.fingerprint == first.tokenizer.fingerprint:
            policy.reward_model = reward_model


# ---- responses to one prompt ----


def shorten(text: str, tokenizer: Tokenizer, limit: int) -> Prompt:
    """The dialogue without its first turns, so that it takes at most `limit` tokens.

    Raises InputError if the last turn does not fit.
    """
    ids = tokenizer.encode(text)
    while len(ids) > limit:
        next_turn = text.find("\n\nHuman:", 1)
        if next_turn < 0:
            raise InputError(
                f"the prompt takes {len(ids)} tokens and there is room for {limit}; shorten it, or "
                f"give a smaller --max-new-tokens"
            )
        text = text[next_turn:]
        ids = tokenizer.encode(text)
    return Prompt(text, ids)


@torch.no_grad()
def respond(
    policy: Policy, text: str, judge: ModuleType | None, cfg: SampleConfig, turn: int
) -> list[Response]:
    """cfg.samples responses to one prompt. turn: of the dialogue, for the random numbers."""
    tokenizer = policy.tokenizer
    device = next(policy.gpt.parameters()).device
    context = policy.gpt.config.block_size
    room = cfg.max_new_tokens or min(200, context // 2)
    prompt = shorten(text, tokenizer, context - room)
    repeated = [prompt] * cfg.samples
    prompts, prompt_lens = pad_prompts(repeated, tokenizer.pad_id, device)  # (N, P), (N,)

    generator = make_generator(device, cfg.seed, "sample", turn)
    tokens, mask = generate(
        policy.gpt, prompts, prompt_lens, room, tokenizer.eos_id, generator
    )  # (N, T), (N, T-1)

    texts = decode_responses(tokenizer, tokens, mask)
    lengths = prompt_lens + mask.sum(dim=1)  # (N,)
    columns = score_responses(policy.reward_model, tokens, lengths)
    for function in policy.functions:
        columns[function.name] = function([prompt.text] * cfg.samples, texts)
    scores = [dict(zip(columns, row)) for row in zip(*columns.values())] or [{}] * cfg.samples
    golds = gold_scores(judge, [prompt.text] * cfg.samples, texts)
    ended = has_ended(tokens, mask, tokenizer.eos_id).tolist()
    return [Response(*row) for row in zip(texts, scores, golds, ended)]


def score_responses(
    reward_model: RewardModel | None, tokens: Tensor, lengths: Tensor
) -> dict[str, list[float]]:
    """tokens (N, T), lengths (N,) -> {"score": N}; empty if there is no reward model that reads
    them."""
    if reward_model is None or tokens.size(1) > reward_model.gpt.config.block_size:
        return {}
    return {"score": reward_model(tokens, lengths).tolist()}


def print_response(path: Path, response: Response) -> None:
    notes = [f"{name} {score:+.2f}" for name, score in response.scores.items()]
    if response.gold is not None:
        notes.append(f"gold {response.gold:+.2f}")
    if not response.ended:
        notes.append("cut off")
    about = f"   ({', '.join(notes)})" if notes else ""
    print(f"{path}: {printable(response.text)}{about}", flush=True)


# ---- a dialogue ----


def take_turn(
    policy: Policy, question: str, judge: ModuleType | None, cfg: SampleConfig, turn: int
) -> None:
    """Print a policy's responses to a question; the first one goes into its dialogue."""
    prompt = policy.prompt_for(question, cfg.plain)
    responses = respond(policy, prompt, judge, cfg, turn)
    for response in responses:
        print_response(policy.path, response)
    policy.dialogue = f"{prompt} {responses[0].text}"


def read_question() -> str:
    """A line typed at the terminal; empty at the end of the input."""
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def talk(policies: list[Policy], judge: ModuleType | None, cfg: SampleConfig) -> None:
    """Respond to what is typed, until an empty line."""
    print("type a question; an empty line ends")
    turn = 0
    question = read_question()
    while question:
        for policy in policies:
            try:
                take_turn(policy, question, judge, cfg, turn)
            except InputError as error:  # a prompt that is too long does not end a dialogue
                print(f"{policy.path}: {printable(str(error))}", flush=True)
        turn += 1
        question = read_question()


def main(cfg: SampleConfig) -> None:
    policies, data = load_policies(cfg)
    judge = judge_of(cfg.data, data, needed=False)
    give_rewards(policies, cfg)
    if not cfg.prompt:
        talk(policies, judge, cfg)
        return
    for policy in policies:
        take_turn(policy, cfg.prompt, judge, cfg, turn=0)


if __name__ == "__main__":
    run(main, SampleConfig)
