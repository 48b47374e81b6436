"""Fill in the tables of README.md and docs/*.md that come from recorded files.

Run it from the root of the repository:

    python -m docs.experiments.fill              # after recording results again
    python -m docs.experiments.fill --check      # changes nothing; fails if a table is stale

A table stands between two marker lines, and what is between them is replaced:

    <!-- table: NAME -->
    <!-- end -->

TABLES has the names. The files are those of docs/results/ and docs/ablations/. A number has three
significant digits and is the mean of seeds 0, 1 and 2, unless its column says otherwise.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pandas import DataFrame, Series, concat, isna, read_csv

from rlhf.run.errors import InputError
from rlhf.run.flags import arg
from rlhf.run.judge import load_judge
from rlhf.run.program import run

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
BY_SEED = "seeds 0, 1, 2"
MARKED = re.compile("^<!-- table: (.*) -->\n(?:(?!<!-- ).*\n)*(<!-- end -->$)?", re.MULTILINE)


@dataclass(frozen=True)
class FillConfig:
    """Fill in the tables of README.md and docs/*.md that come from recorded files."""

    check: bool = arg(False, "change nothing; fail if a table is stale")


# ---- parts of a table ----


def number(x: float) -> str:
    """Three significant digits, or a dash for a missing number."""
    return "–" if isna(x) else f"{x:#.3g}".rstrip(".")


def mean(numbers: Series) -> str:
    """The mean, or a dash if one is missing."""
    return number(numbers.mean(skipna=False))


def means(rows: DataFrame, columns: list[str]) -> list[str]:
    """The mean of each column."""
    return [mean(rows[name]) for name in columns]


def each(numbers: Series) -> str:
    """One cell with the number of each seed."""
    return ", ".join(number(x) for x in numbers)


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def load(root: Path, run: str, file: str) -> DataFrame:
    """docs/results/RUN/FILE.csv of all seeds, one below the other; * in RUN stands for the seed."""
    frames = []
    for seed in SEEDS:
        folder = root / "docs/results" / run.replace("*", str(seed))
        frame = read_csv(folder / f"{file}.csv")
        frames.append(frame.assign(seed=seed))
    return concat(frames, ignore_index=True)


# ---- README.md ----


def before_after(root: Path) -> list[str]:
    """The first three rows of seed 0's ppo_samples.csv."""
    frame = read_csv(root / "docs/results/seed0/ppo_samples.csv", keep_default_na=False)
    rows = []
    for row in frame.head(3).itertuples():
        question = re.sub("Human:|Assistant:", "", row.Prompt)
        before = f"{row.Before} ({row.gold_before:+g})"
        after = f"{row.After} ({row.gold_after:+g})"
        rows.append([" ".join(question.split()), before, after])
    return markdown(["prompt", "before PPO (gold)", "after PPO (gold)"], rows)


def quoted(root: Path, file: str, first: int, last: int | None) -> list[str]:
    """Blocks first to last - 1 of a text file in docs/results/seed0, as code.

    Blocks are separated by empty lines.
    """
    text = (root / "docs/results/seed0" / file).read_text(encoding="utf-8")
    blocks = text.split("\n\n")[first:last]
    return [f"    {line}".rstrip() for line in "\n\n".join(blocks).splitlines()]


# ---- docs/results.md ----


def stages(root: Path) -> list[str]:
    """The three stages with default flags: each quantity at the start, if it has one, and at the
    end."""
    sft = load(root, "seed*", "sft").groupby("seed")
    reward = load(root, "seed*", "reward").groupby("seed")
    reward_end = load(root, "seed*", "reward_evaluation").groupby("seed").last()
    policies = load(root, "seed*", "evaluation").pivot(index="seed", columns="policy")
    rows = [
        ["SFT: loss, held out", mean(sft["loss"].first()), *mean_and_each(sft["valid"].last())],
        [
            "reward model: accuracy, held out",
            mean(reward["accuracy"].first()),
            *mean_and_each(reward_end["accuracy"]),
        ],
    ]
    for name in ("judge_accuracy", "swapped_accuracy"):
        rows.append([f"reward model: {name}", "", *mean_and_each(reward_end[name])])
    for name in ("score", "gold", "kl_ref", "win_rate_vs_sft", "optimality"):
        start, end = policies[name, "sft"], policies[name, "ppo"]
        rows.append([f"PPO: {name}", mean(start), *mean_and_each(end)])
    return markdown(["", "start", "end", BY_SEED], rows)


def mean_and_each(numbers: Series) -> list[str]:
    return [mean(numbers), each(numbers)]


def policies(root: Path) -> list[str]:
    """Each row of evaluation.csv."""
    columns = ["score", "gold", "kl_ref", "objective", "optimality", "optimality_se"]
    rows = []
    for policy, group in load(root, "seed*", "evaluation").groupby("policy", sort=False):
        rows.append([policy, *means(group, columns)])
    return markdown(["policy", *columns], rows)


def advice_on(judge: ModuleType, topic: str) -> set[str]:
    what_to_do, what_to_avoid = judge.TOPICS[topic]
    return {*what_to_do, *what_to_avoid}


def found_in(judge: ModuleType, prompt: str, response: str) -> dict[str, bool]:
    """What a response contains, by the phrases that judge.py knows."""
    sentences = set(judge.split_sentences(response))
    advice = set()
    for topic in judge.TOPICS:
        advice |= advice_on(judge, topic)
    fitting = advice_on(judge, judge.topic_of(prompt))
    kind = set(judge.KIND)
    rude = set(judge.RUDE)
    rambling = set(judge.RAMBLING)
    found = {}
    found["the maximal gold, 3"] = judge.score_one(prompt, response) == judge.MAX_SCORE
    found["advice on another topic"] = bool(sentences & advice - fitting)
    found["no kind sentence"] = not sentences & kind
    found["a rude sentence"] = bool(sentences & rude)
    found["small talk"] = bool(sentences & rambling)
    found["a broken or invented sentence"] = bool(sentences - advice - kind - rude - rambling)
    return found


def samples(root: Path) -> list[str]:
    """Shares of the responses in ppo_samples.csv, before and after PPO."""
    judge = load_judge(str(root / "data/tiny_assistant"))
    shares = []
    for seed in SEEDS:
        path = root / f"docs/results/seed{seed}/ppo_samples.csv"
        frame = read_csv(path, keep_default_na=False)
        for side in ("Before", "After"):
            pairs = zip(frame["Prompt"], frame[side])
            share = DataFrame([found_in(judge, *pair) for pair in pairs]).mean()
            share["different responses"] = frame[side].nunique() / len(frame)
            shares.append(share.rename(side))
    average = concat(shares, axis=1).T.groupby(level=0).mean()
    rows = []
    for name in average:
        before, after = average[name]["Before"], average[name]["After"]
        rows.append([name, f"{before:.2f}", f"{after:.2f}"])
    return markdown(["share of responses", "SFT", "PPO"], rows)


DEFAULT = "default: separate network, 112 steps"
ABLATIONS = {  # what the page calls it: the run in tuning_world.csv
    "k3 in the reward instead of k1": "k3 in the reward in place of k1",
    "constant learning rate": "rate not decayed",
    "one inner epoch": "one inner epoch",
    "value head on the policy, 150 steps": "shared trunk, 150 steps (the default before)",
    "higher learning rate": "higher rate",
    "clip range 0.4": "wider clip",
    "no whitening": "advantages not whitened",
    "lambda 1": "lambda 1",
}
MORE_STEPS = {  # what the page calls it: commit, flags, flags of the run that it is compared with
    "twice the steps": ("ce30cb6", "--lr 4e-4 --warmup 20 --steps 448", "--lr 4e-4 --warmup 20 "),
    "four times the steps": ("dbe630a", "--steps 896", ""),
}


def changes(runs: DataFrame, base: DataFrame) -> list[str]:
    """Mean differences to the base, paired by seed, and in how many seeds optimality is lower."""
    columns = ["objective", "optimality", "gold"]
    difference = runs.set_index("seed")[columns] - base.set_index("seed")[columns]
    objective, optimality, gold = difference.mean()
    lower = (difference["optimality"] < 0).sum()
    seeds = f"{lower} of {len(difference)}"
    return [f"{objective:+.3f}", f"{optimality:+.3f}", f"{gold:+.2f}", seeds]


def ablations(root: Path) -> list[str]:
    """One change at a time, on the tuning set."""
    runs = read_csv(root / "docs/ablations/tuning_world.csv")
    earlier = runs["flags"].str.contains("--warmup")  # with another default, and some names twice
    runs = runs[~earlier].set_index("run")
    rows = []
    for name, run_name in ABLATIONS.items():
        rows.append([name, *changes(runs.loc[run_name], runs.loc[DEFAULT])])
    single = read_csv(root / "docs/ablations/present_defaults.csv").assign(seed=0)
    single = single.fillna({"flags": ""}).set_index(["code", "flags"]).sort_index()
    for name, (commit, flags, without) in MORE_STEPS.items():
        changed = single.loc[[(commit, flags)]]
        base = single.loc[[(commit, without)]]
        rows.append([name, *changes(changed, base)])
    return markdown(["change", "objective", "optimality", "gold", "optimality lower in"], rows)


# ---- docs/alternatives.md ----

METHODS = {  # what the page calls it: the folder
    "PPO": "gae",
    "RLOO": "rloo",
    "GRPO": "grpo",
    "REINFORCE": "reinforce",
    "RLOO, 320 steps": "rloo_320",
    "GRPO, 320 steps": "grpo_320",
    "DPO": "dpo",
}
SHOWN = ["gold", "kl_ref"]


def method_cells(rows: DataFrame) -> list[str]:
    """Of one method: objective; optimality, that of each seed, and the standard error of one; the
    columns SHOWN."""
    optimality = mean_and_each(rows["optimality"])
    return [mean(rows["objective"]), *optimality, *means(rows, ["optimality_se", *SHOWN])]


def methods(root: Path) -> list[str]:
    """The final evaluation of each method on the bundled set."""
    table = []
    for name, folder in METHODS.items():
        evaluation = load(root, f"methods_seed*/{folder}", "evaluation")
        trained = evaluation[evaluation["policy"].isin(["ppo", "dpo"])]
        table.append([name, *method_cells(trained)])
    evaluation = load(root, "methods_seed*/gae", "evaluation")
    best = evaluation[evaluation["policy"] == "best_of_n"]
    table.append(["best-of-n", *method_cells(best)])
    header = ["method", "objective", "optimality", BY_SEED, "standard error", *SHOWN]
    return markdown(header, table)


