"""The rows best_of_n and optimum of evaluation.csv, and the optimality of PPO: by hand, and as a
program. Several policies beside one optimum."""

import copy
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from docs.experiments import compare
from docs.experiments.compare import CompareConfig
from rlhf import evaluate
from rlhf.data import Prompt
from rlhf.evaluate import summarise
from rlhf.methods.optimum import (
    best_of_n_kl,
    estimate_optimum,
    jackknife,
    objective,
    optimal_metrics,
    optimum,
    policy_metrics,
    pooled,
)
from rlhf.model import GPT
from rlhf.rollout import Frozen
from rlhf.run import program
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy
from rlhf.tools.optimality import (
    OptimalityConfig,
    RunConfig,
    describe,
    load_run,
    main,
    sample_all,
)
from tests.core.test_exact import EOS, LONGEST, MISSING_EOS, PROMPTS, World, responses
from tests.helpers import TINY, Digits, end_earlier, noisy, rows
from tests.methods.test_optimum import HAND, HAND_J, HAND_OPTIMUM, one, samples_of

LN2, LN3, LN6 = math.log(2), math.log(3), math.log(6)


def evaluated(before, after, kl_coef):
    """The rows that train_ppo.py writes, and their responses."""
    table = [summarise("sft", before, before, kl_coef), summarise("ppo", after, before, kl_coef)]
    return table, before, after


def add_optimum(evaluation, samples, kl_coef):
    """What the program makes of an evaluation and samples: rows of evaluation.csv, and the
    report."""
    (estimate,) = estimate_optimum([evaluation], samples, kl_coef)
    return estimate.rows, describe(estimate)


# ---- the optimum beside PPO ----


def test_add_optimum_matches_hand_computation():
    """HAND, see test_metrics_and_jackknife_match_hand_computation: the optimum, and on that prompt
    PPO has score ln 3 / 2 + 2 ln 2, gold 1/2 and KL ln 3. In the table it has score 3/2, gold 3 and
    KL 0.2. The other rows move by the difference.

    n = 6 has the KL ln 6 - 5/6 = 0.958, n = 7 ln 7 - 6/7 = 1.089, n = 8 1.204, so 7 is nearest to
    ln 3 = 1.099. In the row it is 1.089 + 0.2 - ln 3."""
    evaluation = evaluated([one(0.25, 0, 0.0)], [one(1.5, 0.2, 3.0)], kl_coef=2.0)
    table, text = add_optimum(evaluation, HAND, 2.0)
    sft, ppo, best, optimal = table
    assert [row["policy"] for row in table] == ["sft", "ppo", "best_of_n", "optimum"]
    ppo_there = {"score": LN3 / 2 + 2 * LN2, "gold": 0.5, "kl_ref": LN3}
    for name, there in ppo_there.items():
        assert optimal[name] == pytest.approx(HAND_OPTIMUM[name] + ppo[name] - there)
    J_there = 2 * LN2 - 1.5 * LN3
    assert optimal["objective"] == pytest.approx(HAND_J + ppo["objective"] - J_there)
    assert best["kl_ref"] == pytest.approx(math.log(7) - 6 / 7 + 0.2 - LN3)
    for row in table:
        assert row["objective"] == pytest.approx(row["score"] - 2 * row["kl_ref"])
        J_sft, J_best = sft["objective"], optimal["objective"]
        assert row["optimality"] == pytest.approx((row["objective"] - J_sft) / (J_best - J_sft))
        assert row["optimality_se"] is None  # of a single prompt
    assert (best["length"], best["prompts"], optimal["prompts"]) == (None, 1, 1)
    assert text.splitlines() == [
        "best_of_n: n = 7, whose KL is nearest to the policy's (up to 1,000,000)",
        "optimum: effective sample size 6.0 on average, below 10 for 1 of 1 prompts",
        "95 % intervals: optimality ± 1.96 optimality_se",
        "warning: too few samples to trust; more --samples, or a larger --kl-coef",
    ]


