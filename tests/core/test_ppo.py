"""PPO's loss of one minibatch, worked by hand; its micro-batches; the update around them."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_ppo
from rlhf import ppo
from rlhf.masked import token_logprobs
from rlhf.ppo import (
    Experience,
    Outputs,
    forward,
    make_experience,
    minibatch_loss,
    update,
    weighted_micro_batches,
)
from rlhf.rollout import Frozen, collect
from rlhf.run.optimizer import make_optimizer
from tests.helpers import CPU, POISON, Digits, f64

MEANS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "clip_fraction",
    "value_clip_fraction",
    "kl_old",
)

# ---- one minibatch's loss, in fractions ----


@pytest.fixture(params=POISON)
def four_slots(request):
    """Two rows of three slots, with a and b in the first, c and d in the second.

        slot  p(chosen)  p_old   ratio   A     V   V_old   R
        a     1/2        1/4     2       1     2     1     1
        b     1/4        1/2     1/2     2     2     1     3
        c     1/4        1/2     1/2    -4    1/4    0     1
        d     1/3        1/4     4/3    -3   -1/4    0     0

    The other two slots hold poison."""
    x = request.param
    probabilities = f64(
        [1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4], [1 / 3] * 3
    )
    outputs = Outputs(
        all_logprobs=probabilities.log().requires_grad_(),
        values=f64([x, 2, 2], [1 / 4, -1 / 4, x]).requires_grad_(),
    )
    minibatch = Experience(
        tokens=torch.tensor([[2, 2, 0, 1], [0, 2, 1, 0]]),
        mask=torch.tensor([[False, True, True], [True, True, False]]),
        old_logprobs=f64([1, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1]).log(),
        old_values=f64([x, 1, 1], [0, 0, x]),
        advantages=f64([x, 1, 2], [-4, -3, x]),
        returns=f64([x, 1, 3], [1, 0, x]),
        widths=torch.tensor([3, 2]),
    )
    return outputs, minibatch


COEFFICIENTS = {"clip_eps": 1 / 4, "value_clip_eps": 1 / 2, "value_coef": 1 / 2}


def test_minibatch_loss_and_metrics_match_hand_computation(four_slots):
    """policy: max(-2, -5/4), max(-1, -3/2), max(2, 3), max(4, 15/4): -5/4 - 1 + 3 + 4 = 19/4, over
        4. a and c are clipped. d's ratio is beyond 5/4 as well, but in the wrong direction.
    value: V clipped is 3/2, 3/2, 1/4, -1/4: half the mean of 1, 9/4 (clipped), 9/16, 1/16.
    entropy: 1/2 ln 2 + 2/4 ln 4 = 3/2 ln 2 in three slots, ln 3 in d.
    kl_old: r - 1 - ln r: 1 - ln 2, ln 2 - 1/2, ln 2 - 1/2, 1/3 - ln 4/3; the sum is 1/3 + ln 3/2.
    """
    entropy = (9 / 2 * math.log(2) + math.log(3)) / 4
    cfg = SimpleNamespace(**COEFFICIENTS, entropy_coef=1 / 4)
    loss, metrics = minibatch_loss(*four_slots, cfg)
    expected = {
        "policy_loss": 19 / 16,
        "value_loss": 31 / 64,
        "entropy": entropy,
        "clip_fraction": 2 / 4,
        "value_clip_fraction": 1 / 4,
        "kl_old": (1 / 3 + math.log(3 / 2)) / 4,
        "max_log_ratio": math.log(2),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        expected, rel=1e-12
    )
    assert loss.item() == pytest.approx(19 / 16 + 1 / 2 * 31 / 64 - 1 / 4 * entropy, rel=1e-12)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_minibatch_loss_has_no_gradient_at_a_clipped_slot(four_slots):
    """Of log p: -A * ratio / 4 for the token chosen in b and d, 0 in a and c. Of V: 1/2 * (V - R) /
    4 in a, c and d, 0 in b, whose V has moved too far."""
    outputs, minibatch = four_slots
    loss, _ = minibatch_loss(outputs, minibatch, SimpleNamespace(**COEFFICIENTS, entropy_coef=0.0))
    loss.backward()
    assert_close(outputs.all_logprobs.grad, f64([0, 0, 0], [0, -1 / 4, 0], [0, 0, 0], [0, 1, 0]))
    assert_close(outputs.values.grad, f64([0, 1 / 8, 0], [-3 / 32, -1 / 32, 0]))


def test_entropy_bonus_has_a_gradient_in_every_slot(four_slots):
    """Of -1/4 * mean entropy: 1/4 * p (1 + log p) / 4, on top of the gradient without it."""
    outputs, minibatch = four_slots
    loss, _ = minibatch_loss(
        outputs, minibatch, SimpleNamespace(**COEFFICIENTS, entropy_coef=1 / 4)
    )
    loss.backward()
    logprobs = outputs.all_logprobs.detach()
    clipped = f64([0, 0, 0], [0, -1 / 4, 0], [0, 0, 0], [0, 1, 0])
    assert_close(outputs.all_logprobs.grad, clipped + logprobs.exp() * (1 + logprobs) / 16)


# ---- a rollout of six responses ----


@pytest.fixture
def experience(policy, gpt, reward_model):
    """Six responses of at most 6 tokens, with advantages and returns that are plain noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]).repeat(2, 1)
    frozen = Frozen(gpt, reward_model, Digits(eos_id=7), max_new_tokens=6)
    rollout = collect(policy, frozen, prompts, torch.tensor([3, 2, 1, 3, 2, 1]), generator)
    mask = rollout.mask
    assert mask.sum(dim=1).tolist() == [2, 6, 2, 1, 4, 2]  # ragged
    advantages, returns = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    rollout = rollout._replace(logprobs=rollout.logprobs + 0.1 * advantages * mask)
    return make_experience(rollout, advantages, returns)


