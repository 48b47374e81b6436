"""One response in numbers: every quantity of a PPO step, slot by slot.

    python -m docs.experiments.walk                # reads runs/sft.pt, reward.pt and ppo.pt
    python -m docs.experiments.walk --prompt 3     # the fourth held-out prompt

Samples responses to 32 held-out prompts from the policy and follows one of them through parts 1 to
6 of train_ppo.py: log-probabilities, KL cost, rewards, values, TD errors, advantages, returns;
then, after one gradient step on the 32, the ratio and the losses of every slot.
docs/one_response.md has a sentence for each column.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from rlhf.data import Prompt, pad_prompts
from rlhf.evaluate import Response, describe
from rlhf.losses import policy_loss, value_loss
from rlhf.model import PolicyWithValue
from rlhf.ppo import assign_credit, update
from rlhf.rewards import kl_k1, shape_rewards
from rlhf.rollout import Rollout, collect, score_rows
from rlhf.run import program
from rlhf.run.checkpoints import load_weights
from rlhf.run.device import make_generator, read
from rlhf.run.errors import InputError, printable
from rlhf.run.flags import arg
from rlhf.run.optimizer import make_optimizer
from rlhf.tokenizer import Tokenizer
from rlhf.tools.optimality import Run, RunConfig, load_run

BATCH = 32  # responses in the rollout
SUMMED = ("kl cost", "reward")  # columns that have a sum


@dataclass(frozen=True)
class WalkConfig(RunConfig):
    """Follow one response through a PPO step."""

    prompt: int = arg(0, "number of the held-out prompt, from 0", group="response")
    seed: int = arg(0, "random seed of the sampled responses")


def main(cfg: WalkConfig) -> None:
    run = load_run(cfg)
    config = run.checkpoint["config"]
    kl_coef = run.checkpoint["kl_coef"]
    tokenizer = run.frozen.tokenizer
    batch = choose_prompts(run.prompts, cfg.prompt)
    rollout, columns = take_step(run, batch, cfg.seed)

    print_response(describe(batch, rollout, tokenizer, run.judge)[0], kl_coef, config)
    slots, texts = slots_and_tokens(rollout, 0, tokenizer)
    numbers = {name: x[0, slots] for name, x in columns.items()}
    before = before_step(numbers, kl_coef, config["gamma"])
    print_columns(slots, texts, before)
    print_sums(texts, before)
    print(
        f"\nafter one gradient step on all {BATCH} responses (AdamW, learning rate "
        f"{config['lr']:g}, clip range {config['clip_eps']:g}):\n"
    )
    print_columns(slots, texts, after_step(numbers, config))


def choose_prompts(prompts: list[Prompt], first: int) -> list[Prompt]:
    """The prompt to follow, and those after it. Raises InputError if there is no such prompt."""
    count = len(prompts)
    if first >= count:
        raise InputError(f"--prompt {first}: there are {count} held-out prompts, numbered from 0")
    return [prompts[(first + i) % count] for i in range(BATCH)]


# ---- the step ----


def take_step(run: Run, prompts: list[Prompt], seed: int = 0) -> tuple[Rollout, dict[str, Tensor]]:
    """Sample responses to the prompts, and take one gradient step on all of them.

    It is a step of train_ppo.py with GAE and a new optimizer.

    Returns: the rollout; {name: (B, T-1)} on the CPU, where new_ means after the step.
    """
    config = run.checkpoint["config"]
    compute = run.compute
    policy = with_values(run)
    # ---- 1 generate, 2 score ----
    tokens, prompt_lens = pad_prompts(prompts, run.frozen.tokenizer.pad_id, compute.device)
    generator = make_generator(compute.device, seed, "walk")
    rollout = collect(policy, run.frozen, tokens, prompt_lens, generator, prompts)
    mask = rollout.mask
    # ---- 3 shape ----
    kl_coef = run.checkpoint["kl_coef"]
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)
    # ---- 4 credit ----
    one_minibatch = {"inner_epochs": 1, "minibatch_size": len(prompts)}
    cfg = SimpleNamespace(**config | one_minibatch)
    experience = assign_credit(rollout, rewards, cfg)
    # ---- 5 losses, 6 update ----
    optimizer = make_optimizer(policy, cfg.lr, weight_decay=0.0, eps=1e-5)
    update(policy, optimizer, compute, experience, cfg, step=0)
    with torch.no_grad():
        after = score_rows(policy, run.frozen, rollout.tokens, mask, prompt_lens)
    columns = {
        "logprob": rollout.logprobs,
        "ref": rollout.ref_logprobs,
        "reward": rewards,
        "value": rollout.values,
        "advantage": experience.returns - rollout.values,
        "whitened": experience.advantages,
        "return": experience.returns,
        "new_logprob": after.logprobs,
        "new_value": after.values,
    }
    return rollout, dict(zip(columns, read(*columns.values())))


def with_values(run: Run) -> PolicyWithValue:
    """The policy with its value network, or with the value head on its own network.

    Raises InputError if there is neither.
    """
    config = run.checkpoint["config"]
    if config.get("advantage") != "gae":  # DPO has none
        raise InputError(
            f"{run.path} has no value network to follow: give a ppo.pt of --advantage gae"
        )
    value_gpt = None
    if config["value_network"] != "shared":
        # It has the sizes of the reward model or, without one, of the policy.
        sized = run.frozen.reward_model or run
        value_gpt = type(sized.gpt)(sized.gpt.config)
    policy = PolicyWithValue(run.gpt, value_gpt)
    load_weights(run.path, policy, run.checkpoint["model"])
    return policy.to(run.compute.device)


# ---- the numbers ----


def before_step(numbers: dict[str, Tensor], kl_coef: float, gamma: float) -> dict[str, Tensor]:
    """What parts 1 to 4 give to each token of a response.

    Args: numbers: of take_step, (slots,) each.
    """
    kl_costs = kl_coef * kl_k1(numbers["logprob"], numbers["ref"])
    values = numbers["value"]
    next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])  # 0 after the last action
    return {
        "logprob": numbers["logprob"],
        "ref": numbers["ref"],
        "kl cost": kl_costs,
        "reward": numbers["reward"],
        "value": values,
        "delta": numbers["reward"] + gamma * next_values - values,  # the TD error
        "advantage": numbers["advantage"],
        "whitened": numbers["whitened"],
        "return": numbers["return"],
    }


def after_step(numbers: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The ratio and the losses of each token by itself, after the gradient step.

    Args: numbers: as for before_step; config: of train_ppo.py.
    """
    rows = {name: x.unsqueeze(0) for name, x in numbers.items()}  # (1, slots) each
    pg_losses = []
    clipped = []
    v_losses = []
    value_clip_eps = config["value_clip_eps"] or math.inf
    for slot in range(rows["logprob"].size(1)):
        only = torch.zeros_like(rows["logprob"], dtype=torch.bool)
        only[0, slot] = True  # a mean over a mask that holds no other slot
        pg_loss, clip_fraction = policy_loss(
            rows["new_logprob"], rows["logprob"], rows["whitened"], only, config["clip_eps"]
        )
        v_loss, _ = value_loss(
            rows["new_value"], rows["value"], rows["return"], only, value_clip_eps
        )
        pg_losses.append(pg_loss)
        clipped.append(clip_fraction)
        v_losses.append(v_loss)
    return {
        "new logprob": numbers["new_logprob"],
        "ratio": (numbers["new_logprob"] - numbers["logprob"]).exp(),
        "clipped": torch.stack(clipped),
        "policy loss": torch.stack(pg_losses),
        "new value": numbers["new_value"],
        "value loss": torch.stack(v_losses),
    }


