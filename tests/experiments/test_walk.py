"""docs.experiments.walk: each number of a walk recomputed with plain Python arithmetic."""

import math

import pytest

from docs.experiments.walk import WalkConfig, after_step, before_step, main
from rlhf.run.errors import InputError
from tests.helpers import f64

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
