"""Every loss and its gradient: against numbers worked by hand, finite differences, and values that
the mask hides."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rlhf.losses import bradley_terry_loss, entropy, policy_loss, ranking_loss, sft_loss, value_loss
from tests.helpers import DTYPES, POISON, f64


def number(x):
    return torch.tensor(x, dtype=torch.float64)


# ---- SFT ----


def test_sft_loss_of_uniform_logits_is_log_v():
    """V = 4 with equal logits: every token costs ln 4."""
    mask = torch.tensor([[False, True, True]])
    assert_close(
        sft_loss(torch.zeros(1, 4, 4, dtype=torch.float64), torch.tensor([[0, 3, 1, 2]]), mask),
        number(math.log(4)),
    )


def test_sft_loss_counts_only_response_tokens():
    """p = 1/2 1/4 1/4 in slot 0 and 1/8 1/8 3/4 in slots 1 and 2. Tokens 0 1 | 2 0: the last two
    are the response. Slots 1 and 2 cost -ln 3/4 and -ln 1/8, mean (ln 4/3 + ln 8) / 2. Slot 0,
    whose action is a prompt token, does not count."""
    logits = torch.log(
        torch.tensor(
            [[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.125, 0.125, 0.75], [0.1, 0.1, 0.8]]],
            dtype=torch.float64,
        )
    )
    loss = sft_loss(logits, torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, True, True]]))
    assert_close(loss, number((math.log(4 / 3) + math.log(8)) / 2))


def test_sft_loss_equals_torch_cross_entropy():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 6, 9, dtype=torch.float64), torch.randint(9, (3, 6))
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    targets = torch.where(mask, tokens[:, 1:], -100)
    assert_close(
        sft_loss(logits, tokens, mask), F.cross_entropy(logits[:, :-1].transpose(1, 2), targets)
    )


@pytest.mark.parametrize("poison", POISON)
def test_sft_loss_ignores_masked_logits(poison):
    """One slot counts. It is uniform over 4 tokens: loss ln 4, gradient p - onehot. All other
    gradients are 0."""
    logits = torch.zeros(1, 4, 4, dtype=torch.float64)
    logits[0, [0, 2, 3]] = poison
    logits.requires_grad_()
    loss = sft_loss(logits, torch.tensor([[0, 3, 1, 2]]), torch.tensor([[False, True, False]]))
    loss.backward()
    assert_close(loss.detach(), number(math.log(4)))
    assert_close(logits.grad[0], f64([0] * 4, [0.25, -0.75, 0.25, 0.25], [0] * 4, [0] * 4))


# ---- reward model ----


def test_bradley_terry_loss_and_gradient_match_hand_computation():
    """Margins 0 and ln 3: sigmoid 1/2 and 3/4, mean loss (ln 2 + ln 4/3) / 2 = 0.4904. The
    derivative with respect to a chosen score is -(1 - sigmoid) / N: -1/4 and -1/8. For a rejected
    score it is the opposite. So descent raises the chosen score."""
    chosen, rejected = f64(1, 2 + math.log(3)).requires_grad_(), f64(1, 2).requires_grad_()
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert_close(loss.detach(), number((math.log(2) + math.log(4 / 3)) / 2))
    assert_close(chosen.grad, f64(-0.25, -0.125))
    assert_close(rejected.grad, f64(0.25, 0.125))


@pytest.mark.parametrize(
    ("margin", "loss"), [(0, 0.693147), (1, 0.313262), (2, 0.126928), (-2, 2.126928)]
)
def test_bradley_terry_loss_of_known_margins(margin, loss):
    """The loss of one pair is ln(1 + e^-margin)."""
    assert bradley_terry_loss(f64(margin), f64(0)).item() == pytest.approx(loss, abs=1e-6)


def test_bradley_terry_loss_rejects_empty_batch():
    with pytest.raises(ValueError, match="N at least 1"):
        bradley_terry_loss(torch.zeros(0), torch.zeros(0))


def test_bradley_terry_loss_of_large_negative_margin_is_finite():
    """At margin -200 the loss is 200. log(sigmoid(x)) in float32 would give infinity."""
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200.0


def test_preference_losses_of_half_precision_are_computed_in_float32():
    """Scores -40,000 and 40,000: the margin, 80,000, is above the largest number of float16."""
    scores = torch.tensor([-40_000, 40_000], dtype=torch.float16)
    assert bradley_terry_loss(scores[:1], scores[1:]).item() == 80_000
    ranks = torch.tensor([[0, 1]])
    assert ranking_loss(scores.unsqueeze(0), ranks).item() == 80_000


def test_bradley_terry_loss_does_not_change_if_all_scores_shift():
    assert_close(
        bradley_terry_loss(f64(1, 2) + 5, f64(0, 3) + 5), bradley_terry_loss(f64(1, 2), f64(0, 3))
    )


def test_ranking_loss_of_three_matches_hand_computation():
    """Scores 2 1 0, ranked in this order: margins 1, 2 and 1, mean (0.313262 + 0.126928 + 0.313262)
    / 3 = 0.251150."""
    got = ranking_loss(f64([2, 1, 0]), torch.tensor([[0, 1, 2]]))
    assert got.item() == pytest.approx(0.251150, abs=1e-6)


def test_ranking_loss_of_two_equals_bradley_terry_loss():
    assert_close(
        ranking_loss(f64([0.3, 1.1], [2.0, -1.0]), torch.tensor([[1, 0], [0, 1]])),
        bradley_terry_loss(f64(1.1, 2.0), f64(0.3, -1.0)),
    )


def test_ranking_loss_drops_ties_and_absent_responses_and_averages_over_prompts():
    """Prompt 1: ranks 0 0 5, scores 0 ln3 0. The tie is dropped. Pairs (0, 2) and (1, 2) have
    margins 0 and ln 3, mean (ln 2 + ln 4/3) / 2. Prompt 2: one response is absent, one pair has
    margin 0: ln 2. Prompt 3: all tied, left out. The loss is the mean over the two prompts, not
    over the three pairs."""
    scores = f64([0, math.log(3), 0], [4, 4, math.nan], [1, 2, 3]).requires_grad_()
    ranks = torch.tensor([[0, 0, 5], [1, 2, -1], [3, 3, 3]])
    loss = ranking_loss(scores, ranks)
    loss.backward()
    assert_close(loss.detach(), number(((math.log(2) + math.log(4 / 3)) / 2 + math.log(2)) / 2))
    assert_close(scores.grad, f64([-0.125, -0.0625, 0.1875], [-0.25, 0.25, 0], [0, 0, 0]))


def test_ranking_loss_rejects_batch_without_pairs():
    with pytest.raises(ValueError, match="no True entry"):
        ranking_loss(f64([1, 2]), torch.tensor([[0, 0]]))


# ---- PPO ----


def quadrants():
    """Ratios 3/2 3/2 1/2 1/2 with advantages +1 -1 +1 -1."""
    new = torch.log(f64([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    return (
        new,
        torch.zeros(1, 4, dtype=torch.float64),
        f64([1, -1, 1, -1]),
        torch.ones(1, 4, dtype=torch.bool),
    )


def test_policy_loss_clips_only_moves_in_the_direction_of_the_advantage():
    """eps 1/5, so the clipped ratio is 6/5 or 4/5. Terms max(-A ratio, -A clipped ratio):
        ratio 3/2, A +1: max(-1.5, -1.2) = -1.2   clipped, gradient 0
        ratio 3/2, A -1: max( 1.5,  1.2) =  1.5   gradient of the log-probability -A ratio = 3/2
        ratio 1/2, A +1: max(-0.5, -0.8) = -0.5   gradient -1/2
        ratio 1/2, A -1: max( 0.5,  0.8) =  0.8   clipped, gradient 0
    Mean 0.6 / 4 = 0.15. The clipped branch is the larger in two of four."""
    new, old, advantages, mask = quadrants()
    loss, clip_fraction = policy_loss(new, old, advantages, mask, clip_eps=0.2)
    loss.backward()
    assert_close(loss.detach(), number(0.15))
    assert_close(new.grad * 4, f64([0, 1.5, -0.5, 0]))
    assert clip_fraction.item() == 0.5


def test_policy_loss_at_ratio_1_has_the_reinforce_gradient():
    """Old and new policy are the same. The loss is -mean(A) = -(2 - 1 + 5) / 3 = -2 and its
    gradient is -A / 3."""
    new = f64([-1, -2, -3]).requires_grad_()
    loss, clip_fraction = policy_loss(
        new, f64([-1, -2, -3]), f64([2, -1, 5]), torch.ones(1, 3, dtype=torch.bool), 0.2
    )
    loss.backward()
    assert_close(loss.detach(), number(-2.0))
    assert_close(new.grad, f64([-2, 1, -5]) / 3)
    assert clip_fraction.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_ratio", [5, 12, 89, 800])
@pytest.mark.parametrize("advantage", [1, 0])
def test_policy_loss_of_a_ratio_that_overflows_is_clipped(advantage, log_ratio, dtype):
    """exp(89) is above the largest float32, exp(12) above the largest float16. With A = 1 and eps
    1/5 the loss is -6/5 all the same; with A = 0 it is 0. The gradient is 0."""
    new = torch.tensor([[log_ratio]], dtype=dtype).requires_grad_()
    A = torch.tensor([[advantage]], dtype=dtype)
    mask = torch.tensor([[True]])
    loss, clip_fraction = policy_loss(new, torch.zeros_like(new), A, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 * advantage, abs=1e-6)
    assert new.grad.item() == 0
    assert clip_fraction.item() == advantage


def test_policy_loss_of_a_large_ratio_in_the_wrong_direction_is_not_limited():
    """A = -1, log ratio 20: loss and gradient are exp(20)."""
    new = f64([20]).requires_grad_()
    mask = torch.tensor([[True]])
    loss, _ = policy_loss(new, f64([0]), f64([-1]), mask, 0.2)
    loss.backward()
    assert_close(loss.detach(), number(math.exp(20)))
    assert_close(new.grad, f64([math.exp(20)]))


def test_value_loss_of_half_precision_is_computed_in_float32():
    """V = 400, return 0: half the square, 80,000, is above the largest number of float16."""
    value = torch.tensor([[400]], dtype=torch.float16)
    zero = torch.zeros_like(value)
    loss, _ = value_loss(value, zero, zero, torch.tensor([[True]]), math.inf)
    assert loss.item() == 80_000


@pytest.mark.parametrize("poison", POISON)
def test_policy_loss_ignores_masked_values(poison):
    """Poison in the pad of one of the three inputs at a time. The two real slots have the terms
    -1.2 and 1.5: mean 0.15, gradients 0 and 3/4. The pad's gradient is 0."""
    for poisoned in range(3):
        inputs = [torch.log(f64([1.5, 1.5, 1.0])), f64([0, 0, 0]), f64([1, -1, 1])]
        inputs[poisoned][0, 2] = poison
        inputs = [x.requires_grad_() for x in inputs]
        loss, clip_fraction = policy_loss(*inputs, torch.tensor([[True, True, False]]), 0.2)
        loss.backward()
        assert_close(loss.detach(), number(0.15))
        assert clip_fraction.item() == 0.5
        assert_close(inputs[0].grad, f64([0, 0.75, 0]))


