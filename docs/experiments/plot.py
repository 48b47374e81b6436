"""Draw the figures of README.md and docs/*.md from recorded files.

Run it from the root of the repository:

    python -m docs.experiments.plot              # after recording results again

FIGURES has the names. The files are those of docs/results/. Needs matplotlib: pip install
matplotlib. The curves of a run of your own are in its report (python -m rlhf.tools.report).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame, concat, read_csv

from docs.experiments.fill import METHODS, ROOT, load
from rlhf.run.errors import InputError
from rlhf.run.files import replacing
from rlhf.run.flags import arg
from rlhf.run.program import run

# Colours of Okabe and Ito, somewhat darker, which the colour-blind tell apart.
INK, SOFT, GRID = "#1c2127", "#59636e", "#d5dbe1"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#b25600", "#007a59", "#a3457f"
STYLE = {
    "font.size": 9,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,  # inches
    "figure.constrained_layout.w_pad": 0.08,
    "figure.dpi": 150,
    "grid.color": GRID,
    "lines.solid_capstyle": "round",
    "xtick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.color": GRID,
    "ytick.labelcolor": SOFT,
    "ytick.left": False,
}
# A line's pattern: (offset, lengths of dashes and gaps).
DOTTED, DASHED, DASH_DOTTED = (0, (1, 1.5)), (0, (5, 2)), (0, (7, 2, 1.5, 2))
WIDTH = 8.0  # inches
POINTS = {"textcoords": "offset points", "color": SOFT}  # of a text beside a dot
# Student's t for a 95 % interval of a mean over three seeds (two degrees of freedom).
T_95 = 4.303


@dataclass(frozen=True)
class PlotConfig:
    """Draw the figures of README.md and docs/*.md from recorded files."""

    out: str = arg("docs", "folder for the figures")


# ---- parts of a figure ----


def load_pyplot():
    """matplotlib.pyplot in the style of the figures, for files. Raises InputError if matplotlib is
    not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    return pyplot


def number(x: float, decimals: int = 2) -> str:
    """So many decimals, with a true minus sign."""
    return f"{x:.{decimals}f}".replace("-", "−")


def smooth(frame: DataFrame, side: int) -> DataFrame:
    """Moving average over each row and so many rows on each side.

    Near the start it covers fewer rows, as many on each side, so the curve begins where the run
    does.
    """
    rows = []
    for i in range(len(frame)):
        before = min(side, i)
        rows.append(frame.iloc[i - before : i + before + 1].mean())
    return DataFrame(rows).set_index(frame.index)


def explain(ax, title: str, sentence: str) -> None:
    """Write a title, and below it a sentence on what to look for."""
    ax.set_title(title, loc="left", weight="bold", size=10, color=INK, pad=25)
    place = {"xy": (0, 1), "xytext": (0, 12), "textcoords": "offset points"}
    ax.annotate(sentence, xycoords="axes fraction", color=SOFT, **place)


def move_apart(places: list[float], gap: float) -> list[float]:
    """The places, in the same order, with those closer than gap pushed apart, each by as much."""
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for _ in range(100):
        for low, high in zip(order, order[1:]):
            overlap = max(0, gap - (moved[high] - moved[low]))
            moved[low] -= overlap / 2
            moved[high] += overlap / 2
    return moved


def label_ends(ax, labels: list[tuple[str, float, str]], gap: float = 0.09) -> None:
    """Write labels at the right of a panel, each at its height unless they would overlap.

    Args: labels: (text, height in units of the y-axis, colour); gap: the least distance between
        two, as a part of the panel's height.
    """
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)  # fixed, so that the labels stay at their lines
    heights = [(y - low) / (high - low) for _, y, _ in labels]
    for (text, _, colour), height in zip(labels, move_apart(heights, gap)):
        ax.text(1.03, height, text, color=colour, va="center", transform=ax.transAxes)


def add_note(figure, note: str) -> None:
    """Write what holds for all panels below them."""
    figure.supxlabel(note, x=0.01, ha="left", size=9, color=SOFT)


def draw_dots(ax, x, y, colour: str, size: float = 2.5) -> None:
    """Draw single measurements, pale."""
    ax.plot(x, y, "o", color=colour, alpha=0.25, markeredgewidth=0, markersize=size)


def draw_circle(ax, x, y, colour: str) -> None:
    """Draw numbers that stand out, also on the edge of a panel."""
    style = {"markeredgecolor": "white", "markersize": 8, "clip_on": False, "zorder": 4}
    ax.plot(x, y, "o", color=colour, **style)


# ---- a training run, over its steps ----

# column: title, sentence
PANELS = {
    "score": ("Score", "The reward model's number, which PPO raises."),
    "gold": ("Gold", "The judge's number rises too. No training step sees it."),
    "kl_ref": ("KL to the SFT model, nats per response", "The KL penalty keeps PPO near it."),
    "objective": ("Objective: score − {} × KL", "PPO maximises it. No policy exceeds the optimum."),
}
# row of evaluation.csv: name, colour, dashes
LINES = {
    "sft": ("SFT", ORANGE, DOTTED),
    "best_of_n": ("best-of-n", GREEN, DASHED),
    "optimum": ("optimum", PURPLE, DASH_DOTTED),
}


def training(metrics: DataFrame, evaluation: DataFrame, seeds: str):
    """The figure of PPO runs that differ in their seed only, their mean as one curve.

    Args: metrics, evaluation: the rows of all runs' ppo.csv and evaluation.csv; seeds: how the note
        calls the runs.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(WIDTH, 6.2), layout="constrained")
    curves = smooth(metrics.groupby("step").mean(), side=7)
    heldout = evaluation.groupby("policy").mean()
    for ax, (name, (title, sentence)) in zip(axes.flat, PANELS.items()):
        explain(ax, title.format(metrics["kl_coef"].iloc[0]), sentence)
        draw_dots(ax, metrics["step"], metrics[name], BLUE)
        ax.plot(curves.index, curves[name], color=BLUE, linewidth=2)
        ax.set(xlabel="PPO step", xlim=(0, curves.index[-1]))
        ax.locator_params(axis="y", nbins=5)
        draw_heldout(ax, heldout[name])
    add_note(
        figure,
        f"Dots: single steps of {seeds}. Curve: their moving average. "
        "Circle and straight lines: means over held-out prompts.",
    )
    return figure


def draw_heldout(ax, means) -> None:
    """Draw the other policies as lines and PPO as a circle at the last step, and label them.

    Args: means: {row of evaluation.csv: its mean}.
    """
    right = ax.get_xlim()[1]
    draw_circle(ax, right, means["ppo"], BLUE)
    labels = [(f"PPO {number(means['ppo'])}", means["ppo"], BLUE)]
    for policy, (name, colour, dashes) in LINES.items():
        ax.axhline(means[policy], color=colour, linestyle=dashes, linewidth=1.5)
        labels.append((f"{name} {number(means[policy])}", means[policy], colour))
    label_ends(ax, labels)


def learning_curve(root: Path):
    """README.md: PPO on the bundled set, three seeds."""
    return training(load(root, "seed*", "ppo"), load(root, "seed*", "evaluation"), "three seeds")


def real_language(root: Path):
    """docs/models.md: PPO on Gemma and people's ratings, one run."""
    folder = root / "docs/results/gemma_movie"
    return training(read_csv(folder / "ppo.csv"), read_csv(folder / "evaluation.csv"), "one run")


# ---- over-optimisation ----


def overoptimisation(root: Path):
    """docs/overoptimisation.md: score and gold against the KL, without a KL penalty."""
    return draw_study(read_csv(root / "docs/results/study/study.csv"))


def draw_study(points: DataFrame):
    """The figure of a study.csv: a panel for each number of comparisons, from many to few.

    The x-axis is the square root of the KL, with the KL itself at its ticks.
    """
    pyplot = load_pyplot()
    points = points[points["kl_coef"].fillna(0) == 0]
    points = points.assign(root=points["kl_ref"].clip(lower=0) ** 0.5)
    sizes = sorted(set(points["comparisons"]), reverse=True)
    values = points[["score", "gold"]]
    shape = {"figsize": (WIDTH, 1 + 2.3 * len(sizes)), "layout": "constrained"}
    figure, axes = pyplot.subplots(len(sizes), sharex=True, sharey=True, squeeze=False, **shape)
    axes[0][0].set_ylim(values.min().min() - 0.2, values.max().max() + 0.2)
    for ax, size in zip(axes.flat, sizes):
        chosen = points[points["comparisons"] == size]
        draw_size(ax, chosen.set_index("seed"), f"{size:,} comparisons")
    axes[0][0].text(2.3, 2.7, "best-of-n's gold", color=GREEN, va="center")
    largest = points["root"].max()
    roots = [0, 1, *range(2, 1 + int(largest), 2)]
    axes[-1][0].set_xticks(roots, [root**2 for root in roots])
    axes[-1][0].set(xlabel="KL to the SFT model, nats per response", xlim=(-0.2, largest + 0.2))
    add_note(
        figure,
        "Dots: steps of PPO, without a KL penalty. Curves: moving averages, one per seed. "
        "Circles: the highest gold of each seed.",
    )
    return figure


def draw_size(ax, points: DataFrame, name: str) -> None:
    """Draw score and gold of one number of comparisons, and mark the highest gold of each seed.

    Args: points: rows of study.csv with the seeds as index and a column root.
    """
    ppo = points[points["method"] == "ppo"]
    best_of_n = points[points["method"] == "best_of_n"]
    peaks = ppo.sort_values("gold").groupby("seed").tail(1)
    last = ppo.groupby("seed").tail(1)
    labels = []
    for column, colour in (("score", BLUE), ("gold", ORANGE)):
        draw_dots(ax, ppo["root"], ppo[column], colour)
        for _, run_of_seed in ppo.groupby("seed"):
            curve = smooth(run_of_seed[["root", column]], side=4)
            ax.plot(curve["root"], curve[column], color=colour, linewidth=1.5)
        end = last[column].mean()
        labels.append((f"PPO's {column}", end, colour))
    for _, curve in best_of_n.groupby("seed"):
        ax.plot(curve["root"], curve["gold"], color=GREEN, linestyle=DASHED, linewidth=1.5)
    draw_circle(ax, peaks["root"], peaks["gold"], ORANGE)
    sft = best_of_n.loc[best_of_n["step_or_n"] == 1, "gold"].mean()
    ax.axhline(sft, color=ORANGE, linestyle=DOTTED, linewidth=1.5)
    labels.append(("SFT's gold", sft, ORANGE))
    highest = number(peaks["gold"].mean())
    lowest = number(last["gold"].mean())
    explain(ax, name, f"PPO's gold peaks at {highest} and ends at {lowest} (means of the seeds).")
    label_ends(ax, labels)


# ---- the alternatives ----

COLOURS = {"PPO": BLUE, "best-of-n": GREEN}


def alternatives(root: Path):
    """docs/alternatives.md: each method's optimality, and its objective beside PPO's."""
    pyplot = load_pyplot()
    table = compare_methods(root, METHODS)
    near = table[~table["method"].isin(["PPO", "DPO"])]
    dpo = table.loc[table["method"] == "DPO", "difference"].mean()
    figure, axes = pyplot.subplots(2, figsize=(WIDTH, 6.2), layout="constrained")
    explain(axes[0], "Optimality", "All methods but DPO come close to the best policy.")
    draw_rule(axes[0], 0, "SFT", ORANGE, DOTTED)
    draw_rule(axes[0], 1, "optimum", PURPLE, DASH_DOTTED)
    draw_methods(axes[0], table, "optimality")
    sentence = f"Left of the line is worse than PPO. DPO, at {number(dpo, 3)}, is left out."
    explain(axes[1], "Objective minus that of PPO with the same seed", sentence)
    draw_rule(axes[1], 0, "PPO", BLUE, "-")
    draw_intervals(axes[1], near)
    draw_methods(axes[1], near, "difference")
    add_note(figure, "Pale dots: seeds 0, 1 and 2. Circles: their mean. Bars: its 95 % interval.")
    return figure


def draw_rule(ax, x: float, name: str, colour: str, dashes) -> None:
    """Draw an upright line with its name at the top."""
    ax.axvline(x, color=colour, linestyle=dashes, linewidth=1.5)
    place = {"xytext": (4, -2), "textcoords": "offset points", "va": "top"}
    ax.annotate(name, (x, 1), xycoords=ax.get_xaxis_transform(), color=colour, **place)


def compare_methods(root: Path, methods: dict[str, str]) -> DataFrame:
    """Rows of method, seed, optimality, objective and difference (of the objective to that of PPO
    with the same seed).

    Args: methods: as METHODS.
    """
    parts = []
    for method, folder in methods.items():
        evaluation = load(root, f"methods_seed*/{folder}", "evaluation")
        trained = evaluation[evaluation["policy"].isin(["ppo", "dpo"])]
        parts.append(trained.assign(method=method))
        if method == "PPO":
            best_of_n = evaluation[evaluation["policy"] == "best_of_n"]
            parts.append(best_of_n.assign(method="best-of-n"))
    table = concat(parts)
    ppo = table[table["method"] == "PPO"].set_index("seed")["objective"]
    table["difference"] = table["objective"] - table["seed"].map(ppo)
    return table


