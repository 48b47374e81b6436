"""Stage two: a reward model. The fine-tuned GPT, with a score head, learns which of two responses
people prefer.

    python train_reward.py      # reads runs/sft.pt; writes runs/reward.pt, reward.csv and
                                # reward_evaluation.csv

One to two minutes on two cores; held-out accuracy ends near 0.88, as would the judge's own
(docs/results.md).

The loss is -log sigmoid(r_chosen - r_rejected), so the chosen response scores HIGHER. Only score
differences are learned; shift and scale are arbitrary. They are fixed once, after training: the
demonstrations get mean 0 and standard deviation 1, so that a kl_coef in PPO means the same trade
whatever scale the training happened to reach. The demonstrations, because the reference policy
imitates them: a score of +1 is one standard deviation better than usual.

How good can it be? Annotators disagree with themselves, so no model reaches 1.0. If the data set
has a judge that knows its annotators' noise, the evaluation also shows what a perfect model would
get.

Left out: margins, ensembles. The default is 4 epochs, because this network is small and starts from
little; a large pretrained one overfits after one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data import (
    Comparison,
    Demonstration,
    choose_batch,
    comparison_batch,
    load_comparisons,
    load_demonstrations,
    pad_rows,
    swap_prompts,
)
from rlhf.losses import bradley_terry_loss
from rlhf.model import RewardModel
from rlhf.run import loading, program
from rlhf.run.checks import check_finite
from rlhf.run.device import Compute, make_generator, setup
from rlhf.run.files import csv_path, digests, write_csv
from rlhf.run.flags import TrainConfig, arg, check_not_negative, check_positive
from rlhf.run.judge import judge_accuracies, load_judge, share_positive
from rlhf.run.micro_batches import micro_batches
from rlhf.run.optimizer import (
    cosine_schedule,
    make_optimizer,
    optimizer_step,
    set_lr,
)
from rlhf.run.processes import gather, share, total_of
from rlhf.run.training import Training
from rlhf.tokenizer import Tokenizer

SHOWN = ("loss", "accuracy", "heldout", "margin", "grad_norm", "lr")


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Train a reward model on comparisons (stage two of three)."""

    kind = "reward"

    steps: int = 750
    batch_size: int = 64
    micro_batch_size: int = 16  # sorted by length, so that less is padded
    lr: float = 1.5e-3
    warmup: int = 20
    max_grad_norm: float = 5.0
    log_every: int = arg(20, "steps between lines of metrics")
    eval_every: int = 150
    eval_rows: int = arg(0, "rows of the closing evaluation, and that set the scale (0: all)")
    weight_decay: float = arg(0.5, "AdamW's weight decay, on matrices only")
    sft: str = arg("", "checkpoint to start from (empty: OUT/sft.pt)", group="model and data")
    comparison_files: tuple[str, ...] = arg((), "files to learn from instead of comparisons.csv")
    comparisons: int = arg(0, "train on the first N comparisons or rankings (0: all)")
    rankings: bool = arg(False, "learn from rankings.csv, K responses to a prompt")
    shuffle_prompts: bool = arg(False, "a control: learn with the prompts of other rows")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "log_every")
        check_not_negative(self, "weight_decay", "comparisons", "eval_rows")
        if self.rankings and (self.shuffle_prompts or self.comparison_files):
            raise ValueError(
                "--shuffle-prompts and --comparison-files are for comparisons, not for --rankings"
            )

    def training_files(self) -> list[Path]:
        name = "rankings" if self.rankings else "comparisons"
        return [Path(file) for file in self.comparison_files] or [csv_path(self.data, name)]


