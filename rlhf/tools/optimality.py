"""How close did PPO come to the best policy there is? Adds the rows best_of_n and optimum to evaluation.csv.

    python -m rlhf.tools.optimality                    # reads runs/sft.pt, reward.pt and ppo.pt

The objective J = score - kl_coef * kl_ref has a best policy in closed form (rlhf/extras/optimum.py), and samples of the
reference are enough to estimate what it reaches. Every row of evaluation.csv gets its

    optimality = (J - J_sft) / (J* - J_sft)            0 for the reference, 1 for the best policy of this objective
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf import evaluate
from rlhf.data import Prompt, load_prompts, pad_rows
from rlhf.extras.optimum import best_of_n, best_of_n_kl, matching_n, optimum
from rlhf.model import GPT, PolicyWithValue
from rlhf.rollout import Frozen, generate, score_responses
from rlhf.support import checkpoints, cli, runtime, tables
from rlhf.support.judge import gold_scores, load_judge


@dataclass(frozen=True)
class RunConfig:
    """A finished PPO run, for the programs that look at one."""

    checkpoint: str = cli.arg("runs/ppo.pt", "the policy", group="run")
    sft: str = cli.arg("", "its reference (empty: the file it was trained from)")
    reward: str = cli.arg("", "its reward model (empty: the file it was trained with)")
    data: str = cli.arg("", "data set folder (empty: the one it was trained on)")
    device: str = cli.arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))


class Run(NamedTuple):
    policy: PolicyWithValue
    frozen: Frozen
    judge: ModuleType | None
    prompts: list[Prompt]  # held out
    config: dict  # of train_ppo.py
    kl_coef: float


@dataclass(frozen=True)
class OptimalityConfig(RunConfig):
    """Compare PPO with best-of-n and with the best policy that its objective has."""

    prompts: int = cli.arg(48, "held-out prompts on which the optimum is estimated", group="estimate")
    samples: int = cli.arg(256, "reference samples for each of them")

    def __post_init__(self):
        cli.check_positive(self, "prompts")
        if self.samples < 4 or self.samples % 2:
            raise ValueError(f"--samples is {self.samples}: give an even number, 4 or more")


def load_run(cfg: RunConfig) -> Run:
    """The models of a finished PPO run, and what they were evaluated with."""
    path = Path(cfg.checkpoint)
    checkpoint = checkpoints.load_checkpoint(path, "ppo")
    config, state = checkpoint["config"], checkpoints.merged(checkpoint["model"])
    device, amp, _ = runtime.setup(cfg.device, config["amp"])
    reference, _ = checkpoints.load_policy(trained_file(checkpoint, "sft", cfg.sft, path), "sft")
    reward_model, _ = checkpoints.load_reward_model(trained_file(checkpoint, "reward", cfg.reward, path))
    separate = any(name.startswith("value_gpt.") for name in state)
    policy = PolicyWithValue(GPT(reference.config), GPT(reward_model.gpt.config) if separate else None)
    policy.load_state_dict(state)
    policy.gpt.temperature = reference.temperature = config["temperature"]

    data = cfg.data or config["data"]
    tokenizer, judge = checkpoints.tokenizer_of(path, checkpoint, data), load_judge(data)
    frozen = Frozen(reference.to(device), reward_model.to(device), tokenizer, config["max_new_tokens"],
                    config["missing_eos_score"], config["micro_batch_size"] or 128, amp)
    limit = min(reference.config.block_size, reward_model.gpt.config.block_size) - config["max_new_tokens"]
    prompts = load_prompts(data, tokenizer, limit, heldout=True)[: config["eval_prompts"]]
    return Run(policy.to(device), frozen, judge, prompts, config, checkpoint["kl_coef"])


def trained_file(checkpoint: dict, name: str, given: str, beside: Path) -> Path:
    """sft.pt or reward.pt of a ppo.pt. Raises InputError if it is not the file that the policy was trained with."""
    config = checkpoint["config"]
    path = Path(given or config[name] or Path(config["out"]) / f"{name}.pt")
    if not given and not path.is_file():
        path = beside.with_name(f"{name}.pt")  # the folder has been moved
    if path.is_file() and checkpoints.digests(file=path)["file"] != checkpoint["inputs"][name]:
        raise cli.InputError(f"{path} is not the {name}.pt that {beside} was trained with; name it with --{name}")
    return path


@torch.no_grad()
def reference_samples(
    prompts: list[Prompt], samples: int, frozen: Frozen, judge: ModuleType | None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Scores (Q, N) of N = samples responses of the reference to each of Q prompts, and their gold (None without a
    judge): what rlhf/extras/optimum.py needs."""
    device = next(frozen.reference.parameters()).device
    tokenizer, scores, golds = frozen.tokenizer, [], []
    for at, prompt in tables.ticker(list(enumerate(prompts)), "reference samples, prompts"):
        generator = runtime.make_generator(device, seed, "reference samples", at)
        texts = []
        for begun in range(0, samples, frozen.rows):
            rows = [prompt.tokens] * min(frozen.rows, samples - begun)
            tokens, prompt_lens = pad_rows(rows, tokenizer.pad_id, device)  # (B, P), (B,)
            with runtime.autocast(device, frozen.amp):
                tokens, mask = generate(
                    frozen.reference, tokens, prompt_lens, frozen.max_new_tokens, tokenizer.eos_id, generator)
                scores.append(score_responses(frozen, tokens, mask, prompt_lens))
            texts += evaluate.decode_responses(tokenizer, tokens, mask)
        if judge is not None:
            golds.append(gold_scores(judge, [prompt.text] * samples, texts))
    scores = torch.cat(scores).view(len(prompts), samples).double().cpu()  # (Q, N)
    return scores, torch.tensor(golds, dtype=torch.float64) if golds else None


