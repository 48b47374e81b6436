"""An option of train_ppo.py, --ptx-coef: also imitate demonstrations, so that PPO forgets less of what they taught.

    gamma * E[log pi(demonstrated response)]      added to the objective; Ouyang et al. 2022, equation 2, "PPO-ptx"

InstructGPT mixes in pretraining text with gamma = 27.8. A model that was never pretrained has its demonstrations. The
coefficient has another unit here: both losses are means over tokens, and PPO's advantages are whitened.
"""

from torch import nn

from rlhf.data import batch_indices, chunks, demonstration_batch, load_demonstrations
from rlhf.extras.parallel import share
from rlhf.losses import sft_loss
from rlhf.support.runtime import autocast


class PretrainingMix:
    """cfg is a PPOConfig; limit: the model's context in tokens."""

    def __init__(self, cfg, tokenizer, limit: int, device, amp):
        self.cfg, self.device, self.amp, self.pad_id = cfg, device, amp, tokenizer.pad_id
        self.rows = load_demonstrations(cfg.data, tokenizer, limit)

    def backward(self, gpt: nn.Module, scaler, step: int, gradient_step: int) -> None:
        """Add the gradient of one minibatch of demonstrations to that of a PPO minibatch, in micro-batches too."""
        cfg = self.cfg
        number = step * cfg.inner_epochs * (cfg.batch_size // cfg.minibatch_size) + gradient_step
        rows = [self.rows[i] for i in batch_indices(len(self.rows), cfg.minibatch_size, number, cfg.seed)]
        actions = sum(len(row.tokens) - row.prompt_len for row in rows)
        for part in chunks(share(rows), cfg.micro_batch_size):
            tokens, mask = demonstration_batch(part, self.pad_id, self.device)  # (B, T), (B, T-1)
            with autocast(self.device, self.amp):
                loss = sft_loss(gpt.hidden(tokens), tokens, mask, gpt.logits)
            scaler.scale(cfg.ptx_coef * loss * (mask.sum() / actions)).backward()
