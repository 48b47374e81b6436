"""Stage one: supervised fine-tuning. A GPT learns, from random weights, to answer as the demonstrations do.

    python train_sft.py            # writes runs/sft.pt and runs/sft.csv

About a minute on two cores; the held-out loss ends near 0.54 nats per token (docs/results.md).

The loss is the cross-entropy of the response alone, end-of-text included: the prompt is given, not predicted. This is
the model that PPO starts from and is kept close to, so its faults are the faults that PPO has to mend. The bundled
demonstrations were written by helpers good and bad, and the model imitates both.

Left out: packing of short rows into long ones, epochs of plain text before the demonstrations.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.checkpoints import load_pretrained, pretrained_digests
from rlhf.cli import arg, check_not_negative, check_positive, run
from rlhf.common import (
    InputError, Progress, autocast, check_finite, csv_path, digests, make_generator, make_scaler, pick_amp,
    pick_device, resume, save_checkpoint,
)
from rlhf.data import batch_indices, chunks, demonstration_batch, find_tokenizer, load_demonstrations, pad_rows
from rlhf.lora import add_adapters
from rlhf.losses import sft_loss
from rlhf.model import GPT, GPTConfig
from rlhf.optim import cosine_schedule, make_optimizer, optimizer_step, set_lr
from rlhf.rollout import generate


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a GPT on demonstrations (stage one of three)."""

    # data
    data: str = arg("data/tiny_assistant", "data set folder")
    out: str = arg("runs", "folder for the checkpoint and the metrics")
    tokenizer: str = arg("auto", "auto (the data set's own, else GPT-2's), gpt2, or a .tiktoken file")
    # model; these travel in the checkpoint
    init: str = arg("", "start from GPT-2's weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 or a folder; "
                    "the four sizes below then come with them")
    n_layer: int = arg(4, "transformer blocks")
    n_head: int = arg(8, "attention heads")
    n_embd: int = arg(64, "channels")
    block_size: int = arg(80, "longest sequence in tokens, prompt and response together")
    lora_rank: int = arg(0, "train adapters of this rank instead of the weights (rlhf/lora.py); 0: the weights")
    # optimisation
    steps: int = arg(800, "optimizer steps")
    batch_size: int = arg(32, "demonstrations a step")
    micro_batch_size: int = arg(0, "of these, how many at once; the same gradient in less memory; 0: all")
    lr: float = arg(4e-3, "peak learning rate")
    warmup: int = arg(30, "steps of linear warm-up, then a cosine down to a tenth")
    weight_decay: float = arg(0.1, "AdamW's, on matrices alone")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    # run
    device: str = arg("auto", "where to run; auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    amp: str = arg("off", "mixed precision; auto is bf16 on a GPU that has it", ("auto", "off", "bf16", "fp16"))
    seed: int = arg(0, "of the weights, the order of the data and the samples")
    log_every: int = arg(25, "steps between lines")
    eval_every: int = arg(200, "steps between validations, samples and checkpoints")
    resume: bool = arg(False, "go on from the checkpoint in --out")

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "lr", "max_grad_norm", "log_every", "eval_every")
        check_not_negative(self, "micro_batch_size", "warmup", "weight_decay", "lora_rank")
        if self.lora_rank and not self.init:
            raise ValueError("--lora-rank needs --init: adapters on random weights have nothing to adapt")
        if self.init and any(getattr(self, size) != getattr(SFTConfig, size)
                             for size in ("n_layer", "n_head", "n_embd", "block_size")):
            raise ValueError("--n-layer, --n-head, --n-embd and --block-size come with --init; leave them out")
        GPTConfig(1, self.block_size, self.n_layer, self.n_head, self.n_embd)  # refuses sizes that do not fit


def batch_losses(gpt, rows, micro_batch_size: int, pad_id: int, device, amp):
    """The loss of a batch in parts, one for each micro-batch (0: all rows at once). A part weighs as much as it has
    response tokens, so the parts sum to the mean over all tokens of the batch, however they are cut."""
    actions = sum(len(row.tokens) - row.prompt_len for row in rows)
    for part in chunks(rows, micro_batch_size):
        tokens, mask = demonstration_batch(part, pad_id, device)  # (B, T), (B, T-1)
        with autocast(device, amp):
            logits = gpt(tokens)  # (B, T, V)
        yield sft_loss(logits, tokens, mask) * (mask.sum() / actions)


