"""Fill in the tables of README.md and docs/*.md that come from recorded files.

    python -m rlhf.tools.fill              # after recording results again
    python -m rlhf.tools.fill --check      # changes nothing; fails if a table is stale

A table stands between two marker lines, and what is between them is replaced:

    <!-- table: NAME -->
    <!-- end -->

TABLES has the names. The files are those of docs/results/ and docs/ablations/. Each number has three significant digits
and is the mean of the seeds beside it. A dash stands for what was not run.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame, Series, concat, isna, read_csv

from rlhf.support.cli import InputError, arg, run

ROOT, SEEDS, PPO = Path(__file__).resolve().parents[2], (0, 1, 2), "optimality objective gold kl_ref"
MARKED = re.compile("^<!-- table: (.*) -->\n(?:(?!<!-- ).*\n)*(<!-- end -->$)?", re.MULTILINE)


@dataclass(frozen=True)
class FillConfig:
    """Fill in the tables of README.md and docs/*.md that come from recorded CSVs."""

    check: bool = arg(False, "change nothing; fail if a table is stale")


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def cells(numbers: Series) -> list[str]:
    """Two cells: the mean, a dash if a seed is missing; and the number of each seed."""
    texts = ["–" if isna(x) else f"{x:#.3g}".rstrip(".") for x in (numbers.mean(skipna=False), *numbers)]
    return [texts[0], ", ".join(texts[1:])]


def table(frame: DataFrame, keys: list[str], columns: list[str]) -> list[str]:
    """One line for each value of the keys, two cells for each column."""
    groups = [(key, group.set_index("seed").reindex(SEEDS)) for key, group in frame.groupby(keys, sort=False)]
    rows = [[*map(str, key), *(cell for x in columns for cell in cells(group[x]))] for key, group in groups]
    return markdown([*keys, *(cell for x in columns for cell in (x, "seeds 0, 1, 2"))], rows)


def load(root: Path, run: str, file: str) -> DataFrame:
    """docs/results/RUN/FILE.csv of all seeds, one below the other; * in RUN stands for the seed."""
    files = {seed: root / "docs/results" / run.replace("*", str(seed)) / f"{file}.csv" for seed in SEEDS}
    return concat(read_csv(path).assign(seed=s, run=run.removeprefix("methods_seed*/")) for s, path in files.items())


def before_after(root: Path) -> list[str]:
    """The first three rows of seed 0's ppo_samples.csv."""
    frame = read_csv(root / "docs/results/seed0/ppo_samples.csv", keep_default_na=False)
    return markdown(["prompt", "before PPO (gold)", "after PPO (gold)"], [
        [" ".join(re.sub("Human:|Assistant:", "", row.Prompt).split()), f"{row.Before} ({row.gold_before:+g})",
         f"{row.After} ({row.gold_after:+g})"] for row in frame.head(3).itertuples()])


def stages(root: Path, runs: str = "seed*") -> list[str]:
    """The three stages with default flags: each quantity at the start, if it has one, and at the end."""
    sft, reward, end = (load(root, runs, x).groupby("seed") for x in ("sft", "reward", "reward_evaluation"))
    policies = load(root, runs, "evaluation").pivot(index="seed", columns="policy")
    lines = [("SFT: loss (start: training, end: held out)", sft["loss"].first(), sft["valid"].last()),
             ("reward model: accuracy (end: held out)", reward["accuracy"].first(), end["accuracy"].last())]
    lines += [(f"reward model: {x}_accuracy", None, end[f"{x}_accuracy"].last()) for x in ("swapped", "judge", "bayes")]
    names = ("score", "gold", "kl_ref", "win_rate_vs_sft", "eos_rate", "optimality")
    lines += [(f"PPO: {x}", policies[x, "sft"], policies[x, "ppo"]) for x in names]
    lines += [(f"{policy}: {x}", None, policies[x, policy]) for policy in ("best_of_n", "optimum") for x in names[:3]]
    return markdown(["", "at the start, mean", "at the end, mean", "seeds 0, 1, 2"], [
        [name, "" if first is None else cells(first)[0], *cells(last)] for name, first, last in lines])


