"""RLOO, GRPO, REINFORCE and DPO: by hand, and their expected gradients as sums over the world of test_exact.py.

The sums run over all groups: every pair of responses to a prompt, or every pair of any two rows of the world, each with
its probability under the policy.
"""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.data import Comparison, Prompt
from rlhf.extras.alternatives import (
    PolicyWithoutValue,
    dpo_loss,
    grpo_advantages,
    pair_accuracy,
    pair_logprobs,
    response_advantages,
    rloo_advantages,
)
from rlhf.losses import policy_loss
from rlhf.model import GPT
from rlhf.rewards import kl_k1, kl_k3, shape_rewards
from tests.core.test_exact import PROMPTS, World, gradient_of_objective, train
from tests.helpers import POISON, f64, noisy

# ---- advantages by hand ----


def test_rloo_advantages_match_hand_computation():
    """1, 2, 6: the others' means are 4, 7/2, 3/2. And 3, 3, 0: 3/2, 3/2, 3."""
    got = rloo_advantages(f64(1, 2, 6, 3, 3, 0), 3)
    assert_close(got, f64(1 - 4, 2 - 7 / 2, 6 - 3 / 2, 3 - 3 / 2, 3 - 3 / 2, 0 - 3))
    assert_close(rloo_advantages(f64(1, 2, 6, 3, 3, 0), 2), f64(-1, 1, 3, -3, 3, -3))


def test_grpo_advantages_match_hand_computation():
    """2, 4, 4, 6: mean 4, variance (4 + 0 + 0 + 4) / 4 = 2. And 1, 1, 1, 5: mean 2, variance (3 + 9) / 4 = 3."""
    centred = [-2, 0, 0, 2, -1, -1, -1, 3]
    got = grpo_advantages(f64(2, 4, 4, 6, 1, 1, 1, 5), 4)
    assert_close(got, f64(*(x / 2**0.5 for x in centred[:4]), *(x / 3**0.5 for x in centred[4:])), atol=1e-7, rtol=1e-7)
    assert_close(grpo_advantages(f64(2, 4, 4, 6, 1, 1, 1, 5), 4, divide=False), f64(*centred))


def test_grpo_advantages_of_equal_scores_are_zero():
    """Also if they differ by rounding only: a deviation below 1e-4 is not blown up to 1."""
    assert grpo_advantages(f64(5, 5, 5), 3).tolist() == [0, 0, 0]
    assert grpo_advantages(f64(1, 1 + 2e-7), 2).abs().max() < 0.01


