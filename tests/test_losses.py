"""Every loss against numbers worked by hand, its gradient, finite differences, and poisoned pads."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rlhf.losses import bradley_terry_loss, entropy, policy_loss, ranking_loss, sft_loss, value_loss

POISON = [math.nan, math.inf, -math.inf, 1e6]


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


# ---- SFT ----


def test_sft_loss_of_uniform_logits_is_log_v():
    """V = 4 and nothing known: every token costs ln 4, whatever it is."""
    mask = torch.tensor([[False, True, True]])
    assert_close(sft_loss(torch.zeros(1, 4, 4, dtype=torch.float64), torch.tensor([[0, 3, 1, 2]]), mask),
                 number(math.log(4)))


def test_sft_loss_by_hand_counts_response_tokens_alone():
    """p = 1/2 1/4 1/4 in slot 0 (the prompt) and 1/8 1/8 3/4 in slots 1 and 2. Tokens 0 | 1 | 2 0 with the last two as
    response: slots 1 and 2 cost -ln 3/4 and -ln 1/8, mean (ln 4/3 + ln 8) / 2. The prompt's slot is not counted."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.125, 0.125, 0.75],
                                      [0.1, 0.1, 0.8]]], dtype=torch.float64))
    loss = sft_loss(logits, torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, True, True]]))
    assert_close(loss, number((math.log(4 / 3) + math.log(8)) / 2))


def test_sft_loss_is_cross_entropy():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 6, 9, dtype=torch.float64), torch.randint(9, (3, 6))
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    targets = torch.where(mask, tokens[:, 1:], -100)
    assert_close(sft_loss(logits, tokens, mask), F.cross_entropy(logits[:, :-1].transpose(1, 2), targets))


@pytest.mark.parametrize("poison", POISON)
def test_sft_loss_of_poisoned_pads(poison):
    """Uniform over 4 in the one counted slot: ln 4, gradient p - onehot; everywhere else the gradient is exactly 0."""
    logits = torch.zeros(1, 4, 4, dtype=torch.float64)
    logits[0, [0, 2, 3]] = poison
    logits.requires_grad_()
    loss = sft_loss(logits, torch.tensor([[0, 3, 1, 2]]), torch.tensor([[False, True, False]]))
    loss.backward()
    assert_close(loss.detach(), number(math.log(4)))
    assert_close(logits.grad[0], f64([0] * 4, [0.25, -0.75, 0.25, 0.25], [0] * 4, [0] * 4))


# ---- reward model ----


def test_bradley_terry_by_hand():
    """Margins 0 and ln 3: sigmoid 1/2 and 3/4, mean (ln 2 + ln 4/3) / 2 = 0.4904. By a chosen score the derivative is
    -(1 - sigmoid) / N: -1/4 and -1/8; by a rejected one the opposite. So the chosen score is pushed UP."""
    chosen, rejected = f64(1, 2 + math.log(3)).requires_grad_(), f64(1, 2).requires_grad_()
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert_close(loss.detach(), number((math.log(2) + math.log(4 / 3)) / 2))
    assert_close(chosen.grad, f64(-0.25, -0.125))
    assert_close(rejected.grad, f64(0.25, 0.125))


@pytest.mark.parametrize(("margin", "loss"), [(0, 0.693147), (1, 0.313262), (2, 0.126928), (-2, 2.126928)])
def test_bradley_terry_table(margin, loss):
    """ln(1 + e^-margin)."""
    assert bradley_terry_loss(f64(margin), f64(0)).item() == pytest.approx(loss, abs=1e-6)


def test_bradley_terry_of_nothing_is_refused():
    with pytest.raises(ValueError, match="N at least 1"):
        bradley_terry_loss(torch.zeros(0), torch.zeros(0))


def test_bradley_terry_stays_finite_and_ignores_the_zero_of_the_scores():
    """At margin -200 the loss is 200 (log(sigmoid) in float32 would be -inf); adding 5 to both sides changes
    nothing."""
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200.0
    assert_close(bradley_terry_loss(f64(1, 2) + 5, f64(0, 3) + 5), bradley_terry_loss(f64(1, 2), f64(0, 3)))


