"""DPO: the policy learns from the comparisons directly. Nothing is sampled, and no reward model
trains it.

    python -m docs.experiments.train_dpo     # reads runs/sft.pt and reward.pt; writes to runs/dpo:
                                       # dpo.pt, dpo.csv, dpo_samples.csv and evaluation.csv
    python -m rlhf.tools.optimality --checkpoint runs/dpo/dpo.pt --sft runs/sft.pt \\
        --reward runs/reward.pt

The loss is the reward model's, -log sigmoid(r_chosen - r_rejected), with r = beta * log(pi /
pi_ref). The docstring of dpo_loss in rlhf/methods/dpo.py says why, and what it does to the
objective.

No training step uses the reward model's scores. They are for evaluation.csv. Its scale makes the
default beta: scores are log-odds divided by this scale, so beta = kl_coef * scale has the optimum
of train_ppo.py with that kl_coef. With another --beta, the objective in evaluation.csv is still
that of --kl-coef.

Left out: comparisons sampled again from the policy, a label smoothing of the votes, terms of the
loss that keep the probability of the chosen response up.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf import evaluate
from rlhf.data import Comparison, Prompt, choose_batch, load_comparisons, load_prompts
from rlhf.methods.dpo import dpo_loss, pair_logprobs
from rlhf.model import GPT, PolicyWithoutValue
from rlhf.rollout import Frozen
from rlhf.run import loading, program
from rlhf.run.checks import check_finite
from rlhf.run.device import Compute, make_generator, setup
from rlhf.run.errors import InputError
from rlhf.run.files import csv_path, digests
from rlhf.run.flags import TrainConfig, arg, check_positive, check_range
from rlhf.run.judge import load_judge, share_positive
from rlhf.run.micro_batches import micro_batches
from rlhf.run.optimizer import cosine_schedule, make_optimizer, optimizer_step, set_lr
from rlhf.run.processes import gather, total
from rlhf.run.reward_functions import Rewards, named_rewards
from rlhf.run.training import Training

SHOWN = ("loss", "accuracy", "heldout", "chosen_log_ratio", "rejected_log_ratio")


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Train the policy with DPO on comparisons (in place of stages two and three)."""

    kind = "dpo"

    out: str = "runs/dpo"
    steps: int = 190
    batch_size: int = 64
    lr: float = 1e-4
    warmup: int = 20
    log_every: int = 20
    eval_every: int = 95
    beta: float = arg(0.0, "DPO's beta (0: kl_coef times the reward model's scale)", group="DPO")
    kl_coef: float = arg(0.07, "KL penalty coefficient of the objective")
    sft: str = arg("runs/sft.pt", "starting policy and reference")
    reward: tuple[str, ...] = arg(("runs/reward.pt",), "reward model, which only scores")
    max_new_tokens: tuple[int, ...] = arg((40,), "longest response; two: drawn between")
    missing_eos_score: float | None = arg(-3.0, "score without end-of-text (none: as it is)")
    eval_prompts: int = arg(500, "held-out prompts of the closing evaluation")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "kl_coef", "eval_prompts")
        check_range("max_new_tokens", self.max_new_tokens)
        if self.rewards().functions:
            raise ValueError("--reward: DPO takes one reward model, FILE.pt")

    def rewards(self) -> Rewards:
        return named_rewards(self.reward, (), Path(self.out) / "reward.pt")


