"""How close did PPO come to the best policy there is? Adds the rows best_of_n and optimum to
evaluation.csv.

    python -m rlhf.tools.optimality     # reads runs/ppo.pt, and sft.pt and reward.pt beside it

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
from rlhf.methods.dpo import response_logprobs
from rlhf.methods.optimum import (
    LARGEST_N,
    Estimate,
    estimate_optimum,
    log_mixture,
    response_metrics,
)
from rlhf.model import GPT
from rlhf.rollout import Frozen, Rollout
from rlhf.run import program
from rlhf.run.checkpoints import check_input
from rlhf.run.device import Compute, autocast, setup
from rlhf.run.errors import InputError
from rlhf.run.files import check_file, write_csv
from rlhf.run.flags import DEVICES, arg
from rlhf.run.loading import judge_of, load_policy, load_rewards, tokenizer_of
from rlhf.run.progress import print_table
from rlhf.run.reward_functions import Rewards, named_rewards

UNRELIABLE = 10  # effective sample size


@dataclass(frozen=True)
class RunConfig:
    """A finished run of train_ppo.py or train_dpo.py, for the programs that look at one."""

    checkpoint: str = arg("runs/ppo.pt", "the policy", group="run")
    sft: str = arg("", "its reference (empty: sft.pt beside the checkpoint)")
    reward: tuple[str, ...] = arg((), "its rewards (empty: reward.pt beside the checkpoint)")
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", DEVICES)

    def __post_init__(self):
        self.rewards()  # refuses two reward models

    def rewards(self) -> Rewards:
        beside = Path(self.checkpoint).with_name("reward.pt")
        return named_rewards(self.reward, (), beside)


class Run(NamedTuple):
    path: Path  # of its checkpoint
    checkpoint: dict
    gpt: GPT  # the policy
    frozen: Frozen
    judge: ModuleType | None
    prompts: list[Prompt]  # held out
    compute: Compute


@dataclass(frozen=True)
class OptimalityConfig(RunConfig):
    """Compare PPO with best-of-n and with the best policy that its objective has."""

    prompts: int = arg(48, "held-out prompts on which the optimum is estimated", group="estimate")
    samples: int = arg(160, "responses per prompt, of the reference and the policy")

    def __post_init__(self):
        super().__post_init__()
        if self.prompts < 2:
            raise ValueError(f"--prompts is {self.prompts}: give 2 or more")
        if self.samples < 4:
            raise ValueError(f"--samples is {self.samples}: give 4 or more")

    def lock_file(self) -> Path | None:
        """Until the tables are written, no run may begin there."""
        return program.lock_of_run(Path(self.checkpoint).parent)


def main(cfg: OptimalityConfig) -> None:
    compare_with_optimum([load_run(cfg)], cfg)


def compare_with_optimum(runs: list[Run], cfg: OptimalityConfig) -> None:
    """Write the tables of each run. All runs have one objective and one reference; the optimum is
    estimated from the samples of all of them."""
    first = runs[0]
    seed = first.checkpoint["config"]["seed"]
    kl_coef = first.checkpoint["kl_coef"]
    models = (first.frozen, first.judge)
    evaluations = [
        evaluate.compare(run.gpt, first.prompts, *models, kl_coef, seed, run.checkpoint["kind"])
        for run in runs
    ]
    policies = [first.frozen.reference, *[run.gpt for run in runs]]
    samples = sample_all(policies, *models, first.prompts[: cfg.prompts], cfg.samples, seed)
    for run, estimate in zip(runs, estimate_optimum(evaluations, samples, kl_coef)):
        path = run.path.with_name("evaluation.csv")
        write_csv(path, estimate.rows)
        print(describe(estimate))
        print(f"wrote {path}\n")
        print_table(estimate.rows)


# ---- a finished run ----


def load_run(cfg: RunConfig) -> Run:
    """The models of a finished run, and what they were evaluated with.

    Raises InputError if a file is missing or is not the one that the run was made from, or if the
    evaluation.csv beside the checkpoint is of another policy.
    """
    path = Path(cfg.checkpoint)
    gpt, checkpoint = load_policy(path, "ppo")
    table = path.with_name("evaluation.csv")
    if table.is_file() and checkpoint["kind"] not in set(read_csv(table)["policy"]):
        raise InputError(f"{table} is of another policy than {path}; move it elsewhere")
    config = checkpoint["config"]
    compute = setup(cfg.device, config["amp"])
    judge = judge_of(cfg.data, config["data"])
    data = cfg.data or config["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)

    sft_path = Path(cfg.sft) if cfg.sft else path.with_name("sft.pt")
    rewards = cfg.rewards()
    check_inputs(path, checkpoint, {"sft": sft_path, **rewards.files()})
    reference, _ = load_policy(sft_path, "sft")
    reference.temperature = gpt.temperature
    reward_model, functions = load_rewards(rewards, tokenizer, compute.device)
    limits = config["max_new_tokens"]
    weights = config.get("reward_weights") or rewards.weights  # DPO has none
    frozen = Frozen(
        reference.to(compute.device),
        reward_model,
        tokenizer,
        max_new_tokens=limits[-1],
        shortest_limit=limits[0],
        missing_eos_score=config["missing_eos_score"],
        rows=config["micro_batch_size"] or 128,
        amp=compute.amp,
        functions=functions,
        weights=weights,
    )
    limit = frozen.context - frozen.max_new_tokens
    prompts = load_prompts(data, tokenizer, limit, True, config["heldout"])
    prompts = prompts[: config["eval_prompts"]]
    return Run(path, checkpoint, gpt.to(compute.device), frozen, judge, prompts, compute)


def check_inputs(path: Path, checkpoint: dict, files: dict[str, Path]) -> None:
    """Raise InputError if a run was made from other files than these.

    So a checkpoint decides on no code that runs: the user names the rewards.

    Args: files: {"sft": its file, "reward": ...}, see Rewards.files.
    """
    trained = [name for name in checkpoint["inputs"] if name.startswith(("sft", "reward"))]
    if trained != list(files):
        rewards = " ".join(checkpoint["config"]["reward"]) or "reward.pt"
        raise InputError(
            f"{path} was trained with --reward {rewards}; give the same rewards, in this order"
        )
    for name, file in files.items():
        check_file(file, f"give --{name.split()[0]} the file that {path} was made from")
        check_input(path, checkpoint, name, file)


# ---- samples ----


def sample_all(
    policies: list[GPT],
    frozen: Frozen,
    judge: ModuleType | None,
    prompts: list[Prompt],
    count: int,
    seed: int,
) -> Tensor:
    """(4, M, Q, n): the samples of rlhf/methods/optimum.py, `count` responses of each of the M
    policies, of which the first is the reference, to each of Q prompts.

    The number is the same for every prompt. Sampling more only if the effective sample size is
    small would make J* too low: it is large on the prompts whose rare good responses happen to be
    missing, and these would get no more.
    """
    repeated = [prompt for prompt in prompts for _ in range(count)]
    responses = []
    parts = []
    for number, policy in enumerate(policies, start=1):
        for batch, rollout in evaluate.rollouts(policy, repeated, frozen, seed + number):
            responses += evaluate.describe(batch, rollout, frozen.tokenizer, judge)
            known = {policy: rollout.logprobs, frozen.reference: rollout.ref_logprobs}
            parts.append(logprobs_under(policies, known, rollout, frozen.amp))  # (M, B)
    shape = (len(policies), len(prompts), count)  # (M, Q, n)
    scores, golds, _ = response_metrics(responses)  # (M Q n,) each
    logprobs = torch.cat(parts, dim=1).double().cpu().view(-1, *shape)  # (M, M, Q, n)
    log_ratios = logprobs - logprobs[0]  # of each policy to the reference, of all responses
    own = log_ratios.diagonal().movedim(-1, 0)  # (M, Q, n)
    return torch.stack([scores.view(shape), golds.view(shape), own, log_mixture(log_ratios)])


@torch.no_grad()
def logprobs_under(
    policies: list[GPT], known: dict[GPT, Tensor], rollout: Rollout, amp: torch.dtype | None
) -> Tensor:
    """(M, B) log-probabilities of a rollout's responses under each policy. known: of each action,
    (B, T-1), by policy."""
    sums = []
    for gpt in policies:
        if gpt in known:
            sums.append(known[gpt].sum(dim=1))
            continue
        with autocast(rollout.tokens.device, amp):
            sums.append(response_logprobs(gpt, rollout.tokens, rollout.mask))
    return torch.stack(sums)


# ---- the report ----


def describe(estimate: Estimate) -> str:
    """What best-of-n is, and how far the table can be trusted."""
    ess = estimate.ess
    unreliable = (ess < UNRELIABLE).sum()
    lines = [
        f"best_of_n: n = {estimate.n:,}, whose KL is nearest to the policy's (up to {LARGEST_N:,})",
        f"optimum: effective sample size {ess.mean():.1f} on average, below {UNRELIABLE} for "
        f"{unreliable} of {len(ess)} prompts",
        "95 % intervals: optimality ± 1.96 optimality_se",
    ]
    if ess.mean() < UNRELIABLE:
        lines.append("warning: too few samples to trust; more --samples, or a larger --kl-coef")
    return "\n".join(lines)


if __name__ == "__main__":
    program.run(main, OptimalityConfig)