def test_ranking_loss_by_hand():
    """Scores 2 1 0 in their right order: margins 1, 2 and 1, mean (0.313262 + 0.126928 + 0.313262) / 3 = 0.251150."""
    got = ranking_loss(f64([2, 1, 0]), torch.tensor([[0, 1, 2]]))
    assert got.item() == pytest.approx(0.251150, abs=1e-6)


def test_ranking_loss_of_two_is_bradley_terry():
    assert_close(ranking_loss(f64([0.3, 1.1], [2.0, -1.0]), torch.tensor([[1, 0], [0, 1]])),
                 bradley_terry_loss(f64(1.1, 2.0), f64(0.3, -1.0)))


def test_ranking_loss_ties_absences_and_the_mean_over_prompts():
    """First prompt: ranks 0 0 5 with scores 0 ln3 0, a tie dropped, pairs (0, 2) and (1, 2) with margins 0 and ln 3:
    (ln 2 + ln 4/3) / 2. Second: one response is absent, one pair with margin 0: ln 2. Third: all tied, left out. The
    mean is over the two prompts, not over the three pairs."""
    scores = f64([0, math.log(3), 0], [4, 4, math.nan], [1, 2, 3]).requires_grad_()
    ranks = torch.tensor([[0, 0, 5], [1, 2, -1], [3, 3, 3]])
    loss = ranking_loss(scores, ranks)
    loss.backward()
    assert_close(loss.detach(), number(((math.log(2) + math.log(4 / 3)) / 2 + math.log(2)) / 2))
    assert_close(scores.grad, f64([-0.125, -0.0625, 0.1875], [-0.25, 0.25, 0], [0, 0, 0]))
    with pytest.raises(ValueError, match="no True entry"):
        ranking_loss(f64([1, 2]), torch.tensor([[0, 0]]))


# ---- PPO ----


