"""Before and after: what the policies say to held-out prompts, and what that is worth.

The reward model's score is what PPO was trained on, so it says little about quality. The gold score of the data set's
judge, from which no training step learns, is the honest column. Without a judge, the win rate goes by the score.
"""

from types import ModuleType

from torch import Tensor

from rlhf.data import Prompt, pad_rows
from rlhf.model import GPT, PolicyWithValue
from rlhf.rewards import kl_k1
from rlhf.rollout import Frozen, Rollout, collect
from rlhf.support.judge import gold_scores
from rlhf.support.runtime import make_generator
from rlhf.support.tables import ticker
from rlhf.tokenizer import Tokenizer


def decode_responses(tokenizer: Tokenizer, tokens: Tensor, mask: Tensor) -> list[str]:
    """tokens (B, T), mask (B, T-1) -> the text of each response, without end-of-text."""
    rows = [row[1:][row_mask].tolist() for row, row_mask in zip(tokens.cpu(), mask.cpu())]
    return [tokenizer.decode([i for i in row if i != tokenizer.eos_id]).strip() for row in rows]


def respond(gpt: GPT, prompts: list[Prompt], frozen: Frozen, judge, seed: int = 0, collect=collect) -> list[dict]:
    """One sampled response to each prompt, with its score, gold (None without a judge), kl_ref in nats per response,
    length in tokens and whether it ended. Scored by the code that PPO trains with, `collect`."""
    device = next(gpt.parameters()).device
    policy, tokenizer, responses = PolicyWithValue(gpt).to(device), frozen.tokenizer, []
    for at in ticker(range(0, len(prompts), frozen.rows), "batches of responses"):
        some = prompts[at : at + frozen.rows]
        tokens, prompt_lens = pad_rows([prompt.tokens for prompt in some], tokenizer.pad_id, device)  # (B, P), (B,)
        rollout = collect(policy, frozen, tokens, prompt_lens, make_generator(device, seed, "evaluate", at))
        kl_ref = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(dim=1)  # (B,): slots off the mask hold 0
        ended = rollout.ended(tokenizer.eos_id)
        texts = decode_responses(tokenizer, rollout.tokens, rollout.mask)
        golds = [None] * len(some) if judge is None else gold_scores(judge, [prompt.text for prompt in some], texts)
        for row, prompt in enumerate(some):
            responses.append({"prompt": prompt.text, "response": texts[row], "score": rollout.scores[row].item(),
                              "gold": golds[row], "kl_ref": kl_ref[row].item(), "length": int(rollout.mask[row].sum()),
                              "ended": bool(ended[row])})
    return responses


def mean_gold(judge: ModuleType | None, prompts: list[Prompt], rollout: Rollout, tokenizer: Tokenizer) -> float | None:
    """The judge's mean over a rollout; None without a judge. For the log only: nothing is trained on it."""
    if judge is None:
        return None
    texts = decode_responses(tokenizer, rollout.tokens, rollout.mask)
    return sum(gold_scores(judge, [prompt.text for prompt in prompts], texts)) / len(texts)


def mean(responses: list[dict], name: str) -> float | None:
    """Mean of a column; None if it has no numbers."""
    return None if responses[0][name] is None else sum(float(one[name]) for one in responses) / len(responses)


def summarise(name: str, responses: list[dict], baseline: list[dict], kl_coef: float) -> dict:
    """One row of evaluation.csv: means over the prompts; the share of responses that differ from each other; wins over
    the baseline, where a tie counts half."""
    yardstick = "score" if responses[0]["gold"] is None else "gold"
    wins = [(ours[yardstick] > theirs[yardstick]) + 0.5 * (ours[yardstick] == theirs[yardstick])
            for ours, theirs in zip(responses, baseline)]
    score, kl_ref = mean(responses, "score"), mean(responses, "kl_ref")
    return {
        "policy": name,
        "score": score,
        "gold": mean(responses, "gold"),
        "kl_ref": kl_ref,
        "objective": score - kl_coef * kl_ref,
        "length": mean(responses, "length"),
        "eos_rate": mean(responses, "ended"),
        "distinct": len({one["response"] for one in responses}) / len(responses),
        "win_rate_vs_sft": sum(wins) / len(wins),
        "prompts": len(responses),
    }


def compare(policy: GPT, prompts: list[Prompt], frozen: Frozen, judge: ModuleType | None, kl_coef: float,
            seed: int, collect=collect, name: str = "ppo") -> tuple[list[dict], list[dict], list[dict]]:
    """The rows of evaluation.csv, sft and the policy's, and the responses of the reference and of the policy."""
    before, after = (respond(gpt, prompts, frozen, judge, seed, collect) for gpt in (frozen.reference, policy))
    return [summarise(who, said, before, kl_coef) for who, said in (("sft", before), (name, after))], before, after
