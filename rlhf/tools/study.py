"""Over-optimisation: the reward model's score rises, gold peaks and falls (Gao, Schulman and Hilton 2022).

    python -m rlhf.tools.study --jobs 2      # long; a second call continues where the first stopped

Runs the three scripts over seeds, sizes of the reward model's training set, and kl_coefs, and writes to --out:

    study.csv   one row a point: method (ppo, best_of_n), seed, comparisons, kl_coef, step or n, kl_ref, score, gold
    fits.csv    Gao et al.'s curves fitted to gold, with d = sqrt(KL):  best-of-n  d (a - b d),  PPO  d (a - b log d)
    study.png   both scores against d, if matplotlib is installed

kl_coef = 0 is run with every size; the other kl_coefs with the largest. The points of PPO are the steps of one run, as
in Gao et al.: score, gold and KL of the responses that it was trained on at that step.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from pandas import DataFrame, concat, read_csv

from rlhf.data import load_comparisons, load_prompts
from rlhf.extras.optimum import best_of_n, best_of_n_kl
from rlhf.rollout import Frozen
from rlhf.support.checkpoints import load_policy, load_reward_model
from rlhf.support.cli import InputError, arg, check_positive, run
from rlhf.support.judge import load_judge
from rlhf.support.runtime import pick_device
from rlhf.support.tables import csv_path
from rlhf.tokenizer import find_tokenizer
from rlhf.tools.optimality import reference_samples
from rlhf.tools.plot import load_pyplot

ROOT = Path(__file__).resolve().parents[2]
POINT = ["method", "seed", "comparisons", "kl_coef", "step_or_n", "kl_ref", "score", "gold"]  # columns of study.csv


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
        for name, number in (("seeds", r"\d+"), ("comparisons", r"[1-9]\d*"), ("kl_coefs", r"\d*\.?\d+(e-?\d+)?")):
            if not re.fullmatch(f"{number}(,{number})*", getattr(self, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: give numbers, with commas")

    def lock_file(self) -> Path:
        return Path(self.out) / ".lock"


# ---- the runs and their points ----


def script(cfg: StudyConfig, name: str, seed: int, out: Path, *flags) -> None:
    """Run one of the three scripts, unless it has run to its end already."""
    finished = out / f"{name}.done"  # holds the command
    flags = ["--data", cfg.data, "--device", cfg.device, "--seed", str(seed), "--out", str(out), *map(str, flags)]
    shown = " ".join([f"train_{name}.py", *flags])
    if finished.is_file():
        if (before := finished.read_text(encoding="utf-8")) != shown:
            raise InputError(f"{out} holds another run, {before}; give another --out")
        return
    print(f"$ {shown}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / f"train_{name}.py", *flags,
               "--resume" if (out / f"{name}.pt").is_file() else "--overwrite"]
    # What the script prints comes through a pipe: if this program is killed, the script ends at its next line.
    with (out / f"{name}.log").open("wb", buffering=0) as log, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        log.writelines(running.stdout)
    if running.returncode:
        raise InputError(f"train_{name}.py stopped with status {running.returncode}; see {out / name}.log")
    finished.write_text(shown, encoding="utf-8")


def one_reward_model(cfg: StudyConfig, seed: int, size: int, whole: bool) -> DataFrame:
    """Train a reward model on so many comparisons and PPO against it, and sample best-of-n. Returns the points."""
    folder = Path(cfg.out) / f"seed{seed}" / f"comparisons{size}"
    sft = folder.parent / "sft.pt"
    steps = max(1, round(4 * size / 64))  # 4 epochs in batches of 64, train_reward.py's defaults
    script(cfg, "reward", seed, folder, "--sft", sft, "--comparisons", size, "--steps", steps)
    points = [best_of_n_points(cfg, seed, sft, folder / "reward.pt")]
    for kl_coef in [x for x in cfg.kl_coefs.split(",") if whole or float(x) == 0]:
        out = folder / f"kl{kl_coef}"
        script(cfg, "ppo", seed, out, "--sft", sft, "--reward", folder / "reward.pt", "--kl-coef", kl_coef)
        curve = read_csv(out / "ppo.csv").rename(columns={"step": "step_or_n"})
        points.append(curve.assign(method="ppo", kl_coef=float(kl_coef)))
    print(f"seed {seed}, {size} comparisons: done", flush=True)
    return concat(points).assign(seed=seed, comparisons=size)[POINT]


def best_of_n_points(cfg: StudyConfig, seed: int, sft_path: Path, reward_path: Path) -> DataFrame:
    device = pick_device(cfg.device)
    (reference, sft), (model, _) = load_policy(sft_path, "sft"), load_reward_model(reward_path)
    tokenizer, judge = find_tokenizer(cfg.data, sft["config"]["tokenizer"]), load_judge(cfg.data)
    frozen = Frozen(reference.to(device), model.to(device), tokenizer)
    limit = reference.config.block_size - frozen.max_new_tokens
    prompts = load_prompts(cfg.data, tokenizer, limit, heldout=True)[: cfg.prompts]
    scores, golds = reference_samples(prompts, cfg.largest_n, frozen, judge, seed)
    rows = [("best_of_n", n, best_of_n_kl(n), *(best_of_n(scores, x, n).mean().item() for x in (scores, golds)))
            for n in (2**k for k in range(cfg.largest_n.bit_length()))]
    return DataFrame(rows, columns=["method", "step_or_n", "kl_ref", "score", "gold"])


# ---- the curves ----


def fit(d: numpy.ndarray, gain: numpy.ndarray, method: str) -> tuple[float, float]:
    """(a, b) of gain = d (a - b d) for best_of_n, gain = d (a - b log d) for ppo, by least squares. Gao et al. 2022."""
    columns = numpy.stack([d, -d * (d if method == "best_of_n" else numpy.log(d))], axis=1)
    return tuple(numpy.linalg.lstsq(columns, gain, rcond=None)[0])


def curves(points: DataFrame):
    """((method, seed, comparisons), points) of each curve: those without a KL penalty, with a column d = sqrt(KL)."""
    points = points[points["kl_coef"].fillna(0) == 0]
    return points.assign(d=points["kl_ref"].clip(lower=0) ** 0.5).groupby(["method", "seed", "comparisons"])


def fits(points: DataFrame) -> DataFrame:
    """One row for each curve. A curve starts with its first point, at d = 0; points whose d is not positive are not
    fitted, and a curve with fewer than three others has no row."""
    rows = []
    for (method, seed, size), curve in curves(points):
        rest, best, last = curve[curve["d"] > 0], curve.iloc[curve["gold"].argmax()], curve.iloc[-1]
        if len(rest) >= 3:
            a, b = fit(rest["d"].to_numpy(), (rest["gold"] - curve["gold"].iloc[0]).to_numpy(), method)
            rows.append({"method": method, "seed": seed, "comparisons": size, "alpha": a, "beta": b,
                         "highest_gold": best["gold"], "at_sqrt_kl": best["d"], "last_gold": last["gold"],
                         "last_score": last["score"], "last_sqrt_kl": last["d"]})
    return DataFrame(rows)


def spread(table: DataFrame) -> DataFrame:
    """Of the rows of fits, mean and standard deviation over the seeds for each method and size."""
    return table.drop(columns=["seed", "last_score", "last_sqrt_kl"]).groupby(["method", "comparisons"]).agg(
        ["mean", "std"])


def plot(points: DataFrame, path: Path) -> None:
    figure, axes = load_pyplot().subplots(2, 2, figsize=(11, 7), sharex="col", layout="tight")
    sizes = sorted(set(points["comparisons"]))
    looks = {"ppo": (0, "PPO, kl_coef = 0", "."), "best_of_n": (1, "best-of-n", ".-")}
    for (method, _, size), curve in curves(points):
        column, title, style = looks[method]
        for ax, name, label in zip(axes[:, column], ("score", "gold"), ("reward model's score", "gold")):
            ax.plot(curve["d"], curve[name], style, color=f"C{sizes.index(size)}", markersize=4)
            ax.set(title=title, xlabel="sqrt(KL to the reference), nats per response", ylabel=label)
            ax.grid(visible=True, alpha=0.3)
    axes[0][0].legend([f"{size:,} comparisons" for size in sizes])
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(cfg: StudyConfig) -> None:
    if cfg.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
        torch.set_num_threads(1)
    tokenizer, out = find_tokenizer(cfg.data), Path(cfg.out)
    if load_judge(cfg.data) is None:
        raise InputError(f"{cfg.data} has no judge.py: without gold there is nothing to compare the score with")
    seeds, sizes = ([int(x) for x in values.split(",")] for values in (cfg.seeds, cfg.comparisons))
    if max(sizes) > (rows := len(load_comparisons([csv_path(cfg.data, "comparisons")], tokenizer, 10**9))):
        raise InputError(f"--comparisons {max(sizes)}: {cfg.data} has {rows}")
    pool = ThreadPoolExecutor(cfg.jobs)
    try:
        list(pool.map(lambda seed: script(cfg, "sft", seed, out / f"seed{seed}"), seeds))
        runs = [(seed, size, size == max(sizes)) for size in sizes for seed in seeds]
        points = concat(pool.map(lambda run: one_reward_model(cfg, *run), runs))
    finally:  # after Ctrl-C or an error, begin no other run
        pool.shutdown(wait=False, cancel_futures=True)
    table = fits(points)
    for name, frame in (("study", points), ("fits", table)):
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")
    print(table.round(3).to_string(index=False), spread(table).round(2).to_string(), sep="\n\nover the seeds:\n")
    print(f"wrote {out / 'study.csv'} and {out / 'fits.csv'}")
    plot(points, out / "study.png")


if __name__ == "__main__":
    run(main, StudyConfig)
