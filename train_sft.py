"""Stage one: supervised fine-tuning (SFT). A GPT learns, from random weights, to respond as the demonstrations do.

    python train_sft.py            # writes runs/sft.pt and runs/sft.csv

Under a minute on two cores; the held-out loss ends near 0.53 nats per token (docs/results.md).

The loss is the cross-entropy of the response tokens only, end-of-text included: the prompt is given, not predicted.
PPO starts from this model and is kept close to it, so its errors are the errors PPO has to fix. The bundled
demonstrations were written by good and bad helpers, and the model imitates both.

Left out: packing of short rows into long ones, pretraining on plain text.
"""

from dataclasses import dataclass

from rlhf.support import cli  # first, so that Ctrl-C prints one line even while torch loads

# isort: split
import torch

from rlhf.data import batch_indices, chunks, demonstration_batch, load_demonstrations, pad_rows
from rlhf.evaluate import decode_responses
from rlhf.extras import parallel
from rlhf.extras.lora import add_adapters
from rlhf.extras.pretrained import start_from
from rlhf.losses import sft_loss
from rlhf.model import GPT, GPTConfig
from rlhf.rollout import generate
from rlhf.support import checkpoints, runtime, tables
from rlhf.tokenizer import find_tokenizer


@dataclass(frozen=True)
class SFTConfig(cli.TrainConfig):
    """Fine-tune a GPT on demonstrations (stage one of three)."""

    steps: int = 600
    batch_size: int = 32
    micro_batch_size: int = 16  # sorted by length, so that less is padded
    lr: float = 4e-3
    warmup: int = 30
    log_every: int = cli.arg(25, "steps between lines of metrics")
    eval_every: int = 200
    eval_rows: int = cli.arg(0, "held-out demonstrations of an evaluation (0: all)")
    weight_decay: float = cli.arg(0.1, "AdamW's weight decay, on matrices only")
    tokenizer: str = cli.arg("auto", "auto (the data set's, else GPT-2's), gpt2 or FILE.tiktoken", group="model")
    init: str = cli.arg("", "pretrained weights: gpt2, ..., a folder, a GGUF file, a name")
    load_in_4bit: bool = cli.arg(False, "hold the weights of --init in 4 bits")
    cut_vocab: bool = cli.arg(False, "drop the tokens that the data set does not use")
    n_layer: int = cli.arg(3, "transformer blocks")
    n_head: int = cli.arg(4, "attention heads")
    n_embd: int = cli.arg(64, "channels")
    block_size: int = cli.arg(80, "context: longest prompt and response in tokens")

    def __post_init__(self):
        super().__post_init__()
        cli.check_positive(self, "log_every")
        cli.check_not_negative(self, "weight_decay", "eval_rows")
        if not self.init and (self.lora_rank or self.cut_vocab) or self.load_in_4bit and not self.lora_rank:
            raise ValueError("--lora-rank and --cut-vocab need --init, and --load-in-4bit needs --init and --lora-rank")
        if self.init and any(getattr(self, size) != getattr(SFTConfig, size)
                             for size in ("n_layer", "n_head", "n_embd", "block_size")):
            raise ValueError("--n-layer, --n-head, --n-embd and --block-size come with --init; leave them out")
        GPTConfig(1, self.block_size, self.n_layer, self.n_head, self.n_embd)  # refuses sizes that do not fit


