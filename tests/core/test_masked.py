"""masked_mean, masked_whiten and token_logprobs against numbers worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rlhf.masked import check_same_shape, masked_mean, masked_whiten, token_logprobs
from tests.helpers import DTYPES, POISON, f64


def test_masked_mean_weighs_all_tokens_equally():
    """Rows [1 1 1] and [5 - -]: (1 + 1 + 1 + 5) / 4 = 2. The mean of the row means is (1 + 5) / 2 =
    3. The mean without the mask is (1 + 1 + 1 + 5 + 0 + 0) / 6 = 4/3."""
    x = f64([1, 1, 1], [5, 0, 0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert_close(masked_mean(x, mask), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("poison", POISON)
def test_masked_mean_ignores_masked_values(poison):
    """The third value is masked: mean (2 + 4) / 2 = 3, gradient 1/2 1/2 0."""
    x = f64([2, 4, poison]).requires_grad_()
    mean = masked_mean(x, torch.tensor([[True, True, False]]))
    mean.backward()
    assert mean.item() == 3.0
    assert_close(x.grad, f64([0.5, 0.5, 0]))


def test_masked_mean_rejects_empty_mask():
    with pytest.raises(ValueError, match="no True entry"):
        masked_mean(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("poison", POISON)
def test_masked_whiten_matches_hand_computation(poison):
    """1 2 3 4: mean 5/2, biased variance (9 + 1 + 1 + 9)/4 / 4 = 5/4. So (x - 5/2) / sqrt(5/4) is
    -3, -1, 1, 3 over sqrt 5. (The unbiased variance 5/3 would give -1.162 for the first.) The pad
    becomes 0."""
    x = f64([1, 2, poison], [3, 4, poison])
    mask = torch.tensor([[True, True, False]] * 2)
    expected = f64([-3, -1, 0], [1, 3, 0]) / math.sqrt(5)
    assert_close(masked_whiten(x, mask), expected, atol=1e-7, rtol=0)


def test_masked_whiten_adds_1e_8_to_the_variance():
    """-1e-4 and 1e-4 have variance 1e-8: each becomes 1e-4 / sqrt(1e-8 + 1e-8) = 1/sqrt 2 in size.
    Equal entries become 0."""
    mask = torch.tensor([[True, True]])
    assert_close(
        masked_whiten(f64([-1e-4, 1e-4]), mask), f64([-1, 1]) / math.sqrt(2), atol=1e-12, rtol=0
    )
    assert_close(masked_whiten(f64([7, 7]), mask), f64([0, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [123.45, -0.1, 1e-3, 6e4])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_masked_whiten_of_equal_entries_is_zero(constant, size, dtype):
    """Whatever the constant, the number of entries and the precision. The mean of three 123.45 in
    float32 is not 123.45, and rounding must not be divided by its own deviation."""
    x = torch.full((2, size), constant, dtype=dtype)
    mask = torch.ones(2, size, dtype=torch.bool)
    mask[1, 1:] = False
    assert masked_whiten(x, mask).eq(0).all()


def test_masked_mean_of_half_precision_is_computed_in_float32():
    """100 times 1,000: the sum, 100,000, is above the largest number of float16, 65,504."""
    x = torch.full((1, 100), 1000, dtype=torch.float16)
    mean = masked_mean(x, torch.ones(1, 100, dtype=torch.bool))
    assert mean.item() == 1000 and mean.dtype == torch.float32


def test_masked_whiten_of_half_precision_is_computed_in_float32():
    """-400, 400: the squares, 160,000, are above the largest number of float16."""
    x = torch.tensor([[-400, 400]], dtype=torch.float16)
    whitened = masked_whiten(x, torch.tensor([[True, True]]))
    assert_close(whitened, torch.tensor([[-1.0, 1.0]]))


def probabilities():
    """Two slots over three tokens: p = 1/2 1/4 1/4, then 1/4 1/2 1/4. The third column has no
    action."""
    return torch.log(
        torch.tensor(
            [[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]], dtype=torch.float64
        )
    )


def test_token_logprobs_are_of_the_next_token():
    """Tokens 0 2 1: slot 0 chose token 2 with probability 1/4, slot 1 chose token 1 with 1/2.
    Without the shift slot 0 would be log 1/2 (token 0) and slot 1 log 1/4 (token 2)."""
    logits = probabilities() + 7.0  # a constant in a row of logits changes nothing
    got = token_logprobs(logits, torch.tensor([[0, 2, 1]]))
    assert_close(got, f64([math.log(0.25), math.log(0.5)]))


def test_token_logprobs_equal_torch_cross_entropy():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 11, dtype=torch.float64), torch.randint(11, (3, 5))
    expected = -F.cross_entropy(
        logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1), reduction="none"
    )
    assert_close(token_logprobs(logits, tokens), expected.view(3, 4))


@pytest.mark.parametrize("poison", POISON)
def test_token_logprobs_of_masked_slots_are_zero(poison):
    """Slot 0 is masked and its logits hold poison: the result and the gradient are 0. Slot 1 chose
    token 1 of p = 1/4 1/2 1/4: the gradient of its log-probability is (0 1 0) - p."""
    logits = probabilities()
    logits[0, 0] = poison
    logits.requires_grad_()
    got = token_logprobs(logits, torch.tensor([[0, 2, 1]]), torch.tensor([[False, True]]))
    got.sum().backward()
    assert_close(got.detach(), f64([0, math.log(0.5)]))
    assert_close(logits.grad[0], f64([0, 0, 0], [-0.25, 0.5, -0.25], [0, 0, 0]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_token_logprobs_of_half_precision_logits_are_computed_in_float32(half):
    """Logits 8 and 0: log sigmoid(-8) = -8.000335. In bfloat16 it would be -8."""
    logits = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]], dtype=half)
    got = token_logprobs(logits, torch.tensor([[0, 1]]))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-8 - math.log1p(math.exp(-8)), abs=1e-6)


def test_masked_mean_rejects_shapes_that_would_broadcast():
    """torch would broadcast (3, 1) against (3, 4) without an error."""
    with pytest.raises(ValueError, match=r"'x': \(3, 1\), 'mask': \(3, 4\)"):
        masked_mean(torch.zeros(3, 1), torch.ones(3, 4, dtype=torch.bool))


def test_token_logprobs_rejects_mismatched_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and \(2, 3\)"):  # the slots of the tokens
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="logits"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="logits"):  # of six slots, and the mask has four
        token_logprobs(torch.zeros(6, 3), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="mask"):
        token_logprobs(
            torch.zeros(2, 3, 5),
            torch.zeros(2, 3, dtype=torch.long),
            torch.ones(2, 3, dtype=torch.bool),
        )


def test_check_same_shape_rejects_a_mask_that_is_not_bool():
    with pytest.raises(TypeError, match="bool"):
        check_same_shape(x=torch.zeros(2), mask=torch.ones(2))
