"""The rows best_of_n and optimum of evaluation.csv, and the optimality of PPO: by hand, and as a
program."""

import copy
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from rlhf.data import Prompt
from rlhf.evaluate import summarise
from rlhf.methods.optimum import (
    Samples,
    estimate_optimum,
    ppo_and_optimum,
    rows_with_optimum,
)
from rlhf.model import GPT
from rlhf.rollout import Frozen
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.files import digests
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy
from rlhf.tools.optimality import (
    OptimalityConfig,
    describe,
    load_run,
    main,
    reference_samples,
    respond,
    trained_file,
)
from tests.core.test_exact import EOS, LONGEST, MISSING_EOS, PROMPTS, World
from tests.helpers import TINY, Digits, end_earlier, noisy, rows
from tests.methods.test_optimum import one

LN2, LN3, LN6 = math.log(2), math.log(3), math.log(6)


def table_of(sft, ppo, kl_coef):
    """The rows that train_ppo.py writes. The win rates play no part here."""
    return [summarise(name, [row], [row], kl_coef) for name, row in (("sft", sft), ("ppo", ppo))]


def add_optimum(table, samples, kl_coef):
    """What the program makes of a table and samples: rows of evaluation.csv, rows of
    optimality.csv, and the report."""
    estimate = estimate_optimum(table, samples, kl_coef)
    per_prompt = [prompt.row() for prompt in estimate.prompts]
    return rows_with_optimum(table, estimate), per_prompt, describe(estimate, "PPO")


# ---- the optimum beside PPO ----

HAND = Samples(
    [one(2 * LN3, 0, 4), one(0, 0, 0), one(0, 0, 0), one(0, 0, -6)],
    [one(2 * LN6, LN3, 2), one(2 * LN2, LN3, 0), one(2 * LN2, LN3, 0), one(2 * LN2, LN3, 0)],
)
# J* - J_sft with HAND, if PPO's J is 1.1 and J_sft 0.25
GAIN = 0.85 + 2 * math.log(1.5) - (2 * LN2 - 1.5 * LN3)


def test_add_optimum_matches_hand_computation():
    """HAND: one prompt, kl_coef 2, four responses of the reference and four of PPO, so a = 1/2. The
    first four have pi / pi_ref = 1 and q = 1, the others 3 and 2. exp(score / 2) is 3, 1, 1, 1 and
    6, 2, 2, 2. Divided by q both are 3, 1, 1, 1, so J* = 2 ln(3/2) and the weights are twice 1/4,
    1/12, 1/12, 1/12: ess = 6, score = 1/4 (2 ln 3 + 2 ln 6) + 3/12 * 2 ln 2 = ln 6, KL = (ln 6 - 2
    ln(3/2)) / 2, gold = 1/4 * 4 - 1/12 * 6 + 1/4 * 2.

    PPO has score (2 ln 6 + 6 ln 2) / 4 = ln 3 / 2 + 2 ln 2, KL ln 3 and gold 1/2 on that prompt, so
    J = 2 ln 2 - 3/2 ln 3. In the table it has score 1.5, KL 0.2 and gold 3. Both rows move by the
    difference.

    best_of_n: the KL nearest to 0.2 is that of n = 2, ln 2 - 1/2. Half of the six pairs of the
    reference's hold the first sample. In two of them the last is best, because of equal scores the
    later wins. The score is 1/2 * 2 ln 3, gold 1/2 * 4 - 2/6 * 6. The KL does not move."""
    table = table_of(one(0.25, 0, 0.0), one(1.5, 0.2, 3.0), kl_coef=2.0)
    table, found, text = add_optimum(table, [HAND], 2.0)
    sft, ppo, best, optimal = table
    assert [row["policy"] for row in table] == ["sft", "ppo", "best_of_n", "optimum"]
    moved = 1.5 - (LN3 / 2 + 2 * LN2)
    assert best["score"] == pytest.approx(LN3 + moved)
    assert best["kl_ref"] == pytest.approx(LN2 - 0.5)
    assert best["gold"] == pytest.approx(0 + 2.5)
    assert optimal["score"] == pytest.approx(LN6 + moved)
    assert optimal["gold"] == pytest.approx(1 + 2.5)
    assert optimal["kl_ref"] == pytest.approx((LN6 - 2 * math.log(1.5)) / 2 + 0.2 - LN3)
    assert optimal["objective"] == pytest.approx(GAIN + 0.25)
    assert sft["optimality"] == 0 and optimal["optimality"] == 1
    assert ppo["optimality"] == pytest.approx(0.85 / GAIN)
    assert best["optimality"] == pytest.approx((LN3 + moved - 2 * (LN2 - 0.5) - 0.25) / GAIN)
    assert [(row["prompt"], row["samples"]) for row in found] == [("p", 8)]
    assert found[0]["ess"] == pytest.approx(6)
    assert found[0]["ppo_objective"] == pytest.approx(2 * LN2 - 1.5 * LN3)
    assert found[0]["objective"] == pytest.approx(2 * math.log(1.5))
    assert "best_of_n: n = 2, whose KL is nearest to PPO's\n" in text
    assert "8 samples for each of 1 prompts" in text
    assert "effective sample size 6.0 on average\n" in text
    assert "below 10): 1 of 1 prompts: p\nwarning: that is too few samples to trust" in text


