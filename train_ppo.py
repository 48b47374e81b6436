"""Stage three: PPO. The policy answers prompts, the reward model scores the answers, better answers become likelier.

    python train_ppo.py            # reads runs/sft.pt and runs/reward.pt; writes runs/ppo.pt, ppo.csv,
                                   # ppo_samples.csv and evaluation.csv

About two and a half minutes on two cores; gold goes from about -0.2 to 2.8, and 3 is the most (docs/results.md).

What is maximised, for each prompt, is

    J(pi) = E_pi[score] - kl_coef * KL(pi || reference)

The reference is the fine-tuned model, frozen. The second term is the leash: the reward model was trained on text like
the reference's and is a poor judge of anything else, so a policy without it (--kl-coef 0) finds the mistakes of the
judge instead of better answers.

A step has six parts; README.md draws them, and the numbers in the comments here are theirs.

Kept of the details that matter: log-probabilities re-computed in the mode of the update, the k1 penalty inside the
reward, the score on the last action, V = 0 after it, advantages whitened over the rollout, the clipped ratio, a fixed
score for answers that never end.
Left out: whitening of rewards, dropout, top-k and top-p (the policy that samples must be the policy that is trained).
"""

import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from rlhf.advantages import explained_variance, gae
from rlhf.checkpoints import load_policy, load_reward_model
from rlhf.cli import arg, check_not_negative, check_positive, run
from rlhf.common import (
    InputError, Progress, autocast, check_finite, check_tokenizer, csv_path, digests, make_generator, make_scaler,
    pick_amp, pick_device, resume, save_checkpoint, write_csv,
)
from rlhf.data import batch_indices, find_tokenizer, load_prompts, pad_rows
from rlhf.evaluate import Setting, answer, compare, mean_gold
from rlhf.judge import load_judge
from rlhf.lora import trained_and_frozen
from rlhf.losses import entropy, policy_loss, value_loss
from rlhf.masked import masked_mean, masked_whiten, token_logprobs
from rlhf.model import PolicyWithValue
from rlhf.optim import linear_schedule, make_optimizer, optimizer_step, set_lr
from rlhf.ptx import PretrainingMix
from rlhf.report import print_answers, print_pairs, print_table, sample_rows
from rlhf.rewards import adapt_kl_coef, kl_k1, kl_k3, shape_rewards
from rlhf.rollout import Rollout, collect, has_ended


