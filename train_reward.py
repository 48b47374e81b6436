"""Stage two: a reward model. The fine-tuned GPT, with a score head, learns which of two responses people prefer.

    python train_reward.py         # reads runs/sft.pt; writes runs/reward.pt, reward.csv and reward_evaluation.csv

About two minutes on two cores; held-out accuracy ends near 0.87, where a perfect model has 0.88 (docs/results.md).

The loss is -log sigmoid(r_chosen - r_rejected), so the chosen response scores HIGHER. Only differences are learned;
the zero and the unit of the scores are free. They are set once, after training: the demonstrations' mean becomes 0
and their standard deviation 1, so that a kl_coef in PPO means the same trade whatever scale the training happened to
reach. Demonstrations, because they are what the reference policy imitates: a score of +1 is one standard deviation
better than usual.

How good can it be? Annotators disagree with themselves, so no model reaches 1.0. Where the data set has a judge and
knows its annotators' noise, the evaluation has the perfect model beside ours.

Left out: margins, ensembles. The default is 3.2 epochs, because this network is small and starts from little; a large
pretrained one overfits after one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.checkpoints import load_policy
from rlhf.cli import arg, check_not_negative, check_positive, run
from rlhf.common import (
    Progress, autocast, check_finite, check_tokenizer, csv_path, digests, make_generator, make_scaler, pick_amp,
    pick_device, resume, save_checkpoint, write_csv,
)
from rlhf.data import (
    batch_indices, chunks, comparison_batch, find_tokenizer, load_comparisons, load_demonstrations, pad_rows,
)
from rlhf.judge import gold_scores, load_judge, vote_probabilities
from rlhf.lora import add_adapters
from rlhf.losses import bradley_terry_loss
from rlhf.model import RewardModel
from rlhf.optim import cosine_schedule, make_optimizer, optimizer_step, set_lr
from rlhf.rankings import load_rankings, ranking_losses


@dataclass(frozen=True)
class RewardConfig:
    """Train a reward model on comparisons (stage two of three)."""

    # data
    data: str = arg("data/tiny_assistant", "data set folder")
    out: str = arg("runs", "folder for the checkpoint and the metrics")
    sft: str = arg("", "checkpoint to start from; empty: sft.pt in --out")
    comparison_files: tuple[str, ...] = arg((), "files to learn from in place of the data set's comparisons.csv")
    comparisons: int = arg(0, "train on the first N comparisons (or rankings) only; 0: all")
    rankings: bool = arg(False, "learn from rankings.csv, K responses to a prompt, instead of comparisons.csv")
    shuffle_prompts: bool = arg(False, "a control: learn with prompts that belong to other rows")
    lora_rank: int = arg(0, "train adapters of this rank instead of the weights (rlhf/lora.py); 0: the weights")
    # optimisation
    steps: int = arg(600, "optimizer steps")
    batch_size: int = arg(64, "comparisons a step")
    micro_batch_size: int = arg(0, "of these, how many at once; the same gradient in less memory; 0: all")
    lr: float = arg(2e-3, "peak learning rate")
    warmup: int = arg(20, "steps of linear warm-up, then a cosine down to a tenth")
    weight_decay: float = arg(0.1, "AdamW's, on matrices alone")
    max_grad_norm: float = arg(5.0, "gradients are clipped to this norm")
    # run
    device: str = arg("auto", "where to run; auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    amp: str = arg("off", "mixed precision; auto is bf16 on a GPU that has it", ("auto", "off", "bf16", "fp16"))
    seed: int = arg(0, "of the order of the data")
    log_every: int = arg(20, "steps between lines")
    eval_every: int = arg(150, "steps between held-out accuracies and checkpoints")
    resume: bool = arg(False, "go on from the checkpoint in --out")

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "lr", "max_grad_norm", "log_every", "eval_every")
        check_not_negative(self, "micro_batch_size", "warmup", "weight_decay", "comparisons", "lora_rank")
        if self.rankings and (self.shuffle_prompts or self.comparison_files):
            raise ValueError("--shuffle-prompts and --comparison-files are for comparisons, not for --rankings")


@torch.no_grad()
def score_rows(model, rows: list[list[int]], pad_id: int, device, amp) -> torch.Tensor:
    """Scores of whole sequences, (N,) on the CPU, 128 at a time."""
    scores = []
    for at in range(0, len(rows), 128):
        tokens, lengths = pad_rows(rows[at : at + 128], pad_id, device)
        with autocast(device, amp):
            scores.append(model(tokens, lengths).float().cpu())
    return torch.cat(scores)


def batch_losses(model, rows, micro_batch_size: int, pad_id: int, device, amp, margins: list):
    """The loss of a batch of comparisons in parts, one for each micro-batch (0: all rows at once), each weighed by its
    share of the rows. Appends chosen less rejected scores of each part to `margins`. A generator: nothing runs until
    optimizer_step takes the parts, one by one."""
    for part in chunks(rows, micro_batch_size):
        tokens, lengths = comparison_batch(part, pad_id, device)  # (2N, T), (2N,)
        with autocast(device, amp):
            scores = model(tokens, lengths)  # (2N,)
        chosen, rejected = scores.chunk(2)  # (N,), (N,)
        margins.append((chosen - rejected).detach())
        yield bradley_terry_loss(chosen, rejected) * (len(part) / len(rows))


def share_positive(margins) -> float:
    """Share of pairs in which the chosen side scores higher; equal scores count half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


