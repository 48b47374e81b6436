"""Before and after: what the policies say to held-out prompts, and what that is worth.

The reward model's score is what PPO was paid for, so it says little about quality. The gold score of the data set's
judge, from which no training step learns, is the honest column; where there is none, the win rate goes by the score.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.common import autocast, make_generator
from rlhf.data import Prompt, pad_rows
from rlhf.judge import gold_scores
from rlhf.model import GPT, PolicyWithValue, RewardModel
from rlhf.optimum import best_of_n, best_of_n_kl, matching_n, optimum
from rlhf.rewards import kl_k1
from rlhf.rollout import Rollout, collect, generate, has_ended, score_responses
from rlhf.tokenizer import Tokenizer


def decode_responses(tokenizer: Tokenizer, tokens: Tensor, mask: Tensor) -> list[str]:
    """tokens (B, T), mask (B, T-1) -> the text of each response, without end-of-text."""
    rows = [row[1:][row_mask].tolist() for row, row_mask in zip(tokens.cpu(), mask.cpu())]
    return [tokenizer.decode([i for i in row if i != tokenizer.eos_id]).strip() for row in rows]


class Setting(NamedTuple):
    """What answers are sampled and judged with."""

    reference: GPT
    reward_model: RewardModel
    tokenizer: Tokenizer
    judge: ModuleType | None
    max_new_tokens: int = 40
    missing_eos_score: float = -3.0
    chunk_size: int = 128  # rows at once
    amp: torch.dtype | None = None


def answer(gpt: GPT, prompts: list[Prompt], setting: Setting, seed: int = 0) -> list[dict]:
    """One sampled response to each prompt, with its score, gold (None without a judge), kl_ref in nats per response,
    length in tokens and whether it ended. Scored by the very code that PPO trains with."""
    device = next(gpt.parameters()).device
    policy, tokenizer, judge, answers = PolicyWithValue(gpt).to(device), setting.tokenizer, setting.judge, []
    for at in range(0, len(prompts), setting.chunk_size):
        chunk = prompts[at : at + setting.chunk_size]
        tokens, prompt_lens = pad_rows([prompt.tokens for prompt in chunk], tokenizer.pad_id, device)
        rollout = collect(policy, setting.reference, setting.reward_model, tokens, prompt_lens, setting.max_new_tokens,
                          tokenizer.eos_id, setting.missing_eos_score, setting.chunk_size, setting.amp,
                          make_generator(device, seed, "evaluate", at))
        kl_ref = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(dim=1)  # (B,): slots off the mask hold 0
        ended = has_ended(rollout.tokens, rollout.mask, tokenizer.eos_id)
        texts = decode_responses(tokenizer, rollout.tokens, rollout.mask)
        for row, prompt in enumerate(chunk):
            answers.append({"prompt": prompt.text, "response": texts[row], "score": rollout.scores[row].item(),
                            "gold": None, "kl_ref": kl_ref[row].item(), "length": int(rollout.mask[row].sum()),
                            "ended": bool(ended[row])})
    if judge is not None:
        golds = gold_scores(judge, [a["prompt"] for a in answers], [a["response"] for a in answers])
        for one, gold in zip(answers, golds):
            one["gold"] = gold
    return answers


def mean_gold(judge: ModuleType | None, prompts: list[Prompt], rollout: Rollout, tokenizer: Tokenizer) -> float | None:
    """The judge's mean over a rollout; None without a judge. For the log: nothing is trained on it."""
    if judge is None:
        return None
    texts = decode_responses(tokenizer, rollout.tokens, rollout.mask)
    return sum(gold_scores(judge, [prompt.text for prompt in prompts], texts)) / len(texts)


