"""docs.experiments.plot draws the recorded numbers, and the numbers that it writes are those of the
pages. --tensorboard writes the same metrics as the CSV."""

import builtins
import re

import pytest
from pandas import DataFrame, concat

import train_sft
from docs.experiments import plot
from docs.experiments.plot import PlotConfig, main, move_apart, number, smooth
from rlhf.run.errors import InputError
from rlhf.run.training import Training
from tests.helpers import ROOT


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pyplot = plot.load_pyplot()
    yield pyplot
    pyplot.close("all")


def without(monkeypatch, package):
    """Make `import package` fail, as if it were not installed."""
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == package or name == f"torch.utils.{package}":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


# ---- parts ----


def test_smooth_covers_as_many_rows_on_each_side_near_the_start():
    """Two rows on each side: none for the first row, one for the second; at the end those there
    are."""
    frame = DataFrame({"gold": [0.0, 3, 6, 3]}, index=[10, 20, 30, 40])
    smoothed = smooth(frame, side=2)["gold"]
    assert list(smoothed.index) == [10, 20, 30, 40]
    assert smoothed.tolist() == [0, 3, 3, 4]  # 0; 9/3; 12/4; 12/3


def test_labels_that_overlap_are_pushed_apart_by_as_much():
    """0.50 and 0.52 are 0.02 apart where 0.1 is needed, so each moves by 0.04."""
    assert move_apart([0.52, 0.1, 0.5], 0.1) == pytest.approx([0.56, 0.1, 0.46])
    assert move_apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6], abs=1e-6)


def test_number_has_a_true_minus_sign():
    assert [number(-0.126), number(2, 3)] == ["−0.13", "2.000"]


# ---- the figures ----


def texts(ax):
    return [text.get_text() for text in ax.texts]


def heights(lines):
    """The y of straight lines."""
    return [line.get_ydata()[0] for line in lines]


def circles(ax):
    """(x, y) of what draw_circle draws."""
    found = []
    for line in ax.get_lines():
        if line.get_markeredgecolor() == "white":
            found += zip(line.get_xdata(), line.get_ydata())
    return found


def test_training_draws_the_mean_over_seeds_beside_the_heldout_means(pyplot):
    """Two seeds of two steps. The curve begins at the mean of step 1, (1 + 3) / 2 = 2, and its last
    value covers step 2 and the step before it, (2 + 6) / 2 = 4."""
    columns = ["step", "score", "gold", "kl_ref", "objective"]
    rows = [(1, 1, 0, 0, 0), (2, 5, 0, 0, 0), (1, 3, 0, 0, 0), (2, 7, 0, 0, 0)]
    metrics = DataFrame(rows, columns=columns).assign(kl_coef=0.25)
    policies = ["sft", "ppo", "best_of_n", "optimum"]
    evaluation = DataFrame({"policy": policies * 2, "score": [0.0, 4, 6, 8, 1, 5, 7, 9]})
    evaluation = evaluation.assign(gold=0.0, kl_ref=0.0, objective=0.0)
    ax, *_, last = plot.training(metrics, evaluation, "two seeds").axes
    dots, curve, circle, *rules = ax.get_lines()
    assert dots.get_ydata().tolist() == [1, 5, 3, 7]
    assert [curve.get_xdata().tolist(), curve.get_ydata().tolist()] == [[1, 2], [2, 4]]
    assert circles(ax) == [(2, 4.5)] and circle in ax.get_lines()
    assert heights(rules) == [0.5, 6.5, 8.5]
    names = ["PPO 4.50", "SFT 0.50", "best-of-n 6.50", "optimum 8.50"]
    assert texts(ax)[1:] == names
    assert last.get_title(loc="left") == "Objective: score − 0.25 × KL"


def test_learning_curve_shows_the_numbers_that_readme_quotes(pyplot):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "raises mean gold from -0.28 to 2.78" in readme
    assert "The optimum has less, 2.64" in readme
    _, ax, *_ = plot.learning_curve(ROOT).axes
    assert {"SFT −0.28", "PPO 2.78", "optimum 2.64"} <= set(texts(ax))


def study_points():
    """Two seeds with 60 comparisons: gold is highest at a KL of 4 and 9. The penalised run is in no
    panel."""
    columns = ["method", "seed", "kl_coef", "step_or_n", "kl_ref", "score", "gold"]
    rows = [
        ("ppo", 0, 0, 1, -0.001, 0.0, 0.5),
        ("ppo", 0, 0, 2, 4, 1.0, 2.0),
        ("ppo", 0, 0, 3, 16, 2.0, -1.0),
        ("ppo", 1, 0, 1, 0, 0.0, 0.5),
        ("ppo", 1, 0, 2, 9, 1.0, 1.5),
        ("ppo", 1, 0, 3, 25, 2.0, -2.0),
        ("ppo", 1, 0.2, 3, 1, 1.0, 2.9),
        ("best_of_n", 0, None, 1, 0, 0.0, 0.25),
        ("best_of_n", 0, None, 2, 0.19, 0.5, 0.75),
    ]
    return DataFrame(rows, columns=columns).assign(comparisons=60)


