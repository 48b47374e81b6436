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

import torch
from torch import Tensor, nn

from rlhf.advantages import gae
from rlhf.data import Prompt, pad_prompts
from rlhf.evaluate import Response, describe
from rlhf.losses import policy_loss, value_loss
from rlhf.masked import masked_whiten, token_logprobs
from rlhf.model import PolicyWithValue
from rlhf.ppo import Experience, make_experience
from rlhf.rewards import kl_k1, shape_rewards
from rlhf.rollout import Rollout, collect
from rlhf.run import program
from rlhf.run.checkpoints import load_weights
from rlhf.run.device import make_generator
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
    policy = with_values(run)
    config = run.checkpoint["config"]
    kl_coef = run.checkpoint["kl_coef"]
    tokenizer = run.frozen.tokenizer
    batch = choose_prompts(run.prompts, cfg.prompt)
    device = next(policy.parameters()).device
    tokens, prompt_lens = pad_prompts(batch, tokenizer.pad_id, device)  # (B, P), (B,)
    generator = make_generator(device, cfg.seed, "walk")
    rollout = collect(policy, run.frozen, tokens, prompt_lens, generator, batch)

    print_response(describe(batch, rollout, tokenizer, run.judge)[0], kl_coef, config)
    slots, texts = slots_and_tokens(rollout, 0, tokenizer)
    experience, before = walk(rollout, 0, kl_coef, config["gamma"], config["lam"])
    print_columns(slots, texts, before)
    print_sums(texts, before)
    print(
        f"\nafter one gradient step on all {BATCH} responses (AdamW, learning rate "
        f"{config['lr']:g}, clip range {config['clip_eps']:g}):\n"
    )
    gradient_step(policy, experience, config)
    print_columns(slots, texts, after_step(policy, experience, 0, config))


def with_values(run: Run) -> PolicyWithValue:
    """The policy with its value network, or with the value head on its own network.

    A separate value network has the sizes of the reward model or, without one, of the policy.
    Raises InputError if there is neither.
    """
    weights = run.checkpoint["model"]
    if "value_head.weight" not in weights:  # another --advantage than gae, or DPO
        raise InputError(
            f"{run.path} has no value network to follow: give a ppo.pt of --advantage gae"
        )
    value_gpt = None
    if any(name.startswith("value_gpt.") for name in weights):
        reward_model = run.frozen.reward_model
        config = reward_model.gpt.config if reward_model else run.gpt.config
        value_gpt = type(run.gpt)(config)
    policy = PolicyWithValue(run.gpt, value_gpt)
    load_weights(run.path, policy, weights)
    return policy.to(next(run.gpt.parameters()).device)


def choose_prompts(prompts: list[Prompt], first: int) -> list[Prompt]:
    """The prompt to follow, and those after it. Raises InputError if there is no such prompt."""
    count = len(prompts)
    if first >= count:
        raise InputError(f"--prompt {first}: there are {count} held-out prompts, numbered from 0")
    return [prompts[(first + i) % count] for i in range(BATCH)]


# ---- the numbers ----


def walk(
    rollout: Rollout, row: int, kl_coef: float, gamma: float, lam: float
) -> tuple[Experience, dict[str, Tensor]]:
    """Parts 3 and 4.

    Returns: what the update learns from, of all rows, with whitened advantages; {name: (slots of
        the row's response,)}.
    """
    mask = rollout.mask
    rewards = shape_rewards(
        rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef
    )  # (B, T-1)
    advantages, returns = gae(rewards, rollout.values, mask, gamma, lam)
    deltas, _ = gae(rewards, rollout.values, mask, gamma, 0.0)  # lambda = 0: the TD error
    whitened = masked_whiten(advantages, mask)
    columns = {
        "logprob": rollout.logprobs,
        "ref": rollout.ref_logprobs,
        "kl cost": kl_coef * kl_k1(rollout.logprobs, rollout.ref_logprobs),
        "reward": rewards,
        "value": rollout.values,
        "delta": deltas,
        "advantage": advantages,
        "whitened": whitened,
        "return": returns,
    }
    experience = make_experience(rollout, whitened, returns)
    return experience, {name: x[row][mask[row]] for name, x in columns.items()}


def gradient_step(policy: PolicyWithValue, experience: Experience, config: dict) -> None:
    """Parts 5 and 6: one gradient step on all rows. config: of train_ppo.py."""
    optimizer = make_optimizer(policy, config["lr"], weight_decay=0.0, eps=1e-5)
    logprobs, values = forward(policy, experience)  # (B, T-1), (B, T-1)
    pg_loss, _, v_loss = losses(logprobs, values, experience, experience.mask, config)
    (pg_loss + config["value_coef"] * v_loss).backward()
    nn.utils.clip_grad_norm_(policy.parameters(), config["max_grad_norm"])
    optimizer.step()


@torch.no_grad()
def after_step(
    policy: PolicyWithValue, experience: Experience, row: int, config: dict
) -> dict[str, Tensor]:
    """The losses of each slot by itself, with the policy as it is now: {name: (slots of the row's
    response,)}."""
    one = experience.take(torch.tensor([row]))  # (1, t), (1, t-1)
    logprobs, values = forward(policy, one)  # (1, t-1), (1, t-1)
    pg_losses = []
    clipped = []
    v_losses = []
    for slot in one.mask[0].nonzero().flatten():
        only = torch.zeros_like(one.mask)
        only[0, slot] = True  # a mean over a mask that holds no other slot
        pg_loss, clip_fraction, v_loss = losses(logprobs, values, one, only, config)
        pg_losses.append(pg_loss)
        clipped.append(clip_fraction)
        v_losses.append(v_loss)
    return {
        "new logprob": logprobs[one.mask],
        "ratio": (logprobs - one.old_logprobs)[one.mask].exp(),
        "clipped": torch.stack(clipped),
        "policy loss": torch.stack(pg_losses),
        "new value": values[one.mask],
        "value loss": torch.stack(v_losses),
    }


def forward(policy: PolicyWithValue, experience: Experience) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions and values, (B, T-1) each."""
    logits, values = policy(experience.tokens)  # (B, T, V), (B, T)
    logprobs = token_logprobs(logits, experience.tokens, experience.mask)  # (B, T-1)
    return logprobs, values[:, :-1]


def losses(
    logprobs: Tensor, values: Tensor, experience: Experience, mask: Tensor, config: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy loss, the share of clipped actions and the value loss over the slots of the mask,
    all scalars. logprobs, values, mask: (B, T-1)."""
    pg_loss, clip_fraction = policy_loss(
        logprobs, experience.old_logprobs, experience.advantages, mask, config["clip_eps"]
    )
    value_clip_eps = config["value_clip_eps"] or math.inf
    v_loss, _ = value_loss(values, experience.old_values, experience.returns, mask, value_clip_eps)
    return pg_loss, clip_fraction, v_loss


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