def main(cfg: SFTConfig) -> None:
    device, amp, scaler = runtime.setup(cfg.device, cfg.amp)
    torch.manual_seed(cfg.seed)  # for the initial weights; everything else random has its own generator
    if cfg.init:
        gpt, tokenizer, inputs = start_from(cfg)
    else:
        tokenizer, inputs = find_tokenizer(cfg.data, cfg.tokenizer), {}
        gpt = GPT(GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    inputs |= checkpoints.digests(demonstrations=tables.csv_path(cfg.data, "demonstrations"))
    gpt = add_adapters(gpt, cfg.lora_rank, runtime.make_generator("cpu", cfg.seed, "adapters")).to(device)
    train_rows = load_demonstrations(cfg.data, tokenizer, gpt.config.block_size)
    valid_rows = load_demonstrations(cfg.data, tokenizer, gpt.config.block_size, heldout=True)[: cfg.eval_rows or None]

    optimizer = runtime.make_optimizer(gpt, cfg.lr, cfg.weight_decay)
    path = cfg.checkpoint("sft")
    begun = checkpoints.begin(path, cfg, tokenizer, inputs, gpt, optimizer, scaler)
    print(f"{sum(p.numel() for p in gpt.parameters()):,} parameters, {tokenizer.vocab_size} tokens, "
          f"{len(train_rows):,} demonstrations ({len(valid_rows):,} held out), on {device}, amp {cfg.amp}, "
          f"seed {cfg.seed}")
    row, n = train_rows[0]
    print(f"one row, | where the loss begins: {tokenizer.decode(row[:n])!r} | {tokenizer.decode(row[n:])!r}")

    progress = tables.Progress(
        path.with_suffix(".csv"), cfg.steps, begun, ("loss", "valid", "grad_norm", "lr"), cfg.tensorboard)
    for step in range(begun["step"], cfg.steps):
        rows = [train_rows[i] for i in batch_indices(len(train_rows), cfg.batch_size, step, cfg.seed)]
        response_tokens = sum(len(row.tokens) - row.prompt_len for row in rows)
        lr = runtime.set_lr(optimizer, cfg.lr * runtime.cosine_schedule(step, cfg.steps, cfg.warmup))
        optimizer.zero_grad()
        loss = 0.0
        # parallel: under torchrun, several processes share the rows. With one process it does nothing.
        for part in tables.ticker(chunks(parallel.share(rows), cfg.micro_batch_size), f"step {step + 1}, micro-batch"):
            tokens, mask = demonstration_batch(part, tokenizer.pad_id, device)  # (B, T), (B, T-1)
            with runtime.autocast(device, amp):
                # A micro-batch weighs as much as it has response tokens: they sum to the mean over all of the batch.
                part_loss = sft_loss(gpt.hidden(tokens), tokens, mask, gpt.logits) * (mask.sum() / response_tokens)
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        loss = parallel.sum_gradients(gpt, loss)
        grad_norm = runtime.optimizer_step(gpt, optimizer, scaler, cfg.max_grad_norm)
        progress.tokens += sum(row.size for row in rows)

        done = step + 1
        evaluated = done % cfg.eval_every == 0 or done == cfg.steps
        valid = validation_loss(gpt, valid_rows, cfg, tokenizer.pad_id, device, amp) if evaluated else None
        runtime.check_finite(gpt, done, loss, valid)
        if evaluated or step == 0 or done % cfg.log_every == 0:
            progress.log(done, loss=loss.item(), valid=valid, grad_norm=grad_norm.item(), lr=lr)
        if evaluated:
            print_samples(gpt, valid_rows, tokenizer, device, amp, cfg.seed)
            checkpoints.save(path, "sft", gpt, cfg, done, tokenizer, optimizer, scaler, inputs, progress)
    print(f"wrote {path}; next: python train_reward.py")


@torch.no_grad()
def validation_loss(gpt, rows, cfg: SFTConfig, pad_id: int, device, amp) -> float:
    """Loss on held-out demonstrations: the mean over all of their response tokens."""
    response_tokens, total = sum(len(row.tokens) - row.prompt_len for row in rows), 0.0
    for part in tables.ticker(chunks(parallel.share(rows), cfg.micro_batch_size or cfg.batch_size), "validation"):
        tokens, mask = demonstration_batch(part, pad_id, device)  # (B, T), (B, T-1)
        with runtime.autocast(device, amp):
            total += (sft_loss(gpt.hidden(tokens), tokens, mask, gpt.logits) * (mask.sum() / response_tokens)).item()
    return parallel.total({"loss": total})["loss"]


def print_samples(gpt, rows, tokenizer, device, amp, seed: int) -> None:
    """What the model now says to the first three held-out prompts."""
    prompts = [row.tokens[: row.prompt_len] for row in rows[:3]]
    tokens, prompt_lens = pad_rows(prompts, tokenizer.pad_id, device)  # (3, P), (3,)
    room = min(100, gpt.config.block_size - tokens.size(1))
    with runtime.autocast(device, amp):
        generator = runtime.make_generator(device, seed, "samples")
        sampled, mask = generate(gpt, tokens, prompt_lens, room, tokenizer.eos_id, generator)
    for prompt, response in zip(prompts, decode_responses(tokenizer, sampled, mask)):
        print(f"    {tokenizer.decode(prompt).strip()!r}\n        -> {response}")


if __name__ == "__main__":
    parallel.run(main, SFTConfig)