def draw_methods(ax, table: DataFrame, column: str) -> None:
    """Draw a row for each method, the best at the top: its seeds and their mean."""
    means = table.groupby("method")[column].mean().sort_values(ascending=False)
    labels = []
    for place, (method, mean) in enumerate(means.items()):
        values = table.loc[table["method"] == method, column]
        colour = COLOURS.get(method, INK)
        draw_dots(ax, values, [place - 0.3] * len(values), colour, size=5)
        draw_circle(ax, mean, place, colour)
        labels.append((number(mean, 3), place, colour))
    ax.set_yticks(range(len(means)), means.index)
    ax.set_ylim(len(means) - 0.5, -1.2)
    label_ends(ax, labels)


def draw_intervals(ax, table: DataFrame) -> None:
    """Draw the 95 % interval of each method's mean difference, in the rows of draw_methods."""
    differences = table.groupby("method")["difference"]
    means = differences.mean().sort_values(ascending=False)
    half = T_95 * differences.sem()
    for place, (method, mean) in enumerate(means.items()):
        ends = [mean - half[method], mean + half[method]]
        ax.plot(ends, [place, place], color=COLOURS.get(method, INK), linewidth=2)


# ---- the frontier of HH-RLHF ----

FRONTIER_COLOURS = [SOFT, ORANGE, BLUE, GREEN, PURPLE]


