"""How close did PPO come to the best policy there is? Adds the rows best_of_n and optimum to
evaluation.csv.

    python -m rlhf.tools.optimality     # reads runs/sft.pt, reward.pt and ppo.pt

The objective J = score - kl_coef * kl_ref has a best policy in closed form. What it reaches is
estimated by importance sampling from the reference and PPO's policy (rlhf/methods/optimum.py).
Every row of evaluation.csv gets its

    optimality = (J - J_sft) / (J* - J_sft)     0 for the reference, 1 for the best policy of J

and its standard error.

docs/experiments/compare.py compares several policies with one J*.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from pandas import read_csv
from torch import Tensor

from rlhf import evaluate
from rlhf.data import Prompt, load_prompts
from rlhf.masked import action_slots, token_logprobs
from rlhf.methods.optimum import (
    LARGEST_N,
    Estimate,
    Evaluation,
    Samples,
    column,
    estimate_optimum,
)
from rlhf.model import GPT, PolicyWithoutValue, PolicyWithValue, RewardModel
from rlhf.rollout import Frozen, Rollout
from rlhf.run import program
from rlhf.run.checkpoints import check_input, load_checkpoint, load_weights
from rlhf.run.device import Compute, autocast, setup
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.flags import DEVICES, arg, check_positive
from rlhf.run.heldout import HELDOUT_SHARE
from rlhf.run.loading import judge_of, load_policy, load_rewards, new_network, tokenizer_of
from rlhf.run.progress import print_table
from rlhf.run.reward_functions import Rewards, function_digests, named_rewards, reward_name
from rlhf.tokenizer import Tokenizer

UNRELIABLE = 10  # effective sample size
WITHIN = 1.96  # standard errors, in 95 % of all cases


@dataclass(frozen=True)
class RunConfig:
    """A finished run of train_ppo.py or train_dpo.py, for the programs that look at one."""

    checkpoint: str = arg("runs/ppo.pt", "the policy", group="run")
    sft: str = arg("", "its reference (empty: the file it was trained from)")
    reward: tuple[str, ...] = arg((), "its rewards (empty: the reward model it was trained with)")
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", DEVICES)


class Run(NamedTuple):
    policy: PolicyWithValue | PolicyWithoutValue
    frozen: Frozen
    judge: ModuleType | None
    prompts: list[Prompt]  # held out
    config: dict  # of train_ppo.py, or train_dpo.py
    kl_coef: float
    kind: str  # "ppo" or "dpo"
    inputs: dict[str, str]  # digests of what it was made from
    path: Path  # of its checkpoint


@dataclass(frozen=True)
class OptimalityConfig(RunConfig):
    """Compare PPO with best-of-n and with the best policy that its objective has."""

    prompts: int = arg(48, "held-out prompts on which the optimum is estimated", group="estimate")
    samples: int = arg(160, "responses per prompt, of the reference and the policy")

    def __post_init__(self):
        check_positive(self, "prompts")
        if self.samples < 4 or self.samples % 2:
            raise ValueError(f"--samples is {self.samples}: give an even number, 4 or more")

    def lock_file(self) -> Path | None:
        """Until the tables are written, no run may begin there."""
        path = Path(self.checkpoint)
        return path.with_name(".lock") if path.is_file() else None


def main(cfg: OptimalityConfig) -> None:
    compare_with_optimum([load_run(cfg)], cfg)


def compare_with_optimum(runs: list[Run], cfg: OptimalityConfig) -> None:
    """Write the tables of each run. All runs have one objective and one reference; the optimum is
    estimated from the samples of all of them."""
    first = runs[0]
    seed = first.config["seed"]
    policies = [first.frozen.reference]
    evaluations = []
    for run in runs:
        gpt = run.policy.gpt
        results = evaluate.compare(
            gpt, first.prompts, first.frozen, first.judge, first.kl_coef, seed, run.kind
        )
        policies.append(gpt)
        evaluations.append(Evaluation(*results))
    prompts = first.prompts[: cfg.prompts]
    samples = sample_all(policies, first.frozen, first.judge, prompts, cfg.samples, seed)
    estimates = estimate_optimum(evaluations, samples, first.kl_coef)
    for run, estimate in zip(runs, estimates):
        path = run.path.with_name("evaluation.csv")
        write_csv(path, estimate.rows)
        print(describe(estimate, run.kind.upper(), samples))
        print(f"wrote {path}\n")
        print_table(estimate.rows)


# ---- a finished run ----


def load_run(cfg: RunConfig) -> Run:
    """The models of a finished run, and what they were evaluated with.

    Raises InputError if the evaluation.csv beside the checkpoint is of another policy.
    """
    path = Path(cfg.checkpoint)
    checkpoint = load_checkpoint(path, "ppo")
    config = checkpoint["config"]
    compute = setup(cfg.device, config["amp"])
    sft_path = Path(cfg.sft or config["sft"] or Path(config["out"]) / "sft.pt")
    sft_path = trained_file(path, checkpoint, "sft", sft_path, moved=not cfg.sft)
    reference, _ = load_policy(sft_path, "sft")
    rewards = rewards_of(path, checkpoint, cfg.reward)
    data = cfg.data or config["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)
    reward_model, functions = load_rewards(rewards, tokenizer, compute.device)
    policy = load_whole_policy(path, checkpoint, reward_model)
    reference.temperature = policy.gpt.temperature

    judge = judge_of(cfg.data, config["data"])
    frozen = frozen_models(reference, reward_model, tokenizer, config, compute)
    for name, function in zip(function_digests(functions), functions):
        check_input(path, checkpoint, name, function.path)
    frozen = frozen._replace(functions=functions, weights=rewards.weights)
    limit = frozen.context - frozen.max_new_tokens
    prompts = load_prompts(data, tokenizer, limit, True, config.get("heldout", HELDOUT_SHARE))
    prompts = prompts[: config["eval_prompts"]]
    policy = policy.to(compute.device)
    kl_coef = checkpoint["kl_coef"]
    inputs = checkpoint["inputs"]
    kind = checkpoint["kind"]
    table = path.with_name("evaluation.csv")
    if table.is_file() and kind not in set(read_csv(table)["policy"]):
        raise InputError(f"{table} is of another policy than {path}; move it elsewhere")
    return Run(policy, frozen, judge, prompts, config, kl_coef, kind, inputs, path)


def rewards_of(path: Path, checkpoint: dict, given: tuple[str, ...]) -> Rewards:
    """The rewards that the checkpoint at path was trained with, or those that the user names in
    their place.

    Raises InputError if there are functions among them and the user has named none (a checkpoint
    decides on no code that runs), or others.
    """
    config = checkpoint["config"]
    trained = config["reward"]
    trained = (trained,) if isinstance(trained, str) and trained else tuple(trained)  # of DPO
    default = Path(config["out"]) / "reward.pt"
    names = [reward_name(spec) for spec in trained or [str(default)]]
    if given and [reward_name(spec) for spec in given] != names:
        raise InputError(
            f"{path} was trained with --reward {' '.join(trained) or default}; name all of them, "
            f"in this order"
        )
    rewards = named_rewards(given or trained, config.get("reward_weights", ()), default)
    if rewards.functions and not given:
        raise InputError(
            f"{path} was trained with reward functions, which run only if you name them: give "
            f"--reward {' '.join(trained)}"
        )
    if rewards.model is None:
        return rewards
    model = trained_file(path, checkpoint, "reward", rewards.model, moved=not given)
    return rewards._replace(model=model)


def trained_file(path: Path, checkpoint: dict, name: str, file: Path, moved: bool) -> Path:
    """The file, of this name among its inputs, that the checkpoint at path was trained with.

    Args: moved: if it is not where it was, look beside the checkpoint.
    Raises: InputError if it is another file.
    """
    if moved and not file.is_file():
        file = path.with_name(f"{name}.pt")
    if file.is_file():
        check_input(path, checkpoint, name, file)
    return file


def load_whole_policy(
    path: Path, checkpoint: dict, reward_model: RewardModel | None
) -> PolicyWithValue | PolicyWithoutValue:
    """The policy of the checkpoint at path, with its value estimate if it has one.

    A separate value network has the sizes of the reward model or, without one, of the policy.
    """
    weights = checkpoint["model"]
    gpt = new_network(checkpoint["model_config"])
    if "value_head.weight" not in weights:  # another --advantage than gae, or DPO
        policy = PolicyWithoutValue(gpt)
    elif any(name.startswith("value_gpt.") for name in weights):
        config = reward_model.gpt.config if reward_model else gpt.config
        policy = PolicyWithValue(gpt, type(gpt)(config))
    else:
        policy = PolicyWithValue(gpt)
    load_weights(path, policy, weights)
    gpt.temperature = checkpoint["config"].get("temperature", 1.0)
    return policy


def frozen_models(
    reference: GPT,
    reward_model: RewardModel | None,
    tokenizer: Tokenizer,
    config: dict,
    compute: Compute,
) -> Frozen:
    """What the run sampled and scored with, without reward functions."""
    limits = config["max_new_tokens"]
    limits = (limits,) if isinstance(limits, int) else limits  # DPO's is one number
    return Frozen(
        reference.to(compute.device),
        reward_model,
        tokenizer,
        max_new_tokens=limits[-1],
        shortest_limit=limits[0],
        missing_eos_score=config["missing_eos_score"],
        rows=config["micro_batch_size"] or 128,
        amp=compute.amp,
    )


# ---- samples ----


def sample_all(
    policies: list[GPT],
    frozen: Frozen,
    judge: ModuleType | None,
    prompts: list[Prompt],
    count: int,
    seed: int,
) -> Samples:
    """So many responses of each of the M policies, of which the first is the reference, to each of
    Q prompts.

    The number is the same for every prompt. Sampling more only if the effective sample size is
    small would make J* too low: it is large on the prompts whose rare good responses happen to be
    missing, and these would get no more.
    """
    repeated = [prompt for prompt in prompts for _ in range(count)]
    responses = []
    parts = []
    for number, policy in enumerate(policies, start=1):
        others = [other for other in policies if other is not policy]
        frozen = frozen._replace(reference=others[0])  # its logprobs come with the rollout
        for batch, rollout in evaluate.rollouts(policy, repeated, frozen, seed + number):
            responses += evaluate.describe(batch, rollout, frozen.tokenizer, judge)
            logprobs = {policy: rollout.logprobs, others[0]: rollout.ref_logprobs}
            for other in others[1:]:
                logprobs[other] = logprobs_under(other, rollout, frozen.amp)
            parts.append(torch.stack([logprobs[gpt].sum(dim=1) for gpt in policies]))  # (M, B)
    shape = (len(policies), len(prompts), count)  # (M, Q, n)
    scores = column(responses, "score").view(shape)
    golds = column(responses, "gold").view(shape)
    sums = torch.cat(parts, dim=1).double().cpu().view(-1, *shape)  # (M, M, Q, n)
    return Samples(scores, golds, sums - sums[0])


@torch.no_grad()
def logprobs_under(gpt: GPT, rollout: Rollout, amp: torch.dtype | None) -> Tensor:
    """(B, T-1) the log-probabilities of a rollout's actions under another policy."""
    tokens, mask = rollout.tokens, rollout.mask
    with autocast(tokens.device, amp):
        logits = gpt.logits(action_slots(gpt.hidden(tokens), mask))  # (S, V)
        return token_logprobs(logits, tokens, mask)


