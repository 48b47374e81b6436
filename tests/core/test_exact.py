"""PPO on a world so small that every response can be listed and the exact values are sums.

There are three content tokens and end-of-text. A response has at most three tokens: 1 + 3 + 9 * 4 =
40 responses to each of three prompts of different lengths. Each has a score of its own. So the
objective J, its gradient and its optimum pi* are sums over 40 terms. Two questions have exact
answers. Does the loss follow the gradient of J? Does `update` reach pi*?
"""

import itertools

import pytest
import torch
from torch import nn

import train_ppo
from rlhf.advantages import gae, response_advantages
from rlhf.losses import policy_loss
from rlhf.masked import masked_whiten, token_logprobs
from rlhf.model import GPT, GPTConfig, PolicyWithoutValue, PolicyWithValue
from rlhf.ppo import make_experience, update
from rlhf.rewards import kl_k1, kl_k3, shape_rewards
from rlhf.rollout import Frozen, collect
from rlhf.run.device import make_generator
from rlhf.run.optimizer import linear_schedule, make_optimizer, set_lr
from rlhf.sampling import has_ended
from tests.helpers import CPU, Digits, noisy

EOS, LONGEST = 3, 3
PROMPTS = ([0], [1, 2], [2, 0, 1])
MISSING_EOS = -1.0
BROKEN = ["k3 in the reward", "sign of the KL", "slot of the score", "mask without end-of-text"]


def responses():
    """(), (0), (0 1), ... each with end-of-text, then those of three content tokens, which are cut
    off without it."""
    for length in range(LONGEST):
        yield from ([*content, EOS] for content in itertools.product(range(EOS), repeat=length))
    yield from map(list, itertools.product(range(EOS), repeat=LONGEST))


class Scores(nn.Module):
    """A table in place of a reward model: one normal random number for each sequence."""

    def __init__(self, seed):
        super().__init__()
        self.table = torch.randn(
            5**6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

    def forward(self, tokens, lengths):
        key = torch.zeros_like(lengths)
        for t in range(tokens.size(1)):
            key = torch.where(t < lengths, key * 5 + tokens[:, t] + 1, key)  # pads do not count
        return self.table[key]


class World:
    """All 120 responses in one batch, the frozen reference and the scores."""

    def __init__(self, seed, channels=4):
        self.config = GPTConfig(vocab_size=4, block_size=6, n_layer=1, n_head=2, n_embd=channels)
        self.reference = noisy(GPT(self.config).double(), seed).requires_grad_(False)
        rows = [(prompt, response) for prompt in PROMPTS for response in responses()]
        lengths = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
        self.tokens = torch.tensor([(p + r + [0] * 6)[:6] for p, r in rows])  # (120, 6)
        slots = torch.arange(5)
        starts = torch.tensor([len(prompt) for prompt, _ in rows])
        self.mask = (slots + 1 >= starts[:, None]) & (slots + 1 < lengths[:, None])  # (120, 5)
        self.reward_model = Scores(seed)
        scores = self.reward_model(self.tokens, lengths)
        self.scores = torch.where(
            has_ended(self.tokens, self.mask, EOS), scores, MISSING_EOS
        )  # (120,)
        self.ref_logprobs = self.logprobs(self.reference).detach()  # (120, 5)

    def logprobs(self, gpt):
        return token_logprobs(gpt(self.tokens), self.tokens, self.mask)

    def objective(self, gpt, kl_coef):
        """J, the mean over the prompts of sum over responses of pi * (score - kl_coef * log(pi /
        ref))."""
        log_ratio = (self.logprobs(gpt) - self.ref_logprobs).sum(dim=1)
        return (
            self.logprobs(gpt).sum(dim=1).exp() * (self.scores - kl_coef * log_ratio)
        ).sum() / len(PROMPTS)

    def kl_to_optimum(self, gpt, kl_coef):
        """KL(pi || pi*), pi* = ref * exp(score / kl_coef) / Z: the mean over the prompts, in nats
        per response."""
        log_optimal = (self.ref_logprobs.sum(dim=1) + self.scores / kl_coef).view(len(PROMPTS), -1)
        log_optimal = log_optimal - log_optimal.logsumexp(dim=1, keepdim=True)
        logprobs = self.logprobs(gpt).sum(dim=1).view(len(PROMPTS), -1)
        return (logprobs.exp() * (logprobs - log_optimal)).sum(dim=1).mean().item()


# ---- the gradient ----


def gradient_of_objective(world, gpt, kl_coef):
    """The gradient of the exact J by central differences, one weight at a time. It uses no
    derivative code."""
    slopes = []
    with torch.no_grad():
        for parameter in gpt.parameters():
            flat = parameter.view(-1)
            for i in range(len(flat)):
                kept, sides = flat[i].item(), []
                for step in (1e-5, -1e-5):
                    flat[i] = kept + step
                    sides.append(world.objective(gpt, kl_coef).item())
                flat[i] = kept
                slopes.append((sides[0] - sides[1]) / 2e-5)
    return torch.tensor(slopes, dtype=torch.float64)


def rewards_of(scores, logprobs, ref_logprobs, mask, kl_coef, broken=""):
    """shape_rewards, or one of three ways to get it wrong."""
    coef = -kl_coef if broken == "sign of the KL" else kl_coef
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, coef)
    if broken == "k3 in the reward":
        k1, k3 = kl_k1(logprobs, ref_logprobs), kl_k3(logprobs, ref_logprobs)
        rewards = rewards + torch.where(mask, kl_coef * (k1 - k3), 0.0)
    return rewards.roll(-1, dims=1) if broken == "slot of the score" else rewards