def quoted(first: int, last: int | None, keep: str = "", file: str = "walk.txt"):
    """Blocks first to last - 1 of a recorded output in docs/results/seed0, as code; only the lines that match keep."""
    return lambda root: [f"    {line}".rstrip() for line in "\n\n".join((root / "docs/results/seed0" / file).read_text(
        encoding="utf-8").split("\n\n")[first:last]).splitlines() if re.match(keep, line)]


def of_runs(runs: str, columns: str, file: str = "evaluation", where: str = "policy == 'ppo'"):
    """The table of several runs in docs/results, one line each."""
    return lambda root: table(concat(load(root, x, file) for x in runs.split()).query(where), ["run"], columns.split())


def of_file(path: str, keys: str, columns: str, where: str = "seed >= 0"):
    """The table of those rows of one CSV for which a pandas query holds."""
    return lambda root: table(read_csv(root / path).query(where, engine="python"), keys.split(), columns.split())


METHODS = [f"methods_seed*/{x}" for x in "gae rloo grpo reinforce rloo_320 grpo_320 dpo dpo_half_beta".split()]
LOOP = "loop_seed*/1 loop_seed*/2 loop_seed*/3 loop_half_seed*/2 loop_half_seed*/3 loop_seed*/once earlier_seed*"
FITS, WORLD = ("docs/results/study/fits.csv", "method comparisons"), ("docs/ablations/tuning_world.csv", "run flags")
TABLES = {
    "before_after": before_after, "stages": stages, "loop": of_runs(LOOP, "gold win_rate_vs_sft kl_ref score"),
    **{f"alternatives_{x.split()[0]}": of_runs(" ".join(METHODS), x, where="policy in ('ppo', 'dpo')")
       for x in ("objective optimality gold", "kl_ref win_rate_vs_sft distinct")},
    "best_of_n": of_runs("methods_seed*/gae", "objective optimality gold kl_ref", where="policy == 'best_of_n'"),
    "walk_before": quoted(0, 2), "walk_after": quoted(2, 4),
    "walk_excerpt": quoted(1, 2, keep="slot|  (18|21|28|38)| sum"),
    "last_lines": quoted(0, None, file="last_lines.txt"),
    "value_network": of_runs("earlier_seed* value_seed* shared_seed*", PPO),
    "lora": of_runs("earlier_seed* lora_seed*", PPO), "earlier_stages": lambda root: stages(root, "earlier_seed*"),
    "loop_accuracy": of_runs(LOOP, "accuracy", "reward_evaluation", "seed >= 0"),
    "shuffled_prompts": of_runs("blind_seed* earlier_seed*", "accuracy", "reward_evaluation", "seed >= 0"),
    "kl_coefs": of_file("docs/results/study/evaluations.csv", "kl_coef policy", "gold score kl_ref",
                        "comparisons == 12000 and policy in ('ppo', 'best_of_n')"),
    "fits": of_file(*FITS, "alpha beta"), "peaks": of_file(*FITS, "highest_gold at_sqrt_kl last_gold"),
    "ablations": of_file(*WORLD, PPO, "not flags.str.contains('--warmup|--lora')"),
    "ablations_earlier": of_file(*WORLD, "gold objective optimality", "flags.str.contains('--warmup')"),
}


def filled(path: Path, root: Path) -> str:
    """The text of a file with its tables filled in."""
    def replacement(match: re.Match) -> str:
        if match[1] not in TABLES or not match[2]:
            raise InputError(f"{path}: <!-- table: {match[1]} --> without <!-- end -->, or none of {', '.join(TABLES)}")
        return "\n".join([f"<!-- table: {match[1]} -->", *TABLES[match[1]](root), match[2]])

    return MARKED.sub(replacement, path.read_text(encoding="utf-8"))


def main(cfg: FillConfig, root: Path = ROOT) -> None:
    new = {path: filled(path, root) for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))}
    stale = [path for path in new if new[path] != path.read_text(encoding="utf-8")]
    if cfg.check and stale:
        raise InputError(f"{', '.join(map(str, stale))}: stale table; run python -m rlhf.tools.fill")
    for path in stale:
        path.write_text(new[path], encoding="utf-8", newline="\n")
        print(f"filled in {path}")


if __name__ == "__main__":
    run(main, FillConfig)