def movie_methods(root: Path) -> list[str]:
    """The same on data/movie_ratings, one run each.

    J* is that of PPO's run, J_sft each run's own.
    """
    folder = root / "docs/results/movie_methods"
    ppo = read_csv(folder / "gae/evaluation.csv").set_index("policy")
    optimum = ppo.loc["optimum", "objective"]
    table = []
    for name in ("PPO", "RLOO", "GRPO", "REINFORCE", "DPO"):
        evaluation = read_csv(folder / METHODS[name] / "evaluation.csv").set_index("policy")
        sft, trained = evaluation.iloc[0], evaluation.iloc[1]
        optimality = (trained["objective"] - sft["objective"]) / (optimum - sft["objective"])
        metrics = read_csv(folder / METHODS[name] / f"{trained.name}.csv")
        cells = [number(trained["objective"]), number(optimality)]
        cells += [number(trained[column]) for column in SHOWN]
        seconds = metrics["seconds"].iloc[-1]
        table.append([name, *cells, f"{seconds:.0f}"])
    return markdown(["method", "objective", "optimality", *SHOWN, "seconds"], table)


# ---- docs/overoptimisation.md ----


def kl_coefs(root: Path) -> list[str]:
    """PPO's final evaluation with each kl_coef, against the largest reward models."""
    frame = read_csv(root / "docs/results/study/evaluations.csv")
    frame = frame[(frame["comparisons"] == 12000) & (frame["policy"] == "ppo")]
    columns = ["score", "gold", "kl_ref", "win_rate_vs_sft"]
    rows = []
    for kl_coef, group in frame.groupby("kl_coef"):
        rows.append([f"{kl_coef:g}", *means(group, columns)])
    return markdown(["`--kl-coef`", *columns], rows)


