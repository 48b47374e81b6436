"""Stage three: PPO. The policy responds to prompts, the reward model scores the responses, better
ones become likelier.

    python train_ppo.py     # reads runs/sft.pt and runs/reward.pt; writes runs/ppo.pt, ppo.csv,
                            # ppo_tokens.csv, ppo_samples.csv and evaluation.csv

One to two minutes on two cores; gold goes from about -0.3 to 2.8, and the maximum is 3
(docs/results.md).

What is maximised, for each prompt, is

    J(pi) = E_pi[score] - kl_coef * KL(pi || reference)

The reference is the fine-tuned model, frozen. The second term is the KL penalty: the reward model
was trained on text like the reference's. It is unreliable off-distribution, and the policy exploits
its errors (try --kl-coef 0).

`main` goes through the six parts of a step that README.md draws. Parts 1 and 2 are in
rlhf/rollout.py, parts 5 and 6 in rlhf/ppo.py. What comes from rlhf/run can be skipped on a first
reading.

--reward takes functions of your own in the reward model's place or beside it (docs/data.md).
--advantage replaces GAE in part 4 by RLOO, GRPO or REINFORCE, which need no value network
(rlhf/advantages.py says what each does to J).

Details that matter and are kept: log-probabilities recomputed the way the update computes them, the
k1 penalty inside the reward, the score on the last action, V = 0 after it, advantages whitened over
the rollout, the clipped ratio, a fixed score for responses that never end.
Left out: whitening of rewards, dropout, top-k and top-p (the policy that samples must be the policy
that is trained).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf import evaluate
from rlhf.data import Prompt, choose_batch, load_prompts, pad_prompts
from rlhf.model import GPT, PolicyWithoutValue, PolicyWithValue, RewardModel
from rlhf.ppo import Experience, assign_credit, update
from rlhf.rewards import adapt_kl_coef, shape_rewards
from rlhf.rollout import Frozen, collect, score_rows
from rlhf.run import loading, program, warnings
from rlhf.run.checks import check_finite, check_first_step, check_numbers
from rlhf.run.device import Compute, make_generator, setup
from rlhf.run.files import csv_path, digests, write_csv
from rlhf.run.flags import TrainConfig, arg, check_positive, check_range
from rlhf.run.judge import load_judge
from rlhf.run.optimizer import linear_schedule, make_optimizer, set_lr
from rlhf.run.progress import token_rows
from rlhf.run.reward_functions import Rewards, named_rewards, part_means
from rlhf.run.training import Training

SHOWN = ("score", "gold", "kl_ref", "value_loss", "entropy", "clip_fraction", "eos_rate")
MUST_BE_FINITE = ("score", "kl_ref", "policy_loss", "value_loss")
VALUE_METRICS = ("value_loss", "value_clip_fraction", "explained_variance")


@dataclass(frozen=True)
class PPOConfig(TrainConfig):
    """Train the policy with PPO against the reward model (stage three of three)."""

    kind = "ppo"

    steps: int = 224
    batch_size: int = 64
    lr: float = 4e-4
    warmup: int = 20
    log_every: int = 10
    eval_every: int = 50
    sft: str = arg("", "starting policy and reference (empty: OUT/sft.pt)", group="rollout")
    reward: tuple[str, ...] = arg((), "reward.pt, FILE.py[:FUNCTION], or several")
    reward_weights: tuple[float, ...] = arg((), "weight of each reward (empty: 1)")
    value_network: str = arg(
        "reward", "start from the reward model, or share the policy's", ("reward", "shared")
    )
    max_new_tokens: tuple[int, ...] = arg((40,), "longest response; two: drawn between")
    sample_rows: int = arg(0, "responses sampled at once (0: the whole batch)")
    missing_eos_score: float | None = arg(-3.0, "score without end-of-text (none: as it is)")
    temperature: float = arg(1.0, "sampling temperature of policy and reference")
    eval_prompts: int = arg(500, "held-out prompts of the closing evaluation")
    advantage: str = arg(
        "gae", "how advantages are estimated", ("gae", "rloo", "grpo", "reinforce"), group="PPO"
    )
    group_size: int = arg(1, "responses to each prompt in a batch")
    kl_coef: float = arg(0.07, "KL penalty coefficient")
    kl_target: float = arg(0.0, "adapt kl_coef towards this KL, nats/response (0: off)")
    kl_horizon: float = arg(10_000, "responses over which kl_coef adapts")
    minibatch_size: int = arg(16, "minibatch size")
    inner_epochs: int = arg(2, "epochs over each rollout")
    gamma: float = arg(1.0, "discount")
    lam: float = arg(0.95, "GAE lambda")
    clip_eps: float = arg(0.2, "PPO clip range")
    value_clip_eps: float = arg(0.0, "value clip range (0: off)")
    value_coef: float = arg(0.5, "value loss coefficient")
    entropy_coef: float = arg(0.0, "entropy bonus coefficient")

    def __post_init__(self):
        super().__post_init__()
        positive = ("temperature", "eval_prompts", "group_size", "kl_horizon", "clip_eps")
        check_positive(self, *positive, "minibatch_size", "inner_epochs")
        check_range("max_new_tokens", self.max_new_tokens)
        self.rewards()  # refuses weights that do not fit
        for size in ("minibatch_size", "group_size"):
            if self.batch_size % getattr(self, size):
                raise ValueError(f"--batch-size must be a multiple of --{size.replace('_', '-')}")
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            raise ValueError("rloo and grpo need --group-size 2 or more")
        if self.advantage == "reinforce" and self.batch_size < 2:
            raise ValueError("reinforce needs --batch-size 2 or more")
        if self.kl_target and self.kl_horizon < self.batch_size:
            raise ValueError("--kl-horizon must be --batch-size or more")
        if self.kl_target and not self.kl_coef:
            raise ValueError("--kl-target multiplies --kl-coef, which must start above 0")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError("--gamma and --lam must lie between 0 and 1")

    def rewards(self) -> Rewards:
        default = Path(self.out) / "reward.pt"
        return named_rewards(self.reward, self.reward_weights, default)


def main(cfg: PPOConfig) -> None:
    compute = setup(cfg.device, cfg.amp)
    policy, frozen, inputs = load_models(cfg, compute)
    tokenizer = frozen.tokenizer
    judge = load_judge(cfg.data)
    prompts, heldout = load_both_prompts(cfg, frozen)

    # No decay: it would pull the policy away from its reference. eps is that of OpenAI's baselines,
    # whose gradients have another scale; others were not tried. Policy and value network share one
    # rate and one gradient clip, so large value gradients shorten the policy's step too. Separating
    # them gained nothing (docs/results.md).
    optimizer = make_optimizer(policy, cfg.lr, weight_decay=0.0, eps=1e-5)
    run = Training(cfg, policy, optimizer, compute, tokenizer, inputs)
    kl_coef = run.state.get("kl_coef", cfg.kl_coef)  # a resumed run goes on with its own
    run.announce(
        f"{len(prompts):,} prompts ({len(heldout):,} held out), "
        f"{cfg.steps * cfg.batch_size:,} responses"
    )
    for step in range(run.step, cfg.steps):
        batch = choose_prompts(prompts, step, cfg)
        # (B, P), (B,)
        prompt_tokens, prompt_lens = pad_prompts(batch, tokenizer.pad_id, compute.device)

        # ---- 1 generate, 2 score ----
        generator = make_generator(compute.device, cfg.seed, "rollout", step)
        rollout = collect(policy, frozen, prompt_tokens, prompt_lens, generator, batch)
        # ---- 3 shape ----
        rewards = shape_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef
        )  # (B, T-1)
        # ---- 4 credit ----
        experience = assign_credit(rollout, rewards, cfg)
        # ---- 5 losses, 6 update ----
        lr = set_lr(optimizer, cfg.lr * linear_schedule(step, cfg.steps, cfg.warmup))
        update_metrics = update(policy, optimizer, compute, experience, cfg, step)

        done = step + 1
        # For the log only: nothing is trained on it.
        responses = evaluate.describe(batch, rollout, tokenizer, judge)
        metrics = step_metrics(cfg, responses, update_metrics, kl_coef)
        metrics |= {**part_means(frozen.functions, rollout.parts), "lr": lr}
        check_numbers(done, *[metrics[name] for name in MUST_BE_FINITE])
        check_first_step(policy, step, metrics, compute.amp)
        run.count_tokens(sum(response.length for response in responses))
        run.log(done, metrics, SHOWN)
        run.warnings.add(warnings.of_step(run.rows, cfg))
        kl_coef = adapt_kl_coef(
            kl_coef, metrics["kl_ref"], cfg.kl_target, cfg.kl_horizon, cfg.batch_size
        )
        if run.evaluates(done):
            samples = evaluate.respond(policy.gpt, heldout[:3], frozen, judge)
            run.show_responses(done, samples)
            # The update may have broken the policy: no checkpoint then.
            check_finite(policy, done, *[sample.kl_ref for sample in samples])
            run.save(done, kl_coef=kl_coef)
            if done <= cfg.eval_every:  # to look at: a step in the middle of learning
                write_tokens(run.path, policy, frozen, responses, prompt_lens, rewards, experience)
    # The closing evaluation has no first ratio to keep at 1, so it scores more rows at once.
    frozen = frozen._replace(rows=cfg.micro_batch_size or 128)
    results = evaluate.compare(policy.gpt, heldout, frozen, judge, kl_coef, cfg.seed)
    run.close_policy(*results)


# ---- what a run is made from ----


def load_models(
    cfg: PPOConfig, compute: Compute
) -> tuple[PolicyWithValue | PolicyWithoutValue, Frozen, dict[str, str]]:
    """The policy with its value estimate; what is frozen; digests of what the run is made from."""
    rewards = cfg.rewards()
    gpt, reward_model, functions, tokenizer, inputs = loading.load_stages(
        cfg, rewards, compute.device
    )
    inputs |= digests(prompts=csv_path(cfg.data, "prompts"))

    gpt.temperature = cfg.temperature
    generator = make_generator("cpu", cfg.seed, "adapters")
    gpt = loading.with_adapters(gpt, cfg, generator)
    reference = loading.frozen_copy(gpt).to(compute.device)
    policy = make_policy(cfg, gpt, reward_model, generator).to(compute.device)
    frozen = Frozen(
        reference,
        reward_model,
        tokenizer,
        max_new_tokens=cfg.max_new_tokens[-1],
        missing_eos_score=cfg.missing_eos_score,
        # Rounding depends on the number of rows in a pass, in half precision a lot. So the old
        # log-probabilities are computed with as many as the update takes: the first ratio is 1.
        rows=cfg.micro_batch_size or cfg.minibatch_size,
        amp=compute.amp,
        sample_rows=cfg.sample_rows,
        shortest_limit=cfg.max_new_tokens[0],
        functions=functions,
        weights=rewards.weights,
    )
    return policy, frozen, inputs


def make_policy(
    cfg: PPOConfig, gpt: GPT, reward_model: RewardModel | None, generator: torch.Generator
) -> PolicyWithValue | PolicyWithoutValue:
    """The policy, with a value network if the advantages need one.

    A separate value network starts from the reward model, which already tells good responses from
    bad ones: it takes over reward_model.gpt, which is replaced by a frozen copy. Without a reward
    model it starts from the fine-tuned model. The value head is new and starts at zero.
    """
    if cfg.advantage != "gae":
        return PolicyWithoutValue(gpt)
    if cfg.value_network == "shared":
        return PolicyWithValue(gpt)
    if reward_model is None:
        return PolicyWithValue(gpt, loading.trained_copy(gpt))
    value_gpt = loading.with_adapters(reward_model.gpt, cfg, generator)
    reward_model.gpt = loading.frozen_copy(value_gpt)
    return PolicyWithValue(gpt, value_gpt)


def load_both_prompts(cfg: PPOConfig, frozen: Frozen) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those held out. A response has to fit after each of them."""
    limit = max(0, frozen.context - frozen.max_new_tokens)
    prompts = load_prompts(cfg.data, frozen.tokenizer, limit, share=cfg.heldout)
    heldout = load_prompts(cfg.data, frozen.tokenizer, limit, True, cfg.heldout)
    return prompts, heldout[: cfg.eval_prompts]


