"""Stage three: PPO. The policy responds to prompts, the reward model scores the responses, better ones become likelier.

    python train_ppo.py            # reads runs/sft.pt and runs/reward.pt; writes runs/ppo.pt, ppo.csv,
                                   # ppo_samples.csv and evaluation.csv

One to two minutes on two cores; gold goes from about -0.3 to 2.8, and 3 is the most (docs/results.md).

What is maximised, for each prompt, is

    J(pi) = E_pi[score] - kl_coef * KL(pi || reference)

The reference is the fine-tuned model, frozen. The second term is the KL penalty: the reward model was trained on text
like the reference's. It is unreliable off-distribution, and the policy exploits its errors (try --kl-coef 0).

`main` goes through the six parts of a step that README.md draws; `update` below it is parts 5 and 6. What is called by
the name of its module (data, cli, runtime, checkpoints, judge, tables) can be skipped on a first reading.

--advantage replaces GAE in part 4 by RLOO, GRPO or REINFORCE, which need no value network
(rlhf/extras/alternatives.py says what each does to J).

Details that matter and are kept: log-probabilities recomputed the way the update computes them, the k1 penalty inside
the reward, the score on the last action, V = 0 after it, advantages whitened over the rollout, the clipped ratio, a
fixed score for responses that never end.
Left out: whitening of rewards, dropout, top-k and top-p (the policy that samples must be the policy that is trained).
"""

from dataclasses import dataclass

from rlhf.support import cli  # first, so that Ctrl-C prints one line even while torch loads

# isort: split
import torch

from rlhf import data, evaluate
from rlhf.advantages import explained_variance, gae
from rlhf.extras import alternatives, parallel, report
from rlhf.extras.from_checkpoint import tokenizer_of
from rlhf.extras.lora import trained_and_frozen
from rlhf.extras.ptx import PretrainingMix
from rlhf.losses import mean_entropy, policy_loss, value_loss
from rlhf.masked import action_logprobs, chosen_logprobs, masked_mean, masked_whiten
from rlhf.model import PolicyWithValue
from rlhf.rewards import adapt_kl_coef, kl_k1, kl_k3, shape_rewards
from rlhf.rollout import Frozen
from rlhf.support import checkpoints, judge, runtime, tables


@dataclass(frozen=True)
class PPOConfig(cli.TrainConfig):
    """Train the policy with PPO against the reward model (stage three of three)."""

    steps: int = 224
    batch_size: int = 64
    lr: float = 4e-4
    warmup: int = 20
    eval_every: int = 50
    sft: str = cli.arg("", "starting policy and reference (empty: OUT/sft.pt)", group="rollout")
    reward: str = cli.arg("", "reward model (empty: OUT/reward.pt)")
    value_network: str = cli.arg("reward", "start from the reward model, or share the policy's", ("reward", "shared"))
    max_new_tokens: int = cli.arg(40, "longest response, end-of-text included")
    sample_rows: int = cli.arg(0, "responses sampled at once (0: the whole batch)")
    missing_eos_score: float = cli.arg(-3.0, "score of a response without end-of-text")
    temperature: float = cli.arg(1.0, "sampling temperature of policy and reference")
    eval_prompts: int = cli.arg(500, "held-out prompts of the closing evaluation")
    advantage: str = cli.arg("gae", "how advantages are estimated", ("gae", "rloo", "grpo", "reinforce"), group="PPO")
    group_size: int = cli.arg(1, "responses to each prompt in a batch")
    kl_coef: float = cli.arg(0.07, "KL penalty coefficient")
    kl_target: float = cli.arg(0.0, "adapt kl_coef towards this KL, nats/response (0: off)")
    kl_horizon: float = cli.arg(10_000, "responses over which kl_coef adapts")
    minibatch_size: int = cli.arg(16, "minibatch size")
    inner_epochs: int = cli.arg(2, "epochs over each rollout")
    max_kl_old: float = cli.arg(float("inf"), "stop the inner epochs when KL(old, new) exceeds this")
    gamma: float = cli.arg(1.0, "discount")
    lam: float = cli.arg(0.95, "GAE lambda")
    clip_eps: float = cli.arg(0.2, "PPO clip range")
    value_clip_eps: float = cli.arg(float("inf"), "value clip range (inf: off)")
    value_coef: float = cli.arg(0.5, "value loss coefficient")
    entropy_coef: float = cli.arg(0.0, "entropy bonus coefficient")
    ptx_coef: float = cli.arg(0.0, "coefficient of the loss on demonstrations (0: off)")

    def __post_init__(self):
        super().__post_init__()
        cli.check_positive(self, "max_new_tokens", "minibatch_size", "inner_epochs", "clip_eps", "temperature",
                           "kl_horizon", "eval_prompts", "group_size")
        cli.check_not_negative(self, "sample_rows", "kl_coef", "kl_target", "value_coef", "entropy_coef", "ptx_coef")
        for broken, message in (
            (self.batch_size % self.minibatch_size, "--batch-size must be a multiple of --minibatch-size"),
            (self.batch_size % self.group_size, "--batch-size must be a multiple of --group-size"),
            (self.group_size < 2 and self.advantage in ("rloo", "grpo"), "rloo and grpo need --group-size 2 or more"),
            (self.batch_size < 2 and self.advantage == "reinforce", "reinforce needs --batch-size 2 or more"),
            (not min(self.value_clip_eps, self.max_kl_old) > 0, "--value-clip-eps and --max-kl-old must be above 0"),
            (self.kl_target and self.kl_horizon < self.batch_size, "--kl-horizon must be --batch-size or more"),
            (self.kl_target and not self.kl_coef, "--kl-target multiplies --kl-coef, which must start above 0"),
            (not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1), "--gamma and --lam must lie between 0 and 1"),
        ):
            if broken:
                raise ValueError(message)


