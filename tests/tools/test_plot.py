"""rlhf.tools.plot reads what train_ppo.py writes, and says what is missing. --tensorboard writes the same metrics."""

import builtins

import pytest

from rlhf.support.cli import InputError, parse_cli
from rlhf.support.tables import Progress
from rlhf.tools import plot
from rlhf.tools.plot import PANELS, PlotConfig, main, read_metrics


def without(monkeypatch, package):
    """Make `import package` fail, as if it were not installed."""
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == package or name == f"torch.utils.{package}":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_plot_takes_folders_without_a_flag():
    assert parse_cli(PlotConfig, []).runs == ("runs",)
    assert parse_cli(PlotConfig, ["a", "b", "--out", "c.png"]) == PlotConfig(runs=("a", "b"), out="c.png")
    with pytest.raises(ValueError, match="--panels gold,silver: give some of score,gold,kl_ref"):
        PlotConfig(panels="gold,silver")


def test_read_metrics_has_every_panel_and_leaves_out_empty_ones(trained, tmp_path):
    metrics = read_metrics(trained[1] / "ppo.csv")
    columns = ["step", "score", "gold", "kl_ref", "entropy", "clip_fraction"]
    assert list(metrics) == columns and metrics["step"] == [1, 2, 3, 4]
    assert list(PANELS) == [*columns[1:], "optimality"]
    (tmp_path / "ppo.csv").write_text("step,score,gold,kl_ref,entropy,clip_fraction\n1,0.5,,0,2,0\n2,0.7,,1,2,0\n")
    assert read_metrics(tmp_path / "ppo.csv") == {"step": [1, 2], "score": [0.5, 0.7], "kl_ref": [0, 1],
                                                  "entropy": [2, 2], "clip_fraction": [0, 0]}
    with pytest.raises(InputError, match="run train_ppo.py first"):
        read_metrics(tmp_path / "nothing.csv")


def test_optimality_is_the_mean_objective_of_fifteen_steps_on_the_scale_of_evaluation_csv(tmp_path):
    """Objectives 0, 1, ... 29: the mean around step 15 is 14; on a scale from -1 to 24 that is 15/25."""
    (tmp_path / "ppo.csv").write_text("step,objective\n" + "".join(f"{i + 1},{i}\n" for i in range(30)))
    (tmp_path / "evaluation.csv").write_text("policy,objective\nsft,-1\nppo,20\n")
    assert read_metrics(tmp_path / "ppo.csv") == {"step": list(range(1, 31))}
    (tmp_path / "evaluation.csv").write_text("policy,objective\nsft,-1\nppo,20\noptimum,24\n")
    optimality = read_metrics(tmp_path / "ppo.csv")["optimality"]
    assert optimality[14] == pytest.approx(15 / 25, abs=1e-12)
    assert optimality[0] == pytest.approx((3.5 + 1) / 25, abs=1e-12)  # the first eight: 0 to 7


def test_folders_of_the_same_name_share_a_colour(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib", reason="matplotlib is not installed") and plot.load_pyplot()
    figures = []
    monkeypatch.setattr(pyplot, "subplots", lambda *a, real=pyplot.subplots, **k: figures.append(real(*a, **k)) or
                        figures[-1])
    for name in ("0/rloo", "1/rloo", "0/gae"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ppo.csv").write_text("step,score,gold\n1,0.5,1\n2,0.7,1\n")
    main(PlotConfig(tuple(str(tmp_path / name) for name in ("0/rloo", "1/rloo", "0/gae")), "gold", str(tmp_path / "a")))
    (ax,) = figures[0][1][0]
    assert ax.get_title() == "gold (judge)"
    first, second, third = (line.get_color() for line in ax.get_lines())
    assert first == second != third
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rloo", "gae"]


def test_plot_writes_a_figure(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "curve.png"
    main(PlotConfig(runs=(str(trained[1]), str(trained[1])), out=str(path)))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_package_gives_one_line(monkeypatch, tmp_path):
    without(monkeypatch, "matplotlib")
    with pytest.raises(InputError, match="pip install matplotlib"):
        main(PlotConfig())
    without(monkeypatch, "tensorboard")
    with pytest.raises(InputError, match="pip install tensorboard"):
        Progress(tmp_path / "x.csv", 4, {"step": 0, "metrics": []}, ("loss",), tensorboard=True)


def test_tensorboard_gets_the_metrics_of_the_csv(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = Progress(tmp_path / "sft.csv", 4, {"step": 0, "metrics": []}, ("loss",), tensorboard=True)
    for step in (1, 2):
        progress.log(step, loss=step / 4, valid=None)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("sft/loss")] == [(1, 0.25), (2, 0.5)]
    assert "sft/valid" not in events.Tags()["scalars"]