@dataclass(frozen=True)
class PPOConfig:
    """Train the policy with PPO against the reward model (stage three of three)."""

    # data
    data: str = arg("data/tiny_assistant", "data set folder")
    out: str = arg("runs", "folder for the checkpoint and the metrics")
    sft: str = arg("", "starting policy and frozen reference; empty: sft.pt in --out")
    reward: str = arg("", "frozen reward model; empty: reward.pt in --out")
    # reward
    max_new_tokens: int = arg(40, "longest response in tokens, end-of-text included")
    missing_eos_score: float = arg(-3.0, "replaces the score of a response without end-of-text")
    temperature: float = arg(1.0, "divides the logits of policy and reference, in sampling and training alike")
    kl_coef: float = arg(0.07, "price of a nat of KL to the reference, in units of score")
    kl_target: float = arg(0.0, "adapt kl_coef, from the one given, towards this many nats per response; 0: keep it")
    kl_horizon: float = arg(10_000, "episodes in which the adaptation takes effect")
    # PPO
    batch_size: int = arg(128, "episodes a step")
    minibatch_size: int = arg(32, "episodes a gradient step")
    micro_batch_size: int = arg(0, "of these, how many at once when scored and updated (sampling takes the batch); the "
                                "same gradient in less memory; 0: all")
    inner_epochs: int = arg(2, "passes over each rollout")
    max_kl_old: float = arg(math.inf, "no further pass over a rollout once the policy, before the last gradient step "
                            "of a pass, is this many nats per token from the one that made it")
    gamma: float = arg(1.0, "discount")
    lam: float = arg(0.95, "GAE's lambda")
    clip_eps: float = arg(0.2, "the ratio earns nothing beyond 1 - eps and 1 + eps")
    value_clip_eps: float = arg(math.inf, "to move the value further than this from the rollout's earns nothing; inf: "
                                "no clipping")
    value_coef: float = arg(0.5, "weight of the value loss")
    entropy_coef: float = arg(0.0, "weight of the entropy bonus")
    ptx_coef: float = arg(0.0, "weight of the imitation of demonstrations (rlhf/ptx.py)")
    value_network: str = arg("reward", "reward: a network of its own, started from the reward model; shared: a head "
                             "on the policy, in less time and memory", ("reward", "shared"))
    lora_rank: int = arg(0, "train adapters of this rank instead of the weights (rlhf/lora.py); 0: the weights")
    # optimisation
    steps: int = arg(112, "rollout-and-update steps")
    lr: float = arg(6e-4, "peak learning rate")
    warmup: int = arg(20, "steps of linear warm-up, then linear decay towards 0")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    # run
    eval_prompts: int = arg(500, "held-out prompts of the closing evaluation")
    optimum_prompts: int = arg(48, "of these, how many the best possible policy is estimated on")
    optimum_samples: int = arg(256, "reference samples for each of them")
    device: str = arg("auto", "where to run; auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    amp: str = arg("off", "mixed precision; auto is bf16 on a GPU that has it", ("auto", "off", "bf16", "fp16"))
    seed: int = arg(0, "of the order of the prompts, the samples and the minibatches")
    eval_every: int = arg(25, "steps between sample answers and checkpoints")
    resume: bool = arg(False, "go on from the checkpoint in --out")

    def __post_init__(self):
        check_positive(self, "max_new_tokens", "batch_size", "minibatch_size", "inner_epochs", "clip_eps", "steps",
                       "temperature", "kl_horizon", "lr", "max_grad_norm", "eval_prompts", "optimum_prompts",
                       "eval_every")
        check_not_negative(self, "kl_coef", "kl_target", "value_coef", "entropy_coef", "ptx_coef", "micro_batch_size",
                           "lora_rank", "warmup")
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"--batch-size ({self.batch_size}) must be a multiple of --minibatch-size "
                             f"({self.minibatch_size})")
        if self.optimum_samples < 4 or self.optimum_samples % 2:
            raise ValueError(f"--optimum-samples is {self.optimum_samples}: give an even number, 4 or more")
        if not (self.value_clip_eps > 0 and self.max_kl_old > 0):
            raise ValueError("--value-clip-eps and --max-kl-old must be above 0; inf turns them off")
        if self.kl_target and self.kl_horizon < self.batch_size:
            raise ValueError(f"--kl-horizon ({self.kl_horizon:g}) counts episodes: give --batch-size "
                             f"({self.batch_size}) or more")
        if self.kl_target and not self.kl_coef:
            raise ValueError("--kl-target multiplies --kl-coef step by step, so it needs one above 0 to start from")
        if not abs(self.missing_eos_score) <= 1e6:
            raise ValueError("--missing-eos-score must lie between -1e6 and 1e6")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError("--gamma and --lam must lie between 0 and 1")


def batch_losses(policy, rollout: Rollout, advantages, returns, rows, cfg: PPOConfig, amp, stats: list):
    """Part 5 of a step: the loss of some rows of the rollout, in parts that fit in memory (--micro-batch-size). A part
    weighs as much as it has actions, so the parts sum to the mean over all of them. Appends its figures to stats.

    A generator: nothing runs until optimizer_step takes the parts, one by one."""
    actions = rollout.mask[rows].sum()
    for part in rows.split(cfg.micro_batch_size or len(rows)):
        mb = rollout.take(part)
        with autocast(mb.tokens.device, amp):
            logits, values = policy(mb.tokens)  # (B, T, V), (B, T)
        new_logprobs = token_logprobs(logits, mb.tokens, mb.mask)  # (B, T-1)

        # ---- 5 losses ----
        mb_advantages, mb_returns = (x[part, : mb.mask.size(1)] for x in (advantages, returns))
        pg_loss, clip_fraction = policy_loss(new_logprobs, mb.logprobs, mb_advantages, mb.mask, cfg.clip_eps)
        v_loss, v_clip_fraction = value_loss(values[:, :-1], mb.values, mb_returns, mb.mask, cfg.value_clip_eps)
        mb_entropy = entropy(logits if cfg.entropy_coef else logits.detach(), mb.mask)  # often a figure alone
        loss = pg_loss + cfg.value_coef * v_loss - cfg.entropy_coef * mb_entropy

        share = mb.mask.sum() / actions
        kl_old = masked_mean(kl_k3(mb.logprobs, new_logprobs.detach()), mb.mask)  # nats per token
        figures = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": mb_entropy, "clip_fraction": clip_fraction,
                   "value_clip_fraction": v_clip_fraction, "kl_old": kl_old}
        stats.append({**{name: share * figure.detach() for name, figure in figures.items()},
                      "max_log_ratio": (new_logprobs - mb.logprobs).detach().abs().max()})
        yield share * loss


