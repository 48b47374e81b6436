"""Advantages: GAE by hand, special cases, the explicit sum, and masks of different lengths; RLOO,
GRPO and REINFORCE by hand, and their expected gradients as sums over the world of test_exact.py.

The sums run over all groups: every pair of responses to a prompt, or every pair of any two rows of
the world, each with its probability under the policy.
"""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import (
    explained_variance,
    gae,
    grpo_advantages,
    response_advantages,
    rloo_advantages,
)
from rlhf.losses import policy_loss
from rlhf.model import GPT, PolicyWithoutValue
from rlhf.rewards import kl_k1, kl_k3, shape_rewards
from tests.core.test_exact import PROMPTS, World, gradient_of_objective, train
from tests.helpers import DTYPES, POISON, f64, noisy


@pytest.mark.parametrize("poison", POISON)
def test_gae_matches_hand_computation(poison):
    """r 0 0 1, V 1/2 1/2 1/2, gamma 1, lambda 1/2. V after the last action is 0, not the pad's.
    From the last action to the first:

        delta 2 = 1 + 0 - 1/2 = 1/2        A = 1/2
        delta 1 = 0 + 1/2 - 1/2 = 0        A = 0 + 1/2 * 1/2 = 1/4
        delta 0 = 0                        A = 1/2 * 1/4 = 1/8

    R = A + V = 5/8 3/4 1. The prompt's slot before and the pad after hold poison. Their results are
    0."""
    rewards, values = f64([poison, 0, 0, 1, poison]), f64([poison, 0.5, 0.5, 0.5, poison])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert_close(advantages, f64([0, 0.125, 0.25, 0.5, 0]))
    assert_close(returns, f64([0, 0.625, 0.75, 1, 0]))


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "advantages"),
    [
        ([0, 0, 1], [0.5, 0.5, 0.5], 1, 0.95, [0.45125, 0.475, 0.5]),
        ([-0.1, 0.05, 1], [0.2, 0.4, 0.6], 1, 0.95, [0.6985, 0.63, 0.4]),
        ([1, 2, 4], [8, 4, 2], 0.5, 0, [-5, -1, 2]),  # delta: 1 + 2 - 8, 2 + 1 - 4, 4 + 0 - 2
        ([1, 2, 3], [10, 20, 30], 1, 1, [-4, -15, -27]),  # rewards to go 6 5 3, minus V
        ([1, 2, 4], [0, 0, 0], 0.5, 1, [3, 4, 4]),  # 1 + 2/2 + 4/4, 2 + 4/2, 4
    ],
)
def test_gae_special_cases_of_gamma_and_lambda(rewards, values, gamma, lam, advantages):
    """lambda 0 is the one-step error. lambda 1 with gamma 1 is the reward to go minus V. gamma
    discounts the rewards and the next value."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    got, returns = gae(f64(rewards), f64(values), mask, gamma, lam)
    assert_close(got, f64(advantages))
    assert_close(returns, f64(advantages) + f64(values))


def test_gae_equals_explicit_double_sum():
    """A[t] = sum over k >= t of (gamma lambda)^(k-t) * (r[k] + gamma V[k+1] - V[k]), written as two
    loops over rows whose responses start and end at different slots."""
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    spans = [(0, 6), (2, 5), (3, 4), (5, 6)]
    mask = torch.zeros(4, 6, dtype=torch.bool)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = True
        for t in range(first, end):
            for k in range(t, end):
                after = values[row, k + 1] if k + 1 < end else 0.0
                delta = rewards[row, k] + 0.9 * after - values[row, k]
                expected[row, t] += (0.9 * 0.7) ** (k - t) * delta
    advantages, returns = gae(rewards, values, mask, 0.9, 0.7)
    assert_close(advantages, expected)
    assert_close(returns, torch.where(mask, expected + values, 0.0))


def test_gae_of_batch_equals_gae_of_each_row():
    """Each row of a batch gets the advantages that its own action slots get without the other rows
    and without pads."""
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    together, _ = gae(rewards, values, mask, 1.0, 0.95)
    for row in range(3):
        kept = mask[row]
        single, _ = gae(
            rewards[row : row + 1, kept],
            values[row : row + 1, kept],
            mask[row : row + 1, kept],
            1.0,
            0.95,
        )
        assert_close(together[row, kept], single[0])


def test_gae_does_not_modify_its_inputs():
    rewards, values, mask = f64([1, 2]), f64([3, 4]), torch.tensor([[True, False]])
    gae(rewards, values, mask, 1.0, 1.0)
    assert (
        rewards.tolist() == [[1, 2]]
        and values.tolist() == [[3, 4]]
        and mask.tolist() == [[True, False]]
    )


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(
    ("values", "expected"),
    [([2, 2, 2, 2], 0), ([1, 2, 3, 6], 1), ([4, 5, 6, 9], 1), ([1, 2, 3, 2], 1 / 7)],
)
def test_explained_variance_matches_hand_computation(values, expected, poison):
    """Returns 1 2 3 6 have variance (4 + 1 + 0 + 9) / 4 = 7/2.
    values 2 2 2 2: the errors have the same variance, so 0
    values equal to the returns, or off by a constant: the errors have no variance, so 1
    values 1 2 3 2: errors 0 0 0 4 have variance 3, so 1 - 3 / (7/2) = 1/7"""
    mask = torch.tensor([[True, True, True, True, False]])
    got = explained_variance(f64([*values, poison]), f64([1, 2, 3, 6, poison]), mask)
    assert got.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_explained_variance_of_equal_returns_is_infinite(dtype):
    """Three returns of 123.45 have no variance, and 1 - x / 0 is -inf. Their mean is another number
    in float32: its distance from 123.45 is rounding and no variance."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([[0, 1, 2]], dtype=dtype)
    returns = torch.full((1, 3), 123.45, dtype=dtype)
    assert explained_variance(values, returns, mask).item() == -math.inf


