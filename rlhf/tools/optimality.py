"""How close did PPO come to the best policy there is? Adds the rows best_of_n and optimum to
evaluation.csv.

    python -m rlhf.tools.optimality     # reads runs/sft.pt, reward.pt and ppo.pt; writes
                                        # optimality.csv too

The objective J = score - kl_coef * kl_ref has a best policy in closed form. What it reaches is
estimated by importance sampling from the reference and PPO's policy (rlhf/methods/optimum.py).
Every row of evaluation.csv gets its

    optimality = (J - J_sft) / (J* - J_sft)     0 for the reference, 1 for the best policy of J

optimality.csv has a row for each prompt on which the optimum is estimated.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf import evaluate
from rlhf.data import Prompt, load_prompts
from rlhf.evaluate import Response
from rlhf.methods.optimum import Estimate, Samples, column, estimate_optimum, rows_with_optimum
from rlhf.model import GPT, PolicyWithoutValue, PolicyWithValue, RewardModel
from rlhf.rollout import Frozen
from rlhf.run import program
from rlhf.run.checkpoints import check_input, load_checkpoint, load_weights
from rlhf.run.device import Compute, setup
from rlhf.run.files import write_csv
from rlhf.run.flags import DEVICES, arg, check_positive
from rlhf.run.loading import judge_of, load_policy, load_reward_model, new_network, tokenizer_of
from rlhf.run.progress import print_table
from rlhf.tokenizer import Tokenizer

UNRELIABLE = 10  # effective sample size


@dataclass(frozen=True)
class RunConfig:
    """A finished run of train_ppo.py or train_dpo.py, for the programs that look at one."""

    checkpoint: str = arg("runs/ppo.pt", "the policy", group="run")
    sft: str = arg("", "its reference (empty: the file it was trained from)")
    reward: str = arg("", "its reward model (empty: the file it was trained with)")
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", DEVICES)


@dataclass(frozen=True)
class OptimalityConfig(RunConfig):
    """Compare PPO with best-of-n and with the best policy that its objective has."""

    prompts: int = arg(48, "held-out prompts on which the optimum is estimated", group="estimate")
    samples: int = arg(160, "responses per prompt, of the reference and of PPO each")

    def __post_init__(self):
        check_positive(self, "prompts")
        if self.samples < 4 or self.samples % 2:
            raise ValueError(f"--samples is {self.samples}: give an even number, 4 or more")


def main(cfg: OptimalityConfig) -> None:
    run = load_run(cfg)
    policy = run.policy.gpt
    seed = run.config["seed"]
    table, _, _ = evaluate.compare(
        policy, run.prompts, run.frozen, run.judge, run.kl_coef, seed, run.kind
    )
    samples = sample_both(run, run.prompts[: cfg.prompts], cfg.samples)
    estimate = estimate_optimum(table, samples, run.kl_coef)
    table = rows_with_optimum(table, estimate)
    folder = Path(cfg.checkpoint).parent
    write_csv(folder / "evaluation.csv", table)
    write_csv(folder / "optimality.csv", [prompt.row() for prompt in estimate.prompts])
    print(describe(estimate, run.kind.upper()))
    print(f"wrote {folder / 'evaluation.csv'} and optimality.csv\n")
    print_table(table)


# ---- a finished run ----


class Run(NamedTuple):
    policy: PolicyWithValue | PolicyWithoutValue
    frozen: Frozen
    judge: ModuleType | None
    prompts: list[Prompt]  # held out
    config: dict  # of train_ppo.py, or train_dpo.py
    kl_coef: float
    kind: str  # "ppo" or "dpo"


def load_run(cfg: RunConfig) -> Run:
    """The models of a finished run, and what they were evaluated with."""
    path = Path(cfg.checkpoint)
    checkpoint = load_checkpoint(path, "ppo")
    config = checkpoint["config"]
    compute = setup(cfg.device, config["amp"])
    reference, _ = load_policy(trained_file(checkpoint, "sft", cfg.sft, path), "sft")
    reward_model, _ = load_reward_model(trained_file(checkpoint, "reward", cfg.reward, path))
    policy = load_whole_policy(path, checkpoint, reward_model)
    reference.temperature = policy.gpt.temperature

    data = cfg.data or config["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)
    judge = judge_of(cfg.data, config["data"])
    frozen = frozen_models(reference, reward_model, tokenizer, config, compute)
    context = min(reference.config.block_size, reward_model.gpt.config.block_size)
    limit = context - config["max_new_tokens"]
    prompts = load_prompts(data, tokenizer, limit, heldout=True)[: config["eval_prompts"]]
    policy = policy.to(compute.device)
    kl_coef = checkpoint["kl_coef"]
    return Run(policy, frozen, judge, prompts, config, kl_coef, checkpoint["kind"])


def trained_file(checkpoint: dict, name: str, given: str, beside: Path) -> Path:
    """sft.pt or reward.pt of a policy. Raises InputError if it is not the file that the policy was
    trained with.

    Args: name: "sft" or "reward"; given: the flag of that name; beside: the policy's file.
    """
    config = checkpoint["config"]
    path = Path(given or config[name] or Path(config["out"]) / f"{name}.pt")
    if not given and not path.is_file():
        path = beside.with_name(f"{name}.pt")  # the folder has been moved
    if path.is_file():
        check_input(beside, checkpoint, name, path)
    return path


def load_whole_policy(
    path: Path, checkpoint: dict, reward_model: RewardModel
) -> PolicyWithValue | PolicyWithoutValue:
    """The policy of the checkpoint at path, with its value estimate if it has one.

    A separate value network has the sizes of the reward model.
    """
    weights = checkpoint["model"]
    gpt = new_network(checkpoint["model_config"])
    if "value_head.weight" not in weights:  # another --advantage than gae, or DPO
        policy = PolicyWithoutValue(gpt)
    elif any(name.startswith("value_gpt.") for name in weights):
        policy = PolicyWithValue(gpt, type(gpt)(reward_model.gpt.config))
    else:
        policy = PolicyWithValue(gpt)
    load_weights(path, policy, weights)
    gpt.temperature = checkpoint["config"].get("temperature", 1.0)
    return policy


def frozen_models(
    reference: GPT, reward_model: RewardModel, tokenizer: Tokenizer, config: dict, compute: Compute
) -> Frozen:
    """What the run sampled and scored with."""
    return Frozen(
        reference.to(compute.device),
        reward_model.to(compute.device),
        tokenizer,
        max_new_tokens=config["max_new_tokens"],
        missing_eos_score=config["missing_eos_score"],
        rows=config["micro_batch_size"] or 128,
        amp=compute.amp,
    )


# ---- samples ----


def sample_both(run: Run, prompts: list[Prompt], count: int) -> list[Samples]:
    """So many responses of the reference and of the policy to each prompt.

    The number is the same for every prompt. Sampling more only if the effective sample size is
    small would make J* too low: it is large on the prompts whose rare good responses happen to be
    missing, and these would get no more.
    """
    policy = run.policy.gpt
    reference = run.frozen.reference
    seed = run.config["seed"]
    of_reference = respond(reference, policy, prompts, count, run.frozen, run.judge, seed + 1)
    of_policy = respond(policy, reference, prompts, count, run.frozen, run.judge, seed + 2)
    return [Samples(*pair) for pair in zip(of_reference, of_policy)]


def respond(
    gpt: GPT,
    other: GPT,
    prompts: list[Prompt],
    count: int,
    frozen: Frozen,
    judge: ModuleType | None,
    seed: int,
) -> list[list[Response]]:
    """So many responses of gpt to each prompt. Their kl_ref is log gpt - log other, summed over the
    response."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    frozen = frozen._replace(reference=other)
    responses = evaluate.respond(gpt, repeated, frozen, judge, seed)
    return [responses[at : at + count] for at in range(0, len(responses), count)]