def test_value_loss_and_gradient_match_hand_computation():
    """V_old 0 0, V 1 1, R 2 0, eps 1/5, so V_clipped = 1/5:
        (1 - 2)^2 = 1 and (0.2 - 2)^2 = 3.24: half the larger is 1.62, clipped, gradient 0
        (1 - 0)^2 = 1 and (0.2 - 0)^2 = 0.04: half the larger is 0.5, gradient V - R = 1
    Mean 1.06."""
    new = f64([1, 1]).requires_grad_()
    loss, clip_fraction = value_loss(
        new, f64([0, 0]), f64([2, 0]), torch.ones(1, 2, dtype=torch.bool), 0.2
    )
    loss.backward()
    assert_close(loss.detach(), number(1.06))
    assert_close(new.grad * 2, f64([0, 1]))
    assert clip_fraction.item() == 0.5


@pytest.mark.parametrize(
    ("new", "old", "ret", "loss", "grad", "clipped"),
    [
        (0.5, 0, 1, 0.32, 0, 1),
        (0.5, 0, 0, 0.125, 0.5, 0),
        (-0.5, 0, 1, 1.125, -1.5, 0),
        (0.5, 1, 0, 0.32, 0, 1),
        (0.5, -0.5, 1, 0.845, 0, 1),
    ],
)
def test_value_loss_takes_the_larger_of_clipped_and_unclipped(new, old, ret, loss, grad, clipped):
    """eps 1/5. 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2):
        V .5 old 0 R 1: max(.25, .64) / 2      V .5 old 0 R 0: max(.25, .04) / 2
        V -.5 old 0 R 1: max(2.25, 1.44) / 2   V .5 old 1 R 0: max(.25, .64) / 2
        V .5 old -.5 R 1: max(.25, 1.69) / 2
    If the clipped branch is the larger, the gradient is 0."""
    value = f64([new]).requires_grad_()
    got, clip_fraction = value_loss(value, f64([old]), f64([ret]), torch.tensor([[True]]), 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert value.grad.item() == pytest.approx(grad, abs=1e-12)
    assert clip_fraction.item() == clipped


def test_value_loss_without_clipping_is_half_the_squared_error():
    """clip_eps = inf: (1 - 4)^2 / 2 = 4.5, although V has moved by 10."""
    loss, clip_fraction = value_loss(
        f64([1]), f64([-9]), f64([4]), torch.tensor([[True]]), math.inf
    )
    assert (loss.item(), clip_fraction.item()) == (4.5, 0.0)


@pytest.mark.parametrize("eps", [math.inf, 100.0])
def test_value_clip_fraction_does_not_count_rounding(eps):
    """In float32 V_old + (V - V_old) may differ from V in the last bit. No V has moved beyond eps,
    so nothing is clipped."""
    old, new, ret = torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(0))
    assert (old + (new - old) != new).any()
    loss, clip_fraction = value_loss(new, old, ret, torch.ones(50, 20, dtype=torch.bool), eps)
    assert clip_fraction.item() == 0
    assert_close(loss, ((new - ret) ** 2).mean() / 2)


