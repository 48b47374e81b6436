"""DPO: by hand, and its expected gradient over all pairs of responses in the world of
test_exact.py."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from docs.experiments.train_dpo import pair_accuracy
from rlhf.data import Comparison, Prompt
from rlhf.methods.dpo import dpo_loss, pair_logprobs
from rlhf.model import GPT
from rlhf.run.device import setup
from tests.core.test_exact import World
from tests.helpers import f64, noisy


def test_dpo_loss_and_gradient_match_hand_computation():
    """The chosen response is twice as likely as under the reference and the rejected one 1/4 as
    likely: a factor of 8 between them. With beta 1 that is sigmoid(log 8) = 8/9, a loss of
    log(9/8). In the second pair the factors are 1/3 and 1: sigmoid(log 1/3) = 1/4, a loss of log 4.
    The derivative by a chosen log-probability is -beta (1 - sigmoid) / N: -1/18 and -3/8. With beta
    1/3 the first has sigmoid(log 2) = 2/3."""
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
    """By each response's log-probability, over all ordered pairs, each as often as a Bradley-Terry
    voter chooses so."""
    log_policy = log_policy.clone().requires_grad_()
    i, j = (~torch.eye(len(scores), dtype=torch.bool)).nonzero(as_tuple=True)
    votes = torch.sigmoid(scores[i] - scores[j])
    total = sum(
        vote
        * dpo_loss(
            log_policy[a : a + 1],
            log_policy[b : b + 1],
            log_ref[a : a + 1],
            log_ref[b : b + 1],
            beta,
        )
        for vote, a, b in zip(votes, i.tolist(), j.tolist())
    )
    return torch.autograd.grad(total, log_policy)[0]


def test_expected_dpo_gradient_is_zero_at_the_optimum_of_the_objective():
    """pi* = ref exp(score / beta) / Z, with the scores in log-odds of the votes. With twice the
    beta it is not, nor at the reference. Twelve responses to one prompt."""
    world = World(seed=1)
    scores = world.scores[:12]
    log_ref = world.ref_logprobs[:12].sum(dim=1)
    beta = 0.5
    best = (log_ref + scores / beta).log_softmax(dim=0)
    assert expected_dpo_gradient(best, log_ref, scores, beta).abs().max() < 1e-12
    assert expected_dpo_gradient(best, log_ref, scores, 2 * beta).abs().max() > 0.1
    assert expected_dpo_gradient(log_ref, log_ref, scores, beta).abs().max() > 0.1


def test_pair_logprobs_are_those_of_each_response_by_itself(gpt):
    """Prompts and responses of different lengths. Only the response counts, and only the policy has
    a gradient."""
    reference = noisy(GPT(gpt.config).double(), seed=7)
    pairs = [
        Comparison(Prompt("", [1, 2, 3]), [4, 10], [5, 6, 7, 10]),
        Comparison(Prompt("", [8]), [9, 9, 9, 10], [10]),
    ]
    compute = setup("cpu", "off")
    got = pair_logprobs(pairs, gpt, reference, 0, compute)
    expected = []
    for model, side in itertools.product((gpt, reference), ("chosen", "rejected")):
        for pair in pairs:
            start, ids = len(pair.prompt.tokens), pair.prompt.tokens + getattr(pair, side)
            logprobs = model(torch.tensor([ids]))[0].log_softmax(dim=1)
            expected.append(sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))))
    assert_close(got, f64(*expected).view(4, 2))
    loss = got[2:].sum()
    assert torch.autograd.grad(loss, gpt.wte.weight, retain_graph=True)[0].eq(0).all()
    of_reference = torch.autograd.grad(
        loss, reference.wte.weight, retain_graph=True, allow_unused=True
    )
    assert of_reference == (None,)
    assert torch.autograd.grad(got[:2].sum(), gpt.wte.weight)[0].abs().max() > 0
    ratios = got[:2] - got[2:]
    share = (ratios[0] > ratios[1]).double().mean().item()
    assert pair_accuracy(pairs, gpt, reference, 0, compute) == share
    assert pair_accuracy(pairs, gpt, gpt, 0, compute) == 0.5  # all equal
