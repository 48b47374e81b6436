"""The learning curve of PPO: score, gold, kl_ref, entropy, clip fraction and optimality over the
steps.

    python -m docs.experiments.plot runs                       # writes runs/learning_curve.png
    python -m docs.experiments.plot runs runs/seed1 runs/seed2 --out docs/learning_curve.png
    python -m docs.experiments.plot docs/results/methods_seed*/* --panels optimality,gold \\
        --out docs/alternatives.png

Reads ppo.csv in each folder. Several folders share the panels, and folders of the same name have
the same colour. Needs matplotlib: pip install matplotlib.

optimality is there if rlhf/tools/optimality.py has been run.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas

from rlhf.run.errors import InputError
from rlhf.run.files import replacing
from rlhf.run.flags import arg
from rlhf.run.program import lock_of_run, run

PANELS = {
    "score": "score (reward model)",
    "gold": "gold (judge)",
    "kl_ref": "KL to the reference, nats",
    "entropy": "entropy, nats per token",
    "clip_fraction": "clip fraction",
    "optimality": "optimality",
}
Metrics = dict[str, list[float]]  # columns of a ppo.csv


@dataclass(frozen=True)
class PlotConfig:
    """Draw the learning curve of one or more PPO runs."""

    runs: tuple[str, ...] = arg(("runs",), "folders that hold a ppo.csv", flag=False)
    panels: str = arg("", f"some of {','.join(PANELS)} (empty: all)")
    out: str = arg("", "the figure (empty: learning_curve.png in the first folder)")

    def __post_init__(self):
        if not set(self.panels.split(",")) <= {"", *PANELS}:
            raise ValueError(f"--panels {self.panels}: give some of {','.join(PANELS)}")

    def figure(self) -> Path:
        return Path(self.out or Path(self.runs[0]) / "learning_curve.png")

    def lock_file(self) -> Path | None:
        return lock_of_run(self.figure().parent)


def read_metrics(path: Path) -> Metrics:
    """The panels' columns of a ppo.csv; those without numbers, such as gold without a judge, are
    left out."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: run train_ppo.py first, or name another folder")
    frame = pandas.read_csv(path)
    frame["optimality"] = optimality_curve(frame, path.with_name("evaluation.csv"))
    metrics = {}
    for name in ("step", *PANELS):
        if name in frame and frame[name].notna().all():
            metrics[name] = frame[name].tolist()
    return metrics


def optimality_curve(metrics: pandas.DataFrame, evaluation: Path) -> pandas.Series | float:
    """Optimality over the steps of a run: (J - J_sft) / (J* - J_sft), where J is the mean objective
    of 15 steps.

    J is that of the prompts trained on; J_sft and J* are the held-out ones of evaluation.csv. NaN
    without a J* there.

    Args: metrics: ppo.csv; evaluation: the path of evaluation.csv.
    """
    if not evaluation.is_file():
        return math.nan
    J = pandas.read_csv(evaluation).set_index("policy")["objective"]
    if "optimum" not in J:
        return math.nan
    smoothed = metrics["objective"].rolling(15, center=True, min_periods=8).mean()
    return (smoothed - J["sft"]) / (J["optimum"] - J["sft"])


def load_pyplot():
    """matplotlib.pyplot, for figures that go to a file. Raises InputError if matplotlib is not
    installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the figure needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def choose_panels(panels: str, runs: dict[str, Metrics]) -> list[str]:
    """The panels that were asked for and that at least one run has numbers for."""
    asked = panels.split(",") if panels else PANELS
    names = []
    for name in PANELS:
        measured = any(name in metrics for metrics in runs.values())
        if name in asked and measured:
            names.append(name)
    return names


def choose_colours(folders: list[str]) -> dict[str, str]:
    """{name of a folder: its colour}, in the order of the folders."""
    colours = {}
    for folder in folders:
        colours.setdefault(Path(folder).name, f"C{len(colours)}")
    return colours


def draw_panel(ax, name: str, runs: dict[str, Metrics], colours: dict[str, str]) -> None:
    for folder, metrics in runs.items():
        if name in metrics:
            colour = colours[Path(folder).name]
            ax.plot(metrics["step"], metrics[name], colour, linewidth=1.2)
    ax.set(title=PANELS[name], xlabel="PPO step")
    ax.grid(alpha=0.3)


def main(cfg: PlotConfig) -> None:
    pyplot = load_pyplot()
    pyplot.rcParams["font.size"] = 8
    runs = {folder: read_metrics(Path(folder) / "ppo.csv") for folder in cfg.runs}
    names = choose_panels(cfg.panels, runs)
    colours = choose_colours(list(runs))
    size = (3.1 * len(names), 2.8)  # inches
    figure, axes = pyplot.subplots(1, len(names), figsize=size, squeeze=False, layout="tight")
    for ax, name in zip(axes[0], names):
        draw_panel(ax, name, runs, colours)
    lines = [pyplot.Line2D([], [], color=colour) for colour in colours.values()]
    axes[0][0].legend(lines, colours, fontsize=6)
    path = cfg.figure()
    with replacing(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main, PlotConfig)
