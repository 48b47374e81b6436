"""train_ppo.py --advantage rloo, grpo and reinforce: what its main passes on, what it writes, and
what reads that."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_ppo
from data import label
from docs.experiments import walk
from rlhf.model import PolicyWithoutValue
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy
from rlhf.tools import export, optimality, sample
from tests.helpers import end_earlier, rows, script, stopped_by_its_first_checkpoint, tiny

METHODS = ["rloo", "grpo", "reinforce"]


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory):
    """The flags of the models. 5 is added to the logit of end-of-text: the trained fixture hardly
    ever says it, so all of its scores are equal."""
    data, out, _ = trained
    folder = tmp_path_factory.mktemp("models")
    end_earlier(out, folder, data)
    return ["--data", data, "--sft", folder / "sft.pt", "--reward", folder / "reward.pt"]


def flags_of(models, out, advantage, *more):
    return [*models, "--out", out, "--advantage", advantage, "--group-size", 4, *more]


@pytest.fixture(scope="module")
def seen(models, tmp_path_factory):
    """A run of each method: the rollouts, and what update was given."""
    record = {}
    for method in METHODS:
        out, steps = tmp_path_factory.mktemp(method), []
        collect, update = train_ppo.collect, train_ppo.update

        def spy_on_collect(*args, steps=steps, collect=collect):
            steps.append(SimpleNamespace(rollout=collect(*args)))
            return steps[-1].rollout

        def spy_on_update(
            policy, optimizer, compute, experience, *rest, steps=steps, update=update
        ):
            now = steps[-1]
            now.policy = policy
            now.experience = experience
            now.weights = sum(
                p.numel() for group in optimizer.param_groups for p in group["params"]
            )
            return update(policy, optimizer, compute, experience, *rest)

        settings = ["--kl-coef", 0.3, "--kl-target", 0, "--lr", 0.02, "--warmup", 0]
        flags = tiny("ppo", *flags_of(models, out, method, *settings))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_ppo, "collect", spy_on_collect)
            patch.setattr(train_ppo, "update", spy_on_update)
            train_ppo.main(parse_cli(train_ppo.PPOConfig, flags))
        record[method] = SimpleNamespace(out=out, steps=steps, log=rows(out / "ppo.csv"))
    return record


@pytest.mark.parametrize("method", METHODS)
def test_batch_holds_each_prompt_group_size_times_in_consecutive_rows(seen, method):
    """Two prompts, four random responses each."""
    for step in seen[method].steps:
        made = step.rollout
        lens = made.mask.int().argmax(dim=1) + 1  # of the prompts
        prompts = [tuple(row[:n].tolist()) for row, n in zip(made.tokens, lens)]
        assert len(prompts) == 8 and all(len(set(prompts[at : at + 4])) == 1 for at in (0, 4))
        assert len(set(prompts)) == 2
    assert len({tuple(row.tolist()) for row in seen[method].steps[0].rollout.tokens}) > 4


@pytest.mark.parametrize("method", METHODS)
def test_update_gets_the_advantages_of_whole_responses(seen, method):
    """In plain numbers: R = score - 0.3 * log(pi / ref) of the response, against the others of its
    group or batch."""
    for step in seen[method].steps:
        made = step.rollout
        log_ratios = torch.where(made.mask, made.logprobs - made.ref_logprobs, 0.0).sum(dim=1)
        R = [made.scores[i].item() - 0.3 * log_ratios[i].item() for i in range(8)]
        for i in range(8):
            group = R if method == "reinforce" else R[i // 4 * 4 : i // 4 * 4 + 4]
            n, mean = len(group), sum(group) / len(group)
            a = (n * R[i] - sum(group)) / (n - 1)
            if method == "grpo":
                a = (R[i] - mean) / math.sqrt(sum((r - mean) ** 2 for r in group) / n + 1e-8)
            expected = torch.where(made.mask[i], a, 0.0)
            assert_close(step.experience.advantages[i], expected, atol=1e-4, rtol=1e-4)
        assert step.experience.tokens is made.tokens and step.experience.mask is made.mask
        assert step.experience.old_logprobs is made.logprobs
        assert step.experience.old_values is made.values
        assert made.values.eq(0).all() and step.experience.returns.eq(0).all()
    assert (made.logprobs - made.ref_logprobs).abs().max() > 0.01
    assert step.experience.advantages.abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_there_is_no_value_network(seen, method):
    """Not in memory, not in the optimizer, not in the checkpoint; its three columns are empty, the
    others are not."""
    run = seen[method]
    gpt, _ = load_policy(run.out / "ppo.pt", "ppo")
    state = torch.load(run.out / "ppo.pt", weights_only=True)["model"]
    assert state.keys() == {f"gpt.{name}" for name in gpt.state_dict()}
    for step in run.steps:
        assert isinstance(step.policy, PolicyWithoutValue)
        assert step.weights == sum(p.numel() for p in step.policy.parameters())
        assert step.weights == sum(p.numel() for p in gpt.parameters())
    for row in run.log:
        assert [name for name, cell in row.items() if cell == ""] == [
            "value_loss",
            "value_clip_fraction",
            "explained_variance",
        ]
        assert float(row["first_log_ratio"]) < 1e-5 and math.isfinite(float(row["policy_loss"]))
    assert [row["policy"] for row in rows(run.out / "evaluation.csv")] == ["sft", "ppo"]


def test_columns_are_those_of_gae(seen, trained):
    assert list(seen["rloo"].log[0]) == list(rows(trained[1] / "ppo.csv")[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_the_uninterrupted_run(models, tmp_path, monkeypatch, method):
    """With adapters too, for one of them."""
    more = ["--lora-rank", 2] if method == "rloo" else []
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script("ppo", *flags_of(models, whole, method, *more))
    with stopped_by_its_first_checkpoint():
        script("ppo", *flags_of(models, cut, method, *more))
    assert torch.load(cut / "ppo.pt", weights_only=True)["step"] == 2
    script("ppo", *flags_of(models, cut, method, *more), "--resume")
    one = torch.load(whole / "ppo.pt", weights_only=True)["model"]
    other = torch.load(cut / "ppo.pt", weights_only=True)["model"]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    clock = {"tokens_per_s", "seconds"}
    for row, same in zip(rows(whole / "ppo.csv"), rows(cut / "ppo.csv"), strict=True):
        assert {k: v for k, v in row.items() if k not in clock} == {
            k: v for k, v in same.items() if k not in clock
        }


@pytest.mark.parametrize("method", METHODS)
def test_tools_read_a_policy_without_value_network(seen, models, tmp_path, method):
    """All but walk, which has nothing to show."""
    path = str(seen[method].out / "ppo.pt")
    flags = ["--checkpoint", path, *map(str, models)]
    optimality.main(
        parse_cli(optimality.OptimalityConfig, [*flags, "--prompts", "3", "--samples", "8"])
    )
    table = rows(seen[method].out / "evaluation.csv")
    assert [row["policy"] for row in table] == ["sft", "ppo", "best_of_n", "optimum"]
    sample.main(parse_cli(sample.SampleConfig, ["--checkpoint", path, "--prompt", "Hello."]))
    if importlib.util.find_spec("transformers"):
        out = tmp_path / "exported"
        export.main(parse_cli(export.ExportConfig, ["--checkpoint", path, "--out", str(out)]))
        assert (out / "config.json").is_file()
    assert label.load_policy(seen[method].out / "ppo.pt", "sft", "ppo")[1]["kind"] == "ppo"
    with pytest.raises(
        InputError, match="no value network to follow: give a ppo.pt of --advantage gae"
    ):
        walk.main(parse_cli(walk.WalkConfig, flags))
