"""Time one PPO iteration: its parts, the share of the machine that it uses, and how the time grows.

    python -m rlhf.tools.bench                                                 # the default sizes; then each doubled
    python -m rlhf.tools.bench --prompt 384 --prompt-min 15 --response 128     # prompts of different lengths
    python -m rlhf.tools.bench --against trl                                   # the same work in TRL 1.9.2

Run it in the folder of train_ppo.py. Weights and prompts are random. Every response has full length, because the
end-of-text id is -1, which is never sampled. So the work depends only on the flags. The parts, and what tokens/s
counts:

    sampling     rollout.generate                              sampled tokens
    scoring      the rest of rollout.collect                   tokens of prompts and responses
    update       rewards, advantages and train_ppo.update      the same, once per epoch
    iteration    all of it                                     sampled tokens

On a busy machine only ratios within one run are reliable: the update's FLOPs per second against those of a large matrix
product (`peak`), a doubled size against the base, this code against TRL. The two sides of a ratio take turns. Each
number is the median over --repeats. docs/performance.md has recorded numbers.
"""

import runpy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from rlhf import rollout
from rlhf.extras.measure import clock, matmul_rate, medians, noting, peak_memory, ratios, training_flops
from rlhf.extras.report import print_table
from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from rlhf.support import cli, runtime
from rlhf.tools.trl_ppo import trl_iterations


@dataclass(frozen=True)
class BenchConfig:
    """Time one PPO iteration on random weights and prompts."""

    n_layer: int = cli.arg(4, "layers", group="network")
    n_embd: int = cli.arg(128, "width")
    n_head: int = cli.arg(4, "attention heads")
    vocab: int = cli.arg(512, "vocabulary size")
    value_network: str = cli.arg("separate", "separate value network, or the policy's", ("separate", "shared"))
    batch: int = cli.arg(128, "responses per iteration", group="work")
    prompt: int = cli.arg(24, "tokens of the longest prompt")
    prompt_min: int = cli.arg(0, "tokens of the shortest prompt (0: all are equal)")
    response: int = cli.arg(32, "tokens of a response")
    inner_epochs: int = cli.arg(4, "epochs over each rollout")
    minibatches: int = cli.arg(4, "minibatches per epoch")
    repeats: int = cli.arg(3, "timed repeats, after a warm-up", group="measurement")
    against: str = cli.arg("doubled", "compare with doubled sizes, or with TRL", ("doubled", "trl", "nothing"))
    device: str = cli.arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    amp: str = cli.arg("off", "mixed precision; auto: bf16 on a GPU that has it", ("auto", "off", "bf16", "fp16"))

    def __post_init__(self):
        cli.check_positive(self, "batch", "prompt", "response", "inner_epochs", "minibatches", "repeats")
        self.shape()  # a ValueError says which sizes do not fit together
        if self.batch % self.minibatches or not 0 <= self.prompt_min <= self.prompt:
            raise ValueError("--batch must be a multiple of --minibatches, and --prompt-min at most --prompt")

    def shape(self) -> GPTConfig:
        return GPTConfig(self.vocab, self.prompt + self.response, self.n_layer, self.n_head, self.n_embd)

    def prompt_lens(self) -> torch.Tensor:
        """(B,), spread evenly from the shortest to the longest, in an order that is random but always the same."""
        lens = torch.linspace(self.prompt_min or self.prompt, self.prompt, self.batch).round().long()
        return lens[torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))]


def update_flops(cfg: BenchConfig) -> int:
    """FLOPs that train_ppo.update needs. A row's last token is left out, because no action follows it."""
    lengths = (cfg.prompt_lens() + cfg.response - 1).tolist()
    outputs = [cfg.batch * cfg.response] + [0] * (cfg.value_network == "separate")  # of the policy, the value network
    return cfg.inner_epochs * sum(training_flops(cfg.shape(), lengths, n) for n in outputs)


def iterations(cfg: BenchConfig) -> Iterator[dict[str, float]]:
    """One PPO iteration after another, as in the loop of train_ppo.py. Yields the seconds of each part."""
    device, amp, scaler = runtime.setup(cfg.device, cfg.amp)
    ppo = SimpleNamespace(**runpy.run_path("train_ppo.py"))  # nothing in rlhf/ imports a script
    flags = ppo.PPOConfig(
        batch_size=cfg.batch, minibatch_size=cfg.batch // cfg.minibatches, inner_epochs=cfg.inner_epochs)
    gpt, value_gpt, reference, scorer = (GPT(cfg.shape()).to(device) for _ in range(4))
    policy = PolicyWithValue(gpt, None if cfg.value_network == "shared" else value_gpt).to(device)
    frozen = rollout.Frozen(reference, RewardModel(scorer).to(device), SimpleNamespace(eos_id=-1), cfg.response,
                            rows=flags.minibatch_size, amp=amp)
    optimizer = runtime.make_optimizer(policy, lr=1e-5, weight_decay=0.0)
    prompts, lens = torch.randint(cfg.vocab, (cfg.batch, cfg.prompt), device=device), cfg.prompt_lens().to(device)
    while True:
        times = [clock()]
        with noting(rollout, "generate", times):  # collect begins with it
            batch = ppo.parallel.collect(policy, frozen, prompts, lens, None)
        times.append(clock())
        rewards = ppo.shape_rewards(batch.scores, batch.logprobs, batch.ref_logprobs, batch.mask, flags.kl_coef)
        advantages, returns = ppo.gae(rewards, batch.values, batch.mask, flags.gamma, flags.lam)
        ppo.update(policy, optimizer, scaler, batch, ppo.masked_whiten(advantages, batch.mask), returns, flags, amp, 0)
        times.append(clock())
        yield {"sampling": times[1] - times[0], "scoring": times[2] - times[1], "update": times[3] - times[2],
               "iteration": times[3] - times[0], "peak": matmul_rate(device, amp)}


def main(cfg: BenchConfig) -> None:
    base, trl = iterations(cfg), trl_iterations(cfg) if cfg.against == "trl" else None
    found = medians(base, cfg.repeats)
    sampled, read = cfg.batch * cfg.response, cfg.batch * cfg.response + int(cfg.prompt_lens().sum())
    tokens = {"sampling": sampled, "scoring": read, "update": cfg.inner_epochs * read, "iteration": sampled}
    print_table([
        {"part": part, "seconds": found[part], "tokens/s": f"{n / found[part]:,.0f}"} for part, n in tokens.items()])
    print(f"\nupdate: {update_flops(cfg) / found['update'] / found['peak']:.1%} of the {found['peak'] / 1e9:,.1f} "
          f"GFLOP/s of a large matrix product; peak memory: {peak_memory():.2f} GB\n")
    if trl:
        print_table([{"seconds": "ours / TRL's", **ratios(base, trl, cfg.repeats)}])
    elif cfg.against == "doubled":
        print_table([
            {"doubled": name, **ratios(iterations(replace(cfg, **{name: 2 * getattr(cfg, name)})), base, cfg.repeats)}
            for name in ("batch", "response", "n_embd", "vocab")])


if __name__ == "__main__":
    cli.run(main, BenchConfig)
