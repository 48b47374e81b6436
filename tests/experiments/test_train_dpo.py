"""docs.experiments.train_dpo: what it starts from and learns from, what it writes, and what reads
that."""

import importlib.util
import math
import re
import shutil

import pytest
import torch

from docs.experiments import compare, train_dpo, walk
from docs.experiments.train_dpo import DPOConfig
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import find_tokenizer, load_policy, load_reward_model
from rlhf.tools import export, optimality, sample
from tests.helpers import ROOT, rows, script, stopped_by_its_first_checkpoint

FLAGS = (
    "--device cpu --steps 6 --batch-size 8 --eval-every 3 --log-every 1 --max-new-tokens 8 "
    "--eval-prompts 10 --warmup 2 --lr 0.01 --beta 0.5"
).split()


def run(trained, out, *more):
    data, models, _ = trained
    files = ["--data", data, "--sft", models / "sft.pt", "--reward", models / "reward.pt"]
    flags = [*FLAGS, *files, "--out", out, *more]
    train_dpo.main(parse_cli(DPOConfig, list(map(str, flags))))


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("dpo")
    run(trained, out)
    return out


def test_train_dpo_writes_its_files(finished):
    files = sorted(path.name for path in finished.iterdir())
    own = ["dpo.csv", "dpo.json", "dpo.pt", "dpo.warnings.txt", "dpo_samples.csv"]
    assert files == [*own, "evaluation.csv"]
    assert [row["policy"] for row in rows(finished / "evaluation.csv")] == ["sft", "dpo"]
    assert len(rows(finished / "dpo_samples.csv")) == 10


def test_metrics_page_lists_the_columns_of_dpo_csv(finished):
    section = (
        (ROOT / "docs" / "metrics.md")
        .read_text(encoding="utf-8")
        .split("\n## dpo.csv\n")[1]
        .split("\n## ")[0]
    )
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.M) == list(rows(finished / "dpo.csv")[0])


def test_first_loss_is_ln_2_and_the_loss_falls(finished):
    """The policy starts as its reference: both log ratios are 0, and half of the pairs count as
    right."""
    first, *_, last = log = rows(finished / "dpo.csv")
    assert [int(row["step"]) for row in log] == [1, 2, 3, 4, 5, 6]
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(first["chosen_log_ratio"]) == float(first["rejected_log_ratio"]) == 0
    assert float(first["accuracy"]) == 0.5 and float(last["loss"]) < 0.6
    assert [row["heldout"] != "" for row in log] == [False, False, True, False, False, True]
    factors = [
        0.5,
        1,
        1,
        0.1 + 0.45 * (1 + 0.5**0.5),
        0.55,
        0.1 + 0.45 * (1 - 0.5**0.5),
    ]  # up, then half a cosine
    assert [float(row["lr"]) for row in log] == pytest.approx([0.01 * factor for factor in factors])


