"""Before and after: what the policies say to held-out prompts, and what that is worth.

The reward model's score is what PPO was paid for, so it says little about quality. The gold score of the data set's
judge, which no training stage has seen, is the honest column; where there is none, the win rate goes by the score.
"""

from types import ModuleType

import torch

from rlhf.common import make_generator
from rlhf.data import Prompt, gold_scores, pad_rows
from rlhf.model import GPT, PolicyWithValue, RewardModel
from rlhf.rewards import kl_k1
from rlhf.rollout import collect, has_ended
from rlhf.tokenizer import Tokenizer


def answer(
    gpt: GPT,
    reference: GPT,
    reward_model: RewardModel,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    judge: ModuleType | None = None,
    amp: torch.dtype | None = None,
    seed: int = 0,
    **scoring,
) -> list[dict]:
    """One sampled response to each prompt, with its score, gold (None without a judge), kl_ref in nats per response,
    length in tokens and whether it ended. Scored by the very code that PPO trains with."""
    device = next(gpt.parameters()).device
    policy = PolicyWithValue(gpt).to(device)
    answers = []
    for at in range(0, len(prompts), 128):
        chunk = prompts[at : at + 128]
        tokens, prompt_lens = pad_rows([prompt.tokens for prompt in chunk], tokenizer.pad_id, device)
        rollout = collect(policy, reference, reward_model, tokens, prompt_lens, max_new_tokens, tokenizer.eos_id,
                          amp=amp, generator=make_generator(device, seed, "evaluate", at), **scoring)
        kl_ref = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(dim=1)  # (B,): slots off the mask hold 0
        ended = has_ended(rollout.tokens, rollout.mask, tokenizer.eos_id)
        for row, prompt in enumerate(chunk):
            ids = rollout.tokens[row, 1:][rollout.mask[row]].tolist()
            text = tokenizer.decode([i for i in ids if i != tokenizer.eos_id]).strip()
            answers.append({"prompt": prompt.text, "response": text, "score": rollout.scores[row].item(),
                            "gold": None, "kl_ref": kl_ref[row].item(), "length": len(ids),
                            "ended": bool(ended[row])})
    if judge is not None:
        golds = gold_scores(judge, [a["prompt"] for a in answers], [a["response"] for a in answers])
        for one, gold in zip(answers, golds):
            one["gold"] = gold
    return answers


def summarise(name: str, answers: list[dict], baseline: list[dict]) -> dict:
    """One row of evaluation.csv: means over the prompts, and wins over the baseline, where a tie counts half."""
    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    yardstick = "score" if answers[0]["gold"] is None else "gold"
    wins = [(ours[yardstick] > theirs[yardstick]) + 0.5 * (ours[yardstick] == theirs[yardstick])
            for ours, theirs in zip(answers, baseline)]
    return {
        "policy": name,
        "score": round(mean(a["score"] for a in answers), 4),
        "gold": "" if answers[0]["gold"] is None else round(mean(a["gold"] for a in answers), 4),
        "kl_ref": round(mean(a["kl_ref"] for a in answers), 4),
        "length": round(mean(a["length"] for a in answers), 2),
        "eos_rate": round(mean(a["ended"] for a in answers), 4),
        "win_rate_vs_sft": round(mean(wins), 4),
        "prompts": len(answers),
    }


def sample_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of ppo_samples.csv: the same prompt answered before and after."""
    return [{"Prompt": a["prompt"], "Before": a["response"], "After": b["response"],
             "score_before": round(a["score"], 4), "score_after": round(b["score"], 4),
             "gold_before": a["gold"], "gold_after": b["gold"]} for a, b in zip(before, after)]


def print_table(rows: list[dict]) -> None:
    """The rows of evaluation.csv, aligned."""
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    print(" | ".join(name.rjust(width) for name, width in widths.items()))
    for row in rows:
        print(" | ".join(str(row[name]).rjust(width) for name, width in widths.items()))


def print_pairs(before: list[dict], after: list[dict], count: int) -> None:
    for a, b in list(zip(before, after))[:count]:
        print(f"\n    {' / '.join(a['prompt'].split(chr(10) * 2)).strip(' /')}")
        for name, one in (("before", a), ("after", b)):
            gold = "" if one["gold"] is None else f", gold {one['gold']:+.1f}"
            print(f"      {name:>6} (score {one['score']:+.2f}{gold}): {one['response']}")
