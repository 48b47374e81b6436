"""The same PPO iteration in TRL, to compare the speed with. Needs two packages: pip install trl==1.9.2 transformers.

TRL's PPOTrainer has no method for one iteration. But train() runs as many iterations as the episodes fill batches, so
with the episodes of one batch a call of train() is one iteration. What it does besides is small: it makes tensors for
its metrics and calls its callbacks.

The work is that of train_ppo.py: sample, score with a reference, a value network and a reward model, then the epochs
and minibatches. One forward pass is missing in TRL's: it takes the old log-probabilities from sampling, where
rlhf.rollout.collect computes them again as the update does. And two things are only there: it computes logits for
prompt tokens too, and it keeps the logits of sampling.
"""

from collections.abc import Iterator
from importlib.metadata import distributions
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from rlhf.extras.measure import clock
from rlhf.support.cli import InputError
from rlhf.support.runtime import autocast, setup

VERSION = "1.9.2"  # its PPO is experimental: another version may need other arguments
PAD = -1  # not a token: a sampled token never looks like a pad or like end-of-text


def trl_iterations(cfg) -> Iterator[dict[str, float]]:
    """One PPO iteration of TRL after another, each followed by a `generate` of transformers on the same prompts.

    Args: cfg: a BenchConfig of rlhf/tools/bench.py.
    Returns: an iterator of {"sampling", "iteration"}, in seconds. Nothing is loaded before its first step.
    """
    found = next((package.version for package in distributions(name="trl")), "none")
    if found != VERSION:
        raise InputError(f"--against trl needs TRL {VERSION}, found {found}: pip install trl=={VERSION} transformers")
    if cfg.value_network == "shared":
        raise InputError("--against trl needs --value-network separate: TRL's PPO trains a separate value network")
    return iterations(cfg)


def iterations(cfg) -> Iterator[dict[str, float]]:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    device, amp, _ = setup(cfg.device, cfg.amp)
    config = GPT2Config(vocab_size=cfg.vocab, n_positions=cfg.prompt + cfg.response, n_embd=cfg.n_embd,
                        n_layer=cfg.n_layer, n_head=cfg.n_head, num_labels=1, bos_token_id=None, eos_token_id=None)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reward_model, value_network = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    rows = [torch.randint(cfg.vocab, (n,)) for n in cfg.prompt_lens()]
    rows = torch.stack([pad(row, (cfg.prompt - len(row), 0), value=PAD) for row in rows])  # (B, P), padded on the left
    args = PPOConfig(
        output_dir="runs", report_to="none", save_strategy="no", disable_tqdm=True, num_sample_generations=0,
        per_device_train_batch_size=cfg.batch, total_episodes=cfg.batch, local_rollout_forward_batch_size=cfg.batch,
        num_mini_batches=cfg.minibatches, num_ppo_epochs=cfg.inner_epochs, response_length=cfg.response,
        temperature=1.0, lr_scheduler_type="constant", gradient_checkpointing=False, use_cpu=device.type == "cpu",
        bf16=amp == torch.bfloat16, fp16=amp == torch.float16)
    trainer = PPOTrainer(
        args, SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD), policy, reference, reward_model, list(rows),
        value_network, data_collator=lambda batch: {"input_ids": torch.stack(batch)})
    trainer.log = trainer.accelerator.print = lambda *args: None
    real = rows != PAD  # (B, P)
    inputs = {"input_ids": (rows * real).to(device), "attention_mask": real.to(device)}
    while True:
        start = clock()
        trainer.train()
        middle = clock()
        with autocast(device, amp):
            policy.generate(**inputs, max_new_tokens=cfg.response, do_sample=True, top_k=0)
        yield {"sampling": clock() - middle, "iteration": middle - start}