def lacks(J, ratio):
    """Two responses of the reference and two of PPO, kl_coef 1. pi / pi_ref is 1 for the first, and
    their score is J. It is `ratio` for the others, q = (1 + ratio) / 2, and their score is J + log
    q. So J* = J, and PPO, with the KL log(ratio), lacks log(ratio / q). The halves are equal, so
    the jackknife changes nothing."""
    score = J + math.log((1 + ratio) / 2)
    return [[(J, 0, 0)] * 2, [(score, math.log(ratio), 0)] * 2]


@pytest.mark.parametrize(("second", "lacking"), [(3, 0), (7, math.log(7 / 6))])
def test_add_optimum_standard_error_matches_hand_computation(second, lacking):
    """On the first prompt PPO lacks ln(3/2), on the second `lacking` more: L on average. In the
    table J is 0 for sft, and 1 and 3 for ppo: 2 on average. So R = 2 / (2 + L), and the standard
    error is half of the difference of (1 - R) J - R lacking, divided by 2 + L."""
    evaluation = evaluated([one(0, 0)] * 2, [one(2, 1), one(4, 1)], kl_coef=1.0)
    table, _ = add_optimum(evaluation, samples_of(lacks(2, 3), lacks(4, second)), 1.0)
    L = math.log(1.5) + lacking / 2
    R = 2 / (2 + L)
    error = abs((1 - R) * 2 - R * lacking) / 2 / (2 + L)
    assert table[1]["optimality"] == pytest.approx(R)
    assert table[1]["optimality_se"] == pytest.approx(error)
    assert table[3]["objective"] == pytest.approx(2 + L)
    assert [table[at]["optimality_se"] for at in (0, 3)] == pytest.approx([0, 0], abs=1e-12)


def test_best_of_n_beside_ppo_matches_hand_computation():
    """The ratio 3 has q = 2, scores 0 and ln 2, and v = 1 and 1/2. So F is 2/3 below ln 2, and the
    best of n = 7 (the KL nearest to ln 3) has the score ln 2 (1 - (2/3)^7). On both prompts. PPO
    has the score ln 2 and the KL ln 3; in the table 2 and 1. kl_coef is 1."""
    evaluation = evaluated([one(0, 0)] * 2, [one(2, 1)] * 2, kl_coef=1.0)
    table, _ = add_optimum(evaluation, samples_of(lacks(0, 3), lacks(0, 3)), 1.0)
    score = LN2 * (1 - (2 / 3) ** 7)
    kl = math.log(7) - 6 / 7
    assert table[2]["score"] == pytest.approx(score + 2 - LN2)
    assert table[2]["objective"] == pytest.approx(score - kl + 1 - (LN2 - LN3))
    assert table[2]["optimality_se"] == pytest.approx(0, abs=1e-12)


def test_all_policies_have_the_same_optimum():
    """PPO and a second policy with the ratio 5 on its samples, 1 on the others. q is the mean over
    the three policies, and the optimum is that of all nine samples: whichever policy it is beside,
    its rows are the same. The policies' own rows are not."""
    scores = torch.tensor([[0.0, 1, 0.5, 0.2], [2, 1.5, 2, 1], [1, 3, 2, 0]]).double()
    ratios = torch.ones(3, 3, 4).double()  # (policy, sampler, sample)
    ratios[1, 1] = 3
    ratios[2, 2] = 5
    own = torch.stack([ratios[k, k] for k in range(3)])  # (3, 4)
    columns = [scores, scores, own.log(), ratios.mean(dim=0).log()]
    samples = torch.stack(columns)[:, :, None]  # (4, 3, 1, 4)
    sft = [one(0, 0, 1.0)] * 2
    evaluations = [
        evaluated(sft, [one(2, 1, 1.0), one(3, 1, 1.0)], 0.5),
        evaluated(sft, [one(1, 2, 1.0), one(2, 1, 1.0)], 0.5),
    ]
    first, second = estimate_optimum(evaluations, samples, 0.5)
    assert first.rows[3] == second.rows[3] and first.rows[0] == second.rows[0]
    q = torch.tensor([1.0] * 4 + [5 / 3] * 4 + [7 / 3] * 4).double()
    plain = optimum(scores.view(1, 12), 0.5, q.log()[None])
    assert first.ess.item() == pytest.approx(plain.ess.item())
    best = jackknife(optimal_metrics, samples, 0.5)  # (3, 1)
    more = objective(best - policy_metrics(samples, 1), 0.5)  # (1,), beside the first policy
    J_best = first.rows[3]["objective"]
    assert J_best == pytest.approx(2.0 + more.item())
    for estimate, J in zip((first, second), (2.0, 0.75)):
        assert estimate.rows[1]["objective"] == pytest.approx(J)
        assert estimate.rows[1]["optimality"] == pytest.approx(J / J_best)
    expected = [scores[2].mean(), scores[2].mean(), math.log(5)]
    assert policy_metrics(samples, 2)[:, 0].tolist() == pytest.approx([float(x) for x in expected])
    assert (first.n, second.n) == (7, 13)  # ln 13 - 12/13 = 1.642 is nearest to ln 5 = 1.609
    moved = second.rows[2]["kl_ref"] - first.rows[2]["kl_ref"]  # both beside the first policy
    assert moved == pytest.approx(best_of_n_kl(13) - best_of_n_kl(7))


