"""Over-optimisation: the reward model's score rises, gold peaks and falls (Gao, Schulman and Hilton 2022).

    python -m rlhf.tools.study --jobs 2      # long; a second call continues where the first stopped

Runs the three scripts over seeds, sizes of the reward model's training set, and kl_coefs, and writes to --out:

    study.csv   one row a point: method (ppo, best_of_n), seed, comparisons, kl_coef, step or n, kl_ref, score, gold
    fits.csv    Gao et al.'s curves fitted to gold, with d = sqrt(KL):  best-of-n  d (a - b d),  PPO  d (a - b log d)
    study.png   both scores against d, if matplotlib is installed

kl_coef = 0 is run with every size; the other kl_coefs with the largest. The points of PPO are the steps of one run, as
in Gao et al.: score, gold and KL of the answers that it was trained on at that step.
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from rlhf.data import load_comparisons, load_prompts
from rlhf.extras.optimum import best_of_n, best_of_n_kl
from rlhf.rollout import Frozen
from rlhf.support.checkpoints import load_policy, load_reward_model
from rlhf.support.cli import InputError, arg, check_positive, run
from rlhf.support.judge import load_judge
from rlhf.support.runtime import pick_device
from rlhf.support.tables import csv_path, write_csv
from rlhf.tokenizer import find_tokenizer
from rlhf.tools.optimality import reference_samples

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, BATCH_SIZE = 4.0, 64  # of every reward model, those of train_reward.py's defaults


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
        for name, kind, least in (("seeds", int, 0), ("comparisons", int, 1), ("kl_coefs", float, 0)):
            try:
                values = [kind(value) for value in getattr(self, name).split(",")]
            except ValueError:
                values = [-1]
            if not min(values) >= least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: give numbers, with commas")

    def lock_file(self) -> Path:
        return Path(self.out) / ".lock"


def script(cfg: StudyConfig, name: str, seed: int, out: Path, *flags) -> None:
    """Run one of the three scripts, unless it has run to its end already."""
    finished = out / f"{name}.done"  # holds the command
    command = [sys.executable, str(ROOT / f"train_{name}.py"), "--data", cfg.data, "--device", cfg.device, "--seed",
               str(seed), "--out", str(out), *map(str, flags)]
    shown = " ".join([f"train_{name}.py", *command[2:]])
    if finished.is_file():
        if (before := finished.read_text(encoding="utf-8")) != shown:
            raise InputError(f"{out} holds another run, {before}; give another --out")
        return
    print(f"$ {shown}", flush=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if cfg.jobs > 1 else {})}
    out.mkdir(parents=True, exist_ok=True)
    command.append("--resume" if (out / f"{name}.pt").is_file() else "--overwrite")
    # What the script prints comes through a pipe: if this program is killed, the script ends at its next line.
    with (out / f"{name}.log").open("wb", buffering=0) as log, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as running:
        for line in running.stdout:
            log.write(line)
    if running.returncode:
        raise InputError(f"train_{name}.py stopped with status {running.returncode}; see {out / name}.log")
    finished.write_text(shown, encoding="utf-8")


def one_reward_model(cfg: StudyConfig, seed: int, size: int, whole: bool) -> list[dict]:
    """Train a reward model on so many comparisons and PPO against it, and sample best-of-n. Returns the points."""
    folder = Path(cfg.out) / f"seed{seed}" / f"comparisons{size}"
    sft = folder.parent / "sft.pt"
    script(cfg, "reward", seed, folder, "--sft", sft, "--comparisons", size,
           "--steps", max(1, round(EPOCHS * size / BATCH_SIZE)))
    points = best_of_n_points(cfg, seed, size, sft, folder / "reward.pt")
    for kl_coef in cfg.kl_coefs.split(","):
        if float(kl_coef) == 0 or whole:
            out = folder / f"kl{kl_coef}"
            script(cfg, "ppo", seed, out, "--sft", sft, "--reward", folder / "reward.pt",
                   "--kl-coef", kl_coef)
            with (out / "ppo.csv").open(newline="") as file:
                points += [{"method": "ppo", "seed": seed, "comparisons": size, "kl_coef": float(kl_coef),
                            "step_or_n": int(row["step"]), "kl_ref": float(row["kl_ref"]),
                            "score": float(row["score"]), "gold": float(row["gold"])} for row in csv.DictReader(file)]
    return points


def best_of_n_points(cfg: StudyConfig, seed: int, size: int, sft_path: Path, reward_path: Path) -> list[dict]:
    device = pick_device(cfg.device)
    (reference, sft), (model, _) = load_policy(sft_path, "sft"), load_reward_model(reward_path)
    tokenizer, judge = find_tokenizer(cfg.data, sft["config"]["tokenizer"]), load_judge(cfg.data)
    frozen = Frozen(reference.to(device), model.to(device), tokenizer)
    limit = reference.config.block_size - frozen.max_new_tokens
    prompts = load_prompts(cfg.data, tokenizer, limit, heldout=True)[: cfg.prompts]
    scores, golds = reference_samples(prompts, cfg.largest_n, frozen, judge, seed)
    sizes = [2**k for k in range(cfg.largest_n.bit_length()) if 2**k <= cfg.largest_n]
    return [{"method": "best_of_n", "seed": seed, "comparisons": size, "kl_coef": None, "step_or_n": n,
             "kl_ref": best_of_n_kl(n), "score": best_of_n(scores, scores, n).mean().item(),
             "gold": best_of_n(scores, golds, n).mean().item()} for n in sizes]


def fit(d: numpy.ndarray, gain: numpy.ndarray, method: str) -> tuple[float, float]:
    """(a, b) of gain = d (a - b d) for best_of_n, gain = d (a - b log d) for ppo, by least squares. Gao et al. 2022."""
    columns = numpy.stack([d, -d * (d if method == "best_of_n" else numpy.log(d))], axis=1)
    a, b = numpy.linalg.lstsq(columns, gain, rcond=None)[0]
    return float(a), float(b)


def fits(points: list[dict]) -> list[dict]:
    """One row for each curve: both methods, each seed and size, without a KL penalty. A curve starts with its first
    point, at d = 0; points whose d is not positive are not fitted."""
    rows, points = [], [p for p in points if not p["kl_coef"]]
    for method, seed, size in sorted({(p["method"], p["seed"], p["comparisons"]) for p in points}):
        curve = [p for p in points if (p["method"], p["seed"], p["comparisons"]) == (method, seed, size)]
        start, rest = curve[0], [p for p in curve if p["kl_ref"] > 0]
        if len(rest) < 3:
            continue
        d = numpy.sqrt([p["kl_ref"] for p in rest])
        a, b = fit(d, numpy.array([p["gold"] - start["gold"] for p in rest]), method)
        best = max(curve, key=lambda p: p["gold"])
        rows.append({"method": method, "seed": seed, "comparisons": size, "alpha": a, "beta": b,
                     "highest_gold": best["gold"], "at_sqrt_kl": max(0.0, best["kl_ref"]) ** 0.5,
                     "last_gold": curve[-1]["gold"], "last_score": curve[-1]["score"],
                     "last_sqrt_kl": max(0.0, curve[-1]["kl_ref"]) ** 0.5})
    return rows


def spread(rows: list[dict]) -> list[str]:
    """Of the rows of fits, a line for each method and size: mean and standard deviation over the seeds."""
    lines = []
    for method, size in sorted({(row["method"], row["comparisons"]) for row in rows}):
        line = f"{method}, {size:,} comparisons"
        for name in ("alpha", "beta", "highest_gold", "at_sqrt_kl", "last_gold"):
            values = [row[name] for row in rows if (row["method"], row["comparisons"]) == (method, size)]
            line += f" | {name} {numpy.mean(values):.2f} +- {numpy.std(values, ddof=1) if len(values) > 1 else 0:.2f}"
        lines.append(line)
    return lines


def plot(points: list[dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib, and call again)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex="col")
    sizes = sorted({p["comparisons"] for p in points})
    colours = dict(zip(sizes, ("tab:red", "tab:orange", "tab:blue", "tab:green", "tab:purple")))
    for column, (method, title) in enumerate((("ppo", "PPO, kl_coef = 0"), ("best_of_n", "best-of-n"))):
        for row, name in enumerate(("score", "gold")):
            ax = axes[row][column]
            for size in sizes:
                for seed in sorted({p["seed"] for p in points}):
                    curve = [p for p in points if (p["method"], p["comparisons"], p["seed"]) == (method, size, seed)
                             and not p["kl_coef"]]
                    ax.plot([max(0, p["kl_ref"]) ** 0.5 for p in curve], [p[name] for p in curve],
                            "." if method == "ppo" else ".-", color=colours.get(size, "black"), markersize=4,
                            label=f"{size:,} comparisons" if seed == min(p["seed"] for p in points) else None)
            ax.grid(alpha=0.3)
            ax.set_ylabel("reward model's score" if name == "score" else "gold")
        axes[0][column].set_title(title)
        axes[1][column].set_xlabel("sqrt(KL to the reference), nats per response")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(cfg: StudyConfig) -> None:
    if cfg.jobs > 1:
        torch.set_num_threads(1)
    tokenizer = find_tokenizer(cfg.data)
    if load_judge(cfg.data) is None:
        raise InputError(f"{cfg.data} has no judge.py: without gold there is nothing to compare the score with")
    rows = len(load_comparisons([csv_path(cfg.data, "comparisons")], tokenizer, 10**9))
    seeds, sizes = ([int(x) for x in values.split(",")] for values in (cfg.seeds, cfg.comparisons))
    if max(sizes) > rows:
        raise InputError(f"--comparisons {max(sizes)}: {cfg.data} has {rows}")
    pool = ThreadPoolExecutor(cfg.jobs)
    try:
        for seed, _ in zip(seeds, pool.map(
                lambda seed: script(cfg, "sft", seed, Path(cfg.out) / f"seed{seed}"), seeds)):
            print(f"seed {seed}: fine-tuned", flush=True)
        runs = [(seed, size) for size in sizes for seed in seeds]
        points = []
        for done, (key, made) in enumerate(zip(runs, pool.map(
                lambda key: one_reward_model(cfg, *key, whole=key[1] == max(sizes)), runs)), start=1):
            points += made
            print(f"seed {key[0]}, {key[1]} comparisons: {done} of {len(runs)} done", flush=True)
    finally:  # after Ctrl-C or an error, begin no other run
        pool.shutdown(wait=False, cancel_futures=True)
    write_csv(Path(cfg.out) / "study.csv", points)
    table = fits(points)
    write_csv(Path(cfg.out) / "fits.csv", table)
    for row in table:
        print(" | ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in row.items()))
    print("\nover the seeds:", *spread(table), sep="\n")
    print(f"wrote {Path(cfg.out) / 'study.csv'} and {Path(cfg.out) / 'fits.csv'}")
    plot(points, Path(cfg.out) / "study.png")


if __name__ == "__main__":
    run(main, StudyConfig)
