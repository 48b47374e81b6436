"""How close did PPO come to the best policy there is? Adds the rows best_of_n and optimum to evaluation.csv.

    python -m rlhf.tools.optimality        # reads runs/sft.pt, reward.pt and ppo.pt; writes optimality.csv too

The objective J = score - kl_coef * kl_ref has a best policy in closed form. What it reaches is estimated by importance
sampling from the reference and PPO's policy (rlhf/extras/optimum.py). Every row of evaluation.csv gets its

    optimality = (J - J_sft) / (J* - J_sft)            0 for the reference, 1 for the best policy of this objective

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
from rlhf.extras.alternatives import PolicyWithoutValue
from rlhf.extras.from_checkpoint import judge_of, tokenizer_of
from rlhf.extras.optimum import add_optimum, column
from rlhf.extras.report import print_table
from rlhf.model import GPT, PolicyWithValue
from rlhf.rollout import Frozen
from rlhf.support import checkpoints, cli, runtime, tables


@dataclass(frozen=True)
class RunConfig:
    """A finished run of train_ppo.py or train_dpo.py, for the programs that look at one."""

    checkpoint: str = cli.arg("runs/ppo.pt", "the policy", group="run")
    sft: str = cli.arg("", "its reference (empty: the file it was trained from)")
    reward: str = cli.arg("", "its reward model (empty: the file it was trained with)")
    data: str = cli.arg("", "data set folder (empty: the one it was trained on)")
    device: str = cli.arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))


class Run(NamedTuple):
    policy: PolicyWithValue | PolicyWithoutValue
    frozen: Frozen
    judge: ModuleType | None
    prompts: list[Prompt]  # held out
    config: dict  # of train_ppo.py, or train_dpo.py
    kl_coef: float
    kind: str  # "ppo" or "dpo"


@dataclass(frozen=True)
class OptimalityConfig(RunConfig):
    """Compare PPO with best-of-n and with the best policy that its objective has."""

    prompts: int = cli.arg(48, "held-out prompts on which the optimum is estimated", group="estimate")
    samples: int = cli.arg(160, "responses per prompt, of the reference and of PPO each")

    def __post_init__(self):
        cli.check_positive(self, "prompts")
        if self.samples < 4 or self.samples % 2:
            raise ValueError(f"--samples is {self.samples}: give an even number, 4 or more")


def load_run(cfg: RunConfig) -> Run:
    """The models of a finished run, and what they were evaluated with."""
    path = Path(cfg.checkpoint)
    checkpoint = checkpoints.load_checkpoint(path, "ppo")
    config = checkpoint["config"]
    device, amp, _ = runtime.setup(cfg.device, config["amp"])
    reference, _ = checkpoints.load_policy(trained_file(checkpoint, "sft", cfg.sft, path), "sft")
    reward_model, _ = checkpoints.load_reward_model(trained_file(checkpoint, "reward", cfg.reward, path))
    gpt, weights = checkpoints.network(checkpoint), checkpoint["model"]
    separate = any(name.startswith("value_gpt.") for name in weights)
    policy = PolicyWithValue(gpt, type(gpt)(reward_model.gpt.config) if separate else None)
    if "value_head.weight" not in weights:  # another --advantage than gae, or DPO
        policy = PolicyWithoutValue(gpt)
    checkpoints.load_weights(path, policy, weights)
    policy.gpt.temperature = reference.temperature = config.get("temperature", 1.0)

    data = cfg.data or config["data"]
    tokenizer, judge = tokenizer_of(path, checkpoint, data), judge_of(cfg.data, config["data"])
    frozen = Frozen(reference.to(device), reward_model.to(device), tokenizer, config["max_new_tokens"],
                    config["missing_eos_score"], config["micro_batch_size"] or 128, amp)
    limit = min(reference.config.block_size, reward_model.gpt.config.block_size) - config["max_new_tokens"]
    prompts = load_prompts(data, tokenizer, limit, heldout=True)[: config["eval_prompts"]]
    return Run(policy.to(device), frozen, judge, prompts, config, checkpoint["kl_coef"], checkpoint["kind"])


def trained_file(checkpoint: dict, name: str, given: str, beside: Path) -> Path:
    """sft.pt or reward.pt of a policy. Raises InputError if it is not the file that the policy was trained with."""
    config = checkpoint["config"]
    path = Path(given or config[name] or Path(config["out"]) / f"{name}.pt")
    if not given and not path.is_file():
        path = beside.with_name(f"{name}.pt")  # the folder has been moved
    if path.is_file():
        checkpoints.check_input(beside, checkpoint, name, path)
    return path


def respond(gpt: GPT, other: GPT, prompts: list[Prompt], samples: int, frozen: Frozen, judge: ModuleType | None,
            seed: int) -> list[list[dict]]:
    """So many responses of gpt to each prompt. Their kl_ref is log gpt - log other, summed over the response."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    said = evaluate.respond(gpt, repeated, frozen._replace(reference=other), judge, seed)
    return [said[at : at + samples] for at in range(0, len(said), samples)]


def reference_samples(prompts: list[Prompt], samples: int, frozen: Frozen, judge: ModuleType | None,
                      seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores (Q, N) of N = samples responses of the reference to each of Q prompts, and their gold (NaN without a
    judge)."""
    said = respond(frozen.reference, frozen.reference, prompts, samples, frozen, judge, seed)
    return tuple(torch.cat([column(one, name) for one in said]) for name in ("score", "gold"))


def main(cfg: OptimalityConfig) -> None:
    run, folder = load_run(cfg), Path(cfg.checkpoint).parent
    table, *_ = evaluate.compare(
        run.policy.gpt, run.prompts, run.frozen, run.judge, run.kl_coef, run.config["seed"], name=run.kind)
    some, policy, reference = run.prompts[: cfg.prompts], run.policy.gpt, run.frozen.reference
    # The same number for every prompt. To sample more only where the effective sample size is small would make J* too
    # low: it is large on the prompts whose rare good responses happen to be missing, and these would get no more.
    theirs, ours = (respond(gpt, other, some, cfg.samples, run.frozen, run.judge, run.config["seed"] + more)
                    for gpt, other, more in ((reference, policy, 1), (policy, reference, 2)))
    rows, text = add_optimum(table, list(zip(theirs, ours)), run.kl_coef)
    tables.write_csv(folder / "evaluation.csv", table)
    tables.write_csv(folder / "optimality.csv", rows)
    print(f"{text}\nwrote {folder / 'evaluation.csv'} and optimality.csv\n")
    print_table(table)


if __name__ == "__main__":
    cli.run(main, OptimalityConfig)
