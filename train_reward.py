"""Stage two: a reward model. The fine-tuned GPT, with a score head, learns which of two responses people prefer.

    python train_reward.py         # reads runs/sft.pt; writes runs/reward.pt, reward.csv and reward_evaluation.csv

One to two minutes on two cores; held-out accuracy ends near 0.88, that of a perfect model (docs/results.md).

The loss is -log sigmoid(r_chosen - r_rejected), so the chosen response scores HIGHER. Only score differences are
learned; shift and scale are arbitrary. They are fixed once, after training: the demonstrations get mean 0 and standard
deviation 1, so that a kl_coef in PPO means the same trade whatever scale the training happened to reach. The
demonstrations, because the reference policy imitates them: a score of +1 is one standard deviation better than usual.

How good can it be? Annotators disagree with themselves, so no model reaches 1.0. If the data set has a judge that knows
its annotators' noise, the evaluation also shows what a perfect model would get.

Left out: margins, ensembles. The default is 4 epochs, because this network is small and starts from little; a large
pretrained one overfits after one.
"""

from dataclasses import dataclass
from pathlib import Path

from rlhf.support import cli  # first, so that Ctrl-C prints one line even while torch loads

# isort: split
import torch

from rlhf.data import batch_indices, chunks, comparison_batch, load_comparisons, load_demonstrations, pad_rows
from rlhf.extras import parallel
from rlhf.extras.from_checkpoint import tokenizer_of
from rlhf.extras.lora import add_adapters
from rlhf.extras.rankings import load_rankings, score_rankings
from rlhf.extras.yardsticks import judge_accuracies, share_positive, swap_prompts
from rlhf.losses import bradley_terry_loss
from rlhf.model import RewardModel
from rlhf.support import checkpoints, judge, runtime, tables


@dataclass(frozen=True)
class RewardConfig(cli.TrainConfig):
    """Train a reward model on comparisons (stage two of three)."""

    steps: int = 750
    batch_size: int = 64
    micro_batch_size: int = 16  # sorted by length, so that less is padded
    lr: float = 1.5e-3
    warmup: int = 20
    max_grad_norm: float = 5.0
    log_every: int = cli.arg(20, "steps between lines of metrics")
    eval_every: int = 150
    eval_rows: int = cli.arg(0, "rows of the closing evaluation, and that set the scale (0: all)")
    weight_decay: float = cli.arg(0.5, "AdamW's weight decay, on matrices only")
    sft: str = cli.arg("", "checkpoint to start from (empty: OUT/sft.pt)", group="model and data")
    comparison_files: tuple[str, ...] = cli.arg((), "files to learn from instead of comparisons.csv")
    comparisons: int = cli.arg(0, "train on the first N comparisons or rankings (0: all)")
    rankings: bool = cli.arg(False, "learn from rankings.csv, K responses to a prompt")
    shuffle_prompts: bool = cli.arg(False, "a control: learn with the prompts of other rows")

    def __post_init__(self):
        super().__post_init__()
        cli.check_positive(self, "log_every")
        cli.check_not_negative(self, "weight_decay", "comparisons", "eval_rows")
        if self.rankings and (self.shuffle_prompts or self.comparison_files):
            raise ValueError("--shuffle-prompts and --comparison-files are for comparisons, not for --rankings")


