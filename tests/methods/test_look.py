"""rlhf.methods.look: the numbers of a PPO step recomputed with plain Python arithmetic, and the
margins of votes."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from rlhf.data import Comparison, Prompt
from rlhf.methods import look
from rlhf.methods.look import by_token, take_step, vote_margins
from rlhf.rollout import Rollout
from tests.helpers import CPU, Digits, f64, noisy

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
LOGPROBS, REF, VALUES = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.25], [0.3, 0.6, 1.1]
CONFIG = {"gamma": 0.9, "lam": 0.8, "lr": 0.05, "seed": 0, "micro_batch_size": 0}
CONFIG |= {"clip_eps": 0.2, "value_clip_eps": 0.0, "value_coef": 0.5, "entropy_coef": 0.0}
CONFIG |= {"max_grad_norm": 1.0, "inner_epochs": 7, "minibatch_size": 1}


@pytest.fixture
def step(policy, monkeypatch):
    """A step on two responses, of 3 and 2 tokens; kl_coef 0.5."""
    rollout = Rollout(
        TOKENS,
        MASK,
        f64([0, *LOGPROBS], [-1, -1, 0, 0]),
        f64([0, *REF], [-2, -1, 0, 0]),
        f64([9, *VALUES], [0.5, -0.5, 9, 9]),
        f64(2.0, -1.0),
    )
    monkeypatch.setattr(look, "collect", lambda *arguments: rollout)
    frozen = SimpleNamespace(tokenizer=Digits())
    prompts = [Prompt("12", [1, 2]), Prompt("6", [6])]
    return take_step(policy, frozen, prompts, 0.5, CONFIG, CPU)


def test_numbers_before_the_step_recomputed_in_plain_arithmetic(step):
    """The first row by hand, from its end: rewards -0.5 * (logprob - ref), plus the score 2 on the
    last; gamma 0.9, lambda 0.8. The second row: rewards -0.5 and -1, deltas -0.5 + 0.9 * -0.5 - 0.5
    and -1 + 0.5."""
    _, columns = step
    costs = [0.5 * (a - b) for a, b in zip(LOGPROBS, REF)]
    rewards = [-costs[0], -costs[1], 2 - costs[2]]
    deltas = [r + 0.9 * after - v for r, after, v in zip(rewards, [*VALUES[1:], 0.0], VALUES)]
    third = deltas[2]
    second = deltas[1] + 0.9 * 0.8 * third
    advantages = [deltas[0] + 0.9 * 0.8 * second, second, third]
    others = [-1.45 + 0.72 * -0.5, -0.5]
    mean, std = statistics.fmean(advantages + others), statistics.pstdev(advantages + others)
    expected = {
        "logprob": LOGPROBS,
        "ref": REF,
        "reward": rewards,
        "value": VALUES,
        "advantage": advantages,
        "whitened": [(a - mean) / math.sqrt(std**2 + 1e-8) for a in advantages],
        "return": [a + v for a, v in zip(advantages, VALUES)],
    }
    assert [*columns] == [*expected, "new_logprob", "new_value"]
    for name, numbers in expected.items():
        assert columns[name][0, 1:].tolist() == pytest.approx(numbers, abs=1e-12), name


def test_new_numbers_are_those_of_the_policy_after_one_gradient_step(step, policy):
    """Its weights have moved by at most the learning rate of AdamW's first step. The config's
    epochs and minibatches do not count."""
    _, columns = step
    with torch.no_grad():
        logits, values = policy(TOKENS)
    for row, slot in MASK.nonzero().tolist():
        expected = logits[row, slot].log_softmax(0)[TOKENS[row, slot + 1]].item()
        assert columns["new_logprob"][row, slot].item() == pytest.approx(expected, abs=1e-9)
        assert columns["new_value"][row, slot].item() == values[row, slot].item()


def test_step_is_one_gradient_step(policy, step, gpt):
    """AdamW's first step moves no weight by more than the learning rate; seven epochs would."""
    before = noisy(type(gpt)(gpt.config).double())  # as the fixture made it
    moved = []
    for old, new in zip(before.parameters(), policy.gpt.parameters()):
        moved.append((new - old).abs().max().item())
    assert 0.04 < max(moved) <= 0.05 + 1e-9


def test_by_token_gives_slots_texts_and_numbers_of_the_response(step, monkeypatch):
    rollout, columns = step
    assert by_token(rollout, 1, {"ref": columns["ref"]}, Digits()) == {
        "slot": [0, 1],
        "token": ["7", "8"],
        "ref": [-2.0, -1.0],
    }
    monkeypatch.setattr(look, "LONGEST", 2)
    assert by_token(rollout, 0, {}, Digits()) == {"slot": [1, 2], "token": ["3", "4"]}


def test_vote_margins_are_log_odds_whatever_the_scale(reward_model):
    """Of each pair, raw score of the chosen side minus that of the rejected one."""
    prompt = Prompt("1", [1])
    pairs = [
        Comparison(prompt, [2, 3], [4], ("23", "4")),
        Comparison(prompt, [5], [6, 7, 8], ("5", "678")),
    ]

    def raw(ids):
        tokens = torch.tensor([[1, *ids]])
        return reward_model(tokens, torch.tensor([1 + len(ids)])).item()

    with torch.no_grad():
        expected = [raw([2, 3]) - raw([4]), raw([5]) - raw([6, 7, 8])]
    reward_model.mean.fill_(3.0)
    reward_model.scale.fill_(0.25)
    assert sorted(vote_margins(reward_model, pairs, 0)) == pytest.approx(sorted(expected), abs=1e-4)
