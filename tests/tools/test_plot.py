"""rlhf.tools.plot reads what train_ppo.py writes, and says what is missing. --tensorboard writes the same metrics."""

import builtins

import pytest

from rlhf.support.cli import InputError, parse_cli
from rlhf.support.tables import Progress
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


def test_read_metrics_has_every_panel_and_leaves_out_empty_ones(trained, tmp_path):
    metrics = read_metrics(trained[1] / "ppo.csv")
    assert list(metrics) == ["step", *PANELS] and metrics["step"] == [1, 2, 3, 4]
    (tmp_path / "ppo.csv").write_text("step,score,gold,kl_ref,entropy,clip_fraction\n1,0.5,,0,2,0\n2,0.7,,1,2,0\n")
    assert read_metrics(tmp_path / "ppo.csv") == {"step": [1, 2], "score": [0.5, 0.7], "kl_ref": [0, 1],
                                                  "entropy": [2, 2], "clip_fraction": [0, 0]}
    with pytest.raises(InputError, match="run train_ppo.py first"):
        read_metrics(tmp_path / "nothing.csv")


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