@pytest.mark.parametrize("mismatched", [0, 1, 2])
def test_gae_and_explained_variance_reject_mismatched_shapes(mismatched):
    arguments = [torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)]
    arguments[mismatched] = arguments[mismatched][:, :1]
    with pytest.raises(ValueError, match="shapes must be equal"):
        gae(*arguments, 1.0, 0.95)
    with pytest.raises(ValueError, match="shapes must be equal"):
        explained_variance(*arguments)


# ---- advantages of whole responses, by hand ----


def test_rloo_advantages_match_hand_computation():
    """1, 2, 6: the others' means are 4, 7/2, 3/2. And 3, 3, 0: 3/2, 3/2, 3."""
    got = rloo_advantages(f64(1, 2, 6, 3, 3, 0), 3)
    assert_close(got, f64(1 - 4, 2 - 7 / 2, 6 - 3 / 2, 3 - 3 / 2, 3 - 3 / 2, 0 - 3))
    assert_close(rloo_advantages(f64(1, 2, 6, 3, 3, 0), 2), f64(-1, 1, 3, -3, 3, -3))


def test_grpo_advantages_match_hand_computation():
    """2, 4, 4, 6: mean 4, variance (4 + 0 + 0 + 4) / 4 = 2. And 1, 1, 1, 5: mean 2, variance (3 +
    9) / 4 = 3."""
    centred = [-2, 0, 0, 2, -1, -1, -1, 3]
    got = grpo_advantages(f64(2, 4, 4, 6, 1, 1, 1, 5), 4)
    assert_close(
        got,
        f64(*(x / 2**0.5 for x in centred[:4]), *(x / 3**0.5 for x in centred[4:])),
        atol=1e-7,
        rtol=1e-7,
    )
    assert_close(grpo_advantages(f64(2, 4, 4, 6, 1, 1, 1, 5), 4, divide=False), f64(*centred))


def test_grpo_advantages_of_equal_scores_are_zero():
    """Also if they differ by rounding only: a deviation below 1e-4 is not blown up to 1."""
    assert grpo_advantages(f64(5, 5, 5), 3).tolist() == [0, 0, 0]
    assert grpo_advantages(f64(1, 1 + 2e-7), 2).abs().max() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [123.45, -0.1, 1e-3, 6e4])
@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_group_advantages_of_equal_scores_are_zero_in_every_precision(constant, size, dtype):
    """In float32 the mean of three 123.45 is off by 8e-6. Divided by sqrt(var + 1e-8) that would be
    0.076."""
    scores = torch.full((2 * size,), constant, dtype=dtype)
    assert grpo_advantages(scores, size).eq(0).all()
    assert rloo_advantages(scores, size).eq(0).all()


def test_grpo_advantages_of_half_precision_are_computed_in_float32():
    """-400, 400: the squares are above the largest number of float16."""
    scores = torch.tensor([-400, 400], dtype=torch.float16)
    assert_close(grpo_advantages(scores, 2), torch.tensor([-1.0, 1.0]))


