"""rlhf.tools.fill makes tables of recorded CSVs, changes nothing outside its markers, and finds stale tables."""

import pandas
import pytest

from rlhf.support.cli import InputError, parse_cli
from rlhf.tools import fill
from rlhf.tools.fill import FillConfig, before_after, cells, filled, main, stages, table
from tests.helpers import ROOT


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A README and a page, each with one stale table of known content, and a page without a table."""
    monkeypatch.setitem(fill.TABLES, "two", lambda root: ["| a |", "| --- |", "| 2 |"])
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Title\n\n<!-- table: two -->\n<!-- end -->\n\nText. –\n", encoding="utf-8")
    (tmp_path / "docs" / "a.md").write_text("before\n<!-- table: two -->\n| old |\n\nold\n<!-- end -->\nafter")
    (tmp_path / "docs" / "b.md").write_text("    <!-- table: in an example -->\n")
    return tmp_path


FILLED = "<!-- table: two -->\n| a |\n| --- |\n| 2 |\n<!-- end -->\n"


def test_fill_replaces_only_what_is_between_markers(repo, capsys):
    example = (repo / "docs" / "b.md").read_bytes()
    main(FillConfig(), repo)
    assert (repo / "README.md").read_text(encoding="utf-8") == f"# Title\n\n{FILLED}\nText. –\n"
    assert (repo / "docs" / "a.md").read_text() == f"before\n{FILLED}after"
    assert (repo / "docs" / "b.md").read_bytes() == example
    assert capsys.readouterr().out == f"filled in {repo / 'README.md'}\nfilled in {repo / 'docs' / 'a.md'}\n"


def test_fill_keeps_several_tables_apart():
    text = "<!-- table: two -->\nx\n<!-- end -->\nbetween\n<!-- table: two -->\n<!-- end -->\n"
    assert [match[0] for match in fill.MARKED.finditer(text)] == [
        "<!-- table: two -->\nx\n<!-- end -->", "<!-- table: two -->\n<!-- end -->"]


def test_check_finds_a_stale_table_and_changes_nothing(repo):
    assert parse_cli(FillConfig, ["--check"]) == FillConfig(check=True) != FillConfig()
    before = (repo / "docs" / "a.md").read_text()
    with pytest.raises(InputError, match=r"README.md, .*a.md: stale table; run python -m rlhf.tools.fill"):
        main(FillConfig(check=True), repo)
    assert (repo / "docs" / "a.md").read_text() == before
    main(FillConfig(), repo)
    main(FillConfig(check=True), repo)


@pytest.mark.parametrize("text", ["<!-- table: none -->\n<!-- end -->\n", "<!-- table: none -->\n",
                                  "<!-- table: two -->\ntext without an end\n",
                                  "<!-- table: two -->\n<!-- table: two -->\n<!-- end -->\n"])
def test_fill_rejects_unknown_and_unclosed_tables(repo, text):
    """The message names the file and the marker, and no file is changed, not even one that comes before."""
    (repo / "docs" / "b.md").write_text(text)
    with pytest.raises(InputError, match=f"b.md: {text.splitlines()[0]} without <!-- end -->, or none of before_after"):
        main(FillConfig(), repo)
    assert "| 2 |" not in (repo / "README.md").read_text(encoding="utf-8")


def test_cells_by_hand():
    """1, 2 and 6 have mean 3. Three significant digits: 0.12345 is 0.123, -2.8 is -2.80, 148.52 is 149."""
    assert cells(pandas.Series([1.0, 2.0, 6.0])) == ["3.00", "1.00, 2.00, 6.00"]
    assert cells(pandas.Series([0.12345, -2.8, 148.52])) == ["48.6", "0.123, -2.80, 149"]
    assert cells(pandas.Series([1.0, None, 6.0])) == ["–", "1.00, –, 6.00"]


def test_table_by_hand():
    """Two runs: seeds 2, 0, 1 of one, and only seed 1 of the other, which has no mean."""
    frame = pandas.DataFrame({"run": ["b", "b", "b", "a"], "seed": [2, 0, 1, 1], "gold": [3.0, 1.0, 2.0, 0.5]})
    assert table(frame, ["run"], ["gold"]) == ["| run | gold | seeds 0, 1, 2 |", "| --- | --- | --- |",
                                               "| b | 2.00 | 1.00, 2.00, 3.00 |", "| a | – | –, 0.500, – |"]


def test_of_runs_reads_ppo_of_every_seed(tmp_path):
    for seed in range(3):
        folder = tmp_path / "docs" / "results" / f"loop_seed{seed}" / "1"
        folder.mkdir(parents=True)
        (folder / "evaluation.csv").write_text(f"policy,gold\nsft,-9\nppo,{seed}.5\noptimum,9\n")
    assert fill.of_runs("loop_seed*/1", "gold")(tmp_path)[2:] == ["| loop_seed*/1 | 1.50 | 0.500, 1.50, 2.50 |"]


@pytest.mark.parametrize("runs", ["seed*", "earlier_seed*"])
def test_stages_by_hand(tmp_path, runs):
    """Seed k: SFT's loss starts at 6 + k and its last held-out loss is 0.5 + k / 10; gold goes from -k to 2 + k / 2."""
    for k in range(3):
        folder = tmp_path / "docs" / "results" / runs.replace("*", str(k))
        folder.mkdir(parents=True)
        (folder / "sft.csv").write_text(f"step,loss,valid\n1,{6 + k},9\n2,3,\n3,1,{0.5 + k / 10}\n")
        (folder / "reward.csv").write_text("step,accuracy\n1,0.5\n2,0.9\n")
        (folder / "reward_evaluation.csv").write_text(
            f"accuracy,judge_accuracy,bayes_accuracy,swapped_accuracy\n0.8{k},0.9,0.95,0.6\n")
        (folder / "evaluation.csv").write_text(
            "policy,score,gold,kl_ref,win_rate_vs_sft,eos_rate,optimality\n"
            f"sft,0.1,{-k},0,0.5,1,0\nppo,1,{2 + k / 2},{3 + k},0.9,1,0.95\n"
            f"best_of_n,1.1,2,{3 + k},,,0.9{k}\noptimum,1.2,2.5,4,,,1\n")
    assert stages(tmp_path, runs) == [
        "|  | at the start, mean | at the end, mean | seeds 0, 1, 2 |",
        "| --- | --- | --- | --- |",
        "| SFT: loss (start: training, end: held out) | 7.00 | 0.600 | 0.500, 0.600, 0.700 |",
        "| reward model: accuracy (end: held out) | 0.500 | 0.810 | 0.800, 0.810, 0.820 |",
        "| reward model: swapped_accuracy |  | 0.600 | 0.600, 0.600, 0.600 |",
        "| reward model: judge_accuracy |  | 0.900 | 0.900, 0.900, 0.900 |",
        "| reward model: bayes_accuracy |  | 0.950 | 0.950, 0.950, 0.950 |",
        "| PPO: score | 0.100 | 1.00 | 1.00, 1.00, 1.00 |",
        "| PPO: gold | -1.00 | 2.50 | 2.00, 2.50, 3.00 |",
        "| PPO: kl_ref | 0.00 | 4.00 | 3.00, 4.00, 5.00 |",
        "| PPO: win_rate_vs_sft | 0.500 | 0.900 | 0.900, 0.900, 0.900 |",
        "| PPO: eos_rate | 1.00 | 1.00 | 1.00, 1.00, 1.00 |",
        "| PPO: optimality | 0.00 | 0.950 | 0.950, 0.950, 0.950 |",
        "| best_of_n: score |  | 1.10 | 1.10, 1.10, 1.10 |",
        "| best_of_n: gold |  | 2.00 | 2.00, 2.00, 2.00 |",
        "| best_of_n: kl_ref |  | 4.00 | 3.00, 4.00, 5.00 |",
        "| optimum: score |  | 1.20 | 1.20, 1.20, 1.20 |",
        "| optimum: gold |  | 2.50 | 2.50, 2.50, 2.50 |",
        "| optimum: kl_ref |  | 4.00 | 4.00, 4.00, 4.00 |",
    ]


