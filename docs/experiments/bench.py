"""Time one PPO iteration: its parts, the share of the machine that it uses, and how the time grows.

Run it from the root of the repository:

    python -m docs.experiments.bench                    # the default sizes; then each doubled
    python -m docs.experiments.bench --against trl      # the same work in TRL 1.9.2
    python -m docs.experiments.bench --prompt 384 --prompt-min 15 --response 128
                                                        # prompts of different lengths

Weights and prompts are random. Every response has full length, because the end-of-text id is -1,
which is never sampled. So the work depends only on the flags. The parts, and what tokens/s counts:

    sampling     rlhf.sampling.generate                      sampled tokens
    scoring      rlhf.rollout.score_rows                     tokens of prompts and responses
    update       rewards, advantages and rlhf.ppo.update     the same, once per epoch
    iteration    all of it                                   sampled tokens

On a busy machine only ratios within one run are reliable: the update's FLOPs per second against
those of a large matrix product (`peak`), a doubled size against the base, this code against TRL.
The two sides of a ratio take turns. Each number is the median over --repeats. docs/performance.md
has recorded numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from docs.experiments.measure import (
    clock,
    matmul_rate,
    medians,
    peak_memory,
    ratios,
    training_flops,
)
from docs.experiments.trl import trl_iterations
from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from rlhf.ppo import assign_credit, update
from rlhf.rewards import shape_rewards
from rlhf.rollout import Frozen, Rollout, score_rows
from rlhf.run.device import Compute, setup
from rlhf.run.flags import arg, check_positive
from rlhf.run.optimizer import make_optimizer
from rlhf.run.program import run
from rlhf.run.progress import print_table
from rlhf.sampling import generate
from train_ppo import PPOConfig

NO_EOS = -1  # an id that is never sampled
DOUBLED = ("batch", "response", "n_embd", "vocab")


@dataclass(frozen=True)
class BenchConfig:
    """Time one PPO iteration on random weights and prompts."""

    n_layer: int = arg(4, "layers", group="network")
    n_embd: int = arg(128, "width")
    n_head: int = arg(4, "attention heads")
    vocab: int = arg(512, "vocabulary size")
    value_network: str = arg(
        "separate", "separate value network, or the policy's", ("separate", "shared")
    )
    batch: int = arg(128, "responses per iteration", group="work")
    prompt: int = arg(24, "tokens of the longest prompt")
    prompt_min: int = arg(0, "tokens of the shortest prompt (0: all are equal)")
    response: int = arg(32, "tokens of a response")
    inner_epochs: int = arg(4, "epochs over each rollout")
    minibatches: int = arg(4, "minibatches per epoch")
    repeats: int = arg(3, "timed repeats, after a warm-up", group="measurement")
    against: str = arg(
        "doubled", "compare with doubled sizes, or with TRL", ("doubled", "trl", "nothing")
    )
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    amp: str = arg(
        "off", "mixed precision; auto: bf16 on a GPU that has it", ("auto", "off", "bf16", "fp16")
    )

    def __post_init__(self):
        check_positive(
            self, "batch", "prompt", "response", "inner_epochs", "minibatches", "repeats"
        )
        self.shape()  # a ValueError says which sizes do not fit together
        prompts_fit = 0 <= self.prompt_min <= self.prompt
        if self.batch % self.minibatches or not prompts_fit:
            raise ValueError(
                "--batch must be a multiple of --minibatches, and --prompt-min at most --prompt"
            )

    def shape(self) -> GPTConfig:
        context = self.prompt + self.response
        return GPTConfig(self.vocab, context, self.n_layer, self.n_head, self.n_embd)

    def prompt_lens(self) -> Tensor:
        """(B,), spread evenly from the shortest to the longest, in an order that is random but
        always the same."""
        shortest = self.prompt_min or self.prompt
        lengths = torch.linspace(shortest, self.prompt, self.batch).round().long()
        generator = torch.Generator().manual_seed(0)
        return lengths[torch.randperm(self.batch, generator=generator)]

    def ppo(self) -> PPOConfig:
        """The flags of train_ppo.py with these sizes."""
        return PPOConfig(
            batch_size=self.batch,
            minibatch_size=self.batch // self.minibatches,
            inner_epochs=self.inner_epochs,
        )


def update_flops(cfg: BenchConfig) -> int:
    """FLOPs that rlhf.ppo.update needs. A row's last token is left out, because no action follows
    it."""
    lengths = (cfg.prompt_lens() + cfg.response - 1).tolist()
    flops = training_flops(cfg.shape(), lengths, outputs=cfg.batch * cfg.response)
    if cfg.value_network == "separate":
        flops += training_flops(cfg.shape(), lengths, outputs=0)
    return cfg.inner_epochs * flops


# ---- one iteration ----


def make_models(cfg: BenchConfig, compute: Compute) -> tuple[PolicyWithValue, Frozen]:
    """Random weights: the policy with its value network, and the two frozen models."""
    gpt = GPT(cfg.shape())
    value_gpt = GPT(cfg.shape()) if cfg.value_network == "separate" else None
    policy = PolicyWithValue(gpt, value_gpt).to(compute.device)
    reference = GPT(cfg.shape()).to(compute.device)
    reward_model = RewardModel(GPT(cfg.shape())).to(compute.device)
    frozen = Frozen(
        reference,
        reward_model,
        tokenizer=SimpleNamespace(eos_id=NO_EOS, stop_ids=(NO_EOS,)),
        max_new_tokens=cfg.response,
        rows=cfg.ppo().minibatch_size,
        amp=compute.amp,
    )
    return policy, frozen


@torch.no_grad()
def score(
    policy: PolicyWithValue, frozen: Frozen, tokens: Tensor, mask: Tensor, prompt_lens: Tensor
) -> Rollout:
    """The second half of rlhf.rollout.collect: tokens (B, T), mask (B, T-1), prompt_lens (B,)."""
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(frozen.rows):
        parts.append(score_rows(policy, frozen, tokens[rows], mask[rows], prompt_lens[rows]))
    return Rollout(*map(torch.cat, zip(*parts)))


def iterations(cfg: BenchConfig) -> Iterator[dict[str, float]]:
    """One PPO iteration after another, as in the loop of train_ppo.py. Yields the seconds of each
    part."""
    compute = setup(cfg.device, cfg.amp)
    ppo = cfg.ppo()
    policy, frozen = make_models(cfg, compute)
    optimizer = make_optimizer(policy, lr=1e-5, weight_decay=0.0)
    shape = (cfg.batch, cfg.prompt)
    prompts = torch.randint(cfg.vocab, shape, device=compute.device)  # (B, P)
    prompt_lens = cfg.prompt_lens().to(compute.device)  # (B,)
    while True:
        start = clock()
        with compute.autocast():
            tokens, mask = generate(
                policy.gpt, prompts, prompt_lens, cfg.response, NO_EOS
            )  # (B, T), (B, T-1)
        sampled = clock()
        rollout = score(policy, frozen, tokens, mask, prompt_lens)
        scored = clock()
        rewards = shape_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, ppo.kl_coef
        )  # (B, T-1)
        experience = assign_credit(rollout, rewards, ppo)
        update(policy, optimizer, compute, experience, ppo, step=0)
        updated = clock()
        yield {
            "sampling": sampled - start,
            "scoring": scored - sampled,
            "update": updated - scored,
            "iteration": updated - start,
            "peak": matmul_rate(compute.device, compute.amp),
        }


# ---- tables ----


def print_parts(cfg: BenchConfig, seconds: dict[str, float]) -> None:
    """The seconds of each part, its tokens per second, and what the update makes of the machine."""
    sampled = cfg.batch * cfg.response
    read = sampled + int(cfg.prompt_lens().sum())
    tokens = {
        "sampling": sampled,
        "scoring": read,
        "update": cfg.inner_epochs * read,
        "iteration": sampled,
    }
    rows = []
    for part, count in tokens.items():
        rate = count / seconds[part]
        rows.append({"part": part, "seconds": seconds[part], "tokens/s": f"{rate:,.0f}"})
    print_table(rows)
    peak = seconds["peak"]
    share = update_flops(cfg) / seconds["update"] / peak
    print(
        f"\nupdate: {share:.1%} of the {peak / 1e9:,.1f} GFLOP/s of a large matrix product; "
        f"peak memory: {peak_memory():.2f} GB\n"
    )


def print_doubled(cfg: BenchConfig, base: Iterator[dict[str, float]]) -> None:
    """How many times longer each part takes if a size is doubled."""
    rows = []
    for name in DOUBLED:
        larger = replace(cfg, **{name: 2 * getattr(cfg, name)})
        rows.append({"doubled": name, **ratios(iterations(larger), base, cfg.repeats)})
    print_table(rows)


def main(cfg: BenchConfig) -> None:
    base = iterations(cfg)
    trl = trl_iterations(cfg) if cfg.against == "trl" else None
    print_parts(cfg, medians(base, cfg.repeats))
    if trl:
        print_table([{"seconds": "ours / TRL's", **ratios(base, trl, cfg.repeats)}])
    elif cfg.against == "doubled":
        print_doubled(cfg, base)


if __name__ == "__main__":
    run(main, BenchConfig)