def reference_samples(
    prompts: list[Prompt], count: int, frozen: Frozen, judge: ModuleType | None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Scores (Q, N) of N = count responses of the reference to each of Q prompts, and their gold
    (NaN without a judge)."""
    reference = frozen.reference
    of_prompts = respond(reference, reference, prompts, count, frozen, judge, seed)
    scores = [column(responses, "score") for responses in of_prompts]  # Q of (1, N)
    golds = [column(responses, "gold") for responses in of_prompts]
    return torch.cat(scores), torch.cat(golds)


# ---- the report ----


def describe(estimate: Estimate, name: str) -> str:
    """What was sampled, and how far the estimate can be trusted. name: of the policy, PPO or
    DPO."""
    lines = [describe_best_of_n(estimate, name), describe_optimum(estimate, name)]
    direction = "downward" if estimate.bias < 0 else "upward"
    lines.append(
        f"{name}'s optimality has a standard error of {estimate.error:.3f} from these prompts and "
        f"is biased {direction} by at least {abs(estimate.bias):.3f}"
    )
    unreliable = [prompt.prompt for prompt in estimate.prompts if prompt.ess < UNRELIABLE]
    if unreliable:
        share = f"{len(unreliable)} of {len(estimate.prompts)} prompts"
        names = shorten(unreliable)
        lines.append(f"unreliable (effective sample size below {UNRELIABLE}): {share}: {names}")
    if not abs(estimate.bias) < 0.03 or estimate.ess < UNRELIABLE:
        lines.append(
            "warning: that is too few samples to trust; more --samples, or a larger --kl-coef"
        )
    return "\n".join(lines)


def describe_best_of_n(estimate: Estimate, name: str) -> str:
    n = estimate.n
    nearest = f"nearest to {name}'s"
    if estimate.larger_n_is_nearer:
        nearest = f"below {name}'s: {n} samples allow no larger n"
    return f"best_of_n: n = {n}, whose KL is {nearest}"


def describe_optimum(estimate: Estimate, name: str) -> str:
    prompts = estimate.prompts
    samples = f"{prompts[0].samples} samples for each of {len(prompts)} prompts"
    halves = f"half the reference's, half {name}'s"
    return f"optimum: {samples}, {halves}; effective sample size {estimate.ess:.1f} on average"


def shorten(prompts: list[str]) -> str:
    """The beginnings of the first two prompts."""
    names = [prompt.strip().splitlines()[0][:40] for prompt in prompts[:2]]
    if len(prompts) > 2:
        names.append("...")
    return "; ".join(names)


if __name__ == "__main__":
    program.run(main, OptimalityConfig)
