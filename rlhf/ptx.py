"""An option of train_ppo.py: mix imitation into PPO, so that it forgets less of what the demonstrations taught.

    gamma * E[log pi(demonstrated response)]      added to the objective; Ouyang et al. 2022, equation 2, "PPO-ptx"

InstructGPT mixes in pretraining text with gamma = 27.8. A model that was never pretrained has its demonstrations. Nor
is our coefficient of InstructGPT's unit: both losses here are means over tokens, and PPO's advantages are whitened.
"""

from collections.abc import Iterator

from torch import Tensor

from rlhf.common import autocast
from rlhf.data import batch_indices, chunks, demonstration_batch, load_demonstrations
from rlhf.losses import sft_loss
from rlhf.model import GPT


class PretrainingMix:
    """Called once a gradient step, with the step's number: the losses to add to it, one for each micro-batch (0: all
    rows at once), each weighed by its share of the tokens; none where coef is 0."""

    def __init__(self, coef: float, folder: str, tokenizer, limit: int, batch_size: int, micro_batch_size: int,
                 seed: int, device, amp):
        self.coef, self.batch_size, self.micro_batch_size = coef, batch_size, micro_batch_size
        self.seed, self.device, self.amp = seed, device, amp
        self.rows = load_demonstrations(folder, tokenizer, limit) if coef else []
        self.pad_id = tokenizer.pad_id

    def __call__(self, gpt: GPT, step: int) -> Iterator[Tensor]:
        if self.coef:
            rows = [self.rows[i] for i in batch_indices(len(self.rows), self.batch_size, step, self.seed)]
            actions = sum(len(row.tokens) - row.prompt_len for row in rows)
            for part in chunks(rows, self.micro_batch_size):
                tokens, mask = demonstration_batch(part, self.pad_id, self.device)  # (B, T), (B, T-1)
                with autocast(self.device, self.amp):
                    logits = gpt(tokens)  # (B, T, V)
                yield self.coef * sft_loss(logits, tokens, mask) * (mask.sum() / actions)
