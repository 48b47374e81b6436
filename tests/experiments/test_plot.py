"""docs.experiments.plot reads what train_ppo.py writes, and says what is missing. --tensorboard
writes the same metrics."""

import builtins

import pytest

import train_sft
from docs.experiments import plot
from docs.experiments.plot import PANELS, PlotConfig, main, read_metrics
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.program import lock, run
from rlhf.run.training import Training


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
    assert parse_cli(PlotConfig, ["a", "b", "--out", "c.png"]) == PlotConfig(
        runs=("a", "b"), out="c.png"
    )
    with pytest.raises(ValueError, match="--panels gold,silver: give some of score,gold,kl_ref"):
        PlotConfig(panels="gold,silver")


def test_read_metrics_has_every_panel_and_leaves_out_empty_ones(trained, tmp_path):
    metrics = read_metrics(trained[1] / "ppo.csv")
    columns = ["step", "score", "gold", "kl_ref", "entropy", "clip_fraction"]
    assert list(metrics) == columns and metrics["step"] == [1, 2, 3, 4]
    assert list(PANELS) == [*columns[1:], "optimality"]
    (tmp_path / "ppo.csv").write_text(
        "step,score,gold,kl_ref,entropy,clip_fraction\n1,0.5,,0,2,0\n2,0.7,,1,2,0\n"
    )
    assert read_metrics(tmp_path / "ppo.csv") == {
        "step": [1, 2],
        "score": [0.5, 0.7],
        "kl_ref": [0, 1],
        "entropy": [2, 2],
        "clip_fraction": [0, 0],
    }
    with pytest.raises(InputError, match="run train_ppo.py first"):
        read_metrics(tmp_path / "nothing.csv")


def test_optimality_is_the_mean_objective_of_fifteen_steps_on_the_scale_of_evaluation_csv(tmp_path):
    """Objectives 0, 1, ... 29: the mean around step 15 is 14; on a scale from -1 to 24 that is
    15/25."""
    lines = [f"{i + 1},{i}\n" for i in range(30)]
    (tmp_path / "ppo.csv").write_text("step,objective\n" + "".join(lines))
    (tmp_path / "evaluation.csv").write_text("policy,objective\nsft,-1\nppo,20\n")
    assert read_metrics(tmp_path / "ppo.csv") == {"step": list(range(1, 31))}
    (tmp_path / "evaluation.csv").write_text("policy,objective\nsft,-1\nppo,20\noptimum,24\n")
    optimality = read_metrics(tmp_path / "ppo.csv")["optimality"]
    assert optimality[14] == pytest.approx(15 / 25, abs=1e-12)
    assert optimality[0] == pytest.approx((3.5 + 1) / 25, abs=1e-12)  # the first eight: 0 to 7


def test_folders_of_the_same_name_share_a_colour(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pyplot = plot.load_pyplot()
    figures = []
    subplots = pyplot.subplots

    def spy(*args, **kwargs):
        figures.append(subplots(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(pyplot, "subplots", spy)
    folders = [tmp_path / name for name in ("0/rloo", "1/rloo", "0/gae")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "ppo.csv").write_text("step,score,gold\n1,0.5,1\n2,0.7,1\n")
    main(PlotConfig(tuple(map(str, folders)), "gold", str(tmp_path / "a")))
    _, axes = figures[0]
    (ax,) = axes[0]
    assert ax.get_title() == "gold (judge)"
    first, second, third = [line.get_color() for line in ax.get_lines()]
    assert first == second != third
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rloo", "gae"]


def test_plot_writes_a_figure(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "curve.png"
    main(PlotConfig(runs=(str(trained[1]), str(trained[1])), out=str(path)))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_is_refused_while_a_run_writes_to_its_folder(trained, tmp_path, monkeypatch, capsys):
    """Another program writes into the folder. A figure for another folder can be drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "ppo.csv").write_bytes((trained[1] / "ppo.csv").read_bytes())
    with lock(folder / ".lock"):
        monkeypatch.setattr("sys.argv", ["plot", str(folder)])
        with pytest.raises(SystemExit) as stop:
            run(main, PlotConfig)
        assert stop.value.code == 2
        assert "error: another program writes here and holds" in capsys.readouterr().err
        monkeypatch.setattr("sys.argv", ["plot", str(folder), "--out", str(tmp_path / "x.png")])
        run(main, PlotConfig)
    assert not (folder / "learning_curve.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "x.png"]


def test_plot_does_not_write_through_a_link(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "other").write_text("of somebody else")
    (tmp_path / "curve.png").symlink_to(tmp_path / "other")
    main(PlotConfig(runs=(str(trained[1]),), out=str(tmp_path / "curve.png")))
    assert (tmp_path / "other").read_text() == "of somebody else"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_missing_package_gives_one_line(monkeypatch, tmp_path):
    without(monkeypatch, "matplotlib")
    with pytest.raises(InputError, match="pip install matplotlib"):
        main(PlotConfig())
    without(monkeypatch, "tensorboard")
    with pytest.raises(InputError, match="pip install tensorboard"):
        begin_run(tmp_path)


def begin_run(folder):
    """A run with --tensorboard that has no model."""
    cfg = train_sft.SFTConfig(out=str(folder), steps=4, tensorboard=True)
    return Training(cfg, model=None, optimizer=None, compute=None, tokenizer=None, inputs={})


def test_tensorboard_gets_the_metrics_of_the_csv(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = begin_run(tmp_path)
    for step in (1, 2):
        run.log(step, {"loss": step / 4, "valid": None}, show=("loss",))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("sft/loss")]
    assert losses == [(1, 0.25), (2, 0.5)]
    assert "sft/valid" not in events.Tags()["scalars"]