def test_add_optimum_without_possible_gain_has_no_optimality():
    """All samples have the same score and PPO has the score of SFT: there is nothing to divide
    by."""
    equal = samples_of(*[[[(1, 0, 0)] * 2] * 2] * 2)
    table, text = add_optimum(evaluated([one(1, 0)] * 2, [one(1, 0)] * 2, 0.5), equal, 0.5)
    assert [row["optimality"] for row in table] == [None] * 4 and "warning" in text
    assert [row["optimality_se"] for row in table] == [None] * 4
    assert table[3]["score"] == 1


def test_add_optimum_warns_of_nothing_if_the_samples_are_enough():
    """40 equal samples have the effective sample size 40. On the second prompt one response has
    all the weight."""
    good = [[(1, 0, 0)] * 20] * 2
    poor = [[(1, 0, 0)] * 20, [(1.001, 0, 0)] + [(1, 0, 0)] * 19]
    evaluation = evaluated([one(0, 0)] * 3, [one(0.5, 0)] * 3, 1e-5)
    _, text = add_optimum(evaluation, samples_of(good, good, poor), 1e-5)
    # (40 + 40 + 1) / 3
    assert (
        "effective sample size 27.0 on average, below 10 for 1 of 3 prompts\n" in text
        and "warning" not in text
    )


def test_add_optimum_without_judge_has_no_gold():
    samples = samples_of(lacks(2, 3), lacks(2, 3))
    samples[1] = math.nan
    evaluation = evaluated([one(0, 0)] * 2, [one(1, 0.1)] * 2, kl_coef=1.0)
    table, _ = add_optimum(evaluation, samples, 1.0)
    assert [row["gold"] for row in table] == [None] * 4
    assert table[3]["score"] is not None


def test_add_optimum_does_not_modify_its_inputs():
    evaluation = evaluated([one(0.25, 0, 0.0)], [one(1.5, 0.2, 3.0)], kl_coef=2.0)
    before = copy.deepcopy(evaluation)
    add_optimum(evaluation, HAND, 2.0)
    assert evaluation == before


# ---- samples, in the exact world ----


@pytest.fixture(scope="module")
def world_samples():
    """Sampled and scored as in the program: 1,500 responses of the reference and of two other
    policies to each prompt of the world in test_exact.py. With the exact log-probabilities of the
    40 responses to each prompt under the three policies, and what the judge was asked."""
    world = World(seed=1, channels=32)
    policies = [world.reference]
    for seed in (2, 3):
        policy = noisy(GPT(world.config).double(), seed=seed)
        with torch.no_grad():
            policy.wte.weight *= 8  # far from the reference
        policies.append(policy)
    with torch.no_grad():
        exact = [world.logprobs(policy).sum(dim=1).view(3, -1) for policy in policies]
    policies = [copy.deepcopy(policy).float() for policy in policies]
    asked = []

    def score(prompts, texts):
        asked.extend(zip(prompts, texts))
        return [float(len(text)) for text in texts]

    judge = SimpleNamespace(__file__="judge.py", score=score)
    frozen = Frozen(policies[0], world.reward_model, Digits(EOS), LONGEST, MISSING_EOS, rows=1000)
    prompts = [Prompt(str(tokens), tokens) for tokens in PROMPTS]
    samples = sample_all(policies, frozen, judge, prompts, 1500, seed=0)
    return world, torch.stack(exact), samples, asked


