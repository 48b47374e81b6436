"""Stage one: supervised fine-tuning (SFT). A GPT learns, from random weights, to respond as the
demonstrations do.

    python train_sft.py            # writes runs/sft.pt and runs/sft.csv
    python train_sft.py --init MODEL --steps 0    # a pretrained model as it is, to start PPO from

Under a minute on two cores; the held-out loss ends near 0.53 nats per token (docs/results.md).

The loss is the cross-entropy of the response tokens only, end-of-text included: the prompt is
given, not predicted. PPO starts from this model and is kept close to it, so its errors are the
errors PPO has to fix. The bundled demonstrations were written by good and bad helpers, and the
model imitates both.

Left out: packing of short rows into long ones, pretraining on plain text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data import (
    Demonstration,
    choose_batch,
    demonstration_batch,
    load_demonstrations,
    pad_rows,
)
from rlhf.losses import sft_loss
from rlhf.masked import action_slots
from rlhf.model import GPT, GPTConfig
from rlhf.rollout import decode_responses
from rlhf.run import loading, program, warnings
from rlhf.run.checks import check_finite
from rlhf.run.device import Compute, make_generator, setup
from rlhf.run.errors import printable
from rlhf.run.files import csv_path, digests
from rlhf.run.flags import InitConfig, arg
from rlhf.run.messages import in_one_line
from rlhf.run.micro_batches import micro_batches
from rlhf.run.optimizer import (
    cosine_schedule,
    make_optimizer,
    optimizer_step,
    set_lr,
)
from rlhf.run.processes import total
from rlhf.run.progress import count_parameters, print_training_row
from rlhf.run.training import Training
from rlhf.sampling import generate
from rlhf.tokenizer import Tokenizer

SHOWN = ("loss", "valid", "grad_norm", "lr")


@dataclass(frozen=True)
class SFTConfig(InitConfig):
    """Fine-tune a GPT on demonstrations (stage one of three)."""

    kind = "sft"

    steps: int = 600
    batch_size: int = 32
    micro_batch_size: int = 16  # sorted by length, so that less is padded
    lr: float = 4e-3
    warmup: int = 30
    log_every: int = 25
    eval_every: int = 200
    eval_rows: int = arg(
        0, "held-out demonstrations of an evaluation (0: all)", group="supervised fine-tuning"
    )
    weight_decay: float = arg(0.1, "AdamW's weight decay, on matrices only")
    tokenizer: str = arg(
        "auto", "auto (the data set's, else GPT-2's), gpt2 or FILE.tiktoken", group="model"
    )
    cut_vocab: bool = arg(False, "drop the tokens of --init that the data set does not use")
    n_layer: int = arg(3, "transformer blocks")
    n_head: int = arg(4, "attention heads")
    n_embd: int = arg(64, "channels")
    block_size: int = arg(80, "context: longest prompt and response in tokens")

    def __post_init__(self):
        super().__post_init__()
        for size in ("n_layer", "n_head", "n_embd", "block_size"):
            if self.init and getattr(self, size) != getattr(SFTConfig, size):
                raise ValueError(
                    "--n-layer, --n-head, --n-embd and --block-size come with --init; leave them "
                    "out"
                )
        self.gpt_config(vocab_size=1)  # refuses sizes that do not fit

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd)


def main(cfg: SFTConfig) -> None:
    compute = setup(cfg.device, cfg.amp)
    torch.manual_seed(cfg.seed)  # for the initial weights; all else random has its own generator
    gpt, tokenizer, inputs = make_model(cfg)
    gpt = gpt.to(compute.device)
    optimizer = make_optimizer(gpt, cfg.lr, cfg.weight_decay)
    run = Training(cfg, gpt, optimizer, compute, tokenizer, inputs)
    if not cfg.steps:
        run.save(0)
        run.close([], "reward")
        return
    train_rows = load_rows(cfg, tokenizer, gpt.config.block_size)
    valid_rows = load_rows(cfg, tokenizer, gpt.config.block_size, heldout=True)
    valid_rows = valid_rows[: cfg.eval_rows or None]

    heldout = f"{len(valid_rows):,}"
    epochs = run.warnings.count_epochs(cfg, len(train_rows), "demonstrations", heldout)
    run.announce(f"{count_parameters(gpt)}, {tokenizer.vocab_size} tokens, {epochs}")
    print_training_row(train_rows[0].tokens, train_rows[0].prompt_len, tokenizer)
    for step in range(run.step, cfg.steps):
        rows = choose_batch(train_rows, cfg.batch_size, step, cfg.seed)
        lr = set_lr(optimizer, cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss = 0.0
        for part in micro_batches(rows, cfg.micro_batch_size, f"step {step + 1}, micro-batch"):
            part_loss = weighted_loss(gpt, part, rows, tokenizer.pad_id, compute)
            compute.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        grad_norm = optimizer_step(gpt, optimizer, compute.scaler, cfg.max_grad_norm)
        run.count_tokens(sum(row.size for row in rows))

        done = step + 1
        valid = None
        if run.evaluates(done):
            valid = validation_loss(gpt, valid_rows, cfg, tokenizer.pad_id, compute)
        if run.logs(done):
            metrics = {
                "loss": total(loss).item(),
                "valid": valid,
                "grad_norm": grad_norm.item(),
                "lr": lr,
            }
            check_finite(gpt, done, metrics["loss"], valid)
            run.log(done, metrics, SHOWN)
        if run.evaluates(done):
            print_samples(gpt, valid_rows, tokenizer, compute, cfg.seed)
            run.save(done)
    run.close(warnings.of_sft(run.rows), "reward")


def make_model(cfg: SFTConfig) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """The network, its tokenizer, and digests of what the run is made from."""
    if cfg.init:
        gpt, tokenizer, inputs = loading.start_from(cfg)
    else:
        tokenizer = loading.find_tokenizer(cfg.data, cfg.tokenizer)
        gpt = GPT(cfg.gpt_config(tokenizer.vocab_size))
        inputs = {}
    if cfg.steps:
        inputs |= digests(demonstrations=csv_path(cfg.data, "demonstrations"))
    generator = make_generator("cpu", cfg.seed, "adapters")
    return loading.with_adapters(gpt, cfg, generator), tokenizer, inputs


def load_rows(
    cfg: SFTConfig, tokenizer: Tokenizer, limit: int, heldout: bool = False
) -> list[Demonstration]:
    """limit: the most tokens that the model reads."""
    return load_demonstrations(cfg.data, tokenizer, limit, heldout, cfg.heldout)


def weighted_loss(
    gpt: GPT, part: list[Demonstration], rows: list[Demonstration], pad_id: int, compute: Compute
) -> Tensor:
    """The loss of a micro-batch, times its share of the response tokens of all rows.

    So the losses of all micro-batches sum to the mean over all response tokens.
    """
    tokens, mask = demonstration_batch(part, pad_id, compute.device)  # (B, T), (B, T-1)
    response_tokens = sum(len(row.tokens) - row.prompt_len for row in rows)
    with compute.autocast():
        logits = gpt.logits(action_slots(gpt.hidden(tokens), mask))  # (S, V)
        return sft_loss(logits, tokens, mask) * (mask.sum() / response_tokens)


@torch.no_grad()
def validation_loss(
    gpt: GPT, rows: list[Demonstration], cfg: SFTConfig, pad_id: int, compute: Compute
) -> float:
    """Loss on held-out demonstrations: the mean over all of their response tokens."""
    loss = torch.zeros((), dtype=torch.float64)
    for part in micro_batches(rows, cfg.micro_batch_size or cfg.batch_size, "validation"):
        loss += weighted_loss(gpt, part, rows, pad_id, compute).item()
    return total(loss).item()


def print_samples(
    gpt: GPT, rows: list[Demonstration], tokenizer: Tokenizer, compute: Compute, seed: int
) -> None:
    """What the model now says to the first three held-out prompts."""
    rows = rows[:3]
    prompts = [row.tokens[: row.prompt_len] for row in rows]
    tokens, prompt_lens = pad_rows(prompts, tokenizer.pad_id, compute.device)  # (3, P), (3,)
    room = min(100, gpt.config.block_size - tokens.size(1))
    generator = make_generator(compute.device, seed, "samples")
    with compute.autocast():
        tokens, mask = generate(gpt, tokens, prompt_lens, room, tokenizer.stop_ids, generator)
    responses = decode_responses(tokenizer, tokens, mask)
    for row, response in zip(rows, responses):
        question = in_one_line(row.given)
        print(f"    {printable(question)}\n        -> {printable(response)}")


if __name__ == "__main__":
    program.run(main, SFTConfig)