# ---- printing ----


def print_response(response: Response, kl_coef: float, config: dict) -> None:
    """The prompt, what the policy says to it, and the settings that count.

    config: of train_ppo.py.
    """
    gold = "" if response.gold is None else f", gold {response.gold:+.1f}"
    print(f"prompt    {printable(' '.join(response.prompt.split()))}")
    print(f"response  {printable(response.text)}")
    print(
        f"score {response.score:+.3f}{gold}; kl_coef {kl_coef:g}, "
        f"gamma {config['gamma']:g}, lambda {config['lam']:g}\n"
    )


def slots_and_tokens(
    rollout: Rollout, row: int, tokenizer: Tokenizer
) -> tuple[list[int], list[str]]:
    """Of one response: the number of each slot, and the text of its token."""
    mask = rollout.mask[row]
    actions = rollout.tokens[row, 1:][mask].tolist()
    texts = [repr(tokenizer.decode([action])) for action in actions]
    return mask.nonzero().flatten().tolist(), texts


def print_columns(slots: list[int], tokens: list[str], columns: dict[str, Tensor]) -> None:
    """A header, and one line per slot. columns: {name: (slots,)}."""
    names = {name: name for name in columns}
    print_line("slot", "token", tokens, names)
    for i, (slot, token) in enumerate(zip(slots, tokens)):
        cells = {name: format_cell(name, x[i].item()) for name, x in columns.items()}
        print_line(str(slot), token, tokens, cells)


def print_sums(tokens: list[str], columns: dict[str, Tensor]) -> None:
    """The line under print_columns with the sums of the columns that have one."""
    cells = {}
    for name, x in columns.items():
        cells[name] = f"{x.sum():.3f}" if name in SUMMED else ""
    print_line("sum", "", tokens, cells)


def print_line(slot: str, token: str, tokens: list[str], cells: dict[str, str]) -> None:
    """Aligned cells. tokens: of all lines; cells: {name of the column: text}."""
    line = [slot.rjust(4), token.ljust(max(map(len, tokens)))]
    for name, cell in cells.items():
        line.append(cell.rjust(max(9, len(name))))
    print("  ".join(line))


def format_cell(name: str, value: float) -> str:
    if name == "clipped":
        return "yes" if value else "no"
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no -0.000


if __name__ == "__main__":
    program.run(main, WalkConfig)