@pytest.mark.parametrize(
    ("new", "old", "ret", "eps"), [(0.9, 0.3, 0, 0.9 - 0.3), (0.5, 0, 0.375, 0.25)]
)
def test_value_clip_fraction_does_not_count_the_edge_or_equal_branches(new, old, ret, eps):
    """V has moved by exactly eps, and 0.3 + (0.9 - 0.3) is above 0.9 in float64, so the clipped
    branch is larger, by rounding only. V has moved by 1/2 and eps is 1/4, but R = 3/8 lies
    half-way: both branches are 1/64."""
    _, clip_fraction = value_loss(f64([new]), f64([old]), f64([ret]), torch.tensor([[True]]), eps)
    assert old + (new - old) > new or (new - ret) ** 2 == (old + eps - ret) ** 2
    assert clip_fraction.item() == 0


@pytest.mark.parametrize("poison", POISON)
def test_value_loss_ignores_masked_values(poison):
    """The two slots of the hand computation above, loss 1.06, with poison in the pad of one of the
    three inputs at a time."""
    for poisoned in range(3):
        inputs = [f64([1, 1, 0]), f64([0, 0, 0]), f64([2, 0, 0])]
        inputs[poisoned][0, 2] = poison
        inputs = [x.requires_grad_() for x in inputs]
        loss, clip_fraction = value_loss(*inputs, torch.tensor([[True, True, False]]), 0.2)
        loss.backward()
        assert_close(loss.detach(), number(1.06))
        assert clip_fraction.item() == 0.5
        assert_close(inputs[0].grad, f64([0, 0.5, 0]))


