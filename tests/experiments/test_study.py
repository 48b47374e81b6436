"""docs.experiments.study: the points, the fits, on curves whose coefficients are known, and bad
input."""

import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
from pandas import DataFrame, read_csv
from pandas.testing import assert_frame_equal

from docs.experiments import study
from docs.experiments.study import (
    POINT,
    StudyConfig,
    fit,
    fits,
    main,
    one_reward_model,
    reference_samples,
    script,
    spread,
    unbiased_best_of_n,
)
from rlhf.data import Prompt
from rlhf.rollout import Frozen
from rlhf.run.errors import InputError
from tests.helpers import ROOT, Digits, f64


def test_unbiased_best_of_n_matches_hand_computation():
    """Scores 1, 3, 2 and n = 2: the best of the three pairs are 3, 3, 2, so the expected score is
    8/3. Their values are 10, 10, 30, with mean 50/3. n = 1 is the mean and n = 3 the maximum."""
    scores, values = f64([1, 3, 2]), f64([20, 10, 30])
    for n, score, value in ((1, 2, 20), (2, 8 / 3, 50 / 3), (3, 3, 10)):
        assert unbiased_best_of_n(scores, scores, n).item() == pytest.approx(score, rel=1e-12)
        assert unbiased_best_of_n(scores, values, n).item() == pytest.approx(value, rel=1e-12)
    for n in (0, 4):
        with pytest.raises(ValueError, match="between 1 and N"):
            unbiased_best_of_n(scores, values, n)


def test_unbiased_best_of_n_of_a_thousand_samples_is_finite():
    """Scores 1 to 1000, n = 256: the expected maximum is n (N + 1) / (n + 1) = 256 * 1001 / 257."""
    scores = torch.arange(1.0, 1001.0, dtype=torch.float64).unsqueeze(0)
    got = unbiased_best_of_n(scores, scores, 256)
    assert got.item() == pytest.approx(256 * 1001 / 257, rel=1e-9)


@pytest.mark.slow
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


def test_fit_finds_the_coefficients_of_both_forms():
    """Gains in gold of d (2 - d/2) and d (1 - 0.3 log d) give the coefficients (2, 1/2) and (1,
    0.3)."""
    d = numpy.array([0.3, 0.9, 1.7, 2.6, 4.0])
    assert fit(d, d * (2 - 0.5 * d), "best_of_n") == pytest.approx((2, 0.5))
    assert fit(d, d * (1 - 0.3 * numpy.log(d)), "ppo") == pytest.approx((1, 0.3))


def point(method, kl_ref, gold, kl_coef=0.0, seed=0):
    return {
        "method": method,
        "seed": seed,
        "comparisons": 100,
        "kl_coef": kl_coef,
        "step_or_n": 1,
        "kl_ref": kl_ref,
        "score": 10 * kl_ref,
        "gold": gold,
    }


def test_fits_measure_gold_from_the_start_of_the_curve():
    """Gold is -1 + d (1 - 0.3 log d) at KL 0, 1, 4, 9, 16. It is highest at d = 4, where it is 3 -
    1.2 log 4. The run with a KL penalty does not count."""
    curve = [point("ppo", 0, -1)]
    curve += [point("ppo", d * d, -1 + d * (1 - 0.3 * math.log(d))) for d in (1, 2, 3, 4)]
    table = fits(DataFrame([*curve, point("ppo", 1.0, 99.0, kl_coef=0.2)]))
    (row,) = table.to_dict("records")
    assert (row["alpha"], row["beta"]) == pytest.approx((1, 0.3))
    assert row["highest_gold"] == row["last_gold"] == pytest.approx(3 - 1.2 * math.log(4))
    assert row["at_sqrt_kl"] == 4 and row["last_score"] == 160


def test_fits_leave_out_short_curves_and_runs_with_kl_penalty():
    assert fits(DataFrame([point("ppo", 0.0, 0.0), point("ppo", 1.0, 1.0)])).empty
    assert fits(DataFrame([point("ppo", d, d, kl_coef=0.1) for d in (0.0, 1.0, 2.0, 3.0)])).empty


def test_fits_of_the_recorded_points_are_the_recorded_fits():
    recorded = ROOT / "docs" / "results" / "study"
    table = fits(read_csv(recorded / "study.csv"))
    assert_frame_equal(table, read_csv(recorded / "fits.csv"), rtol=1e-3)


def test_spread_over_seeds_matches_hand_computation():
    """1, 2, 6 have mean 3 and standard deviation sqrt((4 + 1 + 9) / 2) = 2.65. The other size has
    one seed only."""
    rows = DataFrame(
        [(0, 2000, 1.0), (1, 2000, 2.0), (0, 50, 5.0), (2, 2000, 6.0)],
        columns=["seed", "comparisons", "alpha"],
    )
    rows = rows.assign(method="ppo", beta=1.0, highest_gold=1.0, at_sqrt_kl=1.0, last_gold=1.0)
    table = spread(rows.assign(last_score=0, last_sqrt_kl=0))
    assert list(table.index) == [("ppo", 50), ("ppo", 2000)]
    assert table.loc[("ppo", 2000), "alpha"].tolist() == pytest.approx([3, 7**0.5])
    mean, std = table.loc[("ppo", 50), "alpha"].tolist()
    assert mean == 5 and math.isnan(std)