def test_grpo_without_division_is_rloo_times_a_factor():
    """(G - 1) / G, here 2/3."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(grpo_advantages(scores, 3, divide=False), rloo_advantages(scores, 3) * 2 / 3)


@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages])
@pytest.mark.parametrize(("scores", "group_size"), [
    (f64(1, 2, 3), 1), (f64(1, 2, 3), 2), (f64(1, 2), 0), (f64(1, 2), 4), (f64(1, 2).view(1, 2), 2),
    (torch.zeros(0), 2)])
def test_advantages_reject_groups_that_do_not_come_out_even(advantages, scores, group_size):
    with pytest.raises(ValueError, match="multiple of group_size, and group_size 2 or more"):
        advantages(scores, group_size)


MASK = torch.tensor([[False, True, True], [True, False, False], [True, True, False], [False, True, False]])


@pytest.mark.parametrize(("advantage", "expected"), [
    ("rloo", (-3, 3, 3, -3)), ("grpo", (-1, 1, 1, -1)), ("reinforce", (4 / 3 - 4, 16 / 3 - 4, 20 / 3 - 4, 8 / 3 - 4))])
def test_response_advantages_match_hand_computation(advantage, expected):
    """The rows' rewards sum to 1, 4, 5, 2. In groups of two the others are 4, 1, 2, 5. In the whole batch of mean 3, R
    minus the mean of the other three is 4/3 (R - 3). Every action of a row gets that; what is off the mask is 0."""
    rewards = f64([0, -1, 2], [4, 0, 0], [2.5, 2.5, 0], [0, 2, 0])
    advantages, returns = response_advantages(rewards, MASK, advantage, group_size=2)
    assert_close(advantages, torch.where(MASK, f64(*expected)[:, None], 0.0), atol=1e-7, rtol=1e-7)
    assert returns.shape == MASK.shape and returns.eq(0).all()


def test_response_advantages_are_of_the_score_minus_the_kl_penalty():
    """Scores 1 and 3, kl_coef 1/2, log ratios 1 + 1 and -2: R is 1 - 1 = 0 and 3 + 1 = 4. No pad counts."""
    mask = torch.tensor([[False, True, True], [True, False, False]])
    for poison in POISON:
        logprobs = torch.where(mask, f64([0, 1, 1], [-2, 0, 0]), poison)
        rewards = shape_rewards(f64(1, 3), logprobs, f64([0, 0, 0], [0, 0, 0]), mask, 0.5)
        got = response_advantages(rewards, mask, "rloo", 2)[0]
        assert_close(got, f64([0, -4, -4], [4, 0, 0]))


def test_policy_without_value_has_the_policys_hidden_states_and_no_weights_of_its_own(gpt):
    policy, tokens = PolicyWithoutValue(gpt), torch.tensor([[1, 2, 3]])
    hidden, values = policy.hidden(tokens)
    assert torch.equal(hidden, gpt.hidden(tokens)) and values.tolist() == [[0, 0, 0]] and not values.requires_grad
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
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(gpt.parameters()), retain_graph=True)])


def pairs_of(world, same_prompt):
    """Row numbers (2M,), two consecutive rows a pair: all pairs of responses to one prompt, or all pairs of rows."""
    per_prompt = len(world.tokens) // len(PROMPTS)
    blocks = [range(at, at + per_prompt) for at in range(0, len(world.tokens), per_prompt)]
    pools = blocks if same_prompt else [range(len(world.tokens))]
    return torch.tensor([row for pool in pools for pair in itertools.product(pool, pool) for row in pair])


def expected_gradient(world, gpt, advantages_of, same_prompt=True, weigh=None):
    """Gradient of the policy loss over all pairs, each weighted by its probability; the mean over a pair's two rows.

    advantages_of: R (2M,) -> advantages (2M,); weigh: mask (2M, T-1) -> a factor of each slot (2M, T-1).
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
    got = expected_gradient(world, gpt, lambda rewards, mask: response_advantages(rewards, mask, "rloo", 2)[0])
    assert_close(got, slope, atol=1e-7, rtol=1e-5)
    assert slope.norm() > 0.1 and turned(got, slope) < 1e-5


def test_expected_gradient_of_reinforce_is_that_of_the_objective(uphill):
    """The baseline is the other row of a batch of two, which may be the response to another prompt."""
    world, gpt, slope = uphill
    rows = pairs_of(world, same_prompt=False)

    def batches_of_two(rewards, mask):
        """response_advantages of each pair by itself: what a group is to RLOO, the whole batch is to REINFORCE."""
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
    got = expected_gradient(world, gpt, lambda rewards, mask: torch.where(
        mask, grpo_advantages(rewards.sum(dim=1), 2, divide=False).unsqueeze(1), 0.0))
    assert_close(got, slope / 2, atol=1e-7, rtol=1e-5)


def test_expected_gradient_of_grpo_is_that_of_the_win_rate(uphill):
    """In groups of two A is +1 for the better and -1 for the worse response. So the expected gradient is that of
    P(win) - P(loss), the policy's response against that of a copy which is held fixed, by R. (Up to the 1e-8 under the
    root, which counts if two R are nearly equal.) It is not parallel to the gradient of J."""
    world, gpt, slope = uphill
    got = expected_gradient(world, gpt, lambda rewards, mask: response_advantages(rewards, mask, "grpo", 2)[0])
    logprobs = world.logprobs(gpt).sum(dim=1).view(len(PROMPTS), -1)  # (3, 40)
    R = (world.scores - KL_COEF * (world.logprobs(gpt) - world.ref_logprobs).sum(dim=1)).detach().view(len(PROMPTS), -1)
    won = (R.unsqueeze(2) - R.unsqueeze(1)).sign()  # (3, 40, 40): +1 where the first beats the second
    rate = (logprobs.exp().unsqueeze(2) * logprobs.detach().exp().unsqueeze(1) * won).sum() / len(PROMPTS)
    expected = flat_gradient(rate, gpt)
    assert (got - expected).norm() < 1e-3 * expected.norm()
    print(f"GRPO with the division: sine of the angle to the gradient of J {turned(got, slope):.3f}")
    assert turned(got, slope) > 0.1