@pytest.mark.slow
def test_samples_have_their_log_ratios(world_samples):
    """Each sampled response has its exact log-probability under its policy, and under the mixture
    of all, minus that under the reference. The 40 responses have different texts."""
    world, exact, samples, asked = world_samples
    listed = ["".join(str(token) for token in tokens if token != EOS) for tokens in responses()]
    number = {text: at for at, text in enumerate(listed)}
    assert len(number) == 40 and len(asked) == 3 * 3 * 1500
    at_prompt = torch.tensor([[int(p == str(q)) for q in PROMPTS] for p, _ in asked]).argmax(dim=1)
    picked = torch.tensor([number[text] for _, text in asked])
    expected = (exact - exact[0])[:, at_prompt, picked].view(3, 3, 3, 1500)
    own = torch.stack([expected[k, k] for k in range(3)])
    torch.testing.assert_close(samples[2], own, atol=1e-4, rtol=1e-4)
    mixture = expected.exp().mean(dim=0).log()
    torch.testing.assert_close(samples[3], mixture, atol=1e-4, rtol=1e-4)
    scores = world.scores.view(3, -1)[at_prompt, picked].view(3, 3, 1500)
    torch.testing.assert_close(samples[0], scores.double(), atol=1e-5, rtol=1e-5)
    lengths = torch.tensor([float(len(text)) for _, text in asked]).view(3, 3, 1500)
    torch.testing.assert_close(samples[1], lengths.double())


def test_samples_give_the_exact_optimum(world_samples):
    """J* and the J of each policy are sums over the 40 responses."""
    world, exact, samples, _ = world_samples
    scores, kl_coef = world.scores.view(3, -1), 1.5
    best = kl_coef * (exact[0] + scores / kl_coef).logsumexp(dim=1)
    pooled_scores, _, _, log_q = pooled(samples)
    got = optimum(pooled_scores, kl_coef, log_q)
    error = kl_coef * (1 / got.ess - 1 / 4500) ** 0.5  # of J*, to first order
    assert ((got.objective - best).abs() < 4 * error).all() and (error < 0.03).all()
    for number, logprobs in enumerate(exact):
        J = (logprobs.exp() * (scores - kl_coef * (logprobs - exact[0]))).sum(dim=1)
        got = objective(policy_metrics(samples, number), kl_coef)
        assert got.tolist() == pytest.approx(J.tolist(), abs=0.2)


# ---- the program ----


