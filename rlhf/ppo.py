"""Parts 4 to 6 of a PPO step: the credit of each action, the loss of one minibatch, and the update
that takes its gradients.

One minibatch of b = 4 rows; prompts (p), the policy's actions (a) and pads (.):

    row    tokens (b, t)              mask (b, t-1)
     7     p p p p a a a a a a . .    - - - T T T T T T - -     6 actions
     2     p p p a a . . . . . . .    - - T T - - - - - - -     2
    30     p p a a a a a a a a a a    - T T T T T T T T T T    10
    11     p p p p p p a a a . . .    - - - - - T T T - - -     3

policy_loss and value_loss return means over the True slots, here sum / 21. Then a slot would have
the weight 1/21 in this minibatch, and 1/60 in one with long responses. The policy gradient gives
all slots of a rollout the same weight. So `update` takes the gradient of

    sum / D,    D = actions of the rollout * rows of this minibatch / rows of the rollout

In a rollout of 64 rows with 640 actions, D = 640 * 4 / 64 = 40 in every minibatch of 4 rows. In the
code, the mean is multiplied by a weight:

    these 21 actions     mean = sum / 21      weight = 21 / 40
    another 60 actions   mean = sum / 60      weight = 60 / 40

With fixed parameters, the mean of an epoch's gradients is then the gradient of the whole rollout.
A rollout (64 rows) has several minibatches (an optimizer step each). Micro-batches are parts of a
minibatch that fit memory, each with its own mean and weight: their gradients add up.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.advantages import explained_variance, gae, response_advantages
from rlhf.losses import mean_entropy, policy_loss, value_loss
from rlhf.masked import (
    action_slots,
    chosen_logprobs,
    log_softmax,
    masked_mean,
    masked_whiten,
)
from rlhf.model import PolicyWithoutValue, PolicyWithValue
from rlhf.rewards import kl_k3
from rlhf.rollout import Rollout
from rlhf.run.device import Compute, make_generator
from rlhf.run.metrics import GradientStepMetrics, finite_mean
from rlhf.run.micro_batches import split_rows
from rlhf.run.optimizer import optimizer_step


class Experience(NamedTuple):
    """What an update learns from: a rollout with the credit of its actions, or some rows of it.

    Of the policy that sampled, the old policy, only log-probabilities and values are kept.
    """

    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T-1) bool
    old_logprobs: Tensor  # (B, T-1)
    old_values: Tensor  # (B, T-1)
    advantages: Tensor  # (B, T-1)
    returns: Tensor  # (B, T-1)
    widths: Tensor  # (B,), on the CPU: how many slots a row has up to its last action

    def take(self, rows: Tensor) -> "Experience":
        """Some rows (b,), cut after the last action of the longest: (b, t), (b, t-1).

        rows: on the CPU, as widths are: to ask a GPU for the width would make the host wait.
        """
        width = int(self.widths[rows].max())
        on_device = rows.to(self.tokens.device)
        tokens = self.tokens[on_device, : width + 1]
        per_slot = [x[on_device, :width] for x in self[1:-1]]  # mask to returns
        return Experience(tokens, *per_slot, self.widths[rows])


def assign_credit(rollout: Rollout, rewards: Tensor, cfg) -> Experience:
    """The rollout with an advantage and a return for each action.

    Args: rewards: (B, T-1); cfg: a PPOConfig.
    """
    mask = rollout.mask
    if cfg.advantage == "gae":
        advantages, returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam)
        # Subtracting the mean is one more baseline. The division keeps the balance with the other
        # losses and with gradient clipping whatever the scale of the scores; AdamW already removes
        # most of the scale.
        advantages = masked_whiten(advantages, mask)  # (B, T-1)
    else:  # no value network: values and returns are 0
        advantages, returns = response_advantages(rewards, mask, cfg.advantage, cfg.group_size)
    return make_experience(rollout, advantages, returns)


def make_experience(rollout: Rollout, advantages: Tensor, returns: Tensor) -> Experience:
    """A rollout with the credit of its actions, advantages and returns (B, T-1)."""
    mask = rollout.mask
    numbers = torch.arange(1, mask.size(1) + 1, device=mask.device)  # (T-1,)
    widths = (mask * numbers).amax(dim=1).cpu()  # (B,)
    return Experience(
        rollout.tokens, mask, rollout.logprobs, rollout.values, advantages, returns, widths
    )


class Outputs(NamedTuple):
    """What the networks give for a minibatch, or a micro-batch of it."""

    all_logprobs: Tensor  # (S, V): of every token of the vocabulary, at each of the S True slots
    values: Tensor  # (b, t-1)


def forward(
    policy: PolicyWithValue | PolicyWithoutValue, minibatch: Experience, compute: Compute
) -> Outputs:
    with compute.autocast():
        hidden, values = policy.hidden_and_values(minibatch.tokens)  # (b, t, C), (b, t)
        logits = policy.gpt.logits(action_slots(hidden, minibatch.mask))  # (S, V)
        all_logprobs = log_softmax(logits)  # (S, V)
    return Outputs(all_logprobs, values[:, :-1])


def minibatch_loss(
    outputs: Outputs, minibatch: Experience, cfg
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss of one minibatch (or micro-batch), and its metrics.

        policy_loss + value_coef * value_loss - entropy_coef * entropy

    Each term is a mean over the True slots, which is what `update` turns into sum / D. A term of
    your own has to be one too.

    Args: cfg: a PPOConfig, of which clip_eps, value_clip_eps, value_coef and entropy_coef count.
    Returns: the loss, a scalar with gradient; metrics, scalars without: all are means over the True
        slots but max_log_ratio, the largest |log ratio|.
    """
    mask = minibatch.mask
    new_logprobs = chosen_logprobs(outputs.all_logprobs, minibatch.tokens, mask)  # (b, t-1)
    pg_loss, clip_fraction = policy_loss(
        new_logprobs, minibatch.old_logprobs, minibatch.advantages, mask, cfg.clip_eps
    )
    value_clip_eps = cfg.value_clip_eps or math.inf
    v_loss, value_clip_fraction = value_loss(
        outputs.values, minibatch.old_values, minibatch.returns, mask, value_clip_eps
    )
    # Without a coefficient the entropy is only logged, and needs no gradient.
    all_logprobs = outputs.all_logprobs if cfg.entropy_coef else outputs.all_logprobs.detach()
    entropy = mean_entropy(all_logprobs)
    loss = pg_loss + cfg.value_coef * v_loss - cfg.entropy_coef * entropy

    new_logprobs = new_logprobs.detach()
    log_ratios = new_logprobs - minibatch.old_logprobs  # (b, t-1): off the mask both are 0
    kl_old = masked_mean(kl_k3(minibatch.old_logprobs, new_logprobs), mask)  # nats per token
    metrics = {
        "policy_loss": pg_loss.detach(),
        "value_loss": v_loss.detach(),
        "entropy": entropy.detach(),
        "clip_fraction": clip_fraction,
        "value_clip_fraction": value_clip_fraction,
        "kl_old": kl_old,
        "max_log_ratio": log_ratios.abs().max(),
    }
    return loss, metrics


