"""A training run of a tiny GPT, for the tests of what a run writes and reads."""

from dataclasses import dataclass

import torch

from rlhf.model import GPT, GPTConfig
from rlhf.run.device import setup
from rlhf.run.flags import TrainConfig
from rlhf.run.optimizer import make_optimizer, optimizer_step
from rlhf.run.training import Training
from tests.helpers import Digits

SHAPE = GPTConfig(11, 8, 1, 2, 8)
INPUTS = {"demonstrations": "123"}
TOKENS = torch.tensor([[3, 1, 4]])


@dataclass(frozen=True)
class Config(TrainConfig):
    """Of a run of nine steps."""

    kind = "sft"

    lr: float = 0.5
    steps: int = 9


@dataclass(frozen=True)
class RewardConfig(Config):
    kind = "reward"


@dataclass(frozen=True)
class PPOConfig(Config):
    kind = "ppo"

    temperature: float = 0.5


@dataclass(frozen=True)
class DPOConfig(Config):
    kind = "dpo"


def small_run(
    folder, model=None, cls=Config, tokenizer=None, inputs=INPUTS, amp="off", **settings
) -> Training:
    """A run in this folder, of a new GPT if no model is given. settings: of its config."""
    torch.manual_seed(0)
    model = model or GPT(SHAPE)
    optimizer = make_optimizer(model, 0.1, 0.0)
    cfg = cls(out=str(folder), amp=amp, **settings)
    return Training(cfg, model, optimizer, setup("cpu", amp), tokenizer or Digits(), inputs)


def step(run: Training) -> None:
    """One optimizer step on a loss that depends on all weights."""
    run.optimizer.zero_grad()
    loss = run.model(TOKENS).square().mean()
    run.compute.scaler.scale(loss).backward()
    optimizer_step(run.model, run.optimizer, run.compute.scaler, 1.0)


def saved(run: Training, step: int, **state):
    """The path of the run's checkpoint, saved after this step, with one row of metrics."""
    run.rows = [{"step": step, "loss": 0.5, "seconds": 7.0}]
    run.save(step, **state)
    return run.path


def finished(folder, model, cls):
    """The path of a finished run's checkpoint."""
    return saved(small_run(folder, model, cls), 9)