def test_division_weighs_prompts_by_their_spread():
    """Two prompts with two responses each, scores 0 and 10, or 0 and 0.1: RLOO pushes the first 100 times as much."""
    scores = f64(0, 10, 0, 0.1)
    assert_close(rloo_advantages(scores, 2), f64(-10, 10, -0.1, 0.1))
    assert_close(grpo_advantages(scores, 2), f64(-1, 1, -1, 1), atol=1e-5, rtol=1e-5)


def test_mean_of_each_response_has_another_expected_gradient(uphill):
    """As in GRPO's paper: every token divided by the length of its response. Not parallel to the gradient of J."""
    world, gpt, slope = uphill
    got = expected_gradient(world, gpt, lambda rewards, mask: response_advantages(rewards, mask, "rloo", 2)[0],
                            weigh=lambda mask: mask / mask.sum(dim=1, keepdim=True))
    print(f"mean of each response: sine of the angle to the gradient of J {turned(got, slope):.3f}")
    assert turned(got, slope) > 0.05


def kl_of_each_slot(world, gpt, reverse):
    """Exact KL of the next token's distributions at each slot, (120, 5): KL(pi || ref), or KL(ref || pi) if reverse."""
    ours = gpt(world.tokens)[:, :-1].log_softmax(dim=2)
    theirs = world.reference(world.tokens)[:, :-1].log_softmax(dim=2)
    first, second = (theirs, ours) if reverse else (ours, theirs)
    return torch.where(world.mask, (first.exp() * (first - second)).sum(dim=2), 0.0)


def test_k3_in_the_loss_has_the_gradient_of_the_other_kl(uphill):
    """GRPO's KL term: k3 of each sampled token, differentiated. Its expectation is the KL, and its expected gradient is
    that of KL(ref || pi) of each token's distribution, at the prefixes that the policy samples. It is not the gradient
    of the KL(pi || ref) of responses, which J has. k1 in the loss is worse: its expected gradient is 0."""
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
    print(f"k3 in the loss: sine of the angle to the gradient of the KL {turned(got, true):.3f}, norms "
          f"{got.norm():.3f} and {true.norm():.3f}")
    assert (got - true).norm() > 0.05 * true.norm() and turned(got, true) > 0.03
    nothing = flat_gradient((p.unsqueeze(1) * kl_k1(world.logprobs(gpt), world.ref_logprobs)).sum(), gpt)
    assert nothing.abs().max() < 1e-12 < 1e-3 < true.norm()


def test_exact_kl_of_slots_sums_to_the_kl_of_responses(uphill):
    """So the helper above is right: E over responses of the sum over slots of KL(pi || ref) is the KL of responses."""
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
    """As with GAE in test_exact.py: KL(pi || pi*) is 0.10 nats or more before and at most 0.01 after 100 steps."""
    before, after = train(World(seed, channels=32), 1.5, seed, 100, advantage=advantage, group_size=group_size)
    print(f"{advantage}, seed {seed}: KL to the optimum {before:.3f} -> {after:.5f}")
    assert after <= 0.01 < 0.1 < before


# ---- DPO ----


def test_dpo_loss_and_gradient_match_hand_computation():
    """The chosen response is twice as likely as under the reference and the rejected one 1/4 as likely: a factor of 8
    between them. With beta 1 that is sigmoid(log 8) = 8/9, a loss of log(9/8). In the second pair the factors are 1/3
    and 1: sigmoid(log 1/3) = 1/4, a loss of log 4. The derivative by a chosen log-probability is -beta (1 - sigmoid) /
    N: -1/18 and -3/8. With beta 1/3 the first has sigmoid(log 2) = 2/3."""
    policy = [f64(1 / 2, 1 / 9).log().requires_grad_(), f64(1 / 8, 1 / 5).log().requires_grad_()]
    reference = f64(1 / 4, 1 / 3).log(), f64(1 / 2, 1 / 5).log()
    loss = dpo_loss(*policy, *reference, beta=1.0)
    loss.backward()
    assert_close(loss, f64((math.log(9 / 8) + math.log(4)) / 2).squeeze())
    assert_close(policy[0].grad, f64(-1 / 18, -3 / 8))
    assert_close(policy[1].grad, f64(1 / 18, 3 / 8))
    first = dpo_loss(*(x[:1] for x in (*policy, *reference)), beta=1 / 3)
    assert_close(first, f64(math.log(3 / 2)).squeeze())
    (slope,) = torch.autograd.grad(first, policy[0])
    assert_close(slope, f64(-1 / 3 * 1 / 3, 0))


