"""Talk to what was trained.

    python -m rlhf.tools.sample --checkpoint runs/ppo.pt --prompt "What should I do about a sting?"
    python -m rlhf.tools.sample --checkpoint runs/sft.pt runs/ppo.pt    # a dialogue, side by side

Each response comes with its score, by the reward model or by what --reward names, and the judge's
gold, if there are any.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rlhf import evaluate
from rlhf.data import Prompt
from rlhf.evaluate import Response
from rlhf.model import GPT, RewardModel
from rlhf.rollout import Frozen
from rlhf.run.device import pick_device
from rlhf.run.errors import InputError, printable
from rlhf.run.flags import arg, check_positive
from rlhf.run.loading import judge_of, load_policy, load_rewards, tokenizer_of
from rlhf.run.messages import as_text
from rlhf.run.program import run
from rlhf.run.reward_functions import RewardFunction, Rewards, named_rewards
from rlhf.run.tables import strip_blanks
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
    reward_weights: tuple[float, ...] = arg((), "weight of each reward (empty: 1)")
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
        return named_rewards(self.reward, self.reward_weights, beside)


@dataclass
class Policy:
    """The policy of a checkpoint, what scores its responses, and the dialogue that it has had."""

    path: Path
    gpt: GPT
    tokenizer: Tokenizer
    reward_model: RewardModel | None = None  # None: there is none, or it reads other tokens
    functions: tuple[RewardFunction, ...] = ()
    weights: tuple[float, ...] = ()
    dialogue: tuple[dict[str, str], ...] = ()  # messages

    def prompt_for(self, question: str, plain: bool) -> str | list[dict[str, str]]:
        """The dialogue so far with the question; of a plain prompt, the question only."""
        if plain:
            return strip_blanks(question)
        return [*self.dialogue, {"role": "user", "content": question}]


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


def give_rewards(policies: list[Policy], cfg: SampleConfig) -> None:
    """Give the rewards to all policies, or a reward model that reads tokens to those that have the
    first one's tokenizer.

    Rewards that the user has not named may be missing, or be unfit for this policy.
    """
    first = policies[0]
    rewards = cfg.rewards()
    if not cfg.reward and not (rewards.model and rewards.model.is_file()):
        return
    device = next(first.gpt.parameters()).device
    try:
        reward_model, functions = load_rewards(rewards, first.tokenizer, device)
    except InputError as error:
        if cfg.reward:
            raise
        print(f"going on without a reward model: {printable(str(error))}")
        return
    for policy in policies:
        same_tokens = policy.tokenizer.fingerprint == first.tokenizer.fingerprint
        if reward_model is None or same_tokens:  # functions read text
            policy.reward_model = reward_model
            policy.functions = functions
            policy.weights = rewards.weights


# ---- responses to one prompt ----


def shorten(given: str | list[dict[str, str]], tokenizer: Tokenizer, limit: int) -> Prompt:
    """The dialogue without its first turns, so that it takes at most `limit` tokens.

    Raises InputError if the last turn does not fit.
    """
    ids = tokenizer.prompt_ids(given)
    while len(ids) > limit:
        if isinstance(given, str) or len(given) == 1:
            raise InputError(
                f"the prompt takes {len(ids)} tokens and there is room for {limit}; shorten it, or "
                f"give a smaller --max-new-tokens"
            )
        given = given[2:]  # without the first question and its response
        ids = tokenizer.prompt_ids(given)
    if not tokenizer.template:  # reward functions then get what the policy reads
        given = as_text(given)
    return Prompt(given, ids)


def respond(
    policy: Policy,
    given: str | list[dict[str, str]],
    judge: ModuleType | None,
    cfg: SampleConfig,
    turn: int,
) -> list[Response]:
    """cfg.samples responses to one prompt. turn: of the dialogue, for the random numbers."""
    frozen = Frozen(
        reference=policy.gpt,
        reward_model=policy.reward_model,
        tokenizer=policy.tokenizer,
        missing_eos_score=None,
        functions=policy.functions,
        weights=policy.weights,
    )
    room = cfg.max_new_tokens or min(200, frozen.context // 2)
    prompt = shorten(given, policy.tokenizer, frozen.context - room)
    frozen = frozen._replace(max_new_tokens=room)
    seed = 1000 * cfg.seed + turn
    return evaluate.respond(policy.gpt, [prompt] * cfg.samples, frozen, judge, seed)


def print_response(policy: Policy, response: Response) -> None:
    """One line: the checkpoint, the response and, in brackets, what is known of it."""
    notes = []
    if policy.weights:
        notes.append(f"score {response.score:+.2f}")
    if response.gold is not None:
        notes.append(f"gold {response.gold:+.2f}")
    if not response.ended:
        notes.append("cut off")
    about = f"   ({', '.join(notes)})" if notes else ""
    print(f"{policy.path}: {printable(response.text)}{about}", flush=True)


# ---- a dialogue ----


def take_turn(
    policy: Policy, question: str, judge: ModuleType | None, cfg: SampleConfig, turn: int
) -> None:
    """Print a policy's responses to a question; the first one goes into its dialogue."""
    prompt = policy.prompt_for(question, cfg.plain)
    responses = respond(policy, prompt, judge, cfg, turn)
    for response in responses:
        print_response(policy, response)
    if not cfg.plain:
        policy.dialogue = (*prompt, {"role": "assistant", "content": responses[0].text})


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