def test_add_optimum_states_the_bias_of_too_few_samples():
    """Half of HAND: exp(score / 2) / q is 3, 1 and 3, 1 with mean 2, or 1, 1 and 1, 1. The mean of
    2 ln 2 and 0 is lower than 2 ln(3/2). PPO gained 0.85, so the slope of the optimality is 0.85 /
    GAIN^2."""
    table = table_of(one(0.25, 0, 0.0), one(1.5, 0.2, 3.0), kl_coef=2.0)
    _, _, text = add_optimum(table, [HAND], 2.0)
    assert f"biased upward by at least {(2 * math.log(1.5) - LN2) * 0.85 / GAIN**2:.3f}\n" in text


def lacks(J, ratio):
    """Two responses of the reference and two of PPO, kl_coef 1. pi / pi_ref is 1 for the first, and
    their score is J. It is `ratio` for the others, q = (1 + ratio) / 2, and their score is J + log
    q. So J* = J, and PPO, with the KL log(ratio), lacks log(ratio / q)."""
    ppo = one(J + math.log((1 + ratio) / 2), math.log(ratio))
    return Samples([one(J, 0)] * 2, [ppo] * 2)


@pytest.mark.parametrize(("second", "error"), [(3, 0), (7, math.log(7 / 6) / 2)])
def test_add_optimum_standard_error_matches_hand_computation(second, error):
    """On the first prompt PPO lacks ln(3/2). On the second it lacks as much, or ln(7/4). Half of
    the difference is the standard error of the mean L. In the table J is 0 for sft and 2 for ppo.
    Optimality 2 / (2 + L) has the slope -2 / (2 + L)^2."""
    table = table_of(one(0, 0), one(3, 1), kl_coef=1.0)
    table, _, text = add_optimum(table, [lacks(2, 3), lacks(4, second)], 1.0)
    L = (math.log(1.5) + math.log(2 * second / (1 + second))) / 2
    assert f"a standard error of {error * 2 / (2 + L) ** 2:.3f} from" in text
    assert "upward by at least 0.000\n" in text
    assert table[3]["objective"] == pytest.approx(2 + L)


def test_add_optimum_of_policy_worse_than_its_reference_has_bias_and_standard_error():
    """SFT has J = 2.25 and PPO 2, so the optimality is -0.25 / G with G = L - 0.25, and its slope
    0.25 / G^2. In the second case PPO has -1/2 and SFT 0. A J* that is too low makes the optimality
    too low."""
    table = table_of(one(2.25, 0), one(3, 1), kl_coef=1.0)
    _, _, text = add_optimum(table, [lacks(2, 3), lacks(4, 7)], 1.0)
    G = (math.log(1.5) + math.log(1.75)) / 2 - 0.25
    assert f"a standard error of {math.log(7 / 6) / 2 * 0.25 / G**2:.3f} from" in text
    table = table_of(one(0, 0, 0.0), one(-0.5, 0, 0.0), kl_coef=2.0)
    table, _, text = add_optimum(table, [HAND], 2.0)
    G = GAIN - 0.85 - 0.5
    assert table[1]["optimality"] == pytest.approx(-0.5 / G)
    bias = (2 * math.log(1.5) - LN2) * 0.5 / G**2
    assert f"downward by at least {bias:.3f}\n" in text and "warning" in text


def test_add_optimum_says_if_the_samples_allow_no_larger_n():
    """PPO's KL of 1 is nearer to that of n = 5, ln 5 - 4/5, than to that of n = 4. Four samples
    allow n = 4."""
    table = table_of(one(0, 0, 0.0), one(3, 1, 0.0), kl_coef=1.0)
    _, _, text = add_optimum(table, [HAND], 1.0)
    assert "n = 4, whose KL is below PPO's: 4 samples allow no larger n\n" in text


