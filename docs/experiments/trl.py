"""The same PPO iteration in TRL, to compare the speed with: `bench --against trl` of this folder.

Needs two packages: pip install trl==1.9.2 transformers

TRL's PPOTrainer has no method for one iteration. But train() runs as many iterations as the
episodes fill batches, so with the episodes of one batch a call of train() is one iteration. What it
does besides is small: it makes tensors for its metrics and calls its callbacks.

The work is that of train_ppo.py: sample, score with a reference, a value network and a reward
model, then the epochs and minibatches. One forward pass is missing in TRL's: it takes the old
log-probabilities from sampling, where rlhf.rollout.collect computes them again as the update does.
And two things are only there: it computes logits for prompt tokens too, and it keeps the logits of
sampling.
"""

from collections.abc import Iterator
from importlib.metadata import distributions
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad

from docs.experiments.measure import clock
from rlhf.run.device import Compute, setup
from rlhf.run.errors import InputError

VERSION = "1.9.2"  # its PPO is experimental: another version may need other arguments
PAD = -1  # not a token: a sampled token never looks like a pad or like end-of-text

SETTINGS = {
    "output_dir": "runs",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "num_sample_generations": 0,
    "temperature": 1.0,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}


def trl_iterations(cfg) -> Iterator[dict[str, float]]:
    """One PPO iteration of TRL after another, each followed by a `generate` of transformers on the
    same prompts.

    Args: cfg: a BenchConfig of docs/experiments/bench.py.
    Returns: an iterator of {"sampling", "iteration"}, in seconds. Nothing is loaded before its
        first step.
    """
    versions = [package.version for package in distributions(name="trl")]
    found = versions[0] if versions else "none"
    if found != VERSION:
        raise InputError(
            f"--against trl needs TRL {VERSION}, found {found}: pip install trl=={VERSION} "
            f"transformers"
        )
    if cfg.value_network == "shared":
        raise InputError(
            "--against trl needs --value-network separate: TRL's PPO trains a separate value "
            "network"
        )
    return iterations(cfg)


def iterations(cfg) -> Iterator[dict[str, float]]:
    compute = setup(cfg.device, cfg.amp)
    rows = make_prompts(cfg)  # (B, P)
    trainer, policy = make_trainer(cfg, compute, rows)
    real = rows != PAD  # (B, P)
    ids = (rows * real).to(compute.device)
    attention_mask = real.to(compute.device)
    while True:
        start = clock()
        trainer.train()
        middle = clock()
        with compute.autocast():
            policy.generate(
                input_ids=ids,
                attention_mask=attention_mask,
                max_new_tokens=cfg.response,
                do_sample=True,
                top_k=0,
            )
        yield {"sampling": clock() - middle, "iteration": middle - start}


def make_prompts(cfg) -> Tensor:
    """Random prompts (B, P), padded on the left, as TRL wants them."""
    rows = []
    for length in cfg.prompt_lens():
        row = torch.randint(cfg.vocab, (length,))
        rows.append(pad(row, (cfg.prompt - len(row), 0), value=PAD))
    return torch.stack(rows)


def make_trainer(cfg, compute: Compute, rows: Tensor):
    """TRL's PPOTrainer on random networks of the same sizes, and the policy that it trains."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOTrainer

    config = network_config(cfg)
    policy = GPT2LMHeadModel(config)
    reference = GPT2LMHeadModel(config)
    reward_model = GPT2ForSequenceClassification(config)
    value_network = GPT2ForSequenceClassification(config)
    trainer = PPOTrainer(
        trainer_config(cfg, compute),
        SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD),
        policy,
        reference,
        reward_model,
        list(rows),
        value_network,
        data_collator=lambda batch: {"input_ids": torch.stack(batch)},
    )
    trainer.log = lambda *args: None
    trainer.accelerator.print = lambda *args: None
    return trainer, policy


def network_config(cfg):
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=cfg.vocab,
        n_positions=cfg.prompt + cfg.response,
        n_embd=cfg.n_embd,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=None,
    )


def trainer_config(cfg, compute: Compute):
    """One call of train() is one iteration."""
    from trl.experimental.ppo import PPOConfig

    precision = {"bf16": compute.amp == torch.bfloat16, "fp16": compute.amp == torch.float16}
    return PPOConfig(
        **SETTINGS,
        **precision,
        per_device_train_batch_size=cfg.batch,
        total_episodes=cfg.batch,
        local_rollout_forward_batch_size=cfg.batch,
        num_mini_batches=cfg.minibatches,
        num_ppo_epochs=cfg.inner_epochs,
        response_length=cfg.response,
        use_cpu=compute.device.type == "cpu",
    )