def test_train_dpo_learns_from_comparisons_against_a_frozen_reference(
    trained, tmp_path, monkeypatch
):
    """From comparisons.csv; the held-out file only for `heldout`, all of its 40 rows."""
    data, models, _ = trained
    sft, _ = load_policy(models / "sft.pt", "sft")
    tokenizer = find_tokenizer(str(data))
    batches = []
    seen = []
    pair_logprobs = train_dpo.pair_logprobs

    def is_sft(gpt):
        pairs = zip(gpt.state_dict().values(), sft.state_dict().values())
        return all(torch.equal(a, b) for a, b in pairs)

    def spy(part, policy, reference, *rest):
        batches.append(
            [tuple(row.prompt.tokens + row.chosen) + tuple(row.rejected) for row in part]
        )
        seen.append([is_sft(policy), is_sft(reference)])
        return pair_logprobs(part, policy, reference, *rest)

    monkeypatch.setattr(train_dpo, "pair_logprobs", spy)
    run(trained, tmp_path, "--steps", 3)
    known = {}
    for name in ("comparisons", "comparisons_heldout"):
        known[name] = {
            tuple(
                tokenizer.encode(row["Prompt"])
                + tokenizer.response_ids(row["Chosen"])
                + tokenizer.response_ids(row["Rejected"])
            )
            for row in rows(data / f"{name}.csv")
        }
    assert [len(batch) for batch in batches] == [8, 8, 8, 40]
    assert all(set(batch) <= known["comparisons"] for batch in batches[:3])
    assert set(batches[3]) == known["comparisons_heldout"]
    assert seen == [[True, True], [False, True], [False, True], [False, True]]


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_sum_to_the_batch(trained, tmp_path, monkeypatch, size):
    gradients = []

    def stop(model, *rest):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        raise KeyboardInterrupt

    monkeypatch.setattr(train_dpo, "optimizer_step", stop)
    for micro_batch_size in (0, size):
        with pytest.raises(KeyboardInterrupt):
            run(trained, tmp_path, "--micro-batch-size", micro_batch_size)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_default_beta_is_kl_coef_in_log_odds(trained, tmp_path, capsys):
    """kl_coef times the scale of the reward model, which train_reward.py has divided the scores
    by."""
    scale = load_reward_model(trained[1] / "reward.pt")[0].scale.item()
    run(trained, tmp_path, "--steps", 1, "--warmup", 0, "--beta", 0, "--kl-coef", 0.3)
    assert f"beta {0.3 * scale:.3g}," in capsys.readouterr().out
    for row in rows(tmp_path / "evaluation.csv"):
        assert float(row["objective"]) == pytest.approx(
            float(row["score"]) - 0.3 * float(row["kl_ref"]), abs=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_resumed_run_equals_the_uninterrupted_run(trained, tmp_path, monkeypatch, rank):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(trained, whole, "--lora-rank", rank)
    with stopped_by_its_first_checkpoint():
        run(trained, cut, "--lora-rank", rank)
    assert torch.load(cut / "dpo.pt", weights_only=True)["step"] == 3
    with pytest.raises(
        InputError,
        match="at step 3 of 6: finish it with `python -m docs.experiments.train_dpo --resume`",
    ):
        load_policy(cut / "dpo.pt", "sft", "ppo")
    run(trained, cut, "--lora-rank", rank, "--resume")
    one = torch.load(whole / "dpo.pt", weights_only=True)["model"]
    other = torch.load(cut / "dpo.pt", weights_only=True)["model"]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    clock = {"tokens_per_s", "seconds"}
    for row, same in zip(rows(whole / "dpo.csv"), rows(cut / "dpo.csv"), strict=True):
        assert {k: v for k, v in row.items() if k not in clock} == {
            k: v for k, v in same.items() if k not in clock
        }


def test_tools_read_dpo_pt(finished, trained, tmp_path, capsys):
    """optimality keeps the rows sft and dpo and adds two; walk has nothing to show; train_reward.py
    starts from sft.pt only."""
    path, before = str(finished / "dpo.pt"), rows(finished / "evaluation.csv")
    models = trained[1]
    flags = ["--checkpoint", path, "--data", str(trained[0]), "--sft", str(models / "sft.pt")]
    flags += ["--reward", str(models / "reward.pt")]
    optimality.main(
        parse_cli(optimality.OptimalityConfig, [*flags, "--prompts", "3", "--samples", "8"])
    )
    assert "best_of_n: n = " in capsys.readouterr().out
    after = rows(finished / "evaluation.csv")
    assert [row["policy"] for row in after] == ["sft", "dpo", "best_of_n", "optimum"]
    for old, new in zip(before, after):
        for name in ("score", "kl_ref", "objective", "distinct"):
            assert float(new[name]) == pytest.approx(float(old[name]), rel=1e-5, abs=1e-6)
    sample.main(parse_cli(sample.SampleConfig, ["--checkpoint", path, "--prompt", "Hello."]))
    if importlib.util.find_spec("transformers"):
        out = tmp_path / "exported"
        export.main(parse_cli(export.ExportConfig, ["--checkpoint", path, "--out", str(out)]))
        assert (out / "config.json").is_file()
    with pytest.raises(InputError, match="no value network to follow"):
        walk.main(parse_cli(walk.WalkConfig, flags))
    with pytest.raises(
        InputError, match="was written by `python -m docs.experiments.train_dpo`; a checkpoint of"
    ):
        load_policy(finished / "dpo.pt", "sft")


@pytest.mark.slow
def test_dpo_and_ppo_have_one_optimum(finished, trained, tmp_path):
    """docs/alternatives.md compares them; the length limit of DPO is one number, that of PPO may be
    two."""
    data, models, _ = trained
    shutil.copytree(finished, tmp_path / "dpo")
    files = ["--sft", models / "sft.pt", "--reward", models / "reward.pt"]
    script("ppo", "--data", data, *files, "--out", tmp_path / "ppo", "--steps", 1, "--kl-target", 0)
    policies = [tmp_path / "ppo" / "ppo.pt", tmp_path / "dpo" / "dpo.pt"]
    flags = ["--policies", *policies, *files, "--data", data, "--prompts", 3, "--samples", 8]
    compare.main(parse_cli(compare.CompareConfig, list(map(str, flags))))
    ppo, dpo = [rows(path.with_name("evaluation.csv")) for path in policies]
    assert ppo[3] == dpo[3] and (ppo[1]["policy"], dpo[1]["policy"]) == ("ppo", "dpo")


@pytest.mark.parametrize("flags", [["--kl-coef", "0"], ["--beta", "-1"], ["--log-every", "0"]])
def test_train_dpo_rejects_impossible_values(flags):
    with pytest.raises(SystemExit) as stop:
        parse_cli(DPOConfig, flags)
    assert stop.value.code == 2