def opposed(experience):
    """Advantages the other way round: then ratios are clipped."""
    return experience._replace(advantages=-experience.advantages)


class Recorder:
    """Stands in for the optimizer and the scaler: keeps each loss and each gradient, and changes no
    weight."""

    def __init__(self, policy):
        self.policy, self.losses, self.gradients = policy, [], []

    def zero_grad(self):
        self.policy.zero_grad()

    def scale(self, loss):
        self.losses.append(loss.item())
        return loss

    def unscale_(self, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in self.policy.named_parameters()})

    def step(self, optimizer=None):
        pass

    def update(self):
        pass

    def get_scale(self):
        return 1.0


def record(policy, experience, cfg, step=0):
    """update with a Recorder. Returns it and the metrics."""
    recorder = Recorder(policy)
    compute = CPU._replace(scaler=recorder)
    return recorder, update(policy, recorder, compute, experience, cfg, step)


def run(policy, experience, cfg, lr):
    optimizer = make_optimizer(policy, lr, 0.0)
    return update(policy, optimizer, CPU, experience, cfg, step=0)


SIX = train_ppo.PPOConfig(batch_size=6, minibatch_size=6, inner_epochs=1)

# ---- micro-batches ----


def weighted_gradient(policy, experience, rows, size):
    """The gradient of a minibatch, summed over its micro-batches."""
    policy.zero_grad()
    cfg = dataclasses.replace(SIX, entropy_coef=0.1, value_clip_eps=0.2, micro_batch_size=size)
    for micro_batch, weight in weighted_micro_batches(experience, rows, cfg):
        loss, _ = minibatch_loss(forward(policy, micro_batch, CPU), micro_batch, cfg)
        (weight * loss).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [4, 1, 3]])
def test_gradients_of_weighted_micro_batches_sum_to_that_of_the_minibatch(
    policy, experience, rows, size
):
    rows = torch.tensor(rows)
    whole = weighted_gradient(policy, experience, rows, 0)
    parts = weighted_gradient(policy, experience, rows, size)
    assert whole["gpt.wte.weight"].norm() > 0.01
    assert_close(parts, whole, atol=1e-12, rtol=1e-12)