def test_before_after_shows_three_prompts_without_the_speakers(tmp_path):
    folder = tmp_path / "docs" / "results" / "seed0"
    folder.mkdir(parents=True)
    row = '"\n\nHuman: Who {}?\n\nAssistant:",No.,Yes.,0.5,1.5,-1,{}\n'
    (folder / "ppo_samples.csv").write_text("Prompt,Before,After,score_before,score_after,gold_before,gold_after\n"
                                            + "".join(row.format(i, i) for i in range(4)))
    assert before_after(tmp_path) == ["| prompt | before PPO (gold) | after PPO (gold) |", "| --- | --- | --- |",
                                      "| Who 0? | No. (-1) | Yes. (+0) |", "| Who 1? | No. (-1) | Yes. (+1) |",
                                      "| Who 2? | No. (-1) | Yes. (+2) |"]


def test_quoted_output_is_code(tmp_path):
    """Blocks of lines, indented by four; an empty line stays empty."""
    folder = tmp_path / "docs" / "results" / "seed0"
    folder.mkdir(parents=True)
    (folder / "walk.txt").write_text("prompt\n\nslot\n  18\n\nafter one step:\n\nslot\n")
    assert fill.TABLES["walk_before"](tmp_path) == ["    prompt", "", "    slot", "      18"]
    assert fill.TABLES["walk_after"](tmp_path) == ["    after one step:", "", "    slot"]
    assert fill.quoted(1, 2, keep="slot")(tmp_path) == ["    slot"]


@pytest.mark.parametrize("name", [name for name in fill.TABLES if not name.startswith("walk_")])
def test_recorded_csvs_fill_every_table(name):
    lines = fill.TABLES[name](ROOT)
    assert len(lines) >= 3 and len({line.count("|") for line in lines}) == 1 and "nan" not in "".join(lines)


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_tables_of_the_repository_are_up_to_date(name):
    """If this fails, run python -m rlhf.tools.fill."""
    assert filled(ROOT / name, ROOT) == (ROOT / name).read_text(encoding="utf-8")