def main(cfg: PPOConfig) -> None:
    device, amp, scaler = runtime.setup(cfg.device, cfg.amp)
    policy, frozen, inputs = load_models(cfg, device, amp)
    tokenizer, gold_judge = frozen.tokenizer, judge.load_judge(cfg.data)
    limit = max(0, min(policy.gpt.config.block_size, frozen.reward_model.gpt.config.block_size) - cfg.max_new_tokens)
    prompts = data.load_prompts(cfg.data, tokenizer, limit)
    heldout = data.load_prompts(cfg.data, tokenizer, limit, heldout=True)[: cfg.eval_prompts]
    ptx = PretrainingMix(cfg, tokenizer, policy.gpt.config.block_size, device, amp) if cfg.ptx_coef else None

    # No decay: it would pull the policy away from its reference. eps is that of OpenAI's PPO code (baselines).
    optimizer = runtime.make_optimizer(policy, cfg.lr, weight_decay=0.0, eps=1e-5)
    path = cfg.checkpoint("ppo")
    begun = checkpoints.begin(path, cfg, tokenizer, inputs, policy, optimizer, scaler)
    kl_coef = begun.get("kl_coef", cfg.kl_coef)
    print(f"{len(prompts):,} prompts ({len(heldout):,} held out), {cfg.steps * cfg.batch_size:,} responses, "
          f"on {device}, amp {cfg.amp}, seed {cfg.seed}")

    progress = tables.Progress(path.with_suffix(".csv"), cfg.steps, begun, (
        "score", "gold", "kl_ref", "value_loss", "entropy", "clip_fraction", "eos_rate"), cfg.tensorboard)
    for step in range(begun["step"], cfg.steps):
        rows = data.batch_indices(len(prompts), cfg.batch_size // cfg.group_size, step, cfg.seed)
        batch = [prompts[i] for i in rows for _ in range(cfg.group_size)]
        tokens, prompt_lens = data.pad_rows([one.tokens for one in batch], tokenizer.pad_id, device)  # (B, P), (B,)

        # ---- 1 generate, 2 score ----
        # parallel: under torchrun, several processes share the rows. With one process it only calls rollout.collect.
        generator = runtime.make_generator(device, cfg.seed, "rollout", step)
        rollout = parallel.collect(policy, frozen, tokens, prompt_lens, generator)
        # ---- 3 shape ----
        rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef)
        # ---- 4 credit ----
        if cfg.advantage == "gae":
            advantages, returns = gae(rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam)
            # Subtracting the mean is one more baseline. The division keeps the balance with the other losses and with
            # gradient clipping whatever the scale of the scores; AdamW already removes most of the scale.
            advantages = masked_whiten(advantages, rollout.mask)
        else:  # no value network: values and returns are 0
            advantages, returns = alternatives.response_advantages(rewards, rollout.mask, cfg.advantage, cfg.group_size)
        # ---- 5 losses, 6 update ----
        lr = runtime.set_lr(optimizer, cfg.lr * runtime.linear_schedule(step, cfg.steps, cfg.warmup))
        learned = update(policy, optimizer, scaler, rollout, advantages, returns, cfg, amp, step, ptx)

        score = rollout.scores.mean().item()
        kl_ref = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(dim=1).mean().item()  # nats per response
        runtime.check_finite(policy, step + 1, score, kl_ref, learned["policy_loss"], learned["value_loss"])
        report.check_first_step(step, kl_ref, learned["first_log_ratio"], amp)
        progress.tokens += int(rollout.mask.sum())
        metrics = dict(  # every column of ppo.csv; docs/metrics.md explains them
            score=score,
            gold=evaluate.mean_gold(gold_judge, batch, rollout, tokenizer),
            kl_ref=kl_ref,
            objective=score - kl_coef * kl_ref,
            kl_coef=kl_coef,
            **learned,  # policy_loss to first_log_ratio, see update
            explained_variance=explained_variance(rollout.values, returns, rollout.mask).item(),
            length=rollout.mask.sum(dim=1).float().mean().item(),
            eos_rate=rollout.ended(tokenizer.eos_id).float().mean().item(),
            lr=lr,
        )
        if cfg.advantage != "gae":
            metrics |= dict.fromkeys(["value_loss", "value_clip_fraction", "explained_variance"])  # empty cells
        progress.log(step + 1, **metrics)
        if cfg.kl_target:
            kl_coef = adapt_kl_coef(kl_coef, kl_ref, cfg.kl_target, cfg.kl_horizon, cfg.batch_size)
        done = step + 1
        if done % cfg.eval_every == 0 or done == cfg.steps:
            said = evaluate.respond(policy.gpt, heldout[:3], frozen, gold_judge)
            report.print_responses(now=said)
            runtime.check_finite(policy, done, *(one["kl_ref"] for one in said))
            checkpoints.save(path, "ppo", policy, cfg, done, tokenizer, optimizer, scaler, inputs, progress,
                             kl_coef=kl_coef)

    print("\nbefore and after, on held-out prompts:")
    frozen = frozen._replace(rows=cfg.micro_batch_size or 128)
    rows, before, after = evaluate.compare(policy.gpt, heldout, frozen, gold_judge, kl_coef, cfg.seed, parallel.collect)
    tables.write_csv(path.with_name("evaluation.csv"), rows)
    tables.write_csv(path.with_name("ppo_samples.csv"), report.sample_rows(before, after))
    report.print_responses(before=before[:3], after=after[:3])
    print(f"\nwrote {path}, evaluation.csv and ppo_samples.csv; next: python -m rlhf.tools.optimality\n")
    report.print_table(rows)


