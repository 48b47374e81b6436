"""docs.experiments.walk: each number of a walk recomputed with plain Python arithmetic."""

import math
import statistics

import pytest
import torch

from docs.experiments.walk import WalkConfig, after_step, gradient_step, main, walk, with_values
from rlhf.ppo import make_experience
from rlhf.rollout import Rollout
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.tools.optimality import load_run
from tests.helpers import f64, script

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])


def test_walk_recomputed_in_plain_arithmetic():
    """Two responses, of 3 and 2 tokens; kl_coef 0.5, gamma 0.9, lambda 0.8. The first row by hand,
    from its end: rewards -0.5 * (logprob - ref), plus the score 2 on the last."""
    logprobs, ref, values = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.25], [0.3, 0.6, 1.1]
    rollout = Rollout(
        torch.zeros(2, 5, dtype=torch.long),
        MASK,
        f64([0, *logprobs], [-1, -1, 0, 0]),
        f64([0, *ref], [-2, -1, 0, 0]),
        f64([9, *values], [0.5, -0.5, 9, 9]),
        f64(2.0, -1.0),
    )
    experience, columns = walk(rollout, 0, kl_coef=0.5, gamma=0.9, lam=0.8)
    costs = [0.5 * (a - b) for a, b in zip(logprobs, ref)]
    rewards = [-costs[0], -costs[1], 2 - costs[2]]
    deltas = [r + 0.9 * after - v for r, after, v in zip(rewards, [*values[1:], 0.0], values)]
    third = deltas[2]
    second = deltas[1] + 0.9 * 0.8 * third
    advantages = [deltas[0] + 0.9 * 0.8 * second, second, third]
    # The second row: rewards -0.5 and -1, deltas -0.5 + 0.9 * -0.5 - 0.5 and -1 + 0.5.
    others = [-1.45 + 0.72 * -0.5, -0.5]
    mean, std = statistics.fmean(advantages + others), statistics.pstdev(advantages + others)
    expected = {
        "logprob": logprobs,
        "ref": ref,
        "kl cost": costs,
        "reward": rewards,
        "value": values,
        "delta": deltas,
        "advantage": advantages,
        "whitened": [(a - mean) / math.sqrt(std**2 + 1e-8) for a in advantages],
        "return": [a + v for a, v in zip(advantages, values)],
    }
    assert list(columns) == list(expected)
    for name, numbers in expected.items():
        assert columns[name].tolist() == pytest.approx(numbers, abs=1e-12), name
    whitened = experience.advantages[0, 1:].tolist()
    assert whitened == pytest.approx(expected["whitened"], abs=1e-12)
    assert experience.returns[0, 1:].tolist() == pytest.approx(expected["return"], abs=1e-12)


def test_after_step_shows_ratio_and_losses_of_each_slot(policy):
    """From log-probabilities before and after the step: ratio = exp(new - old), loss = max(-A r, -A
    clip(r)), half the squared error of the value."""
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    with torch.no_grad():
        logits, values = policy(tokens)
    old = torch.where(
        MASK, logits[:, :-1].log_softmax(2).gather(2, tokens[:, 1:, None]).squeeze(2), 0.0
    )
    whitened = f64([0, 1.5, -2, 0.5], [1, -1, 0, 0])
    returns = f64([0, 1, 2, 3], [1, 1, 0, 0])
    rollout = Rollout(tokens, MASK, old, old, values[:, :-1], f64(2.0, -1.0))
    experience = make_experience(rollout, whitened, returns)
    config = {
        "lr": 0.05,
        "clip_eps": 0.2,
        "value_clip_eps": math.inf,
        "value_coef": 0.5,
        "max_grad_norm": 1.0,
    }
    gradient_step(policy, experience, config)
    columns = after_step(policy, experience, 0, config)
    with torch.no_grad():
        logits, values = policy(tokens)
    for i, slot in enumerate((1, 2, 3)):
        new = logits[0, slot].log_softmax(0)[tokens[0, slot + 1]].item()
        ratio, a = math.exp(new - old[0, slot].item()), whitened[0, slot].item()
        clipped = min(max(ratio, 0.8), 1.2)
        assert columns["ratio"][i].item() == pytest.approx(ratio, rel=1e-9)
        assert columns["policy loss"][i].item() == pytest.approx(
            max(-a * ratio, -a * clipped), rel=1e-9
        )
        assert bool(columns["clipped"][i]) == (-a * clipped > -a * ratio)
        error = values[0, slot].item() - returns[0, slot].item()
        assert columns["value loss"][i].item() == pytest.approx(error**2 / 2, rel=1e-9)
    assert columns["clipped"].any() and not columns["clipped"].all()


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


# ---- the value network ----


def loaded(out, data, sft, reward):
    cfg = WalkConfig(
        str(out / "ppo.pt"), sft=str(sft), reward=(str(reward),), data=str(data), device="cpu"
    )
    return with_values(load_run(cfg))


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


def test_walk_needs_a_value_network(trained, tmp_path):
    data, out, _ = trained
    sft, reward = out / "sft.pt", out / "reward.pt"
    files = ["--data", data, "--sft", sft, "--reward", reward, "--out", tmp_path]
    script("ppo", *files, "--advantage", "rloo", "--group-size", 2, "--steps", 1)
    with pytest.raises(InputError, match="ppo.pt has no value network to follow"):
        loaded(tmp_path, data, sft, reward)