def test_study_marks_the_highest_gold_of_each_seed(pyplot):
    """Over the root of the KL. The means of the seeds: (2 + 1.5) / 2 and (-1 - 2) / 2."""
    (ax,) = plot.draw_study(study_points()).axes
    assert sorted(circles(ax)) == [(2, 2), (3, 1.5)]
    sentence = "PPO's gold peaks at 1.75 and ends at −1.50 (means of the seeds)."
    assert texts(ax)[0] == sentence
    assert ax.get_xticks().tolist() == [0, 1, 2, 4]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "4", "16"]
    assert 0.25 in heights(ax.get_lines())  # gold of SFT: n = 1
    assert all(2.9 not in line.get_ydata() for line in ax.get_lines())


def test_study_has_a_panel_for_each_size_from_many_to_few(pyplot):
    few = study_points().assign(comparisons=1500)
    figure = plot.draw_study(concat([few, few.assign(comparisons=12000)]))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["12,000 comparisons", "1,500 comparisons"]


def test_recorded_peaks_are_those_of_the_table(pyplot):
    page = (ROOT / "docs/overoptimisation.md").read_text(encoding="utf-8")
    assert "| 12,000 | 2.09 | -1.46 |" in page and "| 1,500 | 1.16 | -2.14 |" in page
    first, _, last = plot.overoptimisation(ROOT).axes
    assert "peaks at 2.09 and ends at −1.46" in texts(first)[0]
    assert "peaks at 1.16 and ends at −2.14" in texts(last)[0]


def test_methods_are_compared_with_ppo_of_the_same_seed(tmp_path):
    """Differences -1, -2 and -3 although the objectives of RLOO are 0, 1 and 2."""
    for method in ("gae", "rloo"):
        for seed, ppo in enumerate((1, 3, 5)):
            folder = tmp_path / f"docs/results/methods_seed{seed}/{method}"
            folder.mkdir(parents=True)
            objective = ppo if method == "gae" else seed
            rows = f"sft,0,0\nppo,{objective},0.5\nbest_of_n,{ppo + 1},0.75\noptimum,9,1\n"
            (folder / "evaluation.csv").write_text("policy,objective,optimality\n" + rows)
    table = plot.compare_methods(tmp_path, {"PPO": "gae", "RLOO": "rloo"})
    differences = {name: rows["difference"].tolist() for name, rows in table.groupby("method")}
    assert differences == {"PPO": [0, 0, 0], "best-of-n": [1, 1, 1], "RLOO": [-1, -2, -3]}


def test_interval_is_that_of_the_t_distribution(pyplot):
    """-1, -2 and -3: mean -2, standard error 1/sqrt(3), t = 4.303: half is 2.484. The best method
    is at the top."""
    table = DataFrame({"method": ["a"] * 3 + ["b"] * 3, "difference": [-1, -2, -3, 5, 5, 5]})
    _, ax = pyplot.subplots()
    plot.draw_intervals(ax, table)
    first, second = ax.get_lines()
    assert [first.get_xdata().tolist(), first.get_ydata().tolist()] == [[5, 5], [0, 0]]
    assert second.get_xdata() == pytest.approx([-4.484, 0.484], abs=1e-3)
    plot.draw_methods(ax, table, "difference")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert texts(ax) == ["5.000", "−2.000"]


# ---- the program ----


@pytest.mark.slow
def test_plot_writes_the_figures_of_the_pages(pyplot, tmp_path):
    """And not through a link."""
    (tmp_path / "other").write_text("of somebody else")
    (tmp_path / "alternatives.png").symlink_to(tmp_path / "other")
    main(PlotConfig(out=str(tmp_path)))
    assert (tmp_path / "other").read_text() == "of somebody else"
    written = {path.name: path.read_bytes()[:4] for path in tmp_path.glob("*.png")}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = re.findall(r"(\w+\.png)\)", "".join(page.read_text("utf-8") for page in pages))
    shown.remove("report.png")  # a picture of the report
    assert written == dict.fromkeys(shown, b"\x89PNG") and len(shown) == 5


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


def test_frontier_starts_each_run_at_sft_and_marks_the_chosen_point(pyplot):
    rows = [
        ("SFT", 0, 30, 1, 0.08, 0),
        ("alone", 6, 40, 0.9, 0.06, 0),
        ("alone", 12, 80, 0.5, 0.02, 0),
        ("both", 6, 35, 0.9, 0.03, 1),
    ]
    names = ["run", "step", "refusals", "distinct", "offensive", "chosen"]
    axes = plot.draw_frontier(DataFrame(rows, columns=names)).axes
    for ax, prices in zip(axes, [([30, 40, 80], [30, 35]), ([1, 0.9, 0.5], [1, 0.9])], strict=True):
        half, alone, both, chosen, sft = (line.get_xydata().tolist() for line in ax.get_lines())
        assert half[0][1] == 0.04
        assert alone == [list(point) for point in zip(prices[0], [0.08, 0.06, 0.02])]
        assert both == [list(point) for point in zip(prices[1], [0.08, 0.03])]
        assert chosen == [[prices[1][1], 0.03]] and sft == [[prices[0][0], 0.08]]
