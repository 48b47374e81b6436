"""Stage two: a reward model. The fine-tuned GPT, with a score head, learns which of two responses
people prefer.

    python train_reward.py      # reads runs/sft.pt; writes runs/reward.pt, reward.csv,
                                # reward_evaluation.csv and reward_margins.csv
    python train_reward.py --init MODEL    # on another model than the policy's (docs/models.md)

One to two minutes on two cores; held-out accuracy ends near 0.87, where the judge's own is 0.88
(docs/results.md).

The loss is -log sigmoid(r_chosen - r_rejected), so the chosen response scores HIGHER. Only score
differences are learned; shift and scale are arbitrary. They are fixed once, after training: the
responses of the comparisons it learned from, both sides, get mean 0 and standard deviation 1. So a
kl_coef in PPO means the same trade whatever scale the training happened to reach, and a score of +1
is one standard deviation better than the average response. Only one side, or demonstrations like
it, might all score the same: dividing by their deviation would blow up noise.

How good can it be? Annotators disagree with themselves, so no model reaches 1.0. If the data set
has a judge that knows its annotators' noise, the evaluation also shows what a perfect model would
get.

Left out: margins, ensembles. The default is 5 epochs, because this network is small and starts from
little; a large pretrained one overfits after one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data import (
    Comparison,
    choose_batch,
    comparison_batch,
    load_comparisons,
    swap_prompts,
)
from rlhf.losses import bradley_terry_loss
from rlhf.model import RewardModel
from rlhf.run import loading, program, warnings
from rlhf.run.checks import check_finite, check_spread
from rlhf.run.device import Compute, make_generator, setup
from rlhf.run.files import csv_path, digests, numbered, write_csv
from rlhf.run.flags import InitConfig, arg
from rlhf.run.judge import judge_accuracies, load_judge, share_positive
from rlhf.run.micro_batches import micro_batches
from rlhf.run.optimizer import (
    cosine_schedule,
    make_optimizer,
    optimizer_step,
    set_lr,
)
from rlhf.run.processes import gather, total
from rlhf.run.training import Training
from rlhf.tokenizer import Tokenizer

SHOWN = ("loss", "accuracy", "heldout", "margin", "grad_norm", "lr")


@dataclass(frozen=True)
class RewardConfig(InitConfig):
    """Train a reward model on comparisons (stage two of three)."""

    kind = "reward"

    steps: int = 900
    batch_size: int = 64
    micro_batch_size: int = 16  # sorted by length, so that less is padded
    lr: float = 1.5e-3
    warmup: int = 20
    max_grad_norm: float = 5.0
    log_every: int = 20
    eval_every: int = 150
    eval_rows: int = arg(
        0, "rows of the closing evaluation, and that set the scale (0: all)", group="reward model"
    )
    weight_decay: float = arg(0.5, "AdamW's weight decay, on matrices only")
    sft: str = arg("", "checkpoint to start from without --init (empty: OUT/sft.pt)")
    comparison_files: tuple[str, ...] = arg((), "files to learn from instead of comparisons.csv")
    comparisons: int = arg(0, "train on the first N comparisons or rankings (0: all)")
    rankings: bool = arg(False, "learn from rankings.csv, K responses to a prompt")

    def __post_init__(self):
        super().__post_init__()
        if self.rankings and self.comparison_files:
            raise ValueError("--comparison-files are for comparisons, not for --rankings")

    def kind_of_rows(self) -> str:
        return "rankings" if self.rankings else "comparisons"

    def training_files(self) -> list[Path]:
        default = csv_path(self.data, self.kind_of_rows())
        return [Path(file) for file in self.comparison_files] or [default]


def main(cfg: RewardConfig) -> None:
    compute = setup(cfg.device, cfg.amp)
    model, tokenizer, inputs = make_model(cfg, compute.device)
    pad_id = tokenizer.pad_id
    scoring = Scoring(pad_id, compute, 4 * cfg.micro_batch_size or 64)
    train_rows, heldout_rows = load_rows(cfg, tokenizer, model.gpt.config.block_size)

    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run = Training(cfg, model, optimizer, compute, tokenizer, inputs)
    judged = judge_accuracies(load_judge(cfg.data), heldout_rows)
    evaluated_on = f"{len(heldout_rows):,} comparisons"
    run.announce(run.warnings.count_epochs(cfg, len(train_rows), cfg.kind_of_rows(), evaluated_on))
    print(f"held out, the judge in the reward model's place: {in_words(judged) or 'there is none'}")
    for step in range(run.step, cfg.steps):
        rows = choose_batch(train_rows, cfg.batch_size, step, cfg.seed)
        lr = set_lr(optimizer, cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss = 0.0
        margins = []
        for part in micro_batches(rows, cfg.micro_batch_size, f"step {step + 1}, micro-batch"):
            part_loss, part_margins, _ = forward(model, part, pad_id, compute)
            part_loss = part_loss * (len(part) / len(rows))  # they sum to the mean over all rows
            compute.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            margins.append(part_margins)
        grad_norm = optimizer_step(model, optimizer, compute.scaler, cfg.max_grad_norm)
        run.count_tokens(sum(row.size for row in rows))

        done = step + 1
        evaluated = run.evaluates(done) and done < cfg.steps  # the closing evaluation comes below
        if run.logs(done):
            heldout = accuracy(model, heldout_rows[:500], scoring) if evaluated else None
            metrics = step_metrics(loss, margins, heldout, grad_norm)
            check_finite(model, done, metrics["loss"])
            run.log(done, {**metrics, "lr": lr}, SHOWN)
        if evaluated:
            run.save(done)
    if run.step < cfg.steps:
        run.warnings.add(fix_scale(model, train_rows[: cfg.eval_rows or None], scoring))
        check_finite(model, cfg.steps)  # mean and scale are not finite if one score is not
        run.save(cfg.steps)
    result = write_evaluation(run.path, model, heldout_rows, judged, cfg.seed, scoring)
    run.close(warnings.of_reward_model(run.rows, result), "ppo")


# ---- what a run is made from ----


def make_model(
    cfg: RewardConfig, device: torch.device
) -> tuple[RewardModel, Tokenizer, dict[str, str]]:
    """The fine-tuned GPT, or the model that --init names, with a score head; its tokenizer; digests
    of the run's files."""
    if cfg.init:
        model, tokenizer, inputs = loading.start_reward_model(cfg)
    else:
        sft_path = cfg.checkpoint("sft")
        gpt, sft = loading.load_policy(sft_path, "sft")
        tokenizer = loading.tokenizer_of(sft_path, sft, cfg.data)
        generator = make_generator("cpu", cfg.seed, "adapters")
        model = RewardModel(loading.with_adapters(gpt, cfg, generator))
        inputs = digests(sft=sft_path)
    inputs |= digests(**numbered(cfg.kind_of_rows(), cfg.training_files()))
    return model.to(device), tokenizer, inputs


