"""docs.experiments.bench: FLOPs against a hand count, what is alternated with what, and one small
run."""

import doctest
import sys

import pytest
import torch

from docs.experiments import bench, measure, trl
from docs.experiments.bench import BenchConfig, iterations, update_flops
from docs.experiments.measure import matmul_rate, peak_memory, training_flops
from rlhf.model import GPTConfig
from rlhf.run.flags import parse_cli
from rlhf.run.program import run

TINY = dict(
    n_layer=1,
    n_embd=4,
    n_head=2,
    vocab=11,
    batch=4,
    prompt=3,
    response=5,
    inner_epochs=1,
    minibatches=2,
    repeats=1,
    device="cpu",
)


def test_docstring_examples_are_true():
    results = doctest.testmod(measure)
    assert results.failed == 0 and results.attempted >= 4


def test_training_flops_match_hand_count():
    """One layer, C = 2, V = 3, rows of 2 and 4 tokens. Multiply-adds of the forward pass: linear
    layers 12 * 2^2 = 48 a token, 6 tokens, 288; attention reads 1 + 2 and 1 + 2 + 3 + 4 tokens, 13
    * 2 with the keys, as many with the values, 52; the output matrix 2 * 3 = 6 a token. A
    multiply-add is 2 FLOPs, and the backward pass costs twice the forward pass: times 6."""
    config = GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=2)
    assert training_flops(config, [2, 4], outputs=0) == 6 * (288 + 52) == 2040
    assert training_flops(config, [2, 4], outputs=4) == 6 * (288 + 52 + 4 * 6) == 2184
    deep = GPTConfig(vocab_size=3, block_size=8, n_layer=5, n_head=1, n_embd=2)
    assert training_flops(deep, [2, 4], outputs=4) == 6 * (5 * (288 + 52) + 4 * 6)


def test_update_flops_match_hand_count():
    """Prompts of 1 and 3 tokens, responses of 2: without the last token, rows of 2 and 4, as above.
    4 response tokens have logits, the value network has none."""
    network = dict(n_layer=1, n_embd=2, n_head=1, vocab=3)
    work = dict(batch=2, prompt=3, prompt_min=1, response=2, minibatches=1)
    flags = network | work
    assert update_flops(BenchConfig(**flags, inner_epochs=1)) == 2184 + 2040
    assert update_flops(BenchConfig(**flags, inner_epochs=3)) == 3 * (2184 + 2040)
    assert update_flops(BenchConfig(**flags, inner_epochs=3, value_network="shared")) == 3 * 2184


def test_prompt_lengths_lie_evenly_between_the_bounds_in_mixed_order():
    lens = BenchConfig(batch=8, prompt=22, prompt_min=8).prompt_lens()
    assert sorted(lens.tolist()) == [8, 10, 12, 14, 16, 18, 20, 22] != lens.tolist()
    assert torch.equal(lens, BenchConfig(batch=8, prompt=22, prompt_min=8).prompt_lens())
    assert BenchConfig(batch=8, prompt=22).prompt_lens().tolist() == [22] * 8


def test_matmul_rate_is_the_flops_over_the_seconds(monkeypatch):
    """A product of two matrices of 1024 x 1024 has 1024^3 multiply-adds; here it takes 4
    seconds."""
    ticks = iter([10.0, 14.0])
    monkeypatch.setattr(measure, "clock", lambda: next(ticks))
    assert matmul_rate(torch.device("cpu"), None) == 2 * 1024**3 / 4


def test_peak_memory_is_in_gigabytes():
    """A process that has loaded torch holds more than 50 MB, and a test run less than 100 GB."""
    assert 0.05 < peak_memory() < 100


def test_iterations_time_full_length_responses(monkeypatch):
    """The clock shows 0, 1, 3, 7: sampling 1, scoring 2, update 4. No response ends early, in the
    ragged batch too."""
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(bench, "clock", lambda: next(ticks))
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 9.0)
    seen = []
    generate = bench.generate

    def spy(model, prompts, prompt_lens, max_new_tokens, eos_id, *args):
        tokens, mask = generate(model, prompts, prompt_lens, max_new_tokens, eos_id, *args)
        seen.extend([eos_id, mask.sum(dim=1).tolist()])
        return tokens, mask

    monkeypatch.setattr(bench, "generate", spy)
    seconds = next(iterations(BenchConfig(**TINY | {"prompt_min": 1})))
    parts = {"sampling": 1.0, "scoring": 2.0, "update": 4.0, "iteration": 7.0}
    assert seconds == parts | {"peak": 9.0}
    assert seen == [-1, [5, 5, 5, 5]]