def test_dpo_loss_of_the_reference_is_ln_2():
    same = f64(-3, -5), f64(-1, -2)
    assert dpo_loss(*same, *same, beta=0.1).item() == pytest.approx(math.log(2))


def test_dpo_loss_rejects_other_shapes():
    with pytest.raises(ValueError, match="shapes must be equal"):
        dpo_loss(f64(1, 2), f64(1, 2), f64(1), f64(1, 2), beta=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        dpo_loss(*[torch.zeros(0)] * 4, beta=0.1)


def expected_dpo_gradient(log_policy, log_ref, scores, beta):
    """By each response's log-probability, over all ordered pairs, each as often as a Bradley-Terry voter chooses so."""
    log_policy = log_policy.clone().requires_grad_()
    i, j = (~torch.eye(len(scores), dtype=torch.bool)).nonzero(as_tuple=True)
    votes = torch.sigmoid(scores[i] - scores[j])
    total = sum(vote * dpo_loss(log_policy[a : a + 1], log_policy[b : b + 1], log_ref[a : a + 1], log_ref[b : b + 1],
                                beta) for vote, a, b in zip(votes, i.tolist(), j.tolist()))
    return torch.autograd.grad(total, log_policy)[0]


def test_expected_dpo_gradient_is_zero_at_the_optimum_of_the_objective(uphill):
    """pi* = ref exp(score / beta) / Z, with the scores in log-odds of the votes. With twice the beta it is not, nor at
    the reference. Twelve responses to one prompt."""
    world, _, _ = uphill
    scores, log_ref, beta = world.scores[:12], world.ref_logprobs[:12].sum(dim=1), 0.5
    best = (log_ref + scores / beta).log_softmax(dim=0)
    assert expected_dpo_gradient(best, log_ref, scores, beta).abs().max() < 1e-12
    assert expected_dpo_gradient(best, log_ref, scores, 2 * beta).abs().max() > 0.1
    assert expected_dpo_gradient(log_ref, log_ref, scores, beta).abs().max() > 0.1


def test_pair_logprobs_are_those_of_each_response_by_itself(gpt):
    """Prompts and responses of different lengths. Only the response counts, and only the policy has a gradient."""
    reference = noisy(GPT(gpt.config).double(), seed=7)
    pairs = [Comparison(Prompt("", [1, 2, 3]), [4, 10], [5, 6, 7, 10]),
             Comparison(Prompt("", [8]), [9, 9, 9, 10], [10])]
    got = pair_logprobs(pairs, gpt, reference, 0, torch.device("cpu"), None)
    expected = []
    for model, side in itertools.product((gpt, reference), ("chosen", "rejected")):
        for pair in pairs:
            start, ids = len(pair.prompt.tokens), pair.prompt.tokens + getattr(pair, side)
            logprobs = model(torch.tensor([ids]))[0].log_softmax(dim=1)
            expected.append(sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))))
    assert_close(got, f64(*expected).view(4, 2))
    loss = got[2:].sum()
    assert torch.autograd.grad(loss, gpt.wte.weight, retain_graph=True)[0].eq(0).all()
    assert torch.autograd.grad(loss, reference.wte.weight, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(got[:2].sum(), gpt.wte.weight)[0].abs().max() > 0
    ratios = got[:2] - got[2:]
    share = (ratios[0] > ratios[1]).double().mean().item()
    assert pair_accuracy(pairs, gpt, reference, 0, torch.device("cpu"), None) == share
    assert pair_accuracy(pairs, gpt, gpt, 0, torch.device("cpu"), None) == 0.5  # all equal
