"""docs.experiments.walk: each number of a walk recomputed with plain Python arithmetic."""

import copy
import math
import statistics
from pathlib import Path

import pytest
import torch

from docs.experiments import walk
from docs.experiments.walk import (
    WalkConfig,
    after_step,
    before_step,
    main,
    take_step,
    with_values,
)
from rlhf.data import Prompt
from rlhf.rollout import Frozen, Rollout
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.tools.optimality import Run, RunConfig, load_run
from tests.helpers import CPU, Digits, f64, noisy, script

NUMBERS = {
    "logprob": [-1.0, -2.0, -0.5],
    "ref": [-1.5, -1.0, -0.25],
    "reward": [-0.25, 0.5, 2.125],
    "value": [0.3, 0.6, 1.1],
    "advantage": [1.5, -2.0, 0.5],
    "whitened": [1.0, -1.5, 0.25],
    "return": [1.0, 2.0, 3.0],
    "new_logprob": [-0.5, -1.5, -0.4],
    "new_value": [0.5, 0.6, 2.0],
}


def columns_close(columns, expected):
    for name, numbers in expected.items():
        assert columns[name].tolist() == pytest.approx(numbers, abs=1e-12), name


def test_before_step_adds_kl_cost_and_td_error():
    """kl_coef 0.5: 0.5 * (-1 + 1.5) = 0.25. gamma 0.9: -0.25 + 0.9 * 0.6 - 0.3 = -0.01; the value
    after the last action is 0."""
    numbers = {name: f64(*x) for name, x in NUMBERS.items()}
    columns = before_step(numbers, kl_coef=0.5, gamma=0.9)
    columns_close(columns, {"kl cost": [0.25, -0.5, -0.125], "delta": [-0.01, 0.89, 1.025]})
    same = ("logprob", "ref", "reward", "value", "advantage", "whitened", "return")
    columns_close(columns, {name: NUMBERS[name] for name in same})
    assert len(columns) == len(same) + 2


def test_after_step_shows_ratio_and_losses_of_each_token():
    """From log-probabilities before and after the step: ratio = exp(new - old), loss = max(-A r, -A
    clip(r)), half the squared error of the value. The first ratio is clipped: its advantage is
    positive; the second one's is not."""
    numbers = {name: f64(*x) for name, x in NUMBERS.items()}
    columns = after_step(numbers, {"clip_eps": 0.2, "value_clip_eps": 0.0})
    half, tenth = math.exp(0.5), math.exp(0.1)
    expected = {
        "new logprob": NUMBERS["new_logprob"],
        "ratio": [half, half, tenth],
        "clipped": [1, 0, 0],
        "policy loss": [-1.2, 1.5 * half, -0.25 * tenth],
        "new value": NUMBERS["new_value"],
        "value loss": [0.125, 0.98, 0.5],
    }
    columns_close(columns, expected)
    assert list(columns) == list(expected)


def test_walk_prints_a_line_for_each_token_of_the_response(trained, capsys):
    data, out, _ = trained
    main(WalkConfig(checkpoint=str(out / "ppo.pt"), prompt=2, data=str(data)))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("prompt    Human: ") and max(map(len, printed)) <= 120
    tables = [[line for line in block.splitlines()] for block in "\n".join(printed).split("\n\n")]
    before, after = (table for table in tables if table[0].startswith("slot"))
    assert len(before) - 2 == len(after) - 1 <= 8  # a header, and the sums under the first
    with pytest.raises(InputError, match="held-out prompts, numbered from 0"):
        main(WalkConfig(checkpoint=str(out / "ppo.pt"), prompt=10, data=str(data)))


# ---- a PPO step ----

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
LOGPROBS, REF, VALUES = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.25], [0.3, 0.6, 1.1]
CONFIG = {"gamma": 0.9, "lam": 0.8, "lr": 0.05, "seed": 0, "micro_batch_size": 0}
CONFIG |= {"clip_eps": 0.2, "value_clip_eps": 0.0, "value_coef": 0.5, "entropy_coef": 0.0}
CONFIG |= {"max_grad_norm": 1.0, "inner_epochs": 7, "minibatch_size": 1}
CONFIG |= {"advantage": "gae", "group_size": 4}


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
        parts=f64([2.0], [-1.0]),
    )
    monkeypatch.setattr(walk, "collect", lambda *arguments: rollout)
    monkeypatch.setattr(walk, "with_values", lambda run: policy)
    frozen = Frozen(copy.deepcopy(policy.gpt), None, Digits())
    checkpoint = {"config": CONFIG, "kl_coef": 0.5}
    run = Run(Path("ppo.pt"), checkpoint, policy.gpt, frozen, None, [], CPU)
    return take_step(run, [Prompt("12", [1, 2]), Prompt("6", [6])])


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


# ---- the value network ----


def loaded(out, data, sft, reward):
    cfg = RunConfig(str(out / "ppo.pt"), str(sft), (str(reward),), str(data), "cpu")
    return with_values(load_run(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("value_network", ["reward", "shared", "of a function"])
def test_with_values_loads_all_weights_of_the_run(trained, tmp_path, value_network):
    """The value network: the reward model's, the policy's own, or one that started from the
    fine-tuned model, because a function is the only reward."""
    data, out, _ = trained
    sft, reward = out / "sft.pt", out / "reward.pt"
    flags = ["--value-network", value_network]
    if value_network == "of a function":
        reward = tmp_path / "rules.py"
        reward.write_text("def score(prompts, responses): return [len(x) for x in responses]")
        flags = []
    files = ["--data", data, "--sft", sft, "--reward", reward, "--out", tmp_path]
    script("ppo", *files, *flags, "--steps", 1)
    policy = loaded(tmp_path, data, sft, reward)
    assert (policy.value_gpt is None) == (value_network == "shared")
    expected = load_checkpoint(tmp_path / "ppo.pt", "ppo")["model"]
    torch.testing.assert_close(dict(policy.state_dict()), expected, atol=0, rtol=0)


def test_step_needs_a_value_network(trained, tmp_path):
    data, out, _ = trained
    sft, reward = out / "sft.pt", out / "reward.pt"
    files = ["--data", data, "--sft", sft, "--reward", reward, "--out", tmp_path]
    script("ppo", *files, "--advantage", "rloo", "--group-size", 2, "--steps", 1)
    with pytest.raises(InputError, match="ppo.pt has no value network to follow"):
        loaded(tmp_path, data, sft, reward)