@pytest.mark.parametrize("flags", [["--samples", "3"], ["--prompts", "1"]])
def test_optimality_rejects_impossible_counts(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(OptimalityConfig, flags)
    assert stop.value.code == 2 and f"{flags[0]} is {flags[1]}" in capsys.readouterr().err


def test_optimality_rejects_two_policies_in_one_folder():
    """They would write the same tables."""
    with pytest.raises(ValueError, match="each must be in another folder"):
        CompareConfig(policies=("a/ppo.pt", "a/b/../dpo.pt"))
    assert CompareConfig().policies == ("runs/ppo.pt",)


PROGRAM = ["--prompts", "3", "--samples", "8", "--device", "cpu"]


def numbers(row):
    """The cells of a row but its name. An empty cell is NaN."""
    return {name: float(cell or "nan") for name, cell in row.items() if name != "policy"}


def train_ppo_with(*flags):
    cfg = parse_cli(train_ppo.PPOConfig, ["--device", "cpu", *map(str, flags)])
    train_ppo.main(cfg)


@pytest.fixture(scope="module")
def ended_run(trained, tmp_path_factory):
    """An output folder of train_ppo.py. The trained fixture is too short for responses that end,
    and all of its scores are equal. So 5 is added to the logit of end-of-text here, before the
    policy is trained."""
    data, out, _ = trained
    folder = tmp_path_factory.mktemp("optimality")
    end_earlier(out, folder, data)
    more = ["--lr", "0.003", "--temperature", "0.8"]
    train_ppo_with("--data", data, "--out", folder, *TINY["ppo"].split(), *more)
    return folder


@pytest.fixture
def copied(ended_run, tmp_path):
    """Its copy, which a test may change."""
    return shutil.copytree(ended_run, tmp_path / "copy")


def config(folder, *flags):
    """The data set has a judge, so --data has to name it."""
    data = load_checkpoint(folder / "ppo.pt", "ppo")["config"]["data"]
    flags = ["--checkpoint", str(folder / "ppo.pt"), "--data", data, "--device", "cpu", *flags]
    return parse_cli(OptimalityConfig, flags)


def run_config(folder):
    cfg = config(folder)
    return RunConfig(cfg.checkpoint, data=cfg.data, device="cpu")


def run(folder, *flags):
    main(config(folder, *PROGRAM, *flags))
    return rows(folder / "evaluation.csv")


def test_optimality_keeps_the_rows_of_train_ppo(trained, tmp_path):
    """It adds the rows best_of_n and optimum and the columns optimality and optimality_se."""
    folder = shutil.copytree(trained[1], tmp_path / "copy")
    before = rows(folder / "evaluation.csv")
    assert [row["policy"] for row in before] == ["sft", "ppo"] and "optimality" not in before[0]
    after = run(folder)
    assert [row["policy"] for row in after] == ["sft", "ppo", "best_of_n", "optimum"]
    assert list(after[0]) == [*before[0], "optimality", "optimality_se"]
    for old, new in zip(before, after):
        kept = {name: cell for name, cell in numbers(new).items() if "optimality" not in name}
        assert kept == pytest.approx(numbers(old), rel=1e-5, abs=1e-6)


def test_metrics_page_lists_the_columns_of_evaluation_csv(copied, root):
    """docs/metrics.md has a row for each column, in the same order."""
    page = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split("\n## evaluation.csv\n")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, flags=re.M)
    assert documented == list(run(copied)[0])


def test_optimality_of_the_written_rows_follows_from_their_objectives(copied, capsys):
    """(J - J_sft) / (J* - J_sft), with J = score - kl_coef * kl_ref. The rows sft and ppo are those
    of train_ppo.py."""
    before = rows(copied / "evaluation.csv")
    sft, ppo, best, optimum = map(numbers, run(copied))
    for old, new in zip(before, (sft, ppo)):
        assert {name: new[name] for name in numbers(old)} == pytest.approx(
            numbers(old), rel=1e-5, abs=1e-6
        )
    gain = optimum["objective"] - sft["objective"]
    assert gain > 0 and (sft["optimality"], optimum["optimality"]) == (0, 1)
    assert (sft["optimality_se"], optimum["optimality_se"]) == pytest.approx((0, 0), abs=1e-9)
    for row in (ppo, best):
        assert row["optimality_se"] > 0
        assert row["optimality"] == pytest.approx(
            (row["objective"] - sft["objective"]) / gain, abs=1e-4
        )
    kl_coef = load_checkpoint(copied / "ppo.pt", "ppo")["kl_coef"]  # --kl-target has moved it
    for row in (best, optimum):
        assert row["prompts"] == 3
        assert row["objective"] == pytest.approx(row["score"] - kl_coef * row["kl_ref"], abs=1e-4)
    shown = capsys.readouterr().out
    assert "best_of_n: n = " in shown and "of 3 prompts\n" in shown
    assert f"wrote {copied / 'evaluation.csv'}\n" in shown