def test_add_optimum_names_two_of_the_unreliable_prompts_and_warns_of_nothing_else():
    """40 equal samples have the effective sample size 40. On the other prompts one response has all
    the weight."""
    good = Samples([one(1, 0)] * 20, [one(1, 0)] * 20)
    poor = []
    for name in "abc":
        prompt = f"\nHuman: {name}\n\nAssistant:"
        equal = one(1, 0, prompt=prompt)
        best = one(1.001, 0, prompt=prompt)
        poor.append(Samples([equal] * 20, [best] + [equal] * 19))
    table = table_of(one(0, 0), one(0.5, 0), kl_coef=1e-5)
    _, rows, text = add_optimum(table, [good] * 5 + poor, 1e-5)
    assert [round(row["ess"]) for row in rows] == [40] * 5 + [1] * 3
    assert text.endswith(
        "(effective sample size below 10): 3 of 8 prompts: Human: a; Human: b; ..."
    )


def test_add_optimum_without_possible_gain_has_no_optimality():
    """All samples have the same score and PPO has the score of SFT: there is nothing to divide
    by."""
    table = table_of(one(1, 0), one(1, 0), kl_coef=0.5)
    equal = Samples([one(1, 0)] * 2, [one(1, 0)] * 2)
    table, _, text = add_optimum(table, [equal], 0.5)
    assert [row["optimality"] for row in table] == [None] * 4 and "warning" in text
    assert table[3]["score"] == 1


def test_add_optimum_without_judge_has_no_gold():
    table = table_of(one(0, 0), one(1, 0.1), kl_coef=1.0)
    table, rows, _ = add_optimum(table, [lacks(2, 3)], 1.0)
    assert [row["gold"] for row in table + rows] == [None] * 5


def test_add_optimum_does_not_modify_its_inputs():
    table = table_of(one(0.25, 0, 0.0), one(1.5, 0.2, 3.0), kl_coef=2.0)
    before = copy.deepcopy(table)
    add_optimum(table, [HAND], 2.0)
    assert table == before


# ---- respond, in the exact world ----


def test_responses_of_both_policies_give_the_exact_optimum():
    """Sampled and scored as in the program: 2,000 responses of the reference and of another policy
    to each prompt of the world in test_exact.py, which lists all responses. J* is a sum over them,
    and so is the policy's J."""
    world = World(seed=1, channels=32)
    policy = noisy(GPT(world.config).double(), seed=2)
    with torch.no_grad():
        policy.wte.weight *= 8  # far from the reference
        log_ref = world.ref_logprobs.sum(dim=1).view(3, -1)  # (3, 40)
        log_pi = world.logprobs(policy).sum(dim=1).view(3, -1)  # (3, 40)
    scores, kl_coef = world.scores.view(3, -1), 1.5
    J = (log_pi.exp() * (scores - kl_coef * (log_pi - log_ref))).sum(dim=1)
    best = kl_coef * (log_ref + scores / kl_coef).logsumexp(dim=1)

    frozen = Frozen(
        world.reference.float(), world.reward_model, Digits(EOS), LONGEST, MISSING_EOS, rows=1000
    )
    prompts = [Prompt(str(tokens), tokens) for tokens in PROMPTS]
    reference, policy = world.reference, policy.float()
    of_reference = respond(reference, policy, prompts, 2000, frozen, None, 0)
    of_policy = respond(policy, reference, prompts, 2000, frozen, None, 1)
    for at, samples in enumerate(map(Samples, of_reference, of_policy)):
        responses = samples.reference + samples.ppo
        assert {response.prompt for response in responses} == {str(PROMPTS[at])}
        row = ppo_and_optimum(samples, kl_coef).row()
        # The standard error of J*, to first order.
        error = kl_coef * (1 / row["ess"] - 1 / row["samples"]) ** 0.5
        assert row["objective"] == pytest.approx(best[at].item(), abs=4 * error) and error < 0.03
        assert row["ppo_objective"] == pytest.approx(J[at].item(), abs=0.15)


# ---- reference_samples ----


def test_reference_samples_have_the_exact_mean_score(gpt, reward_model):
    """Responses of one token: end-of-text with its score or, cut off, -7. The mean of 4,000 samples
    is within 4 standard errors of the exact mean. The judge counts letters: an ended response has
    none."""
    judge = SimpleNamespace(
        __file__="judge.py", score=lambda prompts, responses: [len(text) for text in responses]
    )
    frozen = Frozen(gpt, reward_model, Digits(), max_new_tokens=1, missing_eos_score=-7.0, rows=300)
    scores, golds = reference_samples([Prompt("1 2", [1, 2])], 4000, frozen, judge)
    with torch.no_grad():
        p = torch.softmax(gpt(torch.tensor([[1, 2]]))[0, -1], dim=0)
        ended = reward_model(torch.tensor([[1, 2, 10]]), torch.tensor([3])).item()
    exact = p[10].item() * ended + (1 - p[10].item()) * -7
    assert scores.shape == golds.shape == (1, 4000)
    assert scores.mean().item() == pytest.approx(exact, abs=4 * scores.std().item() / 4000**0.5)
    assert set(golds[0].tolist()) == {0.0, 1.0} and ((golds[0] == 0) == (scores[0] > -7)).all()