def test_entropy_matches_hand_computation():
    """Slot 0: p = 1/2 1/4 1/4 has entropy 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2. Slot 1 is uniform
    over 3 tokens: ln 3. Slot 2 is masked. The last column has no slot."""
    p = torch.tensor(
        [[[0.5, 0.25, 0.25], [1 / 3] * 3, [0.9, 0.05, 0.05], [0.8, 0.1, 0.1]]], dtype=torch.float64
    )
    got = entropy(torch.log(p) + 3, torch.tensor([[True, True, False]]))
    assert_close(got, number((1.5 * math.log(2) + math.log(3)) / 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_of_a_token_of_probability_zero_counts_it_as_zero(dtype):
    """Logits 0, 0, -inf: p = 1/2 1/2 0, entropy ln 2. It is the maximum of two tokens, so the
    gradient is 0."""
    logits = torch.tensor([[[0, 0, -math.inf], [0, 0, 0]]], dtype=dtype).requires_grad_()
    got = entropy(logits, torch.tensor([[True]]))
    got.backward()
    assert got.item() == pytest.approx(math.log(2), abs=1e-6)
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("poison", POISON)
def test_entropy_ignores_masked_logits(poison):
    """Slot 0 has entropy 3/2 ln 2. The other logits hold poison and get the gradient 0."""
    logits = torch.log(
        torch.tensor([[[0.5, 0.25, 0.25], [1, 1, 1], [1, 1, 1]]], dtype=torch.float64)
    )
    logits[0, 1:] = poison
    logits.requires_grad_()
    got = entropy(logits, torch.tensor([[True, False]]))
    got.backward()
    assert_close(got.detach(), number(1.5 * math.log(2)))
    assert logits.grad[0, 1:].eq(0).all() and logits.grad[0, 0].isfinite().all()


def test_entropy_of_half_precision_logits_is_computed_in_float32():
    """Logits 8 and 0: p = sigmoid(8), entropy -p ln p - q ln q = 0.0030172."""
    logits = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    got = entropy(logits, torch.tensor([[True]]))
    q = 1 / (1 + math.exp(8))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-(1 - q) * math.log(1 - q) - q * math.log(q), abs=1e-7)


# ---- gradients against finite differences ----


def cases():
    torch.manual_seed(0)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    tokens = torch.randint(5, (2, 5))

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    other = [rand(2, 4) for _ in range(3)]
    return {
        "sft": (lambda x: sft_loss(x, tokens, mask), rand(2, 5, 5)),
        "bradley_terry": (lambda x: bradley_terry_loss(x, other[0][0]), rand(4)),
        "ranking": (
            lambda x: ranking_loss(x, torch.tensor([[0, 2, 1, 1], [3, -1, 0, 1]])),
            rand(2, 4),
        ),
        "policy": (lambda x: policy_loss(x, other[0], other[1], mask, 0.2)[0], rand(2, 4)),
        "value": (lambda x: value_loss(x, other[0], other[1], mask, 0.2)[0], rand(2, 4)),
        "entropy": (lambda x: entropy(x, mask), rand(2, 5, 5)),
    }


def finite_differences(function, x, h=1e-6):
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1)
        step[i] = h
        step = step.view_as(x)
        grad.view(-1)[i] = (function(x + step) - function(x - step)) / (2 * h)
    return grad