def peaks(root: Path) -> list[str]:
    """The highest gold without a KL penalty, and the last."""
    frame = read_csv(root / "docs/results/study/fits.csv")
    rows = []
    for comparisons, group in frame.groupby("comparisons"):
        cells = []
        for method in ("ppo", "best_of_n"):
            runs = group[group["method"] == method]
            cells += [mean(runs["highest_gold"]), mean(runs["last_gold"])]
        rows.append([f"{comparisons:,}", *cells])
    header = ["comparisons", "PPO, highest", "PPO, last", "best-of-n, highest", "best-of-n, last"]
    return markdown(header, rows)


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "before_after": before_after,
    "last_lines": lambda root: quoted(root, "last_lines.txt", 0, None),
    "walk_before": lambda root: quoted(root, "walk.txt", 0, 2),
    "walk_after": lambda root: quoted(root, "walk.txt", 2, 4),
    "stages": stages,
    "policies": policies,
    "samples": samples,
    "ablations": ablations,
    "methods": methods,
    "movie_methods": movie_methods,
    "kl_coefs": kl_coefs,
    "peaks": peaks,
}


def filled(path: Path, root: Path) -> str:
    """The text of a file with its tables filled in.

    Raises InputError for an unknown or unclosed table.
    """

    def replacement(match: re.Match) -> str:
        name, end = match.groups()
        if name not in TABLES or not end:
            names = ", ".join(TABLES)
            marker = f"<!-- table: {name} -->"
            raise InputError(f"{path}: {marker} without <!-- end -->, or none of {names}")
        return "\n".join([f"<!-- table: {name} -->", *TABLES[name](root), end])

    return MARKED.sub(replacement, path.read_text(encoding="utf-8"))


def main(cfg: FillConfig, root: Path = ROOT) -> None:
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    new = {path: filled(path, root) for path in pages}
    stale = [path for path in pages if new[path] != path.read_text(encoding="utf-8")]
    if cfg.check and stale:
        names = ", ".join(map(str, stale))
        raise InputError(f"{names}: stale table; run python -m docs.experiments.fill")
    for path in stale:
        path.write_text(new[path], encoding="utf-8", newline="\n")
        print(f"filled in {path}")


if __name__ == "__main__":
    run(main, FillConfig)