def update(
    policy, optimizer, scaler, rollout: Rollout, advantages, returns, cfg: PPOConfig, amp, step: int, ptx=None
) -> dict:
    """Parts 5 and 6 of a step: several passes over one rollout, each in random minibatches. Returns means
    over the gradient steps. ptx: see rlhf/ptx.py."""
    stats, grad_norms, first_log_ratio = [], [], None
    for epoch in range(cfg.inner_epochs):
        order = torch.randperm(len(rollout.tokens), generator=make_generator("cpu", cfg.seed, "update", step, epoch))
        minibatches = order.to(rollout.tokens.device).split(cfg.minibatch_size)
        for i, rows in enumerate(minibatches):
            begun = len(stats)
            losses = batch_losses(policy, rollout, advantages, returns, rows, cfg, amp, stats)
            if ptx is not None:
                losses = chain(losses, ptx(policy.gpt, (step * cfg.inner_epochs + epoch) * len(minibatches) + i))

            # ---- 6 update ----
            _, grad_norm = optimizer_step(losses, policy, optimizer, scaler, cfg.max_grad_norm)
            grad_norms.append(grad_norm)
            if first_log_ratio is None:  # all parts of the first minibatch, where old and new policy are the same
                first_log_ratio = torch.stack([one["max_log_ratio"] for one in stats]).max().item()
        if sum(one["kl_old"].item() for one in stats[begun:]) > cfg.max_kl_old:  # of the last minibatch
            break  # far enough from the policy that made the rollout; its advantages say little about this one
    means = {name: sum(one[name] for one in stats).item() / len(grad_norms) for name in stats[0]
             if name != "max_log_ratio"}
    norms = torch.stack(grad_norms)  # in float16 one may be infinite: the scaler has left that step out
    return {**means, "grad_norm": norms[norms.isfinite()].mean().item(), "gradient_steps": len(grad_norms),
            "first_log_ratio": first_log_ratio}


def check_beginning(step: int, kl_ref: float, first_log_ratio: float, amp) -> None:
    """Facts that hold whatever the data, and whose failure means that two of the passes disagree."""
    faults = []
    tolerance = 1e-4 if amp is None else 0.1
    if step == 0 and not abs(kl_ref) <= tolerance:  # `not <=`, so that NaN fails too
        faults.append(f"kl_ref is {kl_ref} before the first update; policy and reference must be the same")
    if not first_log_ratio <= tolerance:
        faults.append(f"log ratio {first_log_ratio} in the first minibatch, where old and new policy are the same")
    if faults and amp is None:
        raise RuntimeError("; ".join(faults))
    for fault in faults:  # in half precision an unlikely token may be off by this much
        print(f"warning: {fault}")
    if kl_ref < -1:
        print(f"warning: kl_ref is {kl_ref:.2f} nats; a KL this negative means that sampler and scorer disagree")


def load_models(cfg: PPOConfig, device):
    """The policy and its value estimate, the frozen reference, the frozen reward model, the tokenizer; and the digests
    of what the run is made from."""
    sft_path = Path(cfg.sft or Path(cfg.out) / "sft.pt")
    reward_path = Path(cfg.reward or Path(cfg.out) / "reward.pt")
    gpt, sft = load_policy(sft_path, "sft")
    reward_model, reward = load_reward_model(reward_path)
    tokenizer = find_tokenizer(cfg.data, sft["config"]["tokenizer"])
    check_tokenizer(sft_path, sft, tokenizer)
    check_tokenizer(reward_path, reward, tokenizer)

    gpt.temperature = cfg.temperature
    generator = make_generator("cpu", cfg.seed, "adapters")
    policy_gpt, reference = trained_and_frozen(gpt, cfg.lora_rank, generator)
    value_gpt = None
    if cfg.value_network == "reward":
        if reward_model.gpt.config.n_embd != gpt.config.n_embd:
            raise InputError("--value-network reward needs a reward model as wide (n_embd) as the policy")
        # What tells good answers from bad ones has been learned there already.
        value_gpt, reward_model.gpt = trained_and_frozen(reward_model.gpt, cfg.lora_rank, generator)
    policy = PolicyWithValue(policy_gpt, value_gpt)
    files = {"sft": sft_path, "reward": reward_path, "prompts": csv_path(cfg.data, "prompts")}
    if cfg.ptx_coef:
        files["demonstrations"] = csv_path(cfg.data, "demonstrations")
    inputs = digests(**files)
    return policy.to(device), reference.to(device), reward_model.to(device), tokenizer, inputs