# ---- the report ----


def describe(estimate: Estimate, name: str, samples: Samples) -> str:
    """What was sampled, and how far the estimate can be trusted. name: of the policy, PPO or
    DPO."""
    sft, policy, best_of_n, best = estimate.rows
    policies, prompts, count = samples.scores.shape
    ess = estimate.ess.mean().item()
    unreliable = (estimate.ess < UNRELIABLE).sum()
    lines = [
        f"best_of_n: n = {estimate.n:,}, whose KL is nearest to {name}'s (up to {LARGEST_N:,})",
        f"optimum: {policies * count} samples for each of {prompts} prompts, {count} of the "
        f"reference and of each policy",
        f"    effective sample size {ess:.1f} on average, below {UNRELIABLE} for {unreliable}",
        f"    J* is raised by {estimate.raised:.4f}, about the bias of so few samples (jackknife)",
        f"optimality of {name}: {interval(policy)}",
        f"optimality of best_of_n: {interval(best_of_n)}",
    ]
    gain = best["objective"] - sft["objective"]
    if abs(estimate.raised) >= 0.03 * gain or ess < UNRELIABLE:
        lines.append("warning: too few samples to trust; more --samples, or a larger --kl-coef")
    return "\n".join(lines)


def interval(row: dict) -> str:
    """The optimality of a row, its standard error, and the interval that holds the truth in 95 % of
    all cases."""
    value, error = row["optimality"], row["optimality_se"]
    if error is None:
        return "unknown"
    low = value - WITHIN * error
    high = value + WITHIN * error
    return f"{value:.3f} ± {error:.3f} (95 %: {low:.3f} to {high:.3f})"


if __name__ == "__main__":
    program.run(main, OptimalityConfig)