def choose_prompts(prompts: list[Prompt], step: int, cfg: PPOConfig) -> list[Prompt]:
    """The prompts of a step; each stands group_size times in a row."""
    chosen = choose_batch(prompts, cfg.batch_size // cfg.group_size, step, cfg.seed)
    return [prompt for prompt in chosen for _ in range(cfg.group_size)]


# ---- metrics ----


@torch.no_grad()
def write_tokens(
    checkpoint: Path,
    policy: PolicyWithValue | PolicyWithoutValue,
    frozen: Frozen,
    responses: list[evaluate.Response],
    prompt_lens: Tensor,
    rewards: Tensor,
    experience: Experience,
) -> None:
    """Write ppo_tokens.csv: the numbers of a step's first responses, also after its update."""
    few = slice(12)
    after = score_rows(
        policy, frozen, experience.tokens[few], experience.mask[few], prompt_lens[few]
    )
    write_csv(
        checkpoint.with_name("ppo_tokens.csv"),
        token_rows(responses[few], rewards, experience, after, frozen.tokenizer),
    )


def step_metrics(
    cfg: PPOConfig,
    responses: list[evaluate.Response],
    update_metrics: dict[str, float],
    kl_coef: float,
) -> dict[str, float | None]:
    """The columns of ppo.csv but those of several rewards, lr and the clock's; docs/metrics.md
    explains them."""
    score = evaluate.mean(responses, "score")
    kl_ref = evaluate.mean(responses, "kl_ref")
    group_size = cfg.group_size if cfg.advantage in ("rloo", "grpo") else cfg.batch_size
    scores = [response.score for response in responses]
    compared = torch.tensor(scores).view(-1, group_size)  # with each other, row by row
    metrics = {
        "score": score,
        "score_std": compared.std(dim=1, correction=0).mean().item(),
        "gold": evaluate.mean(responses, "gold"),
        "kl_ref": kl_ref,  # nats per response
        "objective": score - kl_coef * kl_ref,
        "kl_coef": kl_coef,
        **update_metrics,  # policy_loss to explained_variance: see rlhf/ppo.py
        "length": evaluate.mean(responses, "length"),
        "eos_rate": evaluate.mean(responses, "ended"),
    }
    if cfg.advantage != "gae":
        metrics |= dict.fromkeys(VALUE_METRICS)  # empty cells: there is no value network
    return metrics


if __name__ == "__main__":
    program.run(main, PPOConfig)