def update(
    policy: PolicyWithValue | PolicyWithoutValue,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    experience: Experience,
    cfg,
    step: int,
) -> dict[str, float]:
    """Several epochs over one rollout, in random minibatches.

    A rollout is expensive, so it is used for several gradient steps. From the second on, the policy
    is not the one that sampled: that is what the ratio and the clip in policy_loss are for.
    Advantages and returns stay fixed.

    Args: cfg: a PPOConfig; step: of PPO, for the random order.
    Returns: the update's metrics.
    """
    history = GradientStepMetrics()
    grad_norms = []
    for epoch in range(cfg.inner_epochs):
        generator = make_generator("cpu", cfg.seed, "update", step, epoch)
        order = torch.randperm(len(experience.tokens), generator=generator)
        for rows in order.split(cfg.minibatch_size):
            history.begin_step()
            optimizer.zero_grad()
            for micro_batch, weight in weighted_micro_batches(experience, rows, cfg):
                outputs = forward(policy, micro_batch, compute)
                loss, metrics = minibatch_loss(outputs, micro_batch, cfg)
                compute.scaler.scale(weight * loss).backward()
                history.add(weight, metrics)
            grad_norm = optimizer_step(policy, optimizer, compute.scaler, cfg.max_grad_norm)
            grad_norms.append(grad_norm)
    metrics = {
        **history.means(),
        "grad_norm": finite_mean(grad_norms),
        "first_log_ratio": history.first("max_log_ratio"),  # 0: old and new policy are the same
        "explained_variance": explained_variance(
            experience.old_values, experience.returns, experience.mask
        ),
    }
    # One copy, as each makes the host wait for a GPU.
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


def weighted_micro_batches(
    experience: Experience, rows: Tensor, cfg
) -> Iterator[tuple[Experience, Tensor]]:
    """This process's rows of a minibatch, --micro-batch-size at a time, each part with its weight.

    weight = True slots of the part / D: the mean over the part, times weight, is its sum / D.
    """
    D = experience.mask.sum().double() * len(rows) / len(experience.mask)
    for part in split_rows(rows, cfg.micro_batch_size):
        micro_batch = experience.take(part)
        yield micro_batch, micro_batch.mask.sum() / D