def test_load_run_restores_the_models_of_the_run(copied):
    """The policy of ppo.pt, and the reference and reward model beside it. Policy and reference have
    the temperature of the run, and sampling has its settings."""
    loaded = load_run(run_config(copied))
    tokens = torch.tensor([[1, 2, 3]])
    for gpt, name in ((loaded.gpt, "ppo"), (loaded.frozen.reference, "sft")):
        expected, _ = load_policy(copied / f"{name}.pt", name)
        expected.temperature = 0.8
        torch.testing.assert_close(gpt(tokens), expected(tokens))
    torch.testing.assert_close(
        dict(loaded.frozen.reward_model.state_dict()),
        load_checkpoint(copied / "reward.pt", "reward")["model"],
        atol=0,
        rtol=0,
    )
    assert (loaded.frozen.max_new_tokens, loaded.frozen.missing_eos_score) == (8, -3.0)
    assert len(loaded.prompts) == 10


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_files_lie_beside_the_checkpoint_unless_flags_name_others(copied, tmp_path, name):
    """The folder is a copy: its config names the original, where both files still are."""
    (copied / f"{name}.pt").rename(tmp_path / "elsewhere.pt")
    before = (copied / "evaluation.csv").read_bytes()
    with pytest.raises(InputError, match=f"{name}.pt does not exist; give --{name} the file that"):
        run(copied)
    assert (copied / "evaluation.csv").read_bytes() == before
    assert len(run(copied, f"--{name}", str(tmp_path / "elsewhere.pt"))) == 4


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_files_beside_the_checkpoint_must_be_those_of_the_run(copied, name):
    """Trained again since, they have other bytes. evaluation.csv stays as it was."""
    before = (copied / "evaluation.csv").read_bytes()
    checkpoint = torch.load(copied / f"{name}.pt", weights_only=True)
    next(iter(checkpoint["model"].values())).add_(1)
    torch.save(checkpoint, copied / f"{name}.pt")
    with pytest.raises(InputError, match=f"ppo.pt was made from another {name} file than .*{name}"):
        run(copied)
    assert (copied / "evaluation.csv").read_bytes() == before


@pytest.mark.parametrize("reward", ["rules", "a.pt b.pt"])
def test_optimality_rejects_rewards_that_are_none(reward, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(OptimalityConfig, ["--reward", *reward.split()])
    assert stop.value.code == 2
    assert f"--reward {reward}: give a reward model FILE.pt first" in capsys.readouterr().err


def test_optimality_without_the_judge_of_the_run_changes_nothing(copied):
    """Only the checkpoint names the folder, so its judge.py does not run. Without gold the table
    would be another."""
    before = (copied / "evaluation.csv").read_bytes()
    with pytest.raises(InputError, match="judge.py is code that only the checkpoint names"):
        main(parse_cli(OptimalityConfig, ["--checkpoint", str(copied / "ppo.pt"), *PROGRAM]))
    assert (copied / "evaluation.csv").read_bytes() == before


@pytest.mark.slow
def test_optimality_may_run_again_with_the_same_result(copied):
    for first, second in zip(run(copied), run(copied), strict=True):
        assert numbers(first) == pytest.approx(numbers(second), rel=1e-5, abs=1e-6, nan_ok=True)


# ---- several policies ----


@pytest.fixture(scope="module")
def two_runs(trained, ended_run, tmp_path_factory):
    """Two runs from the same files, with different learning rates. A tiny --kl-coef, so that their
    objectives differ."""
    folders = []
    files = ["--sft", ended_run / "sft.pt", "--reward", ended_run / "reward.pt"]
    for lr in ("0.003", "0.0005"):
        folder = tmp_path_factory.mktemp("several")
        more = ["--lr", lr, "--kl-target", 0]
        train_ppo_with("--data", trained[0], "--out", folder, *files, *TINY["ppo"].split(), *more)
        folders.append(folder)
    return folders


@pytest.fixture
def two(two_runs, tmp_path):
    """Their copies, which a test may change."""
    return [shutil.copytree(folder, tmp_path / str(at)) for at, folder in enumerate(two_runs)]


def files_of(folder):
    """The flags that name what the run was trained from."""
    config = load_checkpoint(folder / "ppo.pt", "ppo")["config"]
    return ["--sft", config["sft"], "--reward", *config["reward"]]


def several(folders):
    checkpoints = [str(folder / "ppo.pt") for folder in folders]
    data = load_checkpoint(folders[0] / "ppo.pt", "ppo")["config"]["data"]
    flags = [*files_of(folders[0]), "--data", data, "--device", "cpu", *PROGRAM]
    compare.main(parse_cli(CompareConfig, ["--policies", *checkpoints, *flags]))


@pytest.mark.slow
def test_several_policies_have_one_optimum(two, capsys):
    """The rows sft and optimum are the same in both folders, and each has its own ppo row and
    report. On each prompt there are 3 * 8 samples, one J*, and each policy's own metrics."""
    own = [rows(folder / "evaluation.csv")[1] for folder in two]
    several(two)
    tables = [rows(folder / "evaluation.csv") for folder in two]
    first, second = tables
    assert first[0] == second[0] and first[3] == second[3] and first[1] != second[1]
    for before, table in zip(own, tables):
        ppo = numbers(table[1])
        for name, number in numbers(before).items():
            assert ppo[name] == pytest.approx(number, rel=1e-5, abs=1e-6)
        J_sft, J_best = (numbers(table[at])["objective"] for at in (0, 3))
        assert ppo["optimality"] == pytest.approx(
            (ppo["objective"] - J_sft) / (J_best - J_sft), abs=1e-4
        )
    shown = capsys.readouterr().out
    assert shown.count("best_of_n: n = ") == 2
    assert all(f"wrote {folder / 'evaluation.csv'}" in shown for folder in two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--kl-coef", 0.2], "kl_coef"),
        (["--reward-weights", 2], "weights of the rewards"),
        (["--seed", 1], "seed"),
        (["--temperature", 0.9], "temperature"),
        (["--max-new-tokens", 7], "max_new_tokens"),
        (["--eval-prompts", 9], "list of held-out prompts"),
    ],
)
def test_several_policies_must_have_the_same_objective(two, trained, ended_run, flags, name):
    files = ["--sft", ended_run / "sft.pt", "--reward", ended_run / "reward.pt", "--overwrite"]
    more = [*TINY["ppo"].split(), "--kl-target", 0, "--steps", 1, *flags]
    train_ppo_with("--data", trained[0], "--out", two[1], *files, *more)
    before = [(folder / "evaluation.csv").read_bytes() for folder in two]
    with pytest.raises(InputError, match=f"1/ppo.pt has another {name} than .*0/ppo.pt"):
        several(two)
    assert [(folder / "evaluation.csv").read_bytes() for folder in two] == before


