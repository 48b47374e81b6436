"""An option of train_ppo.py, --ptx-coef: also imitate demonstrations, so that PPO forgets less of
what they taught.

    gamma * E[log pi(demonstrated response)]      added to the objective

Ouyang et al. 2022, equation 2, "PPO-ptx". InstructGPT mixes in pretraining text with gamma = 27.8.
A model that was never pretrained has its demonstrations. The coefficient has another unit here:
both losses are means over tokens, and PPO's advantages are whitened.
"""

from torch import nn

from rlhf.data import choose_batch, demonstration_batch, load_demonstrations
from rlhf.losses import sft_loss
from rlhf.masked import action_slots
from rlhf.run.device import Compute
from rlhf.run.micro_batches import micro_batches
from rlhf.tokenizer import Tokenizer


class PretrainingMix:
    """cfg is a PPOConfig; limit: the model's context in tokens."""

    def __init__(self, cfg, tokenizer: Tokenizer, limit: int, compute: Compute):
        self.cfg = cfg
        self.compute = compute
        self.pad_id = tokenizer.pad_id
        self.rows = load_demonstrations(cfg.data, tokenizer, limit, share=cfg.heldout)

    def backward(self, gpt: nn.Module, scaler, step: int, gradient_step: int) -> None:
        """Add the gradient of one minibatch of demonstrations to that of a PPO minibatch, in
        micro-batches too.

        Args: step: of PPO; gradient_step: number within its update.
        """
        cfg = self.cfg
        gradient_steps = cfg.inner_epochs * (cfg.batch_size // cfg.minibatch_size)
        number = step * gradient_steps + gradient_step
        rows = choose_batch(self.rows, cfg.minibatch_size, number, cfg.seed)
        response_tokens = sum(row.size - row.prompt_len for row in rows)
        for part in micro_batches(rows, cfg.micro_batch_size, "demonstrations"):
            tokens, mask = demonstration_batch(part, self.pad_id, self.compute.device)
            with self.compute.autocast():
                logits = gpt.logits(action_slots(gpt.hidden(tokens), mask))  # (S, V)
                loss = sft_loss(logits, tokens, mask) * (mask.sum() / response_tokens)
            scaler.scale(cfg.ptx_coef * loss).backward()
