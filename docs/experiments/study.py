"""Over-optimisation: the reward model's score rises, gold peaks and falls (Gao, Schulman and Hilton
2022).

Run it from the root of the repository. It takes long; a second call continues where the first
stopped:

    python -m docs.experiments.study --jobs 2

Runs the three scripts over seeds, sizes of the reward model's training set, and kl_coefs, and
writes to --out:

    study.csv   one row per point: method (ppo, best_of_n), seed, comparisons, kl_coef, step or n,
                kl_ref, score, gold
    fits.csv    Gao et al.'s curves fitted to gold, with d = sqrt(KL):
                best-of-n  d (a - b d),  PPO  d (a - b log d)
    study.png   score and gold against the KL, if a kl_coef is 0; needs matplotlib

kl_coef = 0 is run with every size; the other kl_coefs with the largest. The points of PPO are the
steps of one run, as in Gao et al.: score, gold and KL of the responses that it was trained on at
that step.
"""

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy
import torch
from pandas import DataFrame, concat, read_csv
from torch import Tensor

from docs.experiments.plot import draw_study, save
from rlhf import evaluate
from rlhf.data import Prompt, load_comparisons, load_prompts
from rlhf.masked import check_same_shape
from rlhf.methods.optimum import best_of_n_kl, response_metrics
from rlhf.rollout import Frozen
from rlhf.run.device import pick_device
from rlhf.run.errors import InputError
from rlhf.run.flags import arg, check_positive
from rlhf.run.judge import load_judge
from rlhf.run.loading import find_tokenizer, load_policy, load_reward_model
from rlhf.run.program import run

ROOT = Path(__file__).resolve().parents[2]
# The columns of study.csv.
POINT = ["method", "seed", "comparisons", "kl_coef", "step_or_n", "kl_ref", "score", "gold"]
# What a flag of several numbers, separated by commas, may hold.
NUMBERS = {
    "seeds": r"\d+",
    "comparisons": r"[1-9]\d*",
    "kl_coefs": r"\d*\.?\d+(e-?\d+)?",
}


@dataclass(frozen=True)
class StudyConfig:
    """Sweep kl_coef and the number of comparisons; see how far the score can be trusted."""

    data: str = arg("data/tiny_assistant", "data set folder with a judge.py")
    out: str = arg("runs/study", "folder for all runs and for the results")
    seeds: str = arg("0,1,2", "seeds, separated by commas")
    comparisons: str = arg("1500,4000,12000", "sizes of the reward model's training set")
    kl_coefs: str = arg("0,0.02,0.07,0.2", "KL penalty coefficients")
    prompts: int = arg(48, "held-out prompts of best-of-n")
    largest_n: int = arg(256, "largest n of best-of-n")
    jobs: int = arg(1, "runs at a time (above 1: one thread each)")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))

    def __post_init__(self):
        check_positive(self, "prompts", "jobs")
        if self.largest_n < 8:
            raise ValueError("--largest-n must be at least 8: a curve needs three points")
        for name, number in NUMBERS.items():
            value = getattr(self, name)
            if not re.fullmatch(f"{number}(,{number})*", value):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value!r}: give numbers, with commas")

    def lock_file(self) -> Path:
        return Path(self.out) / ".lock"


# ---- the runs ----