def main(cfg: DPOConfig) -> None:
    compute = setup(cfg.device, cfg.amp)
    policy, frozen, inputs = load_models(cfg, compute)
    judge = load_judge(cfg.data)
    train_rows = load_rows(cfg, policy.gpt, frozen)
    heldout_rows = load_rows(cfg, policy.gpt, frozen, heldout=True)
    prompts = load_heldout_prompts(cfg, frozen)
    models = (policy.gpt, frozen.reference, frozen.tokenizer.pad_id, compute)

    optimizer = make_optimizer(policy, cfg.lr, weight_decay=0.0)
    run = Training(cfg, policy, optimizer, compute, frozen.tokenizer, inputs)
    beta = cfg.beta or cfg.kl_coef * frozen.reward_model.scale.item()
    heldout = f"{len(heldout_rows):,}"
    epochs = run.warnings.count_epochs(cfg, len(train_rows), "comparisons", heldout)
    run.announce(f"{epochs}, beta {beta:.3g}")
    for step in range(run.step, cfg.steps):
        rows = choose_batch(train_rows, cfg.batch_size, step, cfg.seed)
        lr = set_lr(optimizer, cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss = 0.0
        ratios = []
        for part in micro_batches(rows, cfg.micro_batch_size, f"step {step + 1}, micro-batches"):
            logprobs = pair_logprobs(part, *models)  # (4, N)
            part_loss = dpo_loss(*logprobs, beta)
            part_loss = part_loss * (len(part) / len(rows))  # they sum to the mean over all rows
            compute.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            ratios.append(log_ratios(logprobs))
        grad_norm = optimizer_step(policy, optimizer, compute.scaler, cfg.max_grad_norm)
        run.count_tokens(sum(row.size for row in rows))

        done = step + 1
        metrics = step_metrics(loss, ratios, grad_norm)
        check_finite(policy, done, metrics["loss"])
        if run.logs(done):
            if run.evaluates(done):
                metrics["heldout"] = pair_accuracy(
                    heldout_rows[:500], *models, 4 * cfg.micro_batch_size or 128
                )
            run.log(done, {**metrics, "lr": lr}, SHOWN)
        if run.evaluates(done):
            run.save(done, kl_coef=cfg.kl_coef)
    results = evaluate.compare(policy.gpt, prompts, frozen, judge, cfg.kl_coef, cfg.seed, cfg.kind)
    run.close_policy(*results)


# ---- what a run is made from ----


def load_models(
    cfg: DPOConfig, compute: Compute
) -> tuple[PolicyWithoutValue, Frozen, dict[str, str]]:
    """The policy; what is frozen; digests of what the run is made from."""
    rewards = cfg.rewards()
    gpt, reward_model, functions, tokenizer, inputs = loading.load_stages(
        cfg, rewards, compute.device
    )
    if functions:
        raise InputError(f"{rewards.model} was not made from sft.pt; DPO here needs one that was")
    inputs |= digests(comparisons=csv_path(cfg.data, "comparisons"))
    generator = make_generator("cpu", cfg.seed, "adapters")
    gpt = loading.with_adapters(gpt, cfg, generator)
    reference = loading.frozen_copy(gpt)
    policy = PolicyWithoutValue(gpt).to(compute.device)
    frozen = Frozen(
        reference.to(compute.device),
        reward_model,
        tokenizer,
        max_new_tokens=cfg.max_new_tokens[-1],
        missing_eos_score=cfg.missing_eos_score,
        rows=cfg.micro_batch_size or 128,
        amp=compute.amp,
        shortest_limit=cfg.max_new_tokens[0],
    )
    return policy, frozen, inputs


def load_rows(cfg: DPOConfig, gpt: GPT, frozen: Frozen, heldout: bool = False) -> list[Comparison]:
    limit = gpt.config.block_size
    return load_comparisons(cfg.data, frozen.tokenizer, limit, heldout, cfg.heldout)


def load_heldout_prompts(cfg: DPOConfig, frozen: Frozen) -> list[Prompt]:
    """The prompts of the closing evaluation, after which a response fits."""
    limit = max(0, frozen.context - frozen.max_new_tokens)
    prompts = load_prompts(cfg.data, frozen.tokenizer, limit, True, cfg.heldout)
    return prompts[: cfg.eval_prompts]


# ---- metrics ----


def log_ratios(logprobs: Tensor) -> Tensor:
    """log(pi / pi_ref) of the chosen and of the rejected responses: (4, N) of pair_logprobs -> (N,
    2)."""
    policy = logprobs[:2]  # (2, N)
    reference = logprobs[2:]  # (2, N)
    return (policy - reference).detach().T


@torch.no_grad()
def pair_accuracy(
    rows: list[Comparison],
    policy: GPT,
    reference: GPT,
    pad_id: int,
    compute: Compute,
    size: int = 64,
) -> float:
    """Share of comparisons in which log(pi / pi_ref) is higher for the chosen response.

    size: of a micro-batch.
    """
    margins = [torch.empty(0)]
    for part in micro_batches(rows, size, "held-out comparisons, micro-batch"):
        logprobs = pair_logprobs(part, policy, reference, pad_id, compute)  # (4, N)
        chosen, rejected = log_ratios(logprobs).unbind(dim=1)  # (N,), (N,)
        margins.append((chosen - rejected).cpu())
    return share_positive(gather(torch.cat(margins)))


def step_metrics(loss: Tensor, ratios: list[Tensor], grad_norm: Tensor) -> dict[str, float | None]:
    """The columns of dpo.csv but lr and the clock's; docs/metrics.md explains them.

    Args: ratios: those of each micro-batch, (n, 2), see log_ratios.
    """
    chosen, rejected = gather(torch.cat(ratios)).unbind(dim=1)  # (B,), (B,)
    return {
        "loss": total(loss).item(),
        "accuracy": share_positive(chosen - rejected),
        "heldout": None,  # measured now and then
        "chosen_log_ratio": chosen.mean().item(),
        "rejected_log_ratio": rejected.mean().item(),
        "grad_norm": grad_norm.item(),
    }


if __name__ == "__main__":
    program.run(main, DPOConfig)