def update(policy, optimizer, scaler, rollout, advantages, returns, cfg: PPOConfig, amp, step, ptx=None) -> dict:
    """Parts 5 and 6: several epochs over one rollout, in random minibatches.

    A rollout is expensive, so it is used for many gradient steps. From the second on, the policy is not the one that
    sampled: that is what the ratio and the clip in policy_loss are for. Of the policy that sampled only the rollout's
    log-probabilities and values are kept. Advantages and returns stay fixed.

    Args: advantages, returns: (B, T-1).  Returns: means over the gradient steps.
    """
    means, grad_norms, first_log_ratio = tables.Means(), [], rollout.logprobs.new_zeros(())
    for epoch in range(cfg.inner_epochs):
        generator = runtime.make_generator("cpu", cfg.seed, "update", step, epoch)
        order = torch.randperm(len(rollout.tokens), generator=generator).to(rollout.tokens.device)
        for rows in order.split(cfg.minibatch_size):
            optimizer.zero_grad()
            # Every gradient step divides by the same number of actions, that of the rollout times the minibatch's share
            # of rows: so the mean of an epoch's gradients is the gradient of the whole rollout.
            divisor, minibatch_kl_old = rollout.mask.sum().double() * len(rows) / len(order), 0.0
            # Micro-batches save memory: their gradients sum to the minibatch's.
            for micro in parallel.share(rows).split(cfg.micro_batch_size or len(rows)):
                mb = rollout.take(micro)
                mb_advantages, mb_returns = (x[micro, : mb.mask.size(1)] for x in (advantages, returns))  # (b, t-1)
                share = mb.mask.sum() / divisor
                with runtime.autocast(mb.tokens.device, amp):
                    hidden, new_values = policy.hidden(mb.tokens)  # (b, t, C), (b, t)
                    logprobs = action_logprobs(hidden, mb.mask, policy.gpt.logits)  # (actions, V)
                new_logprobs = chosen_logprobs(logprobs, mb.tokens, mb.mask)  # (b, t-1)

                # ---- 5 losses ----
                pg_loss, clip_fraction = policy_loss(new_logprobs, mb.logprobs, mb_advantages, mb.mask, cfg.clip_eps)
                v_loss, v_clipped = value_loss(new_values[:, :-1], mb.values, mb_returns, mb.mask, cfg.value_clip_eps)
                mb_entropy = mean_entropy(logprobs if cfg.entropy_coef else logprobs.detach())
                loss = pg_loss + cfg.value_coef * v_loss - cfg.entropy_coef * mb_entropy

                # ---- 6 update ----
                scaler.scale(share * loss).backward()

                kl_old = masked_mean(kl_k3(mb.logprobs, new_logprobs.detach()), mb.mask)  # nats per token
                minibatch_kl_old += share * kl_old
                if not grad_norms:  # the first minibatch, in which old and new policy are the same
                    largest = (new_logprobs.detach() - mb.logprobs).abs().max()
                    first_log_ratio = torch.maximum(first_log_ratio, largest)  # NaN stays NaN
                means.add(share, policy_loss=pg_loss, value_loss=v_loss, entropy=mb_entropy,
                          clip_fraction=clip_fraction, value_clip_fraction=v_clipped, kl_old=kl_old)
            if ptx is not None:
                ptx.backward(policy.gpt, scaler, step, len(grad_norms))
            minibatch_kl_old = parallel.sum_gradients(policy, minibatch_kl_old)
            grad_norms.append(runtime.optimizer_step(policy, optimizer, scaler, cfg.max_grad_norm))
        if cfg.max_kl_old < float("inf") and minibatch_kl_old > cfg.max_kl_old:  # of the epoch's last minibatch
            break  # the policy is far from the one that made the rollout, whose advantages say little about it
    norms = torch.stack(grad_norms)  # in float16 one may be infinite: the scaler has left that step out
    return {**parallel.total(means.over(len(grad_norms))), "grad_norm": norms[norms.isfinite()].mean().item(),
            "gradient_steps": len(grad_norms), "first_log_ratio": first_log_ratio.item()}