def script(cfg: StudyConfig, name: str, seed: int, out: Path, *flags) -> None:
    """Run one of the three scripts, unless it has run to its end already."""
    command = [f"train_{name}.py", "--data", cfg.data, "--device", cfg.device]
    command += ["--seed", str(seed), "--out", str(out), *map(str, flags)]
    shown = " ".join(command)
    finished = out / f"{name}.done"  # holds the command
    if finished.is_file():
        before = finished.read_text(encoding="utf-8")
        if before != shown:
            raise InputError(f"{out} holds another run, {before}; give another --out")
        return
    print(f"$ {shown}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    command.append("--resume" if (out / f"{name}.pt").is_file() else "--overwrite")
    status = run_script(command, out / f"{name}.log")
    if status:
        raise InputError(f"train_{name}.py stopped with status {status}; see {out / name}.log")
    finished.write_text(shown, encoding="utf-8")


def run_script(command: list[str], log_path: Path) -> int:
    """Run a script of the root with its flags, what it prints into a file; returns its status.

    The output comes through a pipe, so if this program is killed, the script ends at its next line.
    """
    script_name, *flags = command
    process = subprocess.Popen(
        [sys.executable, ROOT / script_name, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with log_path.open("wb", buffering=0) as log, process:
        log.writelines(process.stdout)
    return process.returncode


# ---- the points of one reward model ----


def one_reward_model(cfg: StudyConfig, seed: int, size: int, whole: bool) -> DataFrame:
    """Train a reward model on so many comparisons and PPO against it, and sample best-of-n. Returns
    the points.

    Args: whole: with every kl_coef, not only 0.
    """
    folder = Path(cfg.out) / f"seed{seed}" / f"comparisons{size}"
    sft = folder.parent / "sft.pt"
    reward = folder / "reward.pt"
    steps = max(1, round(4 * size / 64))  # 4 epochs in batches of 64
    script(cfg, "reward", seed, folder, "--sft", sft, "--comparisons", size, "--steps", steps)
    points = [best_of_n_points(cfg, seed, sft, reward)]
    for kl_coef in cfg.kl_coefs.split(","):
        if whole or float(kl_coef) == 0:
            out = folder / f"kl{kl_coef}"
            flags = ["--sft", sft, "--reward", reward, "--kl-coef", kl_coef]
            script(cfg, "ppo", seed, out, *flags)
            curve = read_csv(out / "ppo.csv").rename(columns={"step": "step_or_n"})
            points.append(curve.assign(method="ppo", kl_coef=float(kl_coef)))
    print(f"seed {seed}, {size} comparisons: done", flush=True)
    return concat(points).assign(seed=seed, comparisons=size)[POINT]


def best_of_n_points(cfg: StudyConfig, seed: int, sft_path: Path, reward_path: Path) -> DataFrame:
    """Score, gold and KL of best-of-n, for n = 1, 2, 4, ... up to --largest-n."""
    device = pick_device(cfg.device)
    reference, sft = load_policy(sft_path, "sft")
    reward_model, _ = load_reward_model(reward_path)
    tokenizer = find_tokenizer(cfg.data, sft["config"]["tokenizer"])
    judge = load_judge(cfg.data)
    frozen = Frozen(reference.to(device), reward_model.to(device), tokenizer)
    limit = reference.config.block_size - frozen.max_new_tokens
    prompts = load_prompts(cfg.data, tokenizer, limit, heldout=True)[: cfg.prompts]
    scores, golds = reference_samples(prompts, cfg.largest_n, frozen, judge, seed)  # (Q, N) each
    rows = []
    n = 1
    while n <= cfg.largest_n:
        score = unbiased_best_of_n(scores, scores, n).mean().item()
        gold = unbiased_best_of_n(scores, golds, n).mean().item()
        kl = best_of_n_kl(n)
        row = {"method": "best_of_n", "step_or_n": n, "kl_ref": kl, "score": score, "gold": gold}
        rows.append(row)
        n *= 2
    return DataFrame(rows)


def reference_samples(
    prompts: list[Prompt], count: int, frozen: Frozen, judge: ModuleType | None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Scores (Q, N) of N = count responses of the reference to each of Q prompts, and their gold
    (NaN without a judge)."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    responses = evaluate.respond(frozen.reference, repeated, frozen, judge, seed)
    scores, golds, _ = response_metrics(responses)  # (Q n,) each
    return scores.view(-1, count), golds.view(-1, count)


def unbiased_best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the best by score of n samples, without replacement from the N at hand.

    Sorted by score, the sample at rank i (0 the lowest) is the best of a random n with probability
    C(i, n-1) / C(N, n). This uses all N samples, and is unbiased (Nakano et al. 2021, WebGPT,
    appendix I). Of equal scores the later wins. rlhf.methods.optimum.best_of_n, for samples of
    several policies, is biased if n is near N.

    Args: scores, values (Q, N): values may be the scores themselves, or another judge's scores of
        the same samples.
    Returns: (Q,), in float64.
    """
    check_same_shape(scores=scores, values=values)
    if scores.dim() != 2 or not 1 <= n <= scores.size(1):
        raise ValueError(
            f"n = {n} must lie between 1 and N of scores (Q, N), here {tuple(scores.shape)}"
        )
    N = scores.size(1)
    ranks = torch.arange(N, dtype=torch.float64, device=scores.device)  # (N,)
    possible = ranks >= n - 1  # (N,): below, fewer than n - 1 samples are worse
    left_out = (ranks - (n - 1)).clamp(min=0)  # (N,)
    log_below = torch.lgamma(ranks + 1) - math.lgamma(n) - torch.lgamma(left_out + 1)  # C(i, n-1)
    log_all = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)  # C(N, n)
    p = torch.where(possible, (log_below - log_all).exp(), 0.0)  # (N,), sums to 1
    order = scores.argsort(dim=1, stable=True)  # (Q, N), lowest first
    return (values.double().gather(1, order) * p).sum(dim=1)


# ---- the curves ----


def fit(d: numpy.ndarray, gain: numpy.ndarray, method: str) -> tuple[float, float]:
    """(a, b) of gain = d (a - b d) for best_of_n, gain = d (a - b log d) for ppo, by least squares.
    Gao et al. 2022."""
    slowdown = d if method == "best_of_n" else numpy.log(d)
    columns = numpy.stack([d, -d * slowdown], axis=1)
    solution = numpy.linalg.lstsq(columns, gain, rcond=None)[0]
    return tuple(solution)


def curves(points: DataFrame):
    """((method, seed, comparisons), points) of each curve: those without a KL penalty, with a
    column d = sqrt(KL)."""
    points = points[points["kl_coef"].fillna(0) == 0]
    points = points.assign(d=points["kl_ref"].clip(lower=0) ** 0.5)
    return points.groupby(["method", "seed", "comparisons"])


def fits(points: DataFrame) -> DataFrame:
    """One row for each curve.

    A curve starts with its first point, at d = 0. Points whose d is not positive are not fitted,
    and a curve with fewer than three others has no row.
    """
    rows = []
    for (method, seed, size), curve in curves(points):
        fitted = curve[curve["d"] > 0]
        if len(fitted) < 3:
            continue
        gain = fitted["gold"] - curve["gold"].iloc[0]
        a, b = fit(fitted["d"].to_numpy(), gain.to_numpy(), method)
        best = curve.iloc[curve["gold"].argmax()]
        last = curve.iloc[-1]
        row = {"method": method, "seed": seed, "comparisons": size, "alpha": a, "beta": b}
        row |= {"highest_gold": best["gold"], "at_sqrt_kl": best["d"]}
        row |= {"last_gold": last["gold"], "last_score": last["score"], "last_sqrt_kl": last["d"]}
        rows.append(row)
    return DataFrame(rows)


def spread(table: DataFrame) -> DataFrame:
    """Of the rows of fits, mean and standard deviation over the seeds for each method and size."""
    table = table.drop(columns=["seed", "last_score", "last_sqrt_kl"])
    return table.groupby(["method", "comparisons"]).agg(["mean", "std"])


# ---- the program ----


def check_data(cfg: StudyConfig, largest: int) -> None:
    """Raise InputError if the data set has no judge, or fewer comparisons than the largest size."""
    tokenizer = find_tokenizer(cfg.data)
    if load_judge(cfg.data) is None:
        raise InputError(
            f"{cfg.data} has no judge.py: without gold there is nothing to compare the score with"
        )
    comparisons = load_comparisons(cfg.data, tokenizer, 10**9)
    if largest > len(comparisons):
        raise InputError(f"--comparisons {largest}: {cfg.data} has {len(comparisons)}")


def run_all(cfg: StudyConfig, seeds: list[int], sizes: list[int]) -> DataFrame:
    """The points of all runs, cfg.jobs of which go on at a time."""
    out = Path(cfg.out)
    pool = ThreadPoolExecutor(cfg.jobs)
    try:
        stages = [pool.submit(script, cfg, "sft", seed, out / f"seed{seed}") for seed in seeds]
        for stage in stages:
            stage.result()
        points = []
        for size in sizes:
            whole = size == max(sizes)
            points += [pool.submit(one_reward_model, cfg, seed, size, whole) for seed in seeds]
        return concat([future.result() for future in points])
    finally:  # after Ctrl-C or an error, begin no other run
        pool.shutdown(wait=False, cancel_futures=True)


def main(cfg: StudyConfig) -> None:
    if cfg.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
        torch.set_num_threads(1)
    seeds = [int(seed) for seed in cfg.seeds.split(",")]
    sizes = [int(size) for size in cfg.comparisons.split(",")]
    check_data(cfg, max(sizes))
    out = Path(cfg.out)
    points = run_all(cfg, seeds, sizes)
    table = fits(points)
    points.to_csv(out / "study.csv", index=False, float_format="%.6g")
    table.to_csv(out / "fits.csv", index=False, float_format="%.6g")
    print(table.round(3).to_string(index=False))
    print("\nover the seeds:")
    print(spread(table).round(2).to_string())
    print(f"wrote {out / 'study.csv'} and {out / 'fits.csv'}")
    if (points["kl_coef"] == 0).any():
        save(draw_study(points), out / "study.png")


if __name__ == "__main__":
    run(main, StudyConfig)