def load_rows(cfg: RewardConfig, tokenizer: Tokenizer, limit: int) -> tuple[list, list[Comparison]]:
    """The rows to train on, comparisons or rankings, and the held-out comparisons.

    limit: the most tokens that the model reads.
    """
    files = tuple(map(Path, cfg.comparison_files))
    heldout = load_comparisons(cfg.data, tokenizer, limit, True, cfg.heldout, files)
    if cfg.rankings:
        from rlhf.methods.rankings import load_rankings

        rows = load_rankings(cfg.data, tokenizer, limit, cfg.heldout)
    else:
        rows = load_comparisons(cfg.data, tokenizer, limit, False, cfg.heldout, files)
    return rows[: cfg.comparisons or None], heldout[: cfg.eval_rows or None]


# ---- loss, scores, scale ----


def forward(
    model: RewardModel, part: list, pad_id: int, compute: Compute
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a micro-batch: the mean loss; the margins of its pairs, better minus worse (N,); the
    scores of all responses, (2N,) if they are comparisons."""
    if not isinstance(part[0], Comparison):
        from rlhf.methods.rankings import score_rankings

        return score_rankings(model, part, pad_id, compute)
    tokens, lengths = comparison_batch(part, pad_id, compute.device)  # (2N, T), (2N,)
    with compute.autocast():
        scores = model(tokens, lengths)  # (2N,)
    chosen, rejected = scores.chunk(2)  # (N,), (N,)
    loss = bradley_terry_loss(chosen, rejected)
    return loss, (chosen - rejected).detach(), scores.detach()


def step_metrics(
    loss: Tensor, margins: list[Tensor], heldout: float | None, grad_norm: Tensor
) -> dict[str, float | None]:
    """The columns of reward.csv but lr and the clock's; docs/metrics.md explains them.

    heldout: accuracy, measured now and then.
    """
    all_margins = gather(torch.cat(margins))  # (N,), or all pairs of the rankings
    return {
        "loss": total(loss).item(),
        "accuracy": share_positive(all_margins),
        "heldout": heldout,
        "margin": all_margins.mean().item(),
        "grad_norm": grad_norm.item(),
    }


class Scoring(NamedTuple):
    """How rows are scored when nothing is trained."""

    pad_id: int
    compute: Compute
    micro_batch_size: int  # larger than in training: without a gradient more fits memory


@torch.no_grad()
def margins_and_scores(model: RewardModel, rows: list, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The margins of all pairs, and the scores of all responses; on the CPU, shorter rows first."""
    margins = [torch.empty(0)]
    scores = [torch.empty(0)]
    for part in micro_batches(rows, scoring.micro_batch_size, "scores, micro-batch"):
        _, part_margins, part_scores = forward(model, part, scoring.pad_id, scoring.compute)
        margins.append(part_margins.cpu())
        scores.append(part_scores.cpu())
    return gather(torch.cat(margins)), gather(torch.cat(scores))


def accuracy(model: RewardModel, rows: list[Comparison], scoring: Scoring) -> float:
    """share_positive of the model's margins on comparisons."""
    margins, _ = margins_and_scores(model, rows, scoring)
    return share_positive(margins)


def fix_scale(model: RewardModel, rows: list, scoring: Scoring) -> str:
    """Fix shift and scale of the scores, once: these rows' responses get mean 0 and deviation 1.

    Returns: a warning, or "".
    """
    margins, scores = margins_and_scores(model, rows, scoring)
    warning = check_spread(margins, scores)
    model.mean.fill_(scores.mean())
    model.scale.fill_(scores.std(correction=0))
    scale = f"(raw - {model.mean:.3f}) / {model.scale:.3f}"
    print(f"scores: {scale}, so that the responses of the comparisons have mean 0 and std 1")
    return warning


# ---- the closing evaluation ----


def in_words(accuracies: dict[str, float | None]) -> str:
    return " | ".join(
        f"{name} {value:.3f}" for name, value in accuracies.items() if value is not None
    )


def write_evaluation(
    path: Path,
    model: RewardModel,
    rows: list[Comparison],
    judged: dict[str, float],
    seed: int,
    scoring: Scoring,
) -> dict[str, float | None]:
    """Beside the checkpoint at path: reward_evaluation.csv, accuracies on held-out comparisons, and
    reward_margins.csv, how sure the model is of each vote.

    swapped_accuracy is None if there is no other prompt.
    """
    margins, _ = margins_and_scores(model, rows, scoring)
    swapped = swap_prompts(rows, seed, model.gpt.config.block_size)
    accuracies = {
        "accuracy": share_positive(margins),
        **judged,
        "swapped_accuracy": accuracy(model, swapped, scoring) if swapped else None,
    }
    result = {**accuracies, "comparisons": len(rows)}
    write_csv(path.with_name("reward_evaluation.csv"), [result])
    raw = model.scale.cpu() * margins  # as in training: a score is divided by the scale
    write_csv(path.with_name("reward_margins.csv"), [{"margin": x} for x in raw.tolist()])
    print(f"held out: {in_words(accuracies)}")
    if swapped:
        print("          (swapped_accuracy: the same model shown the prompt of another row)")
    return result


if __name__ == "__main__":
    program.run(main, RewardConfig)