@pytest.mark.parametrize("name", cases())
def test_loss_gradient_equals_finite_differences(name):
    """Central differences in float64 agree with autograd to 1e-7."""
    function, x = cases()[name]
    x.requires_grad_()
    function(x).backward()
    assert_close(x.grad, finite_differences(function, x.detach()), atol=1e-7, rtol=1e-6)


def test_finite_differences_detect_a_wrong_gradient():
    """The backward of this function is wrong by 1 %."""

    class OnePercentOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x**2).sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0] * 1.01

    x = f64([1.0, -2.0]).requires_grad_()
    OnePercentOff.apply(x).backward()
    with pytest.raises(AssertionError):
        assert_close(
            x.grad, finite_differences(OnePercentOff.apply, x.detach()), atol=1e-7, rtol=1e-6
        )


# ---- shapes ----


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
@pytest.mark.parametrize("mismatched", [0, 1, 2, 3])
def test_ppo_losses_reject_shapes_that_would_broadcast(loss, mismatched):
    arguments = [
        torch.zeros(2, 4),
        torch.zeros(2, 4),
        torch.zeros(2, 4),
        torch.ones(2, 4, dtype=torch.bool),
    ]
    arguments[mismatched] = arguments[mismatched][:, :1]
    with pytest.raises(ValueError, match="shapes must be equal"):
        loss(*arguments, 0.2)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_ppo_losses_reject_a_mask_that_is_not_bool(loss):
    x = torch.zeros(2, 4)
    with pytest.raises(TypeError, match="bool"):
        loss(x, x, x, torch.ones(2, 4), 0.2)


def test_bradley_terry_loss_rejects_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shapes must be equal"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(N,\)"):
        bradley_terry_loss(torch.zeros(3, 1), torch.zeros(3, 1))


def test_ranking_loss_rejects_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        ranking_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="shapes must be equal"):
        ranking_loss(torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.long))


def test_entropy_rejects_wrong_logits_and_masks():
    with pytest.raises(ValueError, match="mask"):
        entropy(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="logits"):
        entropy(torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        entropy(torch.zeros(2, 4, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="no True entry"):
        entropy(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("logits", [torch.zeros(2, 4, 5), torch.zeros(0, 5)])
def test_sft_loss_and_entropy_reject_an_empty_mask(logits):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no True entry"):
        sft_loss(logits, torch.zeros(2, 4, dtype=torch.long), mask)
    with pytest.raises(ValueError, match="no True entry"):
        entropy(torch.zeros(2, 4, 5), mask)


def test_sft_loss_rejects_a_mask_as_wide_as_the_tokens():
    with pytest.raises(ValueError, match="mask"):
        sft_loss(
            torch.zeros(2, 4, 3),
            torch.zeros(2, 4, dtype=torch.long),
            torch.ones(2, 4, dtype=torch.bool),
        )
