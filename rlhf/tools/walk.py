"""One response in numbers: every quantity of a PPO step, slot by slot.

    python -m rlhf.tools.walk                          # reads runs/sft.pt, reward.pt and ppo.pt
    python -m rlhf.tools.walk --prompt 3               # the fourth held-out prompt

Samples responses to 32 held-out prompts from the policy and follows one of them through parts 1 to 6 of train_ppo.py:
log-probabilities, KL cost, rewards, values, TD errors, advantages, returns; then, after one gradient step on the 32,
the ratio and the losses of every slot. docs/one_response.md has a sentence for each column.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.advantages import gae
from rlhf.data import pad_rows
from rlhf.evaluate import decode_responses
from rlhf.losses import policy_loss, value_loss
from rlhf.masked import masked_whiten, token_logprobs
from rlhf.model import PolicyWithValue
from rlhf.rewards import kl_k1, shape_rewards
from rlhf.rollout import Rollout, collect
from rlhf.support import cli, runtime
from rlhf.support.judge import gold_scores
from rlhf.tools.optimality import RunConfig, load_run

BATCH = 32  # responses in the rollout


@dataclass(frozen=True)
class WalkConfig(RunConfig):
    """Follow one response through a PPO step."""

    prompt: int = cli.arg(0, "number of the held-out prompt, from 0", group="response")
    seed: int = cli.arg(0, "random seed of the sampled responses")

    def __post_init__(self):
        cli.check_not_negative(self, "prompt")


def walk(rollout: Rollout, row: int, kl_coef: float, gamma: float, lam: float) -> tuple[dict, Tensor, Tensor]:
    """Parts 3 and 4. Returns {name: (slots of the response,)}, the whitened advantages and the returns (B, T-1)."""
    mask = rollout.mask
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)  # (B, T-1)
    advantages, returns = gae(rewards, rollout.values, mask, gamma, lam)
    deltas, _ = gae(rewards, rollout.values, mask, gamma, 0.0)  # lambda = 0: the TD error
    whitened = masked_whiten(advantages, mask)
    columns = {
        "logprob": rollout.logprobs, "ref": rollout.ref_logprobs,
        "kl cost": kl_coef * kl_k1(rollout.logprobs, rollout.ref_logprobs), "reward": rewards,
        "value": rollout.values, "delta": deltas, "advantage": advantages, "whitened": whitened, "return": returns,
    }
    return {name: x[row][mask[row]] for name, x in columns.items()}, whitened, returns


def after_step(policy, rollout: Rollout, whitened: Tensor, returns: Tensor, row: int, config: dict) -> dict:
    """Parts 5 and 6: one gradient step on the whole rollout. Returns {name: (slots of the row's response,)}."""
    optimizer = runtime.make_optimizer(policy, config["lr"], weight_decay=0.0, eps=1e-5)
    logits, values = policy(rollout.tokens)  # (B, T, V), (B, T)
    new_logprobs = token_logprobs(logits, rollout.tokens, rollout.mask)  # (B, T-1)
    pg_loss, _ = policy_loss(new_logprobs, rollout.logprobs, whitened, rollout.mask, config["clip_eps"])
    v_loss, _ = value_loss(values[:, :-1], rollout.values, returns, rollout.mask, config["value_clip_eps"])
    (pg_loss + config["value_coef"] * v_loss).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config["max_grad_norm"])
    optimizer.step()

    one = rollout.take(torch.tensor([row], device=rollout.tokens.device))
    whitened, returns = (x[row : row + 1, : one.mask.size(1)] for x in (whitened, returns))
    with torch.no_grad():
        logits, values = policy(one.tokens)
        new, values = token_logprobs(logits, one.tokens, one.mask), values[:, :-1]  # (1, T-1)
        # The loss of one slot: the mean over a mask that holds no other slot.
        masks = torch.diag(one.mask[0])[one.mask[0]].unsqueeze(1)  # (slots of the response, 1, T-1)
        pg_losses, clipped = zip(*(policy_loss(new, one.logprobs, whitened, x, config["clip_eps"]) for x in masks))
        v_losses, _ = zip(*(value_loss(values, one.values, returns, x, config["value_clip_eps"]) for x in masks))
    return {"new logprob": new[one.mask], "ratio": (new - one.logprobs)[one.mask].exp(),
            "clipped": torch.stack(clipped), "policy loss": torch.stack(pg_losses),
            "new value": values[one.mask], "value loss": torch.stack(v_losses)}


def print_columns(slots: list[int], tokens: list[str], columns: dict[str, Tensor], total: tuple[str, ...] = ()) -> None:
    """One line per slot; and the sums of the columns named in total."""
    width = max(map(len, tokens))
    print("  ".join(["slot", "token".ljust(width), *(name.rjust(9) for name in columns)]))
    for i, (slot, token) in enumerate(zip(slots, tokens)):
        cells = [("yes" if x[i] else "no") if name == "clipped" else f"{round(x[i].item(), 3) + 0.0:.3f}"
                 for name, x in columns.items()]
        print("  ".join([str(slot).rjust(4), token.ljust(width),
                         *(cell.rjust(max(9, len(name))) for cell, name in zip(cells, columns))]))
    if total:
        cells = [f"{x.sum():.3f}" if name in total else "" for name, x in columns.items()]
        print("  ".join([" sum", " " * width, *(cell.rjust(max(9, len(n))) for cell, n in zip(cells, columns))]))


def main(cfg: WalkConfig) -> None:
    policy, frozen, judge, prompts, config, kl_coef, _ = load_run(cfg)
    if not isinstance(policy, PolicyWithValue):
        raise cli.InputError(f"{cfg.checkpoint} has no value network to follow: give a ppo.pt of --advantage gae")
    if cfg.prompt >= len(prompts):
        raise cli.InputError(f"--prompt {cfg.prompt}: there are {len(prompts)} held-out prompts, numbered from 0")
    batch = [prompts[(cfg.prompt + i) % len(prompts)] for i in range(BATCH)]
    tokenizer, device = frozen.tokenizer, next(policy.parameters()).device
    tokens, prompt_lens = pad_rows([prompt.tokens for prompt in batch], tokenizer.pad_id, device)  # (B, P), (B,)
    rollout = collect(policy, frozen, tokens, prompt_lens, runtime.make_generator(device, cfg.seed, "walk"))

    response = decode_responses(tokenizer, rollout.tokens[:1], rollout.mask[:1])[0]
    gold = "" if judge is None else f", gold {gold_scores(judge, [batch[0].text], [response])[0]:+.1f}"
    print(f"prompt    {' '.join(batch[0].text.split())}\nresponse  {response}\n"
          f"score {rollout.scores[0]:+.3f}{gold}; kl_coef {kl_coef:g}, gamma {config['gamma']:g}, "
          f"lambda {config['lam']:g}\n")
    slots = rollout.mask[0].nonzero().flatten().tolist()
    texts = [repr(tokenizer.decode([i])) for i in rollout.tokens[0, 1:][rollout.mask[0]].tolist()]
    columns, whitened, returns = walk(rollout, 0, kl_coef, config["gamma"], config["lam"])
    print_columns(slots, texts, columns, total=("kl cost", "reward"))
    print(f"\nafter one gradient step on all {BATCH} responses (AdamW, learning rate {config['lr']:g}, "
          f"clip range {config['clip_eps']:g}):\n")
    print_columns(slots, texts, after_step(policy, rollout, whitened, returns, 0, config))


if __name__ == "__main__":
    cli.run(main, WalkConfig)
