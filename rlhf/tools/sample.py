"""Talk to what was trained, or let it respond to a file of prompts.

    python -m rlhf.tools.sample --checkpoint runs/ppo.pt --prompt "What should I do about a sting?"
    python -m rlhf.tools.sample --checkpoint runs/sft.pt runs/ppo.pt    # a dialogue, side by side
    python -m rlhf.tools.sample --prompts questions.txt --n 4 --out responses.jsonl

Each response comes with its score, by the reward model or by what --reward names, and the judge's
gold, if there are any. At the terminal it is printed while it is sampled. --prompts reads each
format of `prepare`; data/responses.py says what --out holds, and how a killed run continues.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor

from rlhf import evaluate
from rlhf.data import Prompt
from rlhf.evaluate import Response
from rlhf.rollout import Frozen
from rlhf.run.device import pick_device
from rlhf.run.errors import InputError, printable
from rlhf.run.flags import DEVICES, arg, check_positive
from rlhf.run.loading import judge_of, load_policy, load_rewards, tokenizer_of
from rlhf.run.messages import TextOrMessages, as_text
from rlhf.run.program import run
from rlhf.run.reward_functions import Rewards, named_rewards
from rlhf.run.tables import strip_blanks


@dataclass(frozen=True)
class SampleConfig:
    """Respond to a prompt, to a file of prompts, or to a dialogue typed at the terminal."""

    checkpoint: tuple[str, ...] = arg(
        ("runs/ppo.pt",), "sft.pt or ppo.pt; several respond side by side"
    )
    prompt: str = arg("", "the prompt (empty: typed at the terminal)")
    prompts: str = arg("", "file of prompts, in any format of prepare")
    out: str = arg("", "FILE.jsonl for responses to --prompts; it is continued")
    overwrite: bool = arg(False, "replace the responses in --out")
    n: int = arg(1, "responses to each prompt")
    sample_rows: int = arg(32, "responses to --prompts sampled at once")
    system: str = arg("", "system message of prompts that have none")
    plain: bool = arg(False, "no Human: and Assistant: around a prompt that is text")
    data: str = arg("", "data set folder (empty: the first checkpoint's, without its judge)")
    reward: tuple[str, ...] = arg((), "rewards (empty: reward.pt beside the first checkpoint)")
    reward_weights: tuple[float, ...] = arg((), "weight of each reward (empty: 1)")
    temperature: float = arg(1.0, "sampling temperature")
    max_new_tokens: int = arg(0, "longest response (0: half the context, at most 200)")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", DEVICES)
    seed: int = arg(0, "random seed")

    def __post_init__(self):
        check_positive(self, "temperature", "n", "sample_rows")
        if bool(self.prompts) != bool(self.out):
            raise ValueError("--prompts FILE and --out FILE.jsonl go together")
        if self.system and self.plain:
            raise ValueError("--system goes with messages; leave out --plain")
        self.rewards()  # refuses two reward models

    def rewards(self) -> Rewards:
        beside = Path(self.checkpoint[0]).with_name("reward.pt")
        return named_rewards(self.reward, self.reward_weights, beside)


@dataclass
class Policy:
    """The policy of a checkpoint, what scores its responses, and the dialogue that it has had."""

    path: Path
    frozen: Frozen  # its reference is the policy
    judge: ModuleType | None
    dialogue: tuple[dict[str, str], ...] = ()  # messages

    def encode(self, given: TextOrMessages, cfg: SampleConfig) -> Prompt:
        """The prompt as the policy reads it: without --plain, a text is a message of the user; the
        message of --system goes before messages without one."""
        if isinstance(given, str) and not cfg.plain:
            given = [{"role": "user", "content": given}]
        if cfg.system and given[0]["role"] != "system":
            given = [{"role": "system", "content": cfg.system}, *given]
        ids = self.frozen.tokenizer.prompt_ids(given)
        if not self.frozen.tokenizer.template:  # reward functions then get what the policy reads
            given = as_text(given)
        return Prompt(given, ids)

    def known_numbers(self, response: Response) -> dict[str, float]:
        """The score and the gold of a response, if they are at hand."""
        numbers = {}
        if self.frozen.weights:
            numbers["score"] = round(response.score, 4)
        knows = getattr(self.judge, "knows", bool)  # a judge without it knows all prompts
        if response.gold is not None and knows(response.prompt):
            numbers["gold"] = response.gold
        return numbers


# ---- what is loaded ----


@contextlib.contextmanager
def going_on(note: str, unless: str | tuple = ""):
    """Print an InputError after the note, and go on; unless the user has given this flag."""
    try:
        yield
    except InputError as error:
        if unless:
            raise
        print(f"{note}: {printable(str(error))}")


def load_policies(cfg: SampleConfig) -> list[Policy]:
    """The policies that respond, on their device, without rewards."""
    policies = []
    for path in map(Path, cfg.checkpoint):
        gpt, checkpoint = load_policy(path, "sft", "ppo")
        if not policies:
            data = cfg.data or checkpoint["config"]["data"]
            judge = None
            with going_on("going on without gold"):
                judge = judge_of(cfg.data, data)
        tokenizer = tokenizer_of(path, checkpoint, data)
        gpt.temperature *= cfg.temperature
        longest = cfg.max_new_tokens or min(200, gpt.config.block_size // 2)
        # A response that is cut off is scored as it is. Without rewards there are no weights.
        gpt.to(pick_device(cfg.device))
        frozen = Frozen(gpt, None, tokenizer, longest, None, weights=())
        policies.append(Policy(path, frozen, judge))
    return policies


def give_rewards(policies: list[Policy], cfg: SampleConfig) -> None:
    """Give the rewards to all policies, or a reward model that reads tokens to those that have the
    first one's tokenizer.
    """
    first = policies[0].frozen.tokenizer
    rewards = cfg.rewards()
    reward_model, functions = load_rewards(rewards, first, pick_device(cfg.device))
    for policy in policies:
        same_tokens = policy.frozen.tokenizer.fingerprint == first.fingerprint
        if reward_model is None or same_tokens:  # functions read text
            policy.frozen = policy.frozen._replace(
                reward_model=reward_model, functions=functions, weights=rewards.weights
            )


# ---- a dialogue ----


@dataclass
class Streamed:
    """A policy that prints the one response that is sampled with it, token by token."""

    frozen: Frozen  # its reference is the policy
    ids: list[int]  # sampled so far
    shown: str = ""

    def __getattr__(self, name: str):
        return getattr(self.frozen.reference, name)

    def hidden(self, tokens: Tensor, *state) -> Tensor:
        if len(state) > 1:  # a cache and a position: of the token that was sampled last
            self.ids.append(tokens.item())
            text = self.frozen.tokenizer.decode(self.ids).rstrip("\ufffd")  # half a character
            self.show(text.strip())
        return self.frozen.reference.hidden(tokens, *state)

    def show(self, text: str) -> None:
        """Print the text without what of it was printed before."""
        print(printable(text.removeprefix(self.shown)), end="", flush=True)
        self.shown = text


def fit(given: TextOrMessages, policy: Policy, cfg: SampleConfig) -> Prompt:
    """The prompt as the policy reads it, without the first turns of a dialogue that is too long.

    Raises InputError if the last turn does not fit.
    """
    prompt = policy.encode(given, cfg)
    length = len(prompt.tokens)
    limit = policy.frozen.context - policy.frozen.max_new_tokens
    if length <= limit:
        return prompt
    if cfg.plain or len(given) == 1:
        raise InputError(
            f"the prompt takes {length} tokens and there is room for {limit}; shorten it, or give "
            f"a smaller --max-new-tokens"
        )
    return fit(given[2:], policy, cfg)  # without the first question and its response


def print_response(policy: Policy, prompt: Prompt, seed: int) -> str:
    """Sample a response and print it in one line: the checkpoint, the response while it is sampled
    and, in brackets, what is known of it. Returns its text."""
    print(f"{policy.path}: ", end="")
    gpt = Streamed(policy.frozen, [])
    [response] = evaluate.respond(gpt, [prompt], policy.frozen, policy.judge, seed)
    gpt.show(response.text)
    numbers = policy.known_numbers(response)
    notes = [f"{name} {number:+.2f}" for name, number in numbers.items()]
    if not response.ended:
        notes.append("cut off")
    print(f"   ({', '.join(notes)})" if notes else "")
    return response.text


def take_turn(policy: Policy, question: str, cfg: SampleConfig, turn: int) -> None:
    """Print a policy's responses to a question; the first one goes into its dialogue."""
    given = [*policy.dialogue, {"role": "user", "content": question}]
    prompt = fit(strip_blanks(question) if cfg.plain else given, policy, cfg)
    seed = (1000 * cfg.seed + turn) * cfg.n
    texts = [print_response(policy, prompt, seed + number) for number in range(cfg.n)]
    if not cfg.plain:
        policy.dialogue = (*given, {"role": "assistant", "content": texts[0]})


def read_question() -> str:
    """A line typed at the terminal; empty at the end of the input."""
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def main(cfg: SampleConfig) -> None:
    policies = load_policies(cfg)
    # The reward.pt beside a checkpoint may be missing, or be unfit for this policy.
    with going_on("going on without a reward model", unless=cfg.reward):
        give_rewards(policies, cfg)
    if cfg.prompts:
        from data.responses import write_responses

        write_responses(policies, cfg)
        return
    questions = [cfg.prompt]
    if not cfg.prompt:
        print("type a question; an empty line ends")
        questions = iter(read_question, "")
    for turn, question in enumerate(questions):
        for policy in policies:
            with going_on(str(policy.path), unless=cfg.prompt):
                take_turn(policy, question, cfg, turn)


if __name__ == "__main__":
    run(main, SampleConfig)