def test_points_are_the_steps_of_ppo_and_best_of_n(tmp_path, monkeypatch):
    """A stand-in writes what train_ppo.py would. The smaller of two sizes is run without a KL
    penalty only."""

    def fake_script(cfg, name, seed, out, *flags):
        if name == "ppo":
            out.mkdir(parents=True)
            header = "step,score,gold,kl_ref,kl_coef,lr\n"
            (out / "ppo.csv").write_text(f"{header}1,0.5,-1,0,0.3,9\n2,0.75,2,1.5,0.3,9\n")

    def fake_points(cfg, seed, sft, reward):
        row = {"method": "best_of_n", "step_or_n": 4, "kl_ref": 0.6, "score": 1.0, "gold": 1.25}
        return DataFrame([row])

    monkeypatch.setattr(study, "script", fake_script)
    monkeypatch.setattr(study, "best_of_n_points", fake_points)
    cfg = StudyConfig(out=str(tmp_path), kl_coefs="0,0.2")
    small = one_reward_model(cfg, 7, 30, whole=False)
    whole = one_reward_model(cfg, 7, 60, whole=True)
    assert list(whole) == POINT and len(small) == 3 and set(small["comparisons"]) == {30}
    assert whole.fillna(-1).to_numpy().tolist() == [
        ["best_of_n", 7, 60, -1, 4, 0.6, 1.0, 1.25],
        ["ppo", 7, 60, 0, 1, 0, 0.5, -1],
        ["ppo", 7, 60, 0, 2, 1.5, 0.75, 2],
        ["ppo", 7, 60, 0.2, 1, 0, 0.5, -1],
        ["ppo", 7, 60, 0.2, 2, 1.5, 0.75, 2],
    ]


@pytest.mark.parametrize(
    "flag",
    [
        {"seeds": "1,x"},
        {"comparisons": ""},
        {"kl_coefs": "-1"},
        {"jobs": 0},
        {"largest_n": 4},
        {"comparisons": "0"},
        {"kl_coefs": "nan"},
        {"seeds": "0.5"},
        {"kl_coefs": "0,,1"},
    ],
)
def test_study_config_rejects_impossible_values(flag):
    with pytest.raises(ValueError):
        StudyConfig(**flag)


def test_study_rejects_bad_input(tmp_path, small_data, monkeypatch):
    """A script that shows its flags and stops with status 2 takes the place of train_sft.py, which
    imports torch."""
    with pytest.raises(InputError, match="--comparisons 4000: .* has 40"):
        main(StudyConfig(data=str(small_data), out=str(tmp_path / "out"), comparisons="20,4000"))
    assert (study.ROOT / "train_sft.py").is_file()
    (tmp_path / "train_sft.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(2)\n")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    with pytest.raises(InputError, match="stopped with status 2; see .*sft.log"):
        script(StudyConfig(data=str(tmp_path / "nowhere")), "sft", 0, tmp_path / "out")
    flags = (tmp_path / "out" / "sft.log").read_text()
    data = f"--data {tmp_path / 'nowhere'}"
    out = f"--out {tmp_path / 'out'}"
    assert flags == f"{data} --device auto --seed 0 {out} --overwrite\n"
    (tmp_path / "out" / "sft.done").write_text("train_sft.py --steps 5")
    with pytest.raises(InputError, match="holds another run, train_sft.py --steps 5"):
        script(StudyConfig(data=str(small_data)), "sft", 0, tmp_path / "out")
    (small_data / "judge.py").unlink()
    with pytest.raises(InputError, match="no judge.py"):
        main(StudyConfig(data=str(small_data), out=str(tmp_path / "out"), comparisons="20"))


@pytest.mark.slow
def test_killed_study_leaves_no_script_running(tmp_path):
    """A script that prints its number and then goes on for a minute takes the place of
    train_sft.py. kill -9 of the study closes the pipe that it prints into."""
    (tmp_path / "train_sft.py").write_text(
        "import os, time\nprint(os.getpid(), flush=True)\n"
        "for _ in range(600):\n    time.sleep(0.1)\n    print('step', flush=True)\n"
    )
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from docs.experiments import study\n"
        "study.ROOT = Path(sys.argv[1])\n"
        "study.script(study.StudyConfig(), 'sft', 0, study.ROOT / 'out')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "out" / "sft.log"
    while not (log.is_file() and "step" in log.read_text()):
        assert running.poll() is None
        time.sleep(0.1)
    number = int(log.read_text().split()[0])
    os.kill(number, 0)  # it runs
    running.kill()
    running.wait()
    for _ in range(100):
        time.sleep(0.1)
        command = ["ps", "-o", "stat=", "-p", str(number)]
        state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if state in ("", "Z"):  # gone, or dead and not yet collected
            return
    raise AssertionError(f"{number} still runs: {state}")


def test_interrupted_study_begins_no_other_run(tmp_path, monkeypatch, small_data):
    """One run at a time, and the first one fails: the other two seeds are not begun."""
    started = []

    def fail(cfg, name, seed, out, *flags):
        started.append(seed)
        time.sleep(0.2)
        raise InputError("stopped")

    monkeypatch.setattr(study, "script", fail)
    with pytest.raises(InputError, match="stopped"):
        main(StudyConfig(data=str(small_data), out=str(tmp_path / "out"), comparisons="20"))
    time.sleep(0.5)
    # The second may have started before the first was seen to fail.
    assert started in ([0], [0, 1])


def test_study_resumes_a_run_that_was_cut_off(tmp_path, monkeypatch):
    (tmp_path / "train_sft.py").write_text("import sys\nprint(*sys.argv[1:])\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sft.pt").touch()
    monkeypatch.setattr(study, "ROOT", tmp_path)
    script(StudyConfig(), "sft", 0, tmp_path / "out")
    assert (tmp_path / "out" / "sft.log").read_text().rstrip().endswith("--resume")
    assert not (tmp_path / "out" / "sft.done").read_text().endswith("--resume")