def add_optimum(table: list[dict], ours: list[dict], scores: Tensor, golds: Tensor | None, kl_coef: float) -> str:
    """Append the rows best_of_n and optimum to the table [sft, ..., ppo], and to every row its optimality

        (J - J_sft) / (J* - J_sft),    J = score - kl_coef * kl_ref

    0 for the reference, 1 for the best policy that this objective has. The two rows come from fewer prompts than the
    others, and prompts differ more than policies do, so they are paired with PPO's:

        number = PPO's mean over all prompts + (theirs - PPO's, means over the Q prompts that both have responded to)

    except for the KL of best-of-n, which is the same for every prompt.

    Args: ours: PPO's responses to all Q prompts, and again, any number of times; scores, golds (Q, N) of
        reference_samples, with N even.
    Returns: a line on how far the estimate can be trusted: its standard error over the Q prompts, and its bias. Half
        of the samples give a lower J* than all of them. All of them give a J* that is too low by about the same
        amount, if the effective sample size is large. If it is 5 or less, that amount is a lower bound, because the
        samples miss responses that are good and rare.
    """
    ppo, best = table[-1], optimum(scores, kl_coef)
    largest = scores.size(1) // 2  # beyond it, best-of-n is too uncertain
    n = matching_n(ppo["kl_ref"], largest)

    def beside_ppo(column: str, theirs: Tensor) -> float:
        return ppo[column] + theirs.mean().item() - evaluate.mean(ours, column)

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
    # optimality = gained / gain with gain = gained + lacking, so an error e in what PPO lacks changes the optimality
    # by e * optimality / gain.
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
        text += "\nwarning: that is too few samples to trust; more --samples, or a larger --kl-coef"
    return text


def main(cfg: OptimalityConfig) -> None:
    run, path = load_run(cfg), Path(cfg.checkpoint).with_name("evaluation.csv")
    policy, seed, some = run.policy.gpt, run.config["seed"], run.prompts[: cfg.prompts]
    table, _, _ = evaluate.compare(policy, run.prompts, run.frozen, run.judge, run.kl_coef, seed)
    # 32 responses each: one would be noise beside N of the reference.
    ours = evaluate.respond(policy, some * 32, run.frozen, run.judge, seed + 1)
    samples = reference_samples(some, cfg.samples, run.frozen, run.judge, seed)
    trust = add_optimum(table, ours, *samples, run.kl_coef)
    tables.write_csv(path, table)
    print(f"{trust}\nwrote {path}\n")
    tables.print_table(table)


if __name__ == "__main__":
    cli.run(main, OptimalityConfig)
