"""DPO: the policy learns from the comparisons directly. Nothing is sampled, and no reward model trains it.

    python -m rlhf.tools.train_dpo         # reads runs/sft.pt and reward.pt; writes to runs/dpo: dpo.pt, dpo.csv,
                                           # dpo_samples.csv and evaluation.csv
    python -m rlhf.tools.optimality --checkpoint runs/dpo/dpo.pt

The loss is the reward model's, -log sigmoid(r_chosen - r_rejected), with r = beta * log(pi / pi_ref). Its docstring in
rlhf/extras/alternatives.py says why, and what it does to the objective.

No training step uses the reward model's scores. They are for evaluation.csv. Its scale makes the default beta: scores
are log-odds divided by this scale, so beta = kl_coef * scale has the optimum of train_ppo.py with that kl_coef. With
another --beta, the objective in evaluation.csv is still that of --kl-coef.

Left out: comparisons sampled again from the policy, a label smoothing of the votes, terms of the loss that keep the
probability of the chosen response up.
"""

from dataclasses import dataclass

import torch

from rlhf import data, evaluate
from rlhf.extras import report
from rlhf.extras.alternatives import PolicyWithoutValue, dpo_loss, pair_accuracy, pair_logprobs
from rlhf.extras.from_checkpoint import tokenizer_of
from rlhf.extras.lora import trained_and_frozen
from rlhf.extras.yardsticks import share_positive
from rlhf.rollout import Frozen
from rlhf.support import checkpoints, cli, judge, runtime, tables


@dataclass(frozen=True)
class DPOConfig(cli.TrainConfig):
    """Train the policy with DPO on comparisons (in place of stages two and three)."""

    out: str = "runs/dpo"
    steps: int = 190
    batch_size: int = 64
    lr: float = 1e-4
    warmup: int = 20
    log_every: int = cli.arg(20, "steps between lines of metrics")
    eval_every: int = 95
    beta: float = cli.arg(0.0, "DPO's beta (0: kl_coef times the reward model's scale)", group="DPO")
    kl_coef: float = cli.arg(0.07, "KL penalty coefficient of the objective")
    sft: str = cli.arg("runs/sft.pt", "starting policy and reference")
    reward: str = cli.arg("runs/reward.pt", "reward model, which only scores")
    max_new_tokens: int = cli.arg(40, "longest response of the evaluation")
    missing_eos_score: float = cli.arg(-3.0, "score of a response without end-of-text")
    eval_prompts: int = cli.arg(500, "held-out prompts of the closing evaluation")

    def __post_init__(self):
        super().__post_init__()
        cli.check_positive(self, "log_every", "kl_coef", "max_new_tokens", "eval_prompts")
        cli.check_not_negative(self, "beta")


def main(cfg: DPOConfig) -> None:
    device, amp, scaler = runtime.setup(cfg.device, cfg.amp)
    sft_path, reward_path, path = (cfg.checkpoint(name) for name in ("sft", "reward", "dpo"))
    gpt, sft = checkpoints.load_policy(sft_path, "sft")
    reward_model, reward = checkpoints.load_reward_model(reward_path)
    tokenizer, gold_judge = tokenizer_of(sft_path, sft, cfg.data), judge.load_judge(cfg.data)
    checkpoints.check_tokenizer(reward_path, reward, tokenizer)
    checkpoints.check_input(reward_path, reward, "sft", sft_path)
    files = [tables.csv_path(cfg.data, "comparisons", heldout) for heldout in (False, True)]
    train_rows, heldout_rows = (data.load_comparisons([file], tokenizer, gpt.config.block_size) for file in files)
    limit = max(0, min(gpt.config.block_size, reward_model.gpt.config.block_size) - cfg.max_new_tokens)
    prompts = data.load_prompts(cfg.data, tokenizer, limit, heldout=True)[: cfg.eval_prompts]

    gpt, reference = trained_and_frozen(gpt, cfg.lora_rank, runtime.make_generator("cpu", cfg.seed, "adapters"))
    policy = PolicyWithoutValue(gpt).to(device)
    frozen = Frozen(reference.to(device), reward_model.to(device), tokenizer, cfg.max_new_tokens,
                    cfg.missing_eos_score, cfg.micro_batch_size or 128, amp)
    given = gpt, frozen.reference, tokenizer.pad_id, device, amp
    optimizer = runtime.make_optimizer(policy, cfg.lr, weight_decay=0.0)
    inputs = checkpoints.digests(sft=sft_path, reward=reward_path, comparisons=files[0])
    begun = checkpoints.begin(path, cfg, tokenizer, inputs, policy, optimizer, scaler)
    beta = cfg.beta or cfg.kl_coef * reward_model.scale.item()
    print(f"{len(train_rows):,} comparisons, {cfg.steps * cfg.batch_size / len(train_rows):.1f} epochs "
          f"({len(heldout_rows):,} held out), beta {beta:.3g}, on {device}, amp {cfg.amp}, seed {cfg.seed}")

    progress = tables.Progress(path.with_suffix(".csv"), cfg.steps, begun, (
        "loss", "accuracy", "heldout", "chosen_log_ratio", "rejected_log_ratio"), cfg.tensorboard)
    for step in range(begun["step"], cfg.steps):
        rows = [train_rows[i] for i in data.batch_indices(len(train_rows), cfg.batch_size, step, cfg.seed)]
        lr = runtime.set_lr(optimizer, cfg.lr * runtime.cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss, log_ratios = 0.0, []
        for part in tables.ticker(data.chunks(rows, cfg.micro_batch_size), f"step {step + 1}, micro-batches"):
            logprobs = pair_logprobs(part, *given)  # (4, N)
            part_loss = dpo_loss(*logprobs, beta) * (len(part) / len(rows))  # micro-batches sum to the batch's mean
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            log_ratios.append((logprobs[:2] - logprobs[2:]).detach())  # (2, N)
        grad_norm = runtime.optimizer_step(policy, optimizer, scaler, cfg.max_grad_norm)
        chosen, rejected = torch.cat(log_ratios, dim=1)  # (B,), (B,)
        progress.tokens += sum(row.size for row in rows)

        done = step + 1
        runtime.check_finite(policy, done, loss)
        evaluated = done % cfg.eval_every == 0 or done == cfg.steps
        if evaluated or step == 0 or done % cfg.log_every == 0:
            heldout = pair_accuracy(heldout_rows[:500], *given) if evaluated else None
            progress.log(done, loss=loss.item(), accuracy=share_positive(chosen - rejected), heldout=heldout,
                         chosen_log_ratio=chosen.mean().item(), rejected_log_ratio=rejected.mean().item(),
                         grad_norm=grad_norm.item(), lr=lr)
        if evaluated:
            checkpoints.save(path, "dpo", policy, cfg, done, tokenizer, optimizer, scaler, inputs, progress,
                             kl_coef=cfg.kl_coef)

    table, before, after = evaluate.compare(gpt, prompts, frozen, gold_judge, cfg.kl_coef, cfg.seed, name="dpo")
    tables.write_csv(path.with_name("evaluation.csv"), table)
    tables.write_csv(path.with_name("dpo_samples.csv"), report.sample_rows(before, after))
    report.print_responses(before=before[:3], after=after[:3])
    print(f"\nwrote {path}, evaluation.csv and dpo_samples.csv\n")
    report.print_table(table)


if __name__ == "__main__":
    cli.run(main, DPOConfig)