def load_models(cfg: PPOConfig, device, amp):
    """The policy with its value estimate; what is frozen; and the digests of what the run is made from."""
    sft_path, reward_path = cfg.checkpoint("sft"), cfg.checkpoint("reward")
    gpt, sft = checkpoints.load_policy(sft_path, "sft")
    reward_model, reward = checkpoints.load_reward_model(reward_path)
    tokenizer = tokenizer_of(sft_path, sft, cfg.data)
    checkpoints.check_tokenizer(reward_path, reward, tokenizer)
    inputs = checkpoints.digests(sft=sft_path, reward=reward_path, prompts=tables.csv_path(cfg.data, "prompts"))
    checkpoints.check_input(reward_path, reward, "sft", sft_path)

    gpt.temperature = cfg.temperature
    generator = runtime.make_generator("cpu", cfg.seed, "adapters")
    policy_gpt, reference = trained_and_frozen(gpt, cfg.lora_rank, generator)
    value_gpt = None
    if cfg.advantage == "gae" and cfg.value_network == "reward":
        # Its network already tells good responses from bad ones. The value head is new and starts at zero.
        value_gpt, reward_model.gpt = trained_and_frozen(reward_model.gpt, cfg.lora_rank, generator)
    policy = (PolicyWithValue(policy_gpt, value_gpt) if cfg.advantage == "gae"
              else alternatives.PolicyWithoutValue(policy_gpt))
    if cfg.ptx_coef:
        inputs |= checkpoints.digests(demonstrations=tables.csv_path(cfg.data, "demonstrations"))
    frozen = Frozen(reference.to(device), reward_model.to(device), tokenizer, cfg.max_new_tokens,
                    cfg.missing_eos_score, cfg.micro_batch_size or cfg.minibatch_size, amp, cfg.sample_rows)
    return policy.to(device), frozen, inputs


if __name__ == "__main__":
    parallel.run(main, PPOConfig)
