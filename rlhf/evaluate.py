"""Before and after: what the policies say to held-out prompts, and what that is worth.

The reward model's score is what PPO was trained on, so it says little about quality. The gold score
of the data set's judge, from which no training step learns, is the honest column. Without a judge,
the win rate goes by the score.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from rlhf.data import Prompt, pad_prompts
from rlhf.model import GPT, PolicyWithoutValue
from rlhf.rewards import kl_k1
from rlhf.rollout import Frozen, Rollout, collect, decode_responses
from rlhf.run.device import make_generator, read
from rlhf.run.judge import gold_scores, share_positive
from rlhf.run.progress import ticker
from rlhf.sampling import has_ended
from rlhf.tokenizer import Tokenizer

# ---- responses ----


@dataclass(frozen=True)
class Response:
    prompt: str
    text: str
    score: float
    gold: float | None  # None without a judge
    kl_ref: float  # nats
    length: int  # tokens, end-of-text included
    ended: bool


def respond(
    gpt: GPT, prompts: list[Prompt], frozen: Frozen, judge: ModuleType | None, seed: int = 0
) -> list[Response]:
    """One sampled response to each prompt, scored by the code that PPO trains with, `collect`.

    frozen.rows prompts go at once. Random numbers follow from the seed and the number of the first.
    """
    responses = []
    for batch, rollout in rollouts(gpt, prompts, frozen, seed):
        responses += describe(batch, rollout, frozen.tokenizer, judge)
    return responses


def rollouts(
    gpt: GPT, prompts: list[Prompt], frozen: Frozen, seed: int
) -> Iterator[tuple[list[Prompt], Rollout]]:
    """respond, before the responses are decoded: some of the prompts and their rollout, at once."""
    policy = PolicyWithoutValue(gpt)  # nothing here needs values, and collect asks for them
    device = next(gpt.parameters()).device
    for at in ticker(range(0, len(prompts), frozen.rows), "batches of responses"):
        batch = prompts[at : at + frozen.rows]
        tokens, prompt_lens = pad_prompts(batch, frozen.tokenizer.pad_id, device)  # (B, P), (B,)
        generator = make_generator(device, seed, "evaluate", at)
        yield batch, collect(policy, frozen, tokens, prompt_lens, generator, batch)


def describe(
    prompts: list[Prompt], rollout: Rollout, tokenizer: Tokenizer, judge: ModuleType | None
) -> list[Response]:
    """The responses of a rollout, with all that is known of them."""
    kl_refs = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(dim=1)  # (B,); off the mask: 0
    tokens, mask, scores, kl_refs = read(rollout.tokens, rollout.mask, rollout.scores, kl_refs)
    texts = decode_responses(tokenizer, tokens, mask)
    questions = [prompt.text for prompt in prompts]
    golds = gold_scores(judge, questions, texts)
    lengths = mask.sum(dim=1).tolist()
    ended = has_ended(tokens, mask, tokenizer.stop_ids).tolist()
    columns = zip(questions, texts, scores.tolist(), golds, kl_refs.tolist(), lengths, ended)
    return [Response(*row) for row in columns]


def mean(responses: list[Response], name: str) -> float | None:
    """Mean of a field of the responses; None if it has no numbers."""
    if getattr(responses[0], name) is None:
        return None
    return sum(float(getattr(response, name)) for response in responses) / len(responses)


# ---- policies, before and after ----


def compare(
    policy: GPT,
    prompts: list[Prompt],
    frozen: Frozen,
    judge: ModuleType | None,
    kl_coef: float,
    seed: int,
    name: str = "ppo",
) -> tuple[list[dict], list[Response], list[Response]]:
    """The rows of evaluation.csv, sft and the policy's, and the responses of the reference and of
    the policy."""
    before = respond(frozen.reference, prompts, frozen, judge, seed)
    after = respond(policy, prompts, frozen, judge, seed)
    rows = [
        summarise("sft", before, before, kl_coef),
        summarise(name, after, before, kl_coef),
    ]
    return rows, before, after


def summarise(
    name: str, responses: list[Response], baseline: list[Response], kl_coef: float
) -> dict:
    """One row of evaluation.csv: means over the prompts; the share of responses that differ from
    each other; wins over the baseline."""
    score = mean(responses, "score")
    kl_ref = mean(responses, "kl_ref")
    row = {
        "policy": name,
        "score": score,
        "gold": mean(responses, "gold"),
        "kl_ref": kl_ref,
        "objective": score - kl_coef * kl_ref,
        "length": mean(responses, "length"),
        "eos_rate": mean(responses, "ended"),
    }
    row["distinct"] = len({response.text for response in responses}) / len(responses)
    row["win_rate_vs_sft"] = win_rate(responses, baseline)
    row["prompts"] = len(responses)
    return row


def win_rate(responses: list[Response], baseline: list[Response]) -> float:
    """Share of prompts with a better response than the baseline's, by gold if there is a judge,
    else by score. A tie counts half."""
    by = "score" if responses[0].gold is None else "gold"
    margins = []
    for response, other in zip(responses, baseline):
        margins.append(getattr(response, by) - getattr(other, by))
    return share_positive(torch.tensor(margins))