def main(cfg: RewardConfig) -> None:
    compute = setup(cfg.device, cfg.amp)
    model, tokenizer, inputs = make_model(cfg, compute.device)
    pad_id = tokenizer.pad_id
    limit = model.gpt.config.block_size
    train_rows = load_training_rows(cfg, tokenizer, limit)
    heldout_rows, demonstrations = load_evaluation_rows(cfg, tokenizer, limit)

    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run = Training(cfg, model, optimizer, compute, tokenizer, inputs)
    judged = judge_accuracies(load_judge(cfg.data), heldout_rows, tokenizer)
    run.announce(describe(cfg, len(train_rows), len(heldout_rows)))
    print(f"held out, the judge in the reward model's place: {in_words(judged) or 'there is none'}")
    for step in range(run.step, cfg.steps):
        rows = choose_batch(train_rows, cfg.batch_size, step, cfg.seed)
        lr = set_lr(optimizer, cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss = 0.0
        margins = []
        for part in micro_batches(rows, cfg.micro_batch_size, f"step {step + 1}, micro-batch"):
            part_loss, part_margins = loss_and_margins(model, part, pad_id, compute)
            part_loss = part_loss * (len(part) / len(rows))  # they sum to the mean over all rows
            compute.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            margins.append(part_margins)
        grad_norm = optimizer_step(model, optimizer, compute.scaler, cfg.max_grad_norm)
        run.count_tokens(sum(row.size for row in rows))

        done = step + 1
        check_finite(model, done, loss)
        evaluated = run.evaluates(done) and done < cfg.steps  # the closing evaluation comes below
        if run.logs(done):
            metrics = step_metrics(loss, margins, grad_norm)
            if evaluated:
                metrics["heldout"] = accuracy(model, heldout_rows[:500], pad_id, compute)
            run.log(done, {**metrics, "lr": lr}, SHOWN)
        if evaluated:
            run.save(done)
    if run.step < cfg.steps:
        fix_scale(model, demonstrations, pad_id, compute)
        check_finite(model, cfg.steps)  # mean and scale are not finite if one score is not
        run.save(cfg.steps)
    write_evaluation(run.path, model, heldout_rows, judged, cfg.seed, pad_id, compute)


# ---- what a run is made from ----


def make_model(
    cfg: RewardConfig, device: torch.device
) -> tuple[RewardModel, Tokenizer, dict[str, str]]:
    """The fine-tuned GPT with a score head, its tokenizer, and digests of the run's files."""
    sft_path = cfg.checkpoint("sft")
    gpt, sft = loading.load_policy(sft_path, "sft")
    tokenizer = loading.tokenizer_of(sft_path, sft, cfg.data)
    generator = make_generator("cpu", cfg.seed, "adapters")
    model = RewardModel(loading.with_adapters(gpt, cfg.lora_rank, generator))
    inputs = digests(sft=sft_path, demonstrations=csv_path(cfg.data, "demonstrations"))
    kind = "rankings" if cfg.rankings else "comparisons"
    for number, file in enumerate(cfg.training_files(), start=1):
        inputs |= digests(**{f"{kind} {number}": file})
    return model.to(device), tokenizer, inputs


def load_training_rows(cfg: RewardConfig, tokenizer: Tokenizer, limit: int) -> list:
    """Comparisons, or rankings: both have a size in tokens."""
    files = cfg.training_files()
    if cfg.rankings:
        from rlhf.methods.rankings import load_rankings

        return load_rankings(files[0], tokenizer, limit)[: cfg.comparisons or None]
    rows = load_comparisons(files, tokenizer, limit)[: cfg.comparisons or None]
    return swap_prompts(rows, cfg.seed, limit) if cfg.shuffle_prompts else rows


def load_evaluation_rows(
    cfg: RewardConfig, tokenizer: Tokenizer, limit: int
) -> tuple[list[Comparison], list[Demonstration]]:
    """Held-out comparisons, and the demonstrations that set the scale."""
    some = slice(cfg.eval_rows or None)
    path = csv_path(cfg.data, "comparisons", heldout=True)
    heldout = load_comparisons([path], tokenizer, limit)
    return heldout[some], load_demonstrations(cfg.data, tokenizer, limit)[some]


def describe(cfg: RewardConfig, train_rows: int, heldout_rows: int) -> str:
    kind = "rankings" if cfg.rankings else "comparisons"
    epochs = cfg.steps * cfg.batch_size / train_rows
    if epochs > 10:
        print(f"warning: {epochs:.0f} epochs over the same {kind} will overfit; lower --steps")
    return f"{train_rows:,} {kind}, {epochs:.1f} epochs ({heldout_rows:,} comparisons held out)"


# ---- loss, scores, scale ----


def loss_and_margins(
    model: RewardModel, part: list, pad_id: int, compute: Compute
) -> tuple[Tensor, Tensor]:
    """The mean loss of a micro-batch, and the margins of its pairs, better minus worse (N,)."""
    if not isinstance(part[0], Comparison):
        from rlhf.methods.rankings import score_rankings

        return score_rankings(model, part, pad_id, compute)
    tokens, lengths = comparison_batch(part, pad_id, compute.device)  # (2N, T), (2N,)
    with compute.autocast():
        chosen, rejected = model(tokens, lengths).chunk(2)  # (N,), (N,)
    return bradley_terry_loss(chosen, rejected), (chosen - rejected).detach()


def step_metrics(loss: Tensor, margins: list[Tensor], grad_norm: Tensor) -> dict[str, float | None]:
    """The columns of reward.csv but lr and the clock's; docs/metrics.md explains them."""
    all_margins = gather(torch.cat(margins))  # (N,), or all pairs of the rankings
    return {
        "loss": total_of(loss),
        "accuracy": share_positive(all_margins),
        "heldout": None,  # measured now and then
        "margin": all_margins.mean().item(),
        "grad_norm": grad_norm.item(),
    }


@torch.no_grad()
def score_sequences(
    model: RewardModel, rows: list[list[int]], pad_id: int, compute: Compute
) -> Tensor:
    """Scores of whole sequences, (N,) on the CPU, 128 at a time."""
    rows = share(rows)
    scores = [torch.empty(0)]
    for at in range(0, len(rows), 128):
        tokens, lengths = pad_rows(rows[at : at + 128], pad_id, compute.device)  # (B, T), (B,)
        with compute.autocast():
            scores.append(model(tokens, lengths).float().cpu())
    return gather(torch.cat(scores))


def accuracy(model: RewardModel, rows: list[Comparison], pad_id: int, compute: Compute) -> float:
    """share_positive of the model's margins on comparisons."""
    chosen = [row.prompt.tokens + row.chosen for row in rows]
    rejected = [row.prompt.tokens + row.rejected for row in rows]
    margins = score_sequences(model, chosen, pad_id, compute)  # (N,)
    margins = margins - score_sequences(model, rejected, pad_id, compute)
    return share_positive(margins)


def fix_scale(model: RewardModel, demonstrations: list, pad_id: int, compute: Compute) -> None:
    """Fix shift and scale of the scores, once: demonstrations get mean 0 and deviation 1."""
    rows = [row.tokens for row in demonstrations]
    scores = score_sequences(model, rows, pad_id, compute)  # (N,)
    std = scores.std(correction=0)
    model.mean.fill_(scores.mean())
    model.scale.fill_(std if std > 1e-6 else 1.0)  # a single demonstration has no spread
    if std < 0.01:  # sigmoid(0.01) is 0.5025: no vote was learned
        print(
            f"warning: the scores hardly differ (standard deviation {std:.1e}): PPO would follow "
            f"noise"
        )
    scale = f"(raw - {model.mean:.3f}) / {model.scale:.3f}"
    print(f"scores: {scale}, so that demonstrations have mean 0 and std 1")


# ---- the closing evaluation ----


def in_words(accuracies: dict[str, float]) -> str:
    return " | ".join(f"{name} {value:.3f}" for name, value in accuracies.items())


def write_evaluation(
    path: Path,
    model: RewardModel,
    rows: list[Comparison],
    judged: dict[str, float],
    seed: int,
    pad_id: int,
    compute: Compute,
) -> None:
    """reward_evaluation.csv beside the checkpoint at path: accuracies on held-out comparisons."""
    swapped = swap_prompts(rows, seed, model.gpt.config.block_size)
    accuracies = {
        "accuracy": accuracy(model, rows, pad_id, compute),
        **judged,
        "swapped_accuracy": accuracy(model, swapped, pad_id, compute),
    }
    result = {**accuracies, "comparisons": len(rows)}
    write_csv(path.with_name("reward_evaluation.csv"), [result])
    print(f"held out: {in_words(accuracies)}")
    print("          (swapped_accuracy: the same model shown the prompt of another row)")
    if accuracies["accuracy"] < 0.55:
        print(
            "warning: accuracy is near 0.5 or below: PPO would follow noise or, if votes are "
            "swapped, bad responses"
        )
    print(f"wrote {path}; next: python train_ppo.py")


if __name__ == "__main__":
    program.run(main, RewardConfig)