@torch.no_grad()
def validation_loss(gpt, rows, batch_size: int, pad_id: int, device, amp) -> float:
    """Loss on held-out demonstrations: the mean over all of their tokens."""
    return sum(loss.item() for loss in batch_losses(gpt, rows, batch_size, pad_id, device, amp))


def print_samples(gpt, rows, tokenizer, device, amp, seed: int) -> None:
    """What the model answers now to the first three held-out prompts."""
    prompts = [row.tokens[: row.prompt_len] for row in rows[:3]]
    tokens, prompt_lens = pad_rows(prompts, tokenizer.pad_id, device)
    room = min(100, gpt.config.block_size - tokens.size(1))
    with autocast(device, amp):
        generator = make_generator(device, seed, "samples")
        sampled, mask = generate(gpt, tokens, prompt_lens, room, tokenizer.eos_id, generator)
    for prompt, row, row_mask in zip(prompts, sampled, mask):
        response = tokenizer.decode(row[1:][row_mask].tolist())
        print(f"    {tokenizer.decode(prompt).strip()!r}\n        ->{response}")


def main(cfg: SFTConfig) -> None:
    device = pick_device(cfg.device)
    amp = pick_amp(cfg.amp, device)
    tokenizer = find_tokenizer(cfg.data, cfg.tokenizer)
    torch.manual_seed(cfg.seed)  # the initial weights; all other randomness has generators of its own
    if cfg.init:
        gpt = load_pretrained(cfg.init)
        if gpt.config.vocab_size != tokenizer.vocab_size:
            raise InputError(f"--init {cfg.init} knows {gpt.config.vocab_size} tokens and the tokenizer "
                             f"{tokenizer.vocab_size}; give --tokenizer gpt2, or the file it was trained with")
    else:
        gpt = GPT(GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    limit = gpt.config.block_size
    train_rows = load_demonstrations(cfg.data, tokenizer, limit)
    valid_rows = load_demonstrations(cfg.data, tokenizer, limit, heldout=True)

    gpt = add_adapters(gpt, cfg.lora_rank, make_generator("cpu", cfg.seed, "adapters")).to(device)
    optimizer = make_optimizer(gpt, cfg.lr, cfg.weight_decay)
    scaler = make_scaler(device, amp)
    path, start = Path(cfg.out) / "sft.pt", 0
    inputs = digests(demonstrations=csv_path(cfg.data, "demonstrations")) | pretrained_digests(cfg.init)
    if cfg.resume:
        start = resume(path, "sft", cfg, tokenizer, inputs, gpt, optimizer, scaler)["step"]

    parameters = sum(p.numel() for p in gpt.parameters())
    print(f"{parameters:,} parameters, {tokenizer.vocab_size} tokens, {len(train_rows):,} demonstrations "
          f"({len(valid_rows):,} held out), on {device}, amp {cfg.amp}, seed {cfg.seed}")
    first = train_rows[0]
    print(f"one row, | where the loss begins: {tokenizer.decode(first.tokens[:first.prompt_len])!r} | "
          f"{tokenizer.decode(first.tokens[first.prompt_len:])!r}")

    size = cfg.micro_batch_size or cfg.batch_size
    progress = Progress(Path(cfg.out) / "sft.csv", cfg.steps, start)
    for step in range(start, cfg.steps):
        rows = [train_rows[i] for i in batch_indices(len(train_rows), cfg.batch_size, step, cfg.seed)]
        losses = batch_losses(gpt, rows, cfg.micro_batch_size, tokenizer.pad_id, device, amp)
        lr = cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup)
        set_lr(optimizer, lr)
        loss, grad_norm = optimizer_step(losses, gpt, optimizer, scaler, cfg.max_grad_norm)
        progress.tokens += sum(row.size for row in rows)

        done = step + 1
        check_finite(gpt, done)
        last = done == cfg.steps
        evaluated = step == 0 or done % cfg.eval_every == 0 or last
        if evaluated or done % cfg.log_every == 0:
            valid = validation_loss(gpt, valid_rows, size, tokenizer.pad_id, device, amp) if evaluated else None
            progress.log(done, loss=loss.item(), valid=valid, grad_norm=grad_norm.item(), lr=lr)
        if done % cfg.eval_every == 0 or last:
            print_samples(gpt, valid_rows, tokenizer, device, amp, cfg.seed)
            save_checkpoint(path, "sft", gpt, cfg, done, tokenizer, optimizer, scaler, inputs)
    print(f"wrote {path}; next: python train_reward.py")


if __name__ == "__main__":
    run(main, SFTConfig)