def accuracy(model, rows, pad_id: int, device, amp) -> float:
    """share_positive of the model's margins on comparisons."""
    chosen = score_rows(model, [row.prompt.tokens + row.chosen for row in rows], pad_id, device, amp)
    rejected = score_rows(model, [row.prompt.tokens + row.rejected for row in rows], pad_id, device, amp)
    return share_positive(chosen - rejected)


def swap_prompts(rows, seed: int, limit: int):
    """Give every comparison the prompt of another row: what is left can be judged without reading the question.
    Rows that no longer fit the context are left out."""
    order = torch.randperm(len(rows), generator=make_generator("cpu", seed, "swap")).tolist()
    prompts = {row: rows[after].prompt for row, after in zip(order, order[1:] + order[:1])}
    swapped = [row._replace(prompt=prompts[i]) for i, row in enumerate(rows)]
    return [row for row in swapped if len(row.prompt.tokens) + max(len(row.chosen), len(row.rejected)) <= limit]


def judge_accuracies(judge, rows, tokenizer) -> dict[str, float]:
    """What a reward model that equals the judge would reach on these comparisons. Where the judge made the votes and
    knows its annotators' noise, that is the best there is.

    bayes_accuracy: expected, mean of max(p, 1 - p) with p the annotator's probability; the best that any model can do.
    judge_accuracy: on the votes as they were drawn, which lie a little off their expectation.
    """
    prompts = [row.prompt.text for row in rows]
    chosen, rejected = (gold_scores(judge, prompts, [tokenizer.decode(side[:-1]).strip() for side in sides])
                        for sides in ([row.chosen for row in rows], [row.rejected for row in rows]))
    result = {"judge_accuracy": share_positive(torch.tensor(chosen) - torch.tensor(rejected))}
    if (p := vote_probabilities(judge, chosen, rejected)) is not None:
        result["bayes_accuracy"] = sum(max(x, 1 - x) for x in p) / len(p)
    return result