def reference_samples(
    prompts: list[Prompt], samples: int, setting: Setting, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Scores (Q, N) of N = samples responses of the reference to each of Q prompts, and their gold (None without a
    judge): what rlhf/optimum.py needs."""
    device = next(setting.reference.parameters()).device
    tokenizer, scores, golds = setting.tokenizer, [], []
    for at, prompt in enumerate(prompts):
        generator = make_generator(device, seed, "reference samples", at)
        texts = []
        for begun in range(0, samples, setting.chunk_size):
            rows = [prompt.tokens] * min(setting.chunk_size, samples - begun)
            tokens, prompt_lens = pad_rows(rows, tokenizer.pad_id, device)
            with autocast(device, setting.amp):
                tokens, mask = generate(setting.reference, tokens, prompt_lens, setting.max_new_tokens,
                                        tokenizer.eos_id, generator)
                scores.append(score_responses(setting.reward_model, tokens, mask, prompt_lens, tokenizer.eos_id,
                                              setting.missing_eos_score))
            texts += decode_responses(tokenizer, tokens, mask)
        if setting.judge is not None:
            golds.append(gold_scores(setting.judge, [prompt.text] * samples, texts))
    scores = torch.cat(scores).view(len(prompts), samples).double().cpu()
    return scores, torch.tensor(golds, dtype=torch.float64) if golds else None


def mean(answers: list[dict], name: str) -> float | None:
    """Mean of a column; None where it has no numbers."""
    return None if answers[0][name] is None else sum(float(one[name]) for one in answers) / len(answers)


def summarise(name: str, answers: list[dict], baseline: list[dict], kl_coef: float) -> dict:
    """One row of evaluation.csv: means over the prompts, and wins over the baseline, where a tie counts half."""
    yardstick = "score" if answers[0]["gold"] is None else "gold"
    wins = [(ours[yardstick] > theirs[yardstick]) + 0.5 * (ours[yardstick] == theirs[yardstick])
            for ours, theirs in zip(answers, baseline)]
    score, kl_ref = mean(answers, "score"), mean(answers, "kl_ref")
    return {
        "policy": name,
        "score": score,
        "gold": mean(answers, "gold"),
        "kl_ref": kl_ref,
        "objective": score - kl_coef * kl_ref,
        "length": mean(answers, "length"),
        "eos_rate": mean(answers, "ended"),
        "win_rate_vs_sft": sum(wins) / len(wins),
        "prompts": len(answers),
    }


def add_optimum(table: list[dict], ours: list[dict], scores: Tensor, golds: Tensor | None, kl_coef: float) -> str:
    """Append the rows best_of_n and optimum to the table [sft, ..., ppo], and to every row its optimality

        (J - J_sft) / (J* - J_sft),    J = score - kl_coef * kl_ref

    0 for the reference, 1 for the best policy that this objective has. The two rows come from fewer prompts than the
    others, and prompts differ more than policies do, so they are paired with PPO's:

        figure = PPO's mean over all prompts + (theirs - PPO's, means over the Q prompts that both have answered)

    but for the KL of best-of-n, which is the same for every prompt.

    Args: ours: PPO's answers to all Q prompts, and again, any number of times; scores, golds (Q, N) of
        reference_samples, with N even.
    Returns: a line on how far the estimate can be trusted: the standard error, over the Q prompts, of what PPO lacks,
        J* - J; and its bias. Half of the samples, twice, give a lower J* than all of them; all of them give a lower
        one than there is, by about as much where the effective sample size is large. Where it is 5 or less, that is a
        lower bound: the samples cannot tell of answers that are too good to be among them.
    """
    ppo, best = table[-1], optimum(scores, kl_coef)
    largest = scores.size(1) // 2  # beyond it, best-of-n is too uncertain
    n = matching_n(ppo["kl_ref"], largest)

    def beside_ppo(column: str, theirs: Tensor) -> float:
        return ppo[column] + theirs.mean().item() - mean(ours, column)

    for name, score, gold, kl_ref in (
        ("best_of_n", best_of_n(scores, scores, n), None if golds is None else best_of_n(scores, golds, n),
         best_of_n_kl(n)),
        ("optimum", best["score"], None if golds is None else (best["weights"] * golds).sum(dim=1),
         beside_ppo("kl_ref", best["kl_ref"])),
    ):
        score, gold = beside_ppo("score", score), None if gold is None else beside_ppo("gold", gold)
        table.append({**dict.fromkeys(ppo), "policy": name, "score": score, "gold": gold, "kl_ref": kl_ref,
                      "objective": score - kl_coef * kl_ref, "prompts": len(scores)})
    start, ess = table[0]["objective"], best["ess"]
    gain = table[-1]["objective"] - start
    for row in table:
        row["optimality"] = (row["objective"] - start) / gain if gain > 0 else None
    halves = optimum(torch.cat(scores.chunk(2, dim=1)), kl_coef)["objective"].mean()
    # Optimality is gained / (gained + lacking), of PPO's objective: an error e of what it lacks is one of
    # e / (gained + lacking) times the optimality.
    slope = ppo["optimality"] / gain if gain > 0 else math.inf
    bias = (best["objective"].mean() - halves).item() * slope if gain > 0 else math.inf
    reached = torch.tensor([one["score"] - kl_coef * one["kl_ref"] for one in ours]).view(-1, len(scores)).mean(dim=0)
    lacking = best["objective"] - reached  # (Q,)
    error = lacking.std().item() / math.sqrt(len(scores)) * abs(slope) if gain > 0 and len(scores) > 1 else math.inf
    nearest = "whose KL is nearest to PPO's"
    if matching_n(ppo["kl_ref"], largest + 1) > n:
        nearest = f"the largest that {scores.size(1)} samples allow; PPO's KL is larger"
    text = (f"best_of_n: n = {n}, {nearest}\n"
            f"optimum: {scores.size(1)} reference samples for each of {len(scores)} prompts, effective sample size "
            f"{ess.mean():.1f}\non average, {ess.min():.1f} at least; PPO's optimality has a standard error of "
            f"{error:.3f}\nfrom these prompts, and is too {'low' if bias < 0 else 'high'} by {abs(bias):.3f} or more")
    if not abs(bias) < 0.03 or ess.mean() < 3:
        text += "\nwarning: that is too few samples to trust; more --optimum-samples, or a larger --kl-coef"
    return text


def compare(
    policy: GPT, prompts: list[Prompt], setting: Setting, kl_coef: float, optimum_prompts: int, samples: int, seed: int
) -> tuple[list[dict], list[dict], list[dict], str]:
    """The closing evaluation: the rows of evaluation.csv, the answers before and after, and add_optimum's line."""
    before, after = (answer(gpt, prompts, setting, seed) for gpt in (setting.reference, policy))
    table = [summarise(name, answers, before, kl_coef) for name, answers in (("sft", before), ("ppo", after))]
    few = prompts[:optimum_prompts]
    ours = answer(policy, few * 32, setting, seed + 1)  # one each would be noise beside N of the reference
    return table, before, after, add_optimum(table, ours, *reference_samples(few, samples, setting, seed), kl_coef)