def test_grpo_without_division_is_rloo_times_a_factor():
    """(G - 1) / G, here 2/3."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(grpo_advantages(scores, 3, divide=False), rloo_advantages(scores, 3) * 2 / 3)


@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages])
@pytest.mark.parametrize(
    ("scores", "group_size"),
    [
        (f64(1, 2, 3), 1),
        (f64(1, 2, 3), 2),
        (f64(1, 2), 0),
        (f64(1, 2), 4),
        (f64(1, 2).view(1, 2), 2),
        (torch.zeros(0), 2),
    ],
)
def test_advantages_reject_groups_that_do_not_come_out_even(advantages, scores, group_size):
    with pytest.raises(ValueError, match="multiple of group_size, and group_size 2 or more"):
        advantages(scores, group_size)


MASK = torch.tensor(
    [[False, True, True], [True, False, False], [True, True, False], [False, True, False]]
)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("rloo", (-3, 3, 3, -3)),
        ("grpo", (-1, 1, 1, -1)),
        ("reinforce", (4 / 3 - 4, 16 / 3 - 4, 20 / 3 - 4, 8 / 3 - 4)),
    ],
)
def test_response_advantages_match_hand_computation(advantage, expected):
    """The rows' rewards sum to 1, 4, 5, 2. In groups of two the others are 4, 1, 2, 5. In the whole
    batch of mean 3, R minus the mean of the other three is 4/3 (R - 3). Every action of a row gets
    that; what is off the mask is 0."""
    rewards = f64([0, -1, 2], [4, 0, 0], [2.5, 2.5, 0], [0, 2, 0])
    advantages, returns = response_advantages(rewards, MASK, advantage, group_size=2)
    assert_close(advantages, torch.where(MASK, f64(*expected)[:, None], 0.0), atol=1e-7, rtol=1e-7)
    assert returns.shape == MASK.shape and returns.eq(0).all()


def test_response_advantages_are_of_the_score_minus_the_kl_penalty():
    """Scores 1 and 3, kl_coef 1/2, log ratios 1 + 1 and -2: R is 1 - 1 = 0 and 3 + 1 = 4. No pad
    counts."""
    mask = torch.tensor([[False, True, True], [True, False, False]])
    for poison in POISON:
        logprobs = torch.where(mask, f64([0, 1, 1], [-2, 0, 0]), poison)
        rewards = shape_rewards(f64(1, 3), logprobs, f64([0, 0, 0], [0, 0, 0]), mask, 0.5)
        got = response_advantages(rewards, mask, "rloo", 2)[0]
        assert_close(got, f64([0, -4, -4], [4, 0, 0]))


def test_policy_without_value_has_the_policys_hidden_states_and_no_weights_of_its_own(gpt):
    policy = PolicyWithoutValue(gpt)
    tokens = torch.tensor([[1, 2, 3]])
    hidden, values = policy.hidden_and_values(tokens)
    assert torch.equal(hidden, gpt.hidden(tokens))
    assert values.tolist() == [[0, 0, 0]] and not values.requires_grad
    assert {name.removeprefix("gpt.") for name in policy.state_dict()} == set(gpt.state_dict())


# ---- expected gradients, exactly ----

KL_COEF = 0.5


@pytest.fixture(scope="module")
def uphill():
    """A world, a policy far from the reference, and the gradient of J there."""
    world = World(seed=1)
    gpt = noisy(GPT(world.config).double(), seed=2)
    with torch.no_grad():
        gpt.wte.weight *= 6
    return world, gpt, gradient_of_objective(world, gpt, KL_COEF)


def flat_gradient(loss, gpt):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(gpt.parameters()), retain_graph=True)]
    )


def pairs_of(world, same_prompt):
    """Row numbers (2M,), two consecutive rows a pair: all pairs of responses to one prompt, or all
    pairs of rows."""
    per_prompt = len(world.tokens) // len(PROMPTS)
    blocks = [range(at, at + per_prompt) for at in range(0, len(world.tokens), per_prompt)]
    pools = blocks if same_prompt else [range(len(world.tokens))]
    return torch.tensor(
        [row for pool in pools for pair in itertools.product(pool, pool) for row in pair]
    )


def expected_gradient(world, gpt, advantages_of, same_prompt=True, weigh=None):
    """Gradient of the policy loss over all pairs, each weighted by its probability; the mean over a
    pair's two rows.

    advantages_of: R (2M,) -> advantages (2M,); weigh: mask (2M, T-1) -> a factor of each slot (2M,
    T-1).
    """
    rows = pairs_of(world, same_prompt)
    new = world.logprobs(gpt)[rows]  # (2M, T-1)
    old, mask, ref = new.detach(), world.mask[rows], world.ref_logprobs[rows]
    rewards = shape_rewards(world.scores[rows], old, ref, mask, KL_COEF)
    p = old.sum(dim=1).exp().view(-1, 2)  # (M, 2): of each response, given its prompt
    p = p.prod(dim=1) / (len(PROMPTS) if same_prompt else len(PROMPTS) ** 2)  # (M,): of each pair
    assert p.sum().item() == pytest.approx(1)
    slots = mask.double() if weigh is None else weigh(mask)
    weights = p.repeat_interleave(2).unsqueeze(1) * slots / 2  # (2M, T-1)
    advantages = advantages_of(rewards, mask)  # (2M, T-1)
    loss, _ = policy_loss(new, old, advantages * weights * mask.sum(), mask, 0.2)
    return -flat_gradient(loss, gpt)


def turned(one, other):
    """The sine of the angle between two gradients: 0 if one is a multiple of the other."""
    cosine = torch.dot(one, other) / (one.norm() * other.norm())
    return (1 - cosine**2).clamp(min=0).sqrt().item()


def test_expected_gradient_of_rloo_is_that_of_the_objective(uphill):
    world, gpt, slope = uphill
    got = expected_gradient(
        world, gpt, lambda rewards, mask: response_advantages(rewards, mask, "rloo", 2)[0]
    )
    assert_close(got, slope, atol=1e-7, rtol=1e-5)
    assert slope.norm() > 0.1 and turned(got, slope) < 1e-5


def test_expected_gradient_of_reinforce_is_that_of_the_objective(uphill):
    """The baseline is the other row of a batch of two, which may be the response to another
    prompt."""
    world, gpt, slope = uphill
    rows = pairs_of(world, same_prompt=False)

    def batches_of_two(rewards, mask):
        """response_advantages of each pair by itself: what a group is to RLOO, the whole batch is
        to REINFORCE."""
        first = response_advantages(rewards[:2], mask[:2], "reinforce", 1)[0]
        every = response_advantages(rewards, mask, "rloo", 2)[0]
        assert_close(first, every[:2])
        return every

    assert len(rows) == 2 * 120**2
    got = expected_gradient(world, gpt, batches_of_two, same_prompt=False)
    assert_close(got, slope, atol=1e-7, rtol=1e-5)


def test_mean_that_holds_the_row_itself_shrinks_the_expected_gradient(uphill):
    """GRPO without the division, groups of two: half of the gradient of J."""
    world, gpt, slope = uphill
    got = expected_gradient(
        world,
        gpt,
        lambda rewards, mask: torch.where(
            mask, grpo_advantages(rewards.sum(dim=1), 2, divide=False).unsqueeze(1), 0.0
        ),
    )
    assert_close(got, slope / 2, atol=1e-7, rtol=1e-5)


def test_expected_gradient_of_grpo_is_that_of_the_win_rate(uphill):
    """In groups of two A is +1 for the better and -1 for the worse response. So the expected
    gradient is that of P(win) - P(loss), the policy's response against that of a copy which is held
    fixed, by R. (Up to the 1e-8 under the root, which counts if two R are nearly equal.) It is not
    parallel to the gradient of J."""
    world, gpt, slope = uphill
    got = expected_gradient(
        world, gpt, lambda rewards, mask: response_advantages(rewards, mask, "grpo", 2)[0]
    )
    logprobs = world.logprobs(gpt).sum(dim=1).view(len(PROMPTS), -1)  # (3, 40)
    R = (
        (world.scores - KL_COEF * (world.logprobs(gpt) - world.ref_logprobs).sum(dim=1))
        .detach()
        .view(len(PROMPTS), -1)
    )
    won = (
        R.unsqueeze(2) - R.unsqueeze(1)
    ).sign()  # (3, 40, 40): +1 where the first beats the second
    rate = (logprobs.exp().unsqueeze(2) * logprobs.detach().exp().unsqueeze(1) * won).sum() / len(
        PROMPTS
    )
    expected = flat_gradient(rate, gpt)
    assert (got - expected).norm() < 1e-3 * expected.norm()
    print(
        f"GRPO with the division: sine of the angle to the gradient of J {turned(got, slope):.3f}"
    )
    assert turned(got, slope) > 0.1


def test_division_weighs_prompts_by_their_spread():
    """Two prompts with two responses each, scores 0 and 10, or 0 and 0.1: RLOO pushes the first 100
    times as much."""
    scores = f64(0, 10, 0, 0.1)
    assert_close(rloo_advantages(scores, 2), f64(-10, 10, -0.1, 0.1))
    assert_close(grpo_advantages(scores, 2), f64(-1, 1, -1, 1), atol=1e-5, rtol=1e-5)


def test_mean_of_each_response_has_another_expected_gradient(uphill):
    """As in GRPO's paper: every token divided by the length of its response. Not parallel to the
    gradient of J."""
    world, gpt, slope = uphill
    got = expected_gradient(
        world,
        gpt,
        lambda rewards, mask: response_advantages(rewards, mask, "rloo", 2)[0],
        weigh=lambda mask: mask / mask.sum(dim=1, keepdim=True),
    )
    print(f"mean of each response: sine of the angle to the gradient of J {turned(got, slope):.3f}")
    assert turned(got, slope) > 0.05


def kl_of_each_slot(world, gpt, reverse):
    """Exact KL of the next token's distributions at each slot, (120, 5): KL(pi || ref), or KL(ref
    || pi) if reverse."""
    first = gpt(world.tokens)[:, :-1].log_softmax(dim=2)
    second = world.reference(world.tokens)[:, :-1].log_softmax(dim=2)
    if reverse:
        first, second = second, first
    return torch.where(world.mask, (first.exp() * (first - second)).sum(dim=2), 0.0)


def test_k3_in_the_loss_has_the_gradient_of_the_other_kl(uphill):
    """GRPO's KL term: k3 of each sampled token, differentiated. Its expectation is the KL, and its
    expected gradient is that of KL(ref || pi) of each token's distribution, at the prefixes that
    the policy samples. It is not the gradient of the KL(pi || ref) of responses, which J has. k1 in
    the loss is worse: its expected gradient is 0."""
    world, gpt, _ = uphill
    new = world.logprobs(gpt)
    p = new.detach().sum(dim=1).exp() / len(PROMPTS)  # (120,)
    kl = (new.sum(dim=1).exp() / len(PROMPTS) * (new - world.ref_logprobs).sum(dim=1)).sum()
    term = (p.unsqueeze(1) * kl_k3(new, world.ref_logprobs)).sum()
    assert term.item() == pytest.approx(kl.item())
    got = flat_gradient(term, gpt)
    other = flat_gradient((p.unsqueeze(1) * kl_of_each_slot(world, gpt, reverse=True)).sum(), gpt)
    true = flat_gradient(kl, gpt)
    assert_close(got, other)
    print(
        f"k3 in the loss: sine of the angle to the gradient of the KL {turned(got, true):.3f}, "
        f"norms {got.norm():.3f} and {true.norm():.3f}"
    )
    assert (got - true).norm() > 0.05 * true.norm() and turned(got, true) > 0.03
    nothing = flat_gradient(
        (p.unsqueeze(1) * kl_k1(world.logprobs(gpt), world.ref_logprobs)).sum(), gpt
    )
    assert nothing.abs().max() < 1e-12 < 1e-3 < true.norm()


def test_exact_kl_of_slots_sums_to_the_kl_of_responses(uphill):
    """So the helper above is right: E over responses of the sum over slots of KL(pi || ref) is the
    KL of responses."""
    world, gpt, _ = uphill
    with torch.no_grad():
        new = world.logprobs(gpt)
        p = new.sum(dim=1).exp()
        of_slots = (p.unsqueeze(1) * kl_of_each_slot(world, gpt, reverse=False)).sum()
        assert_close(of_slots, (p * (new - world.ref_logprobs).sum(dim=1)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("advantage", "group_size"), [("rloo", 4), ("reinforce", 1)])
def test_train_ppo_reaches_the_optimum_without_a_value_network(advantage, group_size, seed):
    """As with GAE in test_exact.py: KL(pi || pi*) is 0.10 nats or more before and at most 0.01
    after 100 steps."""
    before, after = train(
        World(seed, channels=32), 1.5, seed, 100, advantage=advantage, group_size=group_size
    )
    print(f"{advantage}, seed {seed}: KL to the optimum {before:.3f} -> {after:.5f}")
    assert after <= 0.01 < 0.1 < before