# ---- what belongs together stays together ----


@pytest.mark.slow
def test_optimality_holds_the_lock_of_every_folder(two, monkeypatch):
    """So no training run can begin there and have its tables replaced by those of the old
    policy."""
    original = evaluate.compare
    refused = []

    def try_to_lock(*args):
        for folder in two:
            with pytest.raises(InputError, match="another program writes here"):
                with program.lock(folder / ".lock"):
                    pass
            refused.append(folder)
        return original(*args)

    monkeypatch.setattr(evaluate, "compare", try_to_lock)
    several(two)
    assert refused == two * 2
    with program.lock(two[1] / ".lock"):
        before = (two[0] / "evaluation.csv").read_bytes()
        with pytest.raises(InputError, match="another program writes here and holds .*1/.lock"):
            several(two)
    assert (two[0] / "evaluation.csv").read_bytes() == before


def test_optimality_keeps_the_table_of_another_policy(two):
    """DPO has written in this folder since."""
    path = two[0] / "evaluation.csv"
    path.write_text(path.read_text().replace("\nppo,", "\ndpo,"))
    before = path.read_bytes()
    with pytest.raises(InputError, match="evaluation.csv is of another policy than .*ppo.pt"):
        run(two[0], *files_of(two[0]))
    assert path.read_bytes() == before
    path.unlink()
    assert len(run(two[0], *files_of(two[0]))) == 4


def test_optimality_makes_no_folder_for_a_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nothing/ppo.pt does not exist"):
        main(OptimalityConfig(checkpoint=str(tmp_path / "nothing/ppo.pt")))
    assert OptimalityConfig(checkpoint=str(tmp_path / "nothing/ppo.pt")).lock_file() is None
    assert not (tmp_path / "nothing").exists()
    (tmp_path / ".lock").touch()
    assert OptimalityConfig(checkpoint=str(tmp_path / "ppo.pt")).lock_file() == tmp_path / ".lock"