def test_weights_of_micro_batches_by_hand(experience):
    """2 + 6 + 2 + 1 + 4 + 2 = 17 actions in six rows. For three of the rows D = 17/2: rows 4 and 1
    with their 10 actions weigh 20/17, row 3 with 1 action 2/17. Row 1 ends in slot 7, row 3 in slot
    3."""
    rows = torch.tensor([4, 1, 3])
    cfg = dataclasses.replace(SIX, micro_batch_size=2)
    parts = list(weighted_micro_batches(experience, rows, cfg))
    assert [weight.item() for _, weight in parts] == pytest.approx([20 / 17, 2 / 17], rel=1e-12)
    assert [tuple(part.mask.shape) for part, _ in parts] == [(2, 7), (1, 3)]
    assert [tuple(part.tokens.shape) for part, _ in parts] == [(2, 8), (1, 4)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ppo_micro_batches_sum_to_the_minibatch(policy, experience, size):
    cfg = dataclasses.replace(SIX, entropy_coef=0.1, value_clip_eps=0.2)
    whole, metrics = record(policy, experience, cfg)
    in_parts = dataclasses.replace(cfg, micro_batch_size=size)
    parts, metrics_of_parts = record(policy, experience, in_parts)
    assert len(whole.losses) == 1 and len(parts.losses) == math.ceil(6 / size)
    assert_close(parts.gradients, whole.gradients)
    assert sum(parts.losses) == pytest.approx(whole.losses[0], rel=1e-7, abs=1e-7)
    assert metrics_of_parts == pytest.approx(metrics, rel=1e-6, abs=1e-6)


def test_micro_batch_is_cut_after_the_longest_row_taken(policy, gpt, reward_model):
    """Row 1 has actions in slots 0 to 2 and row 0 in slots 2 to 5. Without row 0, three slots are
    left."""
    frozen = Frozen(gpt, reward_model, Digits(eos_id=-1), max_new_tokens=4)
    prompts = torch.tensor([[1, 2, 3], [4, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    rollout = collect(policy, frozen, prompts, torch.tensor([3, 1]), generator)
    assert rollout.mask.shape == (2, 6)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:6] = mask[1, 0:3] = True
    noise = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64)
    experience = make_experience(rollout._replace(mask=mask), *noise)
    assert experience.widths.tolist() == [6, 3]
    taken = experience.take(torch.tensor([1]))
    assert taken.tokens.tolist() == rollout.tokens[1:, :4].tolist()
    assert taken.mask.tolist() == [[True, True, True]]
    for part, whole in zip(taken[2:-1], experience[2:-1], strict=True):
        assert torch.equal(part, whole[1:, :3])
    assert taken.widths.tolist() == [3]


# ---- the update ----


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_of_an_epoch_have_the_gradient_of_the_rollout_as_their_mean(
    policy, experience, size
):
    """At fixed weights, to 12 digits, although the responses have 1 to 6 tokens: all gradient steps
    divide by the same number. With a number of its own for each minibatch, the two differ. The
    metrics are the rollout's too."""
    cfg = dataclasses.replace(SIX, entropy_coef=0.1, value_clip_eps=0.2)
    whole, metrics = record(policy, experience, cfg)
    in_minibatches = dataclasses.replace(cfg, minibatch_size=size)
    steps, metrics_of_steps = record(policy, experience, in_minibatches)
    assert len(steps.gradients) == 6 / size
    for name, gradient in whole.gradients[0].items():
        mean = sum(step[name] for step in steps.gradients) / len(steps.gradients)
        assert_close(mean, gradient, atol=1e-12, rtol=1e-12)
    for name in MEANS:
        assert metrics_of_steps[name] == pytest.approx(metrics[name], rel=1e-6, abs=1e-9), name


def test_loss_and_metrics_of_an_update_by_hand(policy, experience):
    """mean of max(-A r, -A clip(r)) + 0.3 * half the mean of the larger square - 0.2 * mean
    entropy, and the metrics of the log: over all actions, one after another, in plain numbers."""
    experience = opposed(experience)._replace(old_values=experience.old_values + 0.15)
    tokens, mask, old_logprobs, old_values, advantages, returns, _ = experience
    cfg = dataclasses.replace(
        SIX, clip_eps=0.05, value_clip_eps=0.1, value_coef=0.3, entropy_coef=0.2
    )
    recorder, metrics = record(policy, experience, cfg)
    logits, values = policy(tokens)
    terms = []
    for row, t in mask.nonzero().tolist():
        p = logits[row, t].softmax(0).tolist()
        old, a = old_logprobs[row, t].item(), advantages[row, t].item()
        r = p[tokens[row, t + 1]] / math.exp(old)
        v, old_v = values[row, t].item(), old_values[row, t].item()
        target = returns[row, t].item()
        clipped = old_v + min(max(v - old_v, -0.1), 0.1)
        terms.append(
            {
                "policy_loss": max(-a * r, -a * min(max(r, 0.95), 1.05)),
                "value_loss": 0.5 * max((v - target) ** 2, (clipped - target) ** 2),
                "entropy": -sum(x * math.log(x) for x in p),
                "clip_fraction": -a * min(max(r, 0.95), 1.05) > -a * r,
                "value_clip_fraction": (clipped - target) ** 2 > (v - target) ** 2,
                "kl_old": r - 1 - math.log(r),
            }
        )
    expected = {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    loss = expected["policy_loss"] + 0.3 * expected["value_loss"] - 0.2 * expected["entropy"]
    assert recorder.losses == pytest.approx([loss], rel=1e-6)
    assert 0 < expected["clip_fraction"] < 1 and 0 < expected["value_clip_fraction"] < 1
    log_ratios = token_logprobs(logits, tokens, mask) - old_logprobs
    assert metrics["first_log_ratio"] == pytest.approx(log_ratios.abs().max().item())


def test_every_epoch_takes_each_row_once_in_its_own_order(policy, experience, monkeypatch):
    """Two steps of three epochs over six rows in minibatches of two: all metrics are means over
    nine gradient steps. No weight changes, so micro-batches change none of them."""
    taken, take = [], Experience.take

    def spy(self, rows):
        taken.append(rows.tolist())
        return take(self, rows)

    monkeypatch.setattr(Experience, "take", spy)
    experience = opposed(experience)
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=3, clip_eps=0.05)
    logged = [record(policy, experience, cfg, step)[1] for step in (0, 1)]
    orders = [sum(taken[at : at + 3], []) for at in range(0, 18, 3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    assert len(set(map(tuple, orders))) == 6
    assert logged[0]["clip_fraction"] > 0

    row_by_row = dataclasses.replace(cfg, micro_batch_size=1)
    for step in (0, 1):
        metrics = record(policy, experience, row_by_row, step)[1]
        assert logged[step] == pytest.approx(metrics, rel=1e-5)
    # Each minibatch as a rollout of its own: its metrics, weighted by its number of actions, have
    # the same mean.
    pairs = taken[:9]
    weights = [experience.mask[pair].sum().item() for pair in pairs]
    one_epoch = dataclasses.replace(cfg, inner_epochs=1, batch_size=2)
    minibatches = []
    for pair in pairs:
        minibatch = take(experience, torch.tensor(pair))
        minibatches.append(record(policy, minibatch, one_epoch)[1])
    for name in MEANS:
        total = sum(weight * one[name] for weight, one in zip(weights, minibatches))
        assert logged[0][name] == pytest.approx(total / sum(weights), rel=1e-6), name
    assert logged[0]["first_log_ratio"] == minibatches[0]["first_log_ratio"]


def test_first_log_ratio_is_nan_if_one_micro_batch_has_a_nan(policy, experience):
    old_logprobs = experience.old_logprobs.clone()
    old_logprobs[0, 2] = math.nan  # an action of the first row
    cfg = dataclasses.replace(SIX, micro_batch_size=1)
    _, metrics = record(policy, experience._replace(old_logprobs=old_logprobs), cfg)
    assert math.isnan(metrics["first_log_ratio"])


def test_grad_norm_leaves_out_a_step_that_the_scaler_skips(policy, experience, monkeypatch):
    """Norms inf, 2 and 4: the mean is 3."""
    norms = iter(torch.tensor([math.inf, 2.0, 4.0]))
    monkeypatch.setattr(ppo, "optimizer_step", lambda *args: next(norms))
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=1)
    assert record(policy, experience, cfg)[1]["grad_norm"] == 3