def test_reference_samples_without_judge_have_no_gold(gpt, reward_model):
    frozen = Frozen(gpt, reward_model, Digits(), max_new_tokens=2)
    scores, golds = reference_samples([Prompt("1", [1]), Prompt("2 3", [2, 3])], 6, frozen, None)
    assert scores.shape == (2, 6) and golds.isnan().all()


# ---- trained_file ----


@pytest.fixture
def trained_with(tmp_path):
    """A folder with ppo.pt and sft.pt, a copy of it elsewhere, and the part of the checkpoint that
    names the file."""
    folder, moved = tmp_path / "runs", tmp_path / "moved"
    folder.mkdir()
    (folder / "sft.pt").write_bytes(b"fine-tuned")
    shutil.copytree(folder, moved)
    checkpoint = {
        "config": {"sft": "", "out": str(folder)},
        "inputs": digests(sft=folder / "sft.pt"),
    }
    return SimpleNamespace(folder=folder, moved=moved, checkpoint=checkpoint)


def test_trained_file_is_the_one_in_the_out_folder(trained_with):
    path = trained_file(trained_with.checkpoint, "sft", "", trained_with.moved / "ppo.pt")
    assert path == trained_with.folder / "sft.pt"


def test_trained_file_is_the_one_that_the_flag_of_the_run_named(trained_with):
    trained_with.checkpoint["config"]["sft"] = str(trained_with.moved / "sft.pt")
    path = trained_file(trained_with.checkpoint, "sft", "", trained_with.folder / "ppo.pt")
    assert path == trained_with.moved / "sft.pt"


def test_trained_file_of_a_moved_folder_is_beside_the_checkpoint(trained_with):
    (trained_with.folder / "sft.pt").unlink()
    path = trained_file(trained_with.checkpoint, "sft", "", trained_with.moved / "ppo.pt")
    assert path == trained_with.moved / "sft.pt"


def test_trained_file_may_be_named(trained_with):
    given = str(trained_with.moved / "sft.pt")
    assert trained_file(
        trained_with.checkpoint, "sft", given, trained_with.folder / "ppo.pt"
    ).samefile(given)


@pytest.mark.parametrize("given", [True, False])
def test_trained_file_rejects_another_file(trained_with, given):
    path = trained_with.folder / "sft.pt"
    path.write_bytes(b"trained again")
    with pytest.raises(
        InputError, match="ppo.pt was made from another sft file than .*sft.pt; name the right one"
    ):
        trained_file(
            trained_with.checkpoint,
            "sft",
            str(path) if given else "",
            trained_with.folder / "ppo.pt",
        )


# ---- the program ----


