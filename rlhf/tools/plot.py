"""The learning curve of PPO: score, gold, kl_ref, entropy and clip fraction over the steps.

    python -m rlhf.tools.plot runs                       # writes runs/learning_curve.png
    python -m rlhf.tools.plot runs runs/seed1 runs/seed2 --out docs/learning_curve.png

Reads ppo.csv in each folder. Several folders share the panels. Needs matplotlib: pip install matplotlib.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas

from rlhf.support import cli

PANELS = {"score": "score (reward model)", "gold": "gold (judge)", "kl_ref": "KL to the reference, nats",
          "entropy": "entropy, nats per token", "clip_fraction": "clip fraction"}


@dataclass(frozen=True)
class PlotConfig:
    """Draw the learning curve of one or more PPO runs."""

    runs: tuple[str, ...] = cli.arg(("runs",), "folders that hold a ppo.csv", flag=False)
    out: str = cli.arg("", "the figure (empty: learning_curve.png in the first folder)")


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The panels' columns of a ppo.csv; those without numbers, such as gold without a judge, are left out."""
    if not path.is_file():
        raise cli.InputError(f"{path} does not exist: run train_ppo.py first, or name another folder")
    frame = pandas.read_csv(path)
    return {name: frame[name].tolist() for name in ("step", *PANELS) if name in frame and frame[name].notna().all()}


def load_pyplot():
    """matplotlib.pyplot, for figures that go to a file. Raises InputError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise cli.InputError("the figure needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main(cfg: PlotConfig) -> None:
    pyplot = load_pyplot()
    runs = {folder: read_metrics(Path(folder) / "ppo.csv") for folder in cfg.runs}
    names = [name for name in PANELS if any(name in metrics for metrics in runs.values())]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.1 * len(names), 2.8), squeeze=False)
    for ax, name in zip(axes[0], names):
        for folder, metrics in runs.items():
            if name in metrics:
                ax.plot(metrics["step"], metrics[name], linewidth=1.2, label=Path(folder).name)
        ax.set_title(PANELS[name], fontsize=9)
        ax.set_xlabel("PPO step", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    path = Path(cfg.out or Path(cfg.runs[0]) / "learning_curve.png")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main, PlotConfig)