def main(cfg: PPOConfig) -> None:
    device = pick_device(cfg.device)
    amp = pick_amp(cfg.amp, device)
    policy, reference, reward_model, tokenizer, inputs = load_models(cfg, device)
    limit = min(reference.config.block_size, reward_model.gpt.config.block_size) - cfg.max_new_tokens
    if limit < 1:
        raise InputError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a prompt in a context of "
                         f"{limit + cfg.max_new_tokens} tokens; lower it")
    prompts = load_prompts(cfg.data, tokenizer, limit)
    heldout = load_prompts(cfg.data, tokenizer, limit, heldout=True)[: cfg.eval_prompts]
    judge = load_judge(cfg.data)

    # No decay: it would pull the policy away from its reference. eps is that of OpenAI's PPO code (baselines).
    optimizer = make_optimizer(policy, cfg.lr, weight_decay=0.0, eps=1e-5)
    scaler = make_scaler(device, amp)
    path, start, kl_coef = Path(cfg.out) / "ppo.pt", 0, cfg.kl_coef
    if cfg.resume:
        checkpoint = resume(path, "ppo", cfg, tokenizer, inputs, policy, optimizer, scaler)
        start, kl_coef = checkpoint["step"], checkpoint["kl_coef"]
    ptx = PretrainingMix(cfg.ptx_coef, cfg.data, tokenizer, reference.config.block_size, cfg.minibatch_size,
                         cfg.micro_batch_size, cfg.seed, device, amp)
    print(f"{len(prompts):,} prompts ({len(heldout):,} held out), {cfg.steps * cfg.batch_size:,} episodes, "
          f"on {device}, amp {cfg.amp}, seed {cfg.seed}")

    chunk_size = cfg.micro_batch_size or cfg.minibatch_size  # rows at once when a rollout is scored
    setting = Setting(reference, reward_model, tokenizer, judge, cfg.max_new_tokens, cfg.missing_eos_score,
                      cfg.micro_batch_size or 128, amp)
    progress = Progress(Path(cfg.out) / "ppo.csv", cfg.steps, start, csv_only=(
        "objective", "kl_coef", "value_clip_fraction", "kl_old", "grad_norm", "gradient_steps", "first_log_ratio",
        "lr"))
    for step in range(start, cfg.steps):
        batch = [prompts[i] for i in batch_indices(len(prompts), cfg.batch_size, step, cfg.seed)]
        tokens, prompt_lens = pad_rows([prompt.tokens for prompt in batch], tokenizer.pad_id, device)  # (B, P), (B,)

        # ---- 1 generate, 2 score ----
        generator = make_generator(device, cfg.seed, "rollout", step)
        rollout = collect(policy, reference, reward_model, tokens, prompt_lens, cfg.max_new_tokens, tokenizer.eos_id,
                          cfg.missing_eos_score, chunk_size, amp, generator)
        # ---- 3 shape ----
        rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef)
        # ---- 4 credit ----
        advantages, returns = gae(rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam)
        # The mean taken away is one more baseline; the division frees --lr from the unit of the scores.
        advantages = masked_whiten(advantages, rollout.mask)
        # ---- 5 losses, 6 update ----
        lr = cfg.lr * linear_schedule(step, cfg.steps, cfg.warmup)
        set_lr(optimizer, lr)
        stats = update(policy, optimizer, scaler, rollout, advantages, returns, cfg, amp, step, ptx)
        check_finite(policy, step + 1)

        kl_ref = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(dim=1).mean().item()  # nats per response
        check_beginning(step, kl_ref, stats["first_log_ratio"], amp)
        progress.tokens += int(rollout.mask.sum())
        progress.log(
            step + 1,
            score=rollout.scores.mean().item(),
            gold=mean_gold(judge, batch, rollout, tokenizer),
            kl_ref=kl_ref,
            objective=rollout.scores.mean().item() - kl_coef * kl_ref,
            kl_coef=kl_coef,
            **stats,
            explained_variance=explained_variance(rollout.values, returns, rollout.mask).item(),
            length=rollout.mask.sum(dim=1).float().mean().item(),
            eos_rate=has_ended(rollout.tokens, rollout.mask, tokenizer.eos_id).float().mean().item(),
            lr=lr,
        )
        if cfg.kl_target:
            kl_coef = adapt_kl_coef(kl_coef, kl_ref, cfg.kl_target, cfg.kl_horizon, cfg.batch_size)
        done = step + 1
        if done % cfg.eval_every == 0 or done == cfg.steps:
            print_answers(answer(policy.gpt, heldout[:3], setting))
            save_checkpoint(path, "ppo", policy, cfg, done, tokenizer, optimizer, scaler, inputs, kl_coef=kl_coef)

    print(f"\nheld out: {len(heldout)} prompts, one sampled response each")
    table, before, after, trust = compare(
        policy.gpt, heldout, setting, kl_coef, cfg.optimum_prompts, cfg.optimum_samples, cfg.seed)
    print_table(table)
    print(trust)
    print_pairs(before, after, 3)
    write_csv(Path(cfg.out) / "evaluation.csv", table)
    write_csv(Path(cfg.out) / "ppo_samples.csv", sample_rows(before, after))
    print(f"\nwrote {path}, {Path(cfg.out) / 'evaluation.csv'} and {Path(cfg.out) / 'ppo_samples.csv'}")


if __name__ == "__main__":
    run(main, PPOConfig)