def main(cfg: RewardConfig) -> None:
    device = pick_device(cfg.device)
    amp = pick_amp(cfg.amp, device)
    sft_path, path, start = Path(cfg.sft or Path(cfg.out) / "sft.pt"), Path(cfg.out) / "reward.pt", 0
    gpt, sft = load_policy(sft_path, "sft")
    tokenizer = find_tokenizer(cfg.data, sft["config"]["tokenizer"])
    check_tokenizer(sft_path, sft, tokenizer)
    limit, kind = gpt.config.block_size, "rankings" if cfg.rankings else "comparisons"
    if cfg.rankings:
        train_files, losses_of = [csv_path(cfg.data, "rankings")], ranking_losses
        train_rows = load_rankings(*train_files, tokenizer, limit)
    else:
        train_files, losses_of = cfg.comparison_files or [csv_path(cfg.data, "comparisons")], batch_losses
        train_rows = load_comparisons(cfg.data, tokenizer, limit, files=cfg.comparison_files)
    train_rows = train_rows[: cfg.comparisons or None]
    heldout_rows = load_comparisons(cfg.data, tokenizer, limit, heldout=True)
    demonstrations = load_demonstrations(cfg.data, tokenizer, limit)
    if cfg.shuffle_prompts:
        train_rows = swap_prompts(train_rows, cfg.seed, limit)

    model = RewardModel(add_adapters(gpt, cfg.lora_rank, make_generator("cpu", cfg.seed, "adapters"))).to(device)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    scaler = make_scaler(device, amp)
    inputs = digests(sft=sft_path, demonstrations=csv_path(cfg.data, "demonstrations"),
                     **{f"{kind} {i}": Path(name) for i, name in enumerate(train_files, start=1)})
    if cfg.resume:
        start = resume(path, "reward", cfg, tokenizer, inputs, model, optimizer, scaler)["step"]

    judge = load_judge(cfg.data)
    judged = judge_accuracies(judge, heldout_rows, tokenizer) if judge else {}
    epochs = cfg.steps * cfg.batch_size / len(train_rows)
    print(f"{len(train_rows):,} {kind}, {epochs:.1f} times over ({len(heldout_rows):,} comparisons held out), on "
          f"{device}, amp {cfg.amp}, seed {cfg.seed}; held out, the judge in the reward model's place: "
          + (", ".join(f"{name} {value:.3f}" for name, value in judged.items()) or "not known, there is none"))

    if epochs > 10:
        print(f"warning: {epochs:.0f} times over the same {kind} is to learn them by heart; lower --steps")

    progress = Progress(Path(cfg.out) / "reward.csv", cfg.steps, start)
    for step in range(start, cfg.steps):
        rows = [train_rows[i] for i in batch_indices(len(train_rows), cfg.batch_size, step, cfg.seed)]
        margins = []
        losses = losses_of(model, rows, cfg.micro_batch_size, tokenizer.pad_id, device, amp, margins)
        lr = cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup)
        set_lr(optimizer, lr)
        loss, grad_norm = optimizer_step(losses, model, optimizer, scaler, cfg.max_grad_norm)
        margins = torch.cat(margins)  # (N,), or all pairs of the rankings
        progress.tokens += sum(row.size for row in rows)

        done = step + 1
        check_finite(model, done)
        last = done == cfg.steps
        evaluated = done % cfg.eval_every == 0 and not last
        if evaluated or step == 0 or done % cfg.log_every == 0 or last:
            heldout = accuracy(model, heldout_rows[:500], tokenizer.pad_id, device, amp) if evaluated else None
            progress.log(done, loss=loss.item(), accuracy=share_positive(margins), heldout=heldout,
                         margin=margins.mean().item(), grad_norm=grad_norm.item(), lr=lr)
        if evaluated:
            save_checkpoint(path, "reward", model, cfg, done, tokenizer, optimizer, scaler, inputs)

    if start < cfg.steps:  # the zero and the unit of the scores, once
        scores = score_rows(model, [row.tokens for row in demonstrations], tokenizer.pad_id, device, amp)
        std = scores.std(correction=0)
        model.mean.fill_(scores.mean())
        model.scale.fill_(std if std > 1e-6 else 1.0)  # a single demonstration has no spread
        save_checkpoint(path, "reward", model, cfg, cfg.steps, tokenizer, optimizer, scaler, inputs)
        print(f"scores: (raw - {model.mean:.3f}) / {model.scale:.3f}, so that demonstrations have mean 0 and std 1")

    result = {"accuracy": accuracy(model, heldout_rows, tokenizer.pad_id, device, amp), **judged}
    swapped = swap_prompts(heldout_rows, cfg.seed, limit)
    result["swapped_accuracy"] = accuracy(model, swapped, tokenizer.pad_id, device, amp)
    result["comparisons"] = len(heldout_rows)
    write_csv(Path(cfg.out) / "reward_evaluation.csv", [result])
    print("held out: " + " | ".join(f"{name} {value:.3f}" for name, value in result.items() if name != "comparisons")
          + "\n          (swapped_accuracy: the same model shown the prompt of another row)")
    if result["accuracy"] < 0.55:
        print("warning: accuracy is near 0.5, the reward model has learned next to nothing; PPO against it is noise")
    print(f"wrote {path}; next: python train_ppo.py")


if __name__ == "__main__":
    run(main, RewardConfig)