def less_toxic(root: Path):
    """docs/notebooks.md: what less offensive text costs, over the weight of the second reward."""
    return draw_frontier(read_csv(root / "docs/results/hh_rlhf/benign/frontier.csv"))


def draw_frontier(points: DataFrame):
    """A panel for each price: refused questions, and alike responses.

    Args: points: rows of run (its name), step, refusals, distinct, offensive, chosen. Each run
        starts at the row of SFT, step 0.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, sharey=True, figsize=(WIDTH, 6.2), layout="constrained")
    sft = points[points["step"] == 0].iloc[0]
    prices = {
        "refusals": ("Offensive text and refusals", "benign questions refused, percent", "left"),
        "distinct": ("Offensive text and diversity", "different responses per prompt", "right"),
    }
    for ax, (column, (title, price, better)) in zip(axes, prices.items()):
        explain(ax, title, f"Mean probability of an offensive response. Low and {better} is good.")
        ax.set_xlabel(price)
        ax.axhline(sft["offensive"] / 2, color=INK, linestyle=DOTTED, linewidth=1)
        runs = points[points["step"] > 0].groupby("run", sort=False)
        for (name, steps), colour in zip(runs, FRONTIER_COLOURS):
            x = [sft[column], *steps[column]]
            y = [sft["offensive"], *steps["offensive"]]
            ax.plot(x, y, "o-", color=colour, linewidth=1.5, markersize=4, label=name)
            for _, point in steps[steps["chosen"] == 1].iterrows():
                draw_circle(ax, point[column], point["offensive"], colour)
        draw_circle(ax, sft[column], sft["offensive"], INK)
        ax.annotate("SFT", (sft[column], sft["offensive"]), xytext=(7, 5), **POINTS)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, labelcolor=SOFT)
    add_note(
        figure,
        "Small dots: checkpoints of a run, joined in the order of its steps. Large: SFT, and the "
        "chosen points, if any.\nDotted line: half of SFT's.",
    )
    return figure


# ---- the program ----

FIGURES: dict[str, Callable] = {
    "learning_curve": learning_curve,
    "real_language": real_language,
    "overoptimisation": overoptimisation,
    "alternatives": alternatives,
    "less_toxic": less_toxic,
}


def save(figure, path: Path) -> None:
    """Write a figure as PNG; an interrupted write leaves the old file."""
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png")
    print(f"wrote {path}")


def main(cfg: PlotConfig, root: Path = ROOT) -> None:
    for name, draw in FIGURES.items():
        save(draw(root), Path(cfg.out) / f"{name}.png")


if __name__ == "__main__":
    run(main, PlotConfig)