def expected_gradient(world, gpt, kl_coef, values, whiten=False, broken=""):
    """Gradient of the policy loss over all responses, each weighted by its probability under the
    policy."""
    new = world.logprobs(gpt)
    old = new.detach()
    mask = world.mask
    rewards = rewards_of(world.scores, old, world.ref_logprobs, mask, kl_coef, broken)
    if broken == "mask without end-of-text":
        mask = mask & (world.tokens[:, 1:] != EOS)
    advantages, _ = gae(rewards, values, mask, 1.0, 1.0)
    scale = 1.0
    if whiten:
        scale = advantages[mask].std(correction=0)
        advantages = masked_whiten(advantages, mask)
    weights = old.sum(dim=1).exp() / len(PROMPTS)  # (120,)
    loss, _ = policy_loss(new, old, advantages * weights[:, None] * mask.sum(), mask, 0.2)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss * scale, list(gpt.parameters()))]
    )


@pytest.fixture(scope="module")
def uphill():
    """A world, a policy that differs from the reference, and the gradient of J there."""
    world = World(seed=1)
    gpt = noisy(GPT(world.config).double(), seed=2)
    return world, gpt, gradient_of_objective(world, gpt, 0.5)


def test_world_lists_every_response(uphill):
    """The probabilities of the 40 responses to each prompt sum to 1."""
    world, gpt, _ = uphill
    totals = world.logprobs(gpt).sum(dim=1).exp().view(len(PROMPTS), -1).sum(dim=1)
    torch.testing.assert_close(totals, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("baseline", [0.0, 30.0])
@pytest.mark.parametrize("whiten", [False, True])
def test_expected_policy_loss_gradient_equals_gradient_of_the_objective(uphill, whiten, baseline):
    """With lambda = 1 this holds for every baseline. Whitening subtracts one more constant and
    divides by a known scale. A baseline may depend on the tokens read so far and not on later ones:
    so do the values of a causal network."""
    world, gpt, slope = uphill
    policy = noisy(PolicyWithValue(GPT(world.config)).double(), seed=3)
    values = baseline * policy(world.tokens)[1][:, :-1].detach()
    assert baseline == 0 or values.std() > 0.1
    got = expected_gradient(world, gpt, 0.5, values, whiten)
    torch.testing.assert_close(-got, slope, atol=1e-7, rtol=1e-5)
    assert slope.norm() > 0.1


@pytest.mark.parametrize("broken", BROKEN)
def test_expected_gradient_of_broken_loss_differs(uphill, broken):
    """So the test above can fail."""
    world, gpt, slope = uphill
    got = expected_gradient(world, gpt, 0.5, torch.zeros_like(world.ref_logprobs), broken=broken)
    assert (got + slope).norm() > 0.05 * slope.norm()


# ---- the optimum ----


def train(
    world, kl_coef, seed, steps, broken="", value_network=False, advantage="gae", group_size=1
):
    """The loop of train_ppo.py around `update`, on samples. Returns KL(pi || pi*) before and
    after."""
    cfg = train_ppo.PPOConfig(
        batch_size=256, minibatch_size=64, inner_epochs=2, steps=steps, lr=5e-3, warmup=3, seed=seed
    )
    gpt = GPT(world.config).double()
    gpt.load_state_dict(world.reference.state_dict())
    policy = PolicyWithValue(
        gpt, noisy(GPT(world.config), seed=9) if value_network else None
    ).double()
    policy = policy if advantage == "gae" else PolicyWithoutValue(gpt)
    optimizer = make_optimizer(policy, cfg.lr, 0.0, eps=1e-5)
    frozen = Frozen(
        world.reference, world.reward_model, Digits(EOS), LONGEST, MISSING_EOS, rows=256
    )
    order = (torch.arange(cfg.batch_size) // group_size) % len(PROMPTS)
    prompts = torch.tensor([(p + [0] * 3)[:3] for p in PROMPTS])[order]
    prompt_lens = torch.tensor([len(p) for p in PROMPTS])[order]
    before = world.kl_to_optimum(gpt, kl_coef)
    for step in range(steps):
        rollout = collect(policy, frozen, prompts, prompt_lens, make_generator("cpu", seed, step))
        if broken == "mask without end-of-text":  # but each response keeps its first action
            rollout = rollout._replace(
                mask=rollout.mask & (rollout.tokens[:, 1:] != EOS)
                | (rollout.mask & (rollout.mask.sum(dim=1, keepdim=True) == 1))
            )
        rewards = rewards_of(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef, broken
        )
        if advantage == "gae":
            advantages, returns = gae(rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam)
            advantages = masked_whiten(advantages, rollout.mask)
        else:
            advantages, returns = response_advantages(rewards, rollout.mask, advantage, group_size)
        set_lr(optimizer, cfg.lr * linear_schedule(step, steps, cfg.warmup))
        experience = make_experience(rollout, advantages, returns)
        update(policy, optimizer, CPU, experience, cfg, step)
    return before, world.kl_to_optimum(gpt, kl_coef)


FAST = (4.0, 40, 0)
CASES = [(*case, seed) for case in ((1.5, 100), (2.5, 80), (4.0, 40)) for seed in (0, 1, 2)]


@pytest.mark.parametrize(
    ("kl_coef", "steps", "seed"),
    [case if case == FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_ppo_reaches_the_optimum(kl_coef, steps, seed):
    """KL(pi || pi*) is 0.014 to 0.19 nats before and at most 0.01 after."""
    before, after = train(World(seed, channels=32), kl_coef, seed, steps)
    print(f"kl_coef {kl_coef}, seed {seed}: KL to the optimum {before:.3f} -> {after:.5f}")
    assert after <= 0.01 < before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_with_separate_value_network_reaches_the_optimum(seed):
    before, after = train(World(seed, channels=32), 2.5, seed, 80, value_network=True)
    print(
        f"kl_coef 2.5, seed {seed}, a value network: KL to the optimum {before:.3f} -> {after:.5f}"
    )
    assert after <= 0.01 < before


@pytest.fixture(scope="module")
def after_40_steps():
    """KL to the optimum of unbroken PPO after 40 of the 100 steps of the first row above."""
    after = train(World(0, channels=32), 1.5, 0, 40)[1]
    print(f"nothing broken, 40 steps: KL to the optimum {after:.3f}")
    return after


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_ppo_does_not_reach_the_optimum(broken, after_40_steps):
    """So the two tests above can fail: after as many steps, unbroken PPO is nearer than 0.03 and
    broken PPO is not."""
    after = train(World(0, channels=32), 1.5, 0, 40, broken)[1]
    print(f"{broken}: KL to the optimum {after:.3f}")
    assert after_40_steps < 0.03 < after