def main(cfg: RewardConfig) -> None:
    device, amp, scaler = runtime.setup(cfg.device, cfg.amp)
    sft_path, path = cfg.checkpoint("sft"), cfg.checkpoint("reward")
    gpt, sft = checkpoints.load_policy(sft_path, "sft")
    tokenizer = tokenizer_of(sft_path, sft, cfg.data)
    pad_id, limit, kind = tokenizer.pad_id, gpt.config.block_size, "rankings" if cfg.rankings else "comparisons"
    train_files = [Path(name) for name in cfg.comparison_files] or [tables.csv_path(cfg.data, kind)]
    train_rows = (load_rankings(train_files[0], tokenizer, limit) if cfg.rankings
                  else load_comparisons(train_files, tokenizer, limit))[: cfg.comparisons or None]
    heldout_file, some = tables.csv_path(cfg.data, "comparisons", heldout=True), slice(cfg.eval_rows or None)
    heldout_rows = load_comparisons([heldout_file], tokenizer, limit)[some]
    demonstrations = load_demonstrations(cfg.data, tokenizer, limit)[some]
    if cfg.shuffle_prompts:
        train_rows = swap_prompts(train_rows, cfg.seed, limit)

    gpt = add_adapters(gpt, cfg.lora_rank, runtime.make_generator("cpu", cfg.seed, "adapters"))
    model = RewardModel(gpt).to(device)
    optimizer = runtime.make_optimizer(model, cfg.lr, cfg.weight_decay)
    inputs = checkpoints.digests(sft=sft_path, demonstrations=tables.csv_path(cfg.data, "demonstrations"),
                                 **{f"{kind} {i}": name for i, name in enumerate(train_files, start=1)})
    begun = checkpoints.begin(path, cfg, tokenizer, inputs, model, optimizer, scaler)

    gold_judge = judge.load_judge(cfg.data)
    judged = judge_accuracies(gold_judge, heldout_rows, tokenizer) if gold_judge else {}
    epochs = cfg.steps * cfg.batch_size / len(train_rows)
    print(f"{len(train_rows):,} {kind}, {epochs:.1f} epochs ({len(heldout_rows):,} comparisons held out), on "
          f"{device}, amp {cfg.amp}, seed {cfg.seed}; held out, the judge in the reward model's place: "
          + (", ".join(f"{name} {value:.3f}" for name, value in judged.items()) or "not known, there is none"))
    if epochs > 10:
        print(f"warning: {epochs:.0f} epochs over the same {kind} will overfit; lower --steps")

    progress = tables.Progress(path.with_suffix(".csv"), cfg.steps, begun, (
        "loss", "accuracy", "heldout", "margin", "grad_norm", "lr"), cfg.tensorboard)
    for step in range(begun["step"], cfg.steps):
        rows = [train_rows[i] for i in batch_indices(len(train_rows), cfg.batch_size, step, cfg.seed)]
        lr = runtime.set_lr(optimizer, cfg.lr * runtime.cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss, margins = 0.0, []
        # parallel: under torchrun, several processes share the rows. With one process it does nothing.
        for part in tables.ticker(chunks(parallel.share(rows), cfg.micro_batch_size), f"step {step + 1}, micro-batch"):
            if cfg.rankings:
                part_loss, margin = score_rankings(model, part, pad_id, device, amp)
            else:
                tokens, lengths = comparison_batch(part, pad_id, device)  # (2N, T), (2N,)
                with runtime.autocast(device, amp):
                    chosen, rejected = model(tokens, lengths).chunk(2)  # (N,), (N,)
                part_loss, margin = bradley_terry_loss(chosen, rejected), (chosen - rejected).detach()
            part_loss = part_loss * (len(part) / len(rows))  # micro-batches sum to the mean over all of the batch
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            margins.append(margin)
        loss = parallel.sum_gradients(model, loss)
        grad_norm = runtime.optimizer_step(model, optimizer, scaler, cfg.max_grad_norm)
        margins = parallel.gather(torch.cat(margins))  # (N,), or all pairs of the rankings
        progress.tokens += sum(row.size for row in rows)

        done = step + 1
        runtime.check_finite(model, done, loss)
        evaluated = done % cfg.eval_every == 0 and done < cfg.steps
        if evaluated or step == 0 or done % cfg.log_every == 0 or done == cfg.steps:
            heldout = accuracy(model, heldout_rows[:500], pad_id, device, amp) if evaluated else None
            progress.log(done, loss=loss.item(), accuracy=share_positive(margins), heldout=heldout,
                         margin=margins.mean().item(), grad_norm=grad_norm.item(), lr=lr)
        if evaluated:
            checkpoints.save(path, "reward", model, cfg, done, tokenizer, optimizer, scaler, inputs, progress)

    if begun["step"] < cfg.steps:  # fix shift and scale of the scores, once
        scores = score_rows(model, [row.tokens for row in demonstrations], pad_id, device, amp)
        std = scores.std(correction=0)
        model.mean.fill_(scores.mean())
        model.scale.fill_(std if std > 1e-6 else 1.0)  # a single demonstration has no spread
        if std < 0.01:  # sigmoid(0.01) is 0.5025: no vote was learned
            print(f"warning: the scores hardly differ (standard deviation {std:.1e}): PPO would follow noise")
        runtime.check_finite(model, cfg.steps)  # mean and scale are not, if one score is not
        checkpoints.save(path, "reward", model, cfg, cfg.steps, tokenizer, optimizer, scaler, inputs, progress)
        print(f"scores: (raw - {model.mean:.3f}) / {model.scale:.3f}, so that demonstrations have mean 0 and std 1")

    result = {"accuracy": accuracy(model, heldout_rows, pad_id, device, amp), **judged,
              "swapped_accuracy": accuracy(model, swap_prompts(heldout_rows, cfg.seed, limit), pad_id, device, amp),
              "comparisons": len(heldout_rows)}
    tables.write_csv(path.with_name("reward_evaluation.csv"), [result])
    print("held out: " + " | ".join(f"{name} {value:.3f}" for name, value in result.items() if name != "comparisons")
          + "\n          (swapped_accuracy: the same model shown the prompt of another row)")
    if result["accuracy"] < 0.55:
        print("warning: accuracy is near 0.5 or below: PPO would follow noise or, if votes are swapped, bad responses")
    print(f"wrote {path}; next: python train_ppo.py")


@torch.no_grad()
def score_rows(model, rows: list[list[int]], pad_id: int, device, amp) -> torch.Tensor:
    """Scores of whole sequences, (N,) on the CPU, 128 at a time."""
    scores, rows = [torch.empty(0)], parallel.share(rows)
    for at in range(0, len(rows), 128):
        tokens, lengths = pad_rows(rows[at : at + 128], pad_id, device)  # (B, T), (B,)
        with runtime.autocast(device, amp):
            scores.append(model(tokens, lengths).float().cpu())
    return parallel.gather(torch.cat(scores))


def accuracy(model, rows, pad_id: int, device, amp) -> float:
    """share_positive of the model's margins on comparisons."""
    chosen = score_rows(model, [row.prompt.tokens + row.chosen for row in rows], pad_id, device, amp)
    rejected = score_rows(model, [row.prompt.tokens + row.rejected for row in rows], pad_id, device, amp)
    return share_positive(chosen - rejected)


if __name__ == "__main__":
    parallel.run(main, RewardConfig)