@pytest.mark.parametrize("flags", [["--samples", "15"], ["--samples", "2"], ["--prompts", "0"]])
def test_optimality_rejects_impossible_counts(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(OptimalityConfig, flags)
    assert stop.value.code == 2 and f"{flags[0]} is {flags[1]}" in capsys.readouterr().err


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


def run(folder, *flags):
    main(config(folder, *PROGRAM, *flags))
    return rows(folder / "evaluation.csv")


def test_optimality_keeps_the_rows_of_train_ppo(trained, tmp_path):
    """It adds the rows best_of_n and optimum and the column optimality."""
    folder = shutil.copytree(trained[1], tmp_path / "copy")
    before = rows(folder / "evaluation.csv")
    assert [row["policy"] for row in before] == ["sft", "ppo"] and "optimality" not in before[0]
    after = run(folder)
    assert [row["policy"] for row in after] == ["sft", "ppo", "best_of_n", "optimum"]
    assert list(after[0]) == [*before[0], "optimality"]
    for old, new in zip(before, after):
        kept = {name: cell for name, cell in numbers(new).items() if name != "optimality"}
        assert kept == pytest.approx(numbers(old), rel=1e-5, abs=1e-6)


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
    for row in (ppo, best):
        assert row["optimality"] == pytest.approx(
            (row["objective"] - sft["objective"]) / gain, abs=1e-4
        )
    kl_coef = load_checkpoint(copied / "ppo.pt", "ppo")["kl_coef"]  # --kl-target has moved it
    for row in (best, optimum):
        assert row["prompts"] == 3
        assert row["objective"] == pytest.approx(row["score"] - kl_coef * row["kl_ref"], abs=1e-4)
    shown = capsys.readouterr().out
    assert "best_of_n: n = " in shown and "16 samples for each of 3 prompts" in shown
    assert f"wrote {copied / 'evaluation.csv'} and optimality.csv\n" in shown


def test_optimality_writes_a_row_for_each_prompt(copied):
    """What the optimum has beyond PPO in evaluation.csv is the mean over the rows of
    optimality.csv."""
    _, ppo, _, optimum = map(numbers, run(copied))
    found = rows(copied / "optimality.csv")
    kl_coef = load_checkpoint(copied / "ppo.pt", "ppo")["kl_coef"]
    columns = "prompt samples ess ppo_score ppo_gold ppo_kl_ref ppo_objective".split()
    assert list(found[0]) == [*columns, "score", "gold", "kl_ref", "objective"]
    loaded = load_run(config(copied))
    assert [row.pop("prompt") for row in found] == [prompt.text for prompt in loaded.prompts[:3]]
    found = list(map(numbers, found))
    for row in found:
        assert row["samples"] == 16 and 1 <= row["ess"] <= 16
        for of in ("", "ppo_"):
            assert row[f"{of}objective"] == pytest.approx(
                row[f"{of}score"] - kl_coef * row[f"{of}kl_ref"], abs=1e-4
            )
    for name in ("score", "gold", "kl_ref", "objective"):
        more = sum(row[name] - row[f"ppo_{name}"] for row in found) / 3
        assert optimum[name] - ppo[name] == pytest.approx(more, abs=1e-4)


def test_load_run_restores_the_models_of_the_run(copied):
    """The policy has all weights of ppo.pt, its value network included. Policy and reference have
    the temperature of the run, and sampling has its settings."""
    loaded = load_run(config(copied))
    torch.testing.assert_close(
        dict(loaded.policy.state_dict()),
        load_checkpoint(copied / "ppo.pt", "ppo")["model"],
        atol=0,
        rtol=0,
    )
    assert any(name.startswith("value_gpt.") for name in loaded.policy.state_dict())
    assert loaded.policy.gpt.temperature == loaded.frozen.reference.temperature == 0.8
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(
        loaded.policy.gpt(tokens), load_policy(copied / "ppo.pt", "ppo")[0](tokens)
    )
    assert (loaded.frozen.max_new_tokens, loaded.frozen.missing_eos_score, len(loaded.prompts)) == (
        8,
        -3.0,
        10,
    )


def test_load_run_of_a_shared_value_head_has_no_value_network(trained, ended_run, tmp_path):
    files = ["--sft", ended_run / "sft.pt", "--reward", ended_run / "reward.pt"]
    more = ["--steps", 1, "--value-network", "shared"]
    flags = [*files, "--out", tmp_path, *TINY["ppo"].split(), *more]
    train_ppo_with("--data", trained[0], *flags)
    loaded = load_run(config(tmp_path))
    assert loaded.policy.value_gpt is None


def test_optimality_without_the_judge_of_the_run_changes_nothing(copied):
    """Only the checkpoint names the folder, so its judge.py does not run. Without gold the table
    would be another."""
    before = (copied / "evaluation.csv").read_bytes()
    with pytest.raises(InputError, match="judge.py is code that only the checkpoint names"):
        main(parse_cli(OptimalityConfig, ["--checkpoint", str(copied / "ppo.pt"), *PROGRAM]))
    assert (copied / "evaluation.csv").read_bytes() == before


def test_optimality_may_run_again_with_the_same_result(copied):
    for first, second in zip(run(copied), run(copied), strict=True):
        assert numbers(first) == pytest.approx(numbers(second), rel=1e-5, abs=1e-6, nan_ok=True)


def test_optimality_rejects_another_reward_model(copied):
    """A reward model that was changed after the run has other bytes. evaluation.csv stays as it
    was."""
    before = (copied / "evaluation.csv").read_bytes()
    checkpoint = torch.load(copied / "reward.pt", weights_only=True)
    checkpoint["model"]["head.bias"] += 1
    torch.save(checkpoint, copied / "reward.pt")
    with pytest.raises(
        InputError, match="ppo.pt was made from another reward file than .*reward.pt"
    ):
        run(copied, "--reward", str(copied / "reward.pt"))
    assert (copied / "evaluation.csv").read_bytes() == before
