"""What the models of a finished run say, to look at: the reward model's opinion of each vote, and
the numbers of one PPO step, token by token.

`python -m rlhf.tools.report` draws them, and `python -m docs.experiments.walk` prints the step
(docs/one_response.md explains its numbers).
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from rlhf.advantages import gae
from rlhf.data import Comparison, Prompt, comparison_batch, pad_prompts
from rlhf.masked import chosen_logprobs, masked_whiten
from rlhf.model import PolicyWithValue, RewardModel
from rlhf.ppo import forward, make_experience, update
from rlhf.rewards import shape_rewards
from rlhf.rollout import Frozen, Rollout, collect
from rlhf.run.device import Compute, make_generator
from rlhf.run.micro_batches import chunks
from rlhf.run.optimizer import make_optimizer
from rlhf.tokenizer import Tokenizer

LONGEST = 200  # tokens
Columns = dict[str, Tensor]  # {name: (B, T-1)}


@torch.no_grad()
def vote_margins(model: RewardModel, pairs: list[Comparison], pad_id: int) -> list[float]:
    """The log-odds of each vote: sigmoid(margin) is the model's probability of the chosen side."""
    margins = []
    for part in chunks(pairs, 64):
        chosen, rejected = model(*comparison_batch(part, pad_id, model.mean.device)).chunk(2)
        margins += rounded(model.scale * (chosen - rejected))  # scores are divided by the scale
    return margins


def take_step(
    policy: PolicyWithValue,
    frozen: Frozen,
    prompts: list[Prompt],
    kl_coef: float,
    config: dict,
    compute: Compute,
) -> tuple[Rollout, Columns]:
    """Sample responses to the prompts, and take one gradient step on all of them.

    It is a step of train_ppo.py with GAE and a new optimizer.

    Args: config: of train_ppo.py, whose seed draws the responses.
    Returns: the rollout; the numbers of every slot, those that begin with new_ after the step.
    """
    # ---- 1 generate, 2 score ----
    tokens, prompt_lens = pad_prompts(prompts, frozen.tokenizer.pad_id, compute.device)
    generator = make_generator(compute.device, config["seed"], "walk")
    rollout = collect(policy, frozen, tokens, prompt_lens, generator, prompts)
    mask = rollout.mask
    # ---- 3 shape ----
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)
    # ---- 4 credit ----
    advantages, returns = gae(rewards, rollout.values, mask, config["gamma"], config["lam"])
    whitened = masked_whiten(advantages, mask)
    # ---- 5 losses, 6 update ----
    experience = make_experience(rollout, whitened, returns)
    optimizer = make_optimizer(policy, config["lr"], weight_decay=0.0, eps=1e-5)
    one_minibatch = {"inner_epochs": 1, "minibatch_size": len(prompts)}
    cfg = SimpleNamespace(**config | one_minibatch)
    update(policy, optimizer, compute, experience, cfg, step=0)
    with torch.no_grad():
        outputs = forward(policy, experience, compute)
    new_logprobs = chosen_logprobs(outputs.all_logprobs, rollout.tokens, mask)
    return rollout, {
        "logprob": rollout.logprobs,
        "ref": rollout.ref_logprobs,
        "reward": rewards,
        "value": rollout.values,
        "advantage": advantages,
        "whitened": whitened,
        "return": returns,
        "new_logprob": new_logprobs,
        "new_value": outputs.values,
    }


def by_token(rollout: Rollout, row: int, columns: Columns, tokenizer: Tokenizer) -> dict[str, list]:
    """Of the first LONGEST tokens of one response: the number of each slot, its token's text, and
    its number in each column."""
    slots = rollout.mask[row].nonzero().flatten()[:LONGEST]
    actions = rollout.tokens[row, slots + 1].tolist()
    numbers = {name: rounded(x[row, slots]) for name, x in columns.items()}
    texts = [tokenizer.decode([action]) for action in actions]
    return {"slot": slots.tolist(), "token": texts, **numbers}


def rounded(x: Tensor) -> list[float]:
    """To five decimals."""
    return x.double().round(decimals=5).tolist()