def fake_iterations(cfg):
    """Seconds that tell which sizes were given."""
    while True:
        yield {
            "sampling": float(cfg.batch),
            "scoring": float(cfg.response),
            "update": float(cfg.n_embd),
            "iteration": float(cfg.vocab),
            "peak": 1e9,
        }


def test_each_size_is_doubled_alone(monkeypatch, capsys):
    monkeypatch.setattr(bench, "iterations", fake_iterations)
    bench.main(BenchConfig(**TINY))
    table = [line.split() for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
    assert table == [
        ["doubled", "sampling", "scoring", "update", "iteration", "peak"],
        ["batch", "2.000", "1.000", "1.000", "1.000", "1.000"],
        ["response", "1.000", "2.000", "1.000", "1.000", "1.000"],
        ["n_embd", "1.000", "1.000", "2.000", "1.000", "1.000"],
        ["vocab", "1.000", "1.000", "1.000", "2.000", "1.000"],
    ]


def test_table_has_tokens_per_second_and_the_share_of_the_peak(monkeypatch, capsys):
    """4 responses of 5 tokens, sampled in 4 s: 5 tokens/s. Prompts of 3: 32 tokens, scored in 5 s,
    read twice in the update's 4 s. The update's FLOPs: C = 4, V = 11; each row reads 7 tokens, 12 *
    4^2 * 7 + 2 * 4 * 28 = 1568 multiply-adds for each of two networks; 4 * 11 * 5 = 220 for the
    logits; 4 rows, 2 epochs, times 6: 161,088. In 4 s that is 0.004 % of 10^9 a second."""
    monkeypatch.setattr(bench, "iterations", fake_iterations)
    monkeypatch.setattr(bench, "peak_memory", lambda: 1.5)
    bench.main(BenchConfig(**TINY | {"inner_epochs": 2, "against": "nothing"}))
    table, line, _ = capsys.readouterr().out.split("\n\n")
    assert [row.split() for row in table.splitlines()] == [
        ["part", "seconds", "tokens/s"],
        ["sampling", "4.000", "5"],
        ["scoring", "5.000", "6"],
        ["update", "4.000", "16"],
        ["iteration", "11.000", "2"],
    ]
    assert update_flops(BenchConfig(**TINY | {"inner_epochs": 2})) == 161_088
    assert line == "update: 0.0% of the 1.0 GFLOP/s of a large matrix product; peak memory: 1.50 GB"


def test_ours_is_divided_by_trls(monkeypatch, capsys):
    monkeypatch.setattr(bench, "iterations", fake_iterations)
    seconds = {"sampling": 8.0, "iteration": 44.0}
    monkeypatch.setattr(bench, "trl_iterations", lambda cfg: iter([seconds] * 2))
    bench.main(BenchConfig(**TINY | {"against": "trl"}))
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["sampling", "iteration"],
        ["0.500", "0.250"],
    ]


def test_missing_trl_gives_one_line(monkeypatch, capsys):
    monkeypatch.setattr(trl, "VERSION", "0.0.0")
    monkeypatch.setattr(sys, "argv", ["bench", "--against", "trl"])
    with pytest.raises(SystemExit) as error:
        run(bench.main, BenchConfig)
    printed = capsys.readouterr()
    assert error.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: --against trl needs TRL 0.0.0, found ")
    assert "pip install trl==" in printed.err


@pytest.mark.parametrize(
    "flags", ["--batch 6", "--prompt-min 25", "--prompt-min -1", "--n-head 3", "--repeats 0"]
)
def test_sizes_that_do_not_fit_are_refused(flags):
    with pytest.raises(SystemExit) as error:
        parse_cli(BenchConfig, flags.split())
    assert error.value.code == 2


@pytest.mark.slow
def test_trl_runs_the_same_work(monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.chdir(tmp_path)
    seconds = next(trl.trl_iterations(BenchConfig(**TINY | {"prompt_min": 1})))
    assert seconds.keys() == {"sampling", "iteration"}
    assert 0 < seconds["sampling"] < seconds["iteration"]
