"""Warnings, a line each, of runs that learn nothing and of measures that mean little."""

import math

import torch


class Warnings:
    """The warnings of a run. They are printed as they arise and again at the end."""

    def __init__(self):
        self.texts = []

    def add(self, text: str) -> None:
        """Print a warning, unless it is empty or has been printed before."""
        if text and text not in self.texts:
            self.texts.append(text)
            print(f"warning: {text}", flush=True)

    def close(self, texts: list[str]) -> None:
        """Print all warnings, last those of the closing evaluation."""
        for text in self.texts + texts:
            print(f"warning: {text}")

    def count_epochs(self, cfg, rows: int, what: str, heldout: str) -> str:
        """In words, how many rows there are and how often the run goes through them."""
        epochs = cfg.steps * cfg.batch_size / rows
        if epochs > 10:
            self.add(f"{epochs:.0f} epochs over the same {what} will overfit; lower --steps")
        return f"{rows:,} {what}, {epochs:.1f} epochs ({heldout} held out)"


# ---- while it trains ----


def of_step(rows: list[dict], cfg) -> str:
    """A warning about the latest step of PPO, or "". Args: as for equal_scores."""
    text = ""
    if len(rows) == 1:
        text = better_cut_off(rows[0]["score"], cfg.missing_eos_score)
        if not text and cfg.rewards().functions:
            text = unusual_scale(rows[0]["score_std"], cfg.kl_coef)
    return text or equal_scores(rows, cfg)


def better_cut_off(score: float, missing_eos_score: float | None) -> str:
    """A warning if responses that end score less than those that are cut off, or "".

    score: the mean of all, which is then below missing_eos_score.
    """
    if missing_eos_score is None or score >= missing_eos_score - 1e-6:  # rounding
        return ""
    return (
        f"responses score {score:.2f} on average, and those that are cut off "
        f"{missing_eos_score:g}: PPO would learn not to end; lower --missing-eos-score"
    )


def unusual_scale(score_std: float, kl_coef: float) -> str:
    """A warning if the scores of functions are not on a reward model's scale, or "".

    score_std: the standard deviation of the first rollout's scores.
    """
    if score_std == 0 or 0.2 <= score_std <= 5:
        return ""
    return (
        f"the scores deviate by {score_std:.2g} at first, and a reward model's by about 1, which "
        f"--kl-coef {kl_coef:g} is made for; multiply --reward-weights by {1 / score_std:.2g}, or "
        f"--kl-coef by {score_std:.2g}"
    )


def equal_scores(rows: list[dict], cfg) -> str:
    """A warning if all scores that are compared were equal in the last three steps of PPO, or "".

    Args: rows: of ppo.csv; cfg: a PPOConfig. The run may have fewer than three steps, and a batch
        of one response has nothing to compare.
    """
    last = rows[-3:]
    if len(last) < min(3, cfg.steps) or cfg.batch_size == 1:
        return ""
    if any(row["score_std"] > 1e-6 * max(1, abs(row["score"])) for row in last):
        return ""
    return (
        "nothing to learn: the scores that are compared are equal, step after step; the responses "
        "are the same, the reward model does not tell them apart, or none ends (then raise "
        "--max-new-tokens, or train SFT longer)"
    )


# ---- at the end; a list of warnings each ----


def overfitting(losses: dict[int | str, float], name: str, noise: float) -> list[str]:
    """Warns if the last loss is above the lowest.

    Args: losses: {step: loss on held-out rows, or share of wrong ones}; name: of the loss; noise: a
        difference up to this is none.
    """
    best = min(losses, key=losses.get)
    *_, last = losses.values()
    if last - losses[best] <= noise:
        return []
    rise = f"{name} was {losses[best]:.3f} after step {best} and is {last:.3f} at the end"
    return [f"overfitting: {rise}; lower --steps, or use more data"]


def few_rows(count: int, what: str) -> list[str]:
    """Warns of standard errors if there are fewer than 20 rows."""
    if count >= 20:
        return []
    error = 0.5 / math.sqrt(count)  # of a share of one half, the largest
    return [f"evaluated on {count} {what} only: standard errors of shares are up to {error:.2f}"]


def of_sft(rows: list[dict]) -> list[str]:
    """rows: of sft.csv."""
    losses = {row["step"]: row["valid"] for row in rows if row["valid"] is not None}
    first = rows[0]["loss"]
    last = rows[-1]["valid"]
    texts = overfitting(losses, "valid", noise=0.01 * last)
    if not texts and last > 0.99 * first:
        fell = f"the loss was {first:.3f} at first, and valid is {last:.3f} at the end"
        texts.append(f"hardly anything was learned: {fell}; change --lr, or raise --steps")
    return texts


def of_reward_model(rows: list[dict], result: dict) -> list[str]:
    """rows: of reward.csv; result: the row of reward_evaluation.csv."""
    accuracy = result["accuracy"]
    swapped = result["swapped_accuracy"]
    pairs = result["comparisons"]
    noise = 1 / math.sqrt(min(500, pairs))  # about two standard errors of a difference
    wrong = {row["step"]: 1 - row["heldout"] for row in rows if row["heldout"] is not None}
    texts = overfitting(wrong | {"": 1 - accuracy}, "the share of wrong held-out pairs", noise)
    if accuracy < 0.55:
        texts.append(
            "accuracy is near 0.5 or below: PPO would follow noise or, if votes are swapped, bad "
            "responses"
        )
    elif swapped is not None and accuracy - swapped <= 1 / math.sqrt(pairs):
        texts.append(
            f"swapped_accuracy {swapped:.3f} is as high as accuracy {accuracy:.3f}, within the "
            f"noise of {pairs} pairs: the reward model does not read the prompt"
        )
    return texts + few_rows(pairs, "comparisons")


def of_policy(method: str, before: list, after: list) -> list[str]:
    """before, after: the reference's and the policy's rlhf.evaluate.Response to each prompt."""
    texts = few_rows(len(before), "prompts")
    gains = torch.tensor([new.score - old.score for old, new in zip(before, after)])
    gain = gains.mean().item()
    error = gains.std(correction=0).item() / math.sqrt(len(before))
    if gain <= 2 * error:
        texts.append(
            f"{method} did not raise the score: {gain:+.3f} on held-out prompts, with a standard "
            f"error of {error:.3f}; try more --steps, a higher --lr or a lower --kl-coef"
        )
    return texts