def quadrants():
    """Ratios 3/2 3/2 1/2 1/2 with advantages + - + -, eps 1/5."""
    new = torch.log(f64([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    return new, torch.zeros(1, 4, dtype=torch.float64), f64([1, -1, 1, -1]), torch.ones(1, 4, dtype=torch.bool)


def test_policy_loss_in_all_four_quadrants():
    """max(-A ratio, -A clipped):
        ratio 3/2, A +1: max(-1.5, -1.2) = -1.2   clipped, gradient 0
        ratio 3/2, A -1: max( 1.5,  1.2) =  1.5   gradient by the log-probability -A ratio = 3/2
        ratio 1/2, A +1: max(-0.5, -0.8) = -0.5   gradient -1/2
        ratio 1/2, A -1: max( 0.5,  0.8) =  0.8   clipped, gradient 0
    Mean 0.6 / 4 = 0.15. The clipped branch is the larger in two of four."""
    new, old, advantages, mask = quadrants()
    loss, clip_fraction = policy_loss(new, old, advantages, mask, clip_eps=0.2)
    loss.backward()
    assert_close(loss.detach(), number(0.15))
    assert_close(new.grad * 4, f64([0, 1.5, -0.5, 0]))
    assert clip_fraction.item() == 0.5


def test_policy_loss_when_old_is_new_is_the_policy_gradient():
    """Ratio 1: the loss is -mean(A) = -(2 - 1 + 5) / 3 = -2 and its gradient -A / 3: plain REINFORCE."""
    new = f64([-1, -2, -3]).requires_grad_()
    loss, clip_fraction = policy_loss(new, f64([-1, -2, -3]), f64([2, -1, 5]), torch.ones(1, 3, dtype=torch.bool), 0.2)
    loss.backward()
    assert_close(loss.detach(), number(-2.0))
    assert_close(new.grad, f64([-2, 1, -5]) / 3)
    assert clip_fraction.item() == 0.0


@pytest.mark.parametrize("poison", POISON)
def test_policy_loss_of_poisoned_pads(poison):
    """Each of the three inputs poisoned in the pad, one at a time: loss, clip fraction and gradients stay those of the
    two real slots: terms -1.2 and 1.5, mean 0.15; gradients 0 and 3/4; exactly 0 in the pad."""
    for spoiled in range(3):
        inputs = [torch.log(f64([1.5, 1.5, 1.0])), f64([0, 0, 0]), f64([1, -1, 1])]
        inputs[spoiled][0, 2] = poison
        inputs = [x.requires_grad_() for x in inputs]
        loss, clip_fraction = policy_loss(*inputs, torch.tensor([[True, True, False]]), 0.2)
        loss.backward()
        assert_close(loss.detach(), number(0.15))
        assert clip_fraction.item() == 0.5
        assert_close(inputs[0].grad, f64([0, 0.75, 0]))


def test_value_loss_by_hand():
    """V_old 0 0, V 1 1, R 2 0, eps 1/5, so V_clipped = 1/5:
        (1 - 2)^2 = 1 and (0.2 - 2)^2 = 3.24: half the larger is 1.62, clipped, gradient 0
        (1 - 0)^2 = 1 and (0.2 - 0)^2 = 0.04: half the larger is 0.5, gradient V - R = 1
    Mean 1.06."""
    new = f64([1, 1]).requires_grad_()
    loss, clip_fraction = value_loss(new, f64([0, 0]), f64([2, 0]), torch.ones(1, 2, dtype=torch.bool), 0.2)
    loss.backward()
    assert_close(loss.detach(), number(1.06))
    assert_close(new.grad * 2, f64([0, 1]))
    assert clip_fraction.item() == 0.5


@pytest.mark.parametrize(
    ("new", "old", "ret", "loss", "grad", "clipped"),
    [(0.5, 0, 1, 0.32, 0, 1), (0.5, 0, 0, 0.125, 0.5, 0), (-0.5, 0, 1, 1.125, -1.5, 0), (0.5, 1, 0, 0.32, 0, 1),
     (0.5, -0.5, 1, 0.845, 0, 1)],
)
def test_value_loss_table(new, old, ret, loss, grad, clipped):
    """eps 1/5. 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2):
        V .5 old 0 R 1: max(.25, .64) / 2      V .5 old 0 R 0: max(.25, .04) / 2
        V -.5 old 0 R 1: max(2.25, 1.44) / 2   V .5 old 1 R 0: max(.25, .64) / 2
        V .5 old -.5 R 1: max(.25, 1.69) / 2
    The clipped branch is in force where it is the larger of the two: there the gradient is 0."""
    value = f64([new]).requires_grad_()
    got, clip_fraction = value_loss(value, f64([old]), f64([ret]), torch.tensor([[True]]), 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert value.grad.item() == pytest.approx(grad, abs=1e-12)
    assert clip_fraction.item() == clipped


def test_value_loss_without_clipping_is_half_the_squared_error():
    """(1 - 4)^2 / 2 = 4.5 with clip_eps = inf, however far V has moved. In float32 V_old + (V - V_old) is not V to the
    last bit, and that is no clipping: the share is 0 with eps = inf and with an eps that no V has reached."""
    got, clip_fraction = value_loss(f64([1]), f64([-9]), f64([4]), torch.tensor([[True]]), math.inf)
    assert (got.item(), clip_fraction.item()) == (4.5, 0.0)
    old, new, ret = torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(0))
    assert (old + (new - old) != new).any()
    for eps in (math.inf, 100.0):
        loss, clip_fraction = value_loss(new, old, ret, torch.ones(50, 20, dtype=torch.bool), eps)
        assert clip_fraction.item() == 0
        assert_close(loss, ((new - ret) ** 2).mean() / 2)


@pytest.mark.parametrize("poison", POISON)
def test_value_loss_of_poisoned_pads(poison):
    """As by hand above, 1.06, with each of the three inputs poisoned in the pad."""
    for spoiled in range(3):
        inputs = [f64([1, 1, 0]), f64([0, 0, 0]), f64([2, 0, 0])]
        inputs[spoiled][0, 2] = poison
        inputs = [x.requires_grad_() for x in inputs]
        loss, clip_fraction = value_loss(*inputs, torch.tensor([[True, True, False]]), 0.2)
        loss.backward()
        assert_close(loss.detach(), number(1.06))
        assert clip_fraction.item() == 0.5
        assert_close(inputs[0].grad, f64([0, 0.5, 0]))


def test_entropy_by_hand():
    """Slot 0: p = 1/2 1/4 1/4 has entropy 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2; slot 1 is uniform over 3: ln 3; slot 2 is
    masked; the last column has no slot."""
    p = torch.tensor([[[0.5, 0.25, 0.25], [1 / 3] * 3, [0.9, 0.05, 0.05], [0.8, 0.1, 0.1]]], dtype=torch.float64)
    got = entropy(torch.log(p) + 3, torch.tensor([[True, True, False]]))
    assert_close(got, number((1.5 * math.log(2) + math.log(3)) / 2))


@pytest.mark.parametrize("poison", POISON)
def test_entropy_of_poisoned_pads(poison):
    """The pad's logits reach neither the entropy, 3/2 ln 2, nor the gradient."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [1, 1, 1], [1, 1, 1]]], dtype=torch.float64))
    logits[0, 1:] = poison
    logits.requires_grad_()
    got = entropy(logits, torch.tensor([[True, False]]))
    got.backward()
    assert_close(got.detach(), number(1.5 * math.log(2)))
    assert logits.grad[0, 1:].eq(0).all() and logits.grad[0, 0].isfinite().all()


def test_entropy_of_half_precision_is_float32():
    """Logits 8 and 0: p = sigmoid(8), entropy -p ln p - q ln q = 0.0030172."""
    logits = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    got = entropy(logits, torch.tensor([[True]]))
    q = 1 / (1 + math.exp(8))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-(1 - q) * math.log(1 - q) - q * math.log(q), abs=1e-7)


# ---- gradients against finite differences, and the shapes that are refused ----


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
        "ranking": (lambda x: ranking_loss(x, torch.tensor([[0, 2, 1, 1], [3, -1, 0, 1]])), rand(2, 4)),
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
def test_gradient_is_the_slope(name):
    """Central differences in float64 agree with autograd to 1e-7."""
    function, x = cases()[name]
    x.requires_grad_()
    function(x).backward()
    assert_close(x.grad, finite_differences(function, x.detach()), atol=1e-7, rtol=1e-6)


def test_the_slope_test_can_fail():
    """A function whose backward is 1 % off is caught."""

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
        assert_close(x.grad, finite_differences(OnePercentOff.apply, x.detach()), atol=1e-7, rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    """Each loss with one argument a row, or a dimension, short of the others."""
    x, narrow, mask = torch.zeros(2, 4), torch.zeros(2, 1), torch.ones(2, 4, dtype=torch.bool)
    for loss in (policy_loss, value_loss):
        for spoiled in range(4):
            arguments = [x, x, x, mask]
            arguments[spoiled] = narrow if spoiled < 3 else mask[:, :1]
            with pytest.raises(ValueError, match="shapes must be equal"):
                loss(*arguments, 0.2)
        with pytest.raises(TypeError, match="bool"):
            loss(x, x, x, mask.float(), 0.2)
    with pytest.raises(ValueError, match="shapes must be equal"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(N,\)"):
        bradley_terry_loss(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        ranking_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="shapes must be equal"):
        ranking_loss(torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="mask"):
        entropy(torch.zeros(2, 4, 3), mask)
    with pytest.raises(ValueError, match="logits"):
        entropy(torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        entropy(torch.zeros(2, 4, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="no True entry"):
        entropy(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask"):
        sft_loss(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long), mask)
