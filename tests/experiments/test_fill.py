"""fill makes tables of recorded CSVs, changes nothing outside its markers, and finds stale
tables."""

import pandas
import pytest

from docs.experiments import fill
from docs.experiments.fill import FillConfig, filled, main
from rlhf.run.errors import InputError
from tests.helpers import ROOT

TABLE = "<!-- table: two -->\n| a |\n| --- |\n| 2 |\n<!-- end -->\n"
EVALUATION = "policy,score,gold,kl_ref,objective,optimality,optimality_se,win_rate_vs_sft\n"


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A README and a page, each with one stale table of known content, and a page without a
    table."""
    monkeypatch.setitem(fill.TABLES, "two", lambda root: ["| a |", "| --- |", "| 2 |"])
    stale = "<!-- table: two -->\n| old |\n\nold\n<!-- end -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# Title\n\n{stale}\nText. –\n", encoding="utf-8")
    (tmp_path / "docs/a.md").write_text(f"before\n{stale}after")
    (tmp_path / "docs/b.md").write_text("    <!-- table: in an example -->\n")
    return tmp_path


def recorded(root, name, text):
    """A file below docs/."""
    path = root / "docs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ---- the program ----


def test_fill_replaces_only_what_is_between_markers(repo, capsys):
    example = (repo / "docs/b.md").read_bytes()
    main(FillConfig(), repo)
    readme = (repo / "README.md").read_text(encoding="utf-8")
    assert readme == f"# Title\n\n{TABLE}\nText. –\n"
    assert (repo / "docs/a.md").read_text() == f"before\n{TABLE}after"
    assert (repo / "docs/b.md").read_bytes() == example
    said = capsys.readouterr().out.splitlines()
    assert said == [f"filled in {repo / 'README.md'}", f"filled in {repo / 'docs/a.md'}"]


def test_fill_keeps_several_tables_apart(repo):
    empty = "<!-- table: two -->\n<!-- end -->\n"
    (repo / "docs/b.md").write_text(f"{empty}between\n{empty}")
    assert filled(repo / "docs/b.md", repo) == f"{TABLE}between\n{TABLE}"


def test_check_finds_a_stale_table_and_changes_nothing(repo):
    before = (repo / "docs/a.md").read_text()
    with pytest.raises(InputError, match=r"README.md, .*a.md: stale table; run python -m docs"):
        main(FillConfig(check=True), repo)
    assert (repo / "docs/a.md").read_text() == before
    main(FillConfig(), repo)
    main(FillConfig(check=True), repo)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: none -->\n<!-- end -->\n",
        "<!-- table: none -->\n",
        "<!-- table: two -->\ntext without an end\n",
        "<!-- table: two -->\n<!-- table: two -->\n<!-- end -->\n",
    ],
)
def test_fill_rejects_unknown_and_unclosed_tables(repo, text):
    """The message names the file and the marker. No file is changed, not even an earlier one."""
    (repo / "docs/b.md").write_text(text)
    marker = text.splitlines()[0]
    with pytest.raises(InputError, match=f"b.md: {marker} without <!-- end -->, or none of before"):
        main(FillConfig(), repo)
    assert "| 2 |" not in (repo / "README.md").read_text(encoding="utf-8")


# ---- the tables ----


def test_cells_match_hand_computation():
    """1, 2 and 6 have mean 3. Three significant digits: 0.12345 is 0.123 and 148.52 is 149."""
    whole = pandas.Series([1.0, 2.0, 6.0])
    assert (fill.mean(whole), fill.each(whole)) == ("3.00", "1.00, 2.00, 6.00")
    broken = pandas.Series([0.12345, -2.8, 148.52])
    assert (fill.mean(broken), fill.each(broken)) == ("48.6", "0.123, -2.80, 149")
    missing = pandas.Series([1.0, None, 6.0])
    assert (fill.mean(missing), fill.each(missing)) == ("–", "1.00, –, 6.00")


def test_stages_and_policies_match_hand_computation(tmp_path):
    """Seed k: SFT's last held-out loss is 0.5 + k / 10; gold goes from -k to 2 + k / 2."""
    reward = "accuracy,judge_accuracy,swapped_accuracy\n"
    for k in range(3):
        sft = f"step,loss,valid\n1,{6 + k},9\n2,3,\n3,1,{0.5 + k / 10}\n"
        recorded(tmp_path, f"results/seed{k}/sft.csv", sft)
        recorded(tmp_path, f"results/seed{k}/reward.csv", "step,accuracy\n1,0.5\n2,0.9\n")
        recorded(tmp_path, f"results/seed{k}/reward_evaluation.csv", f"{reward}0.8{k},0.9,0.6\n")
        rows = f"sft,0.1,{-k},0,0.1,0,0,0.5\nppo,1,{2 + k / 2},{3 + k},0.7,0.9{k},0.0{k},0.9\n"
        recorded(tmp_path, f"results/seed{k}/evaluation.csv", EVALUATION + rows)
    assert fill.stages(tmp_path) == [
        "|  | start | end | seeds 0, 1, 2 |",
        "| --- | --- | --- | --- |",
        "| SFT: loss, held out | 7.00 | 0.600 | 0.500, 0.600, 0.700 |",
        "| reward model: accuracy, held out | 0.500 | 0.810 | 0.800, 0.810, 0.820 |",
        "| reward model: judge_accuracy |  | 0.900 | 0.900, 0.900, 0.900 |",
        "| reward model: swapped_accuracy |  | 0.600 | 0.600, 0.600, 0.600 |",
        "| PPO: score | 0.100 | 1.00 | 1.00, 1.00, 1.00 |",
        "| PPO: gold | -1.00 | 2.50 | 2.00, 2.50, 3.00 |",
        "| PPO: kl_ref | 0.00 | 4.00 | 3.00, 4.00, 5.00 |",
        "| PPO: win_rate_vs_sft | 0.500 | 0.900 | 0.900, 0.900, 0.900 |",
        "| PPO: optimality | 0.00 | 0.910 | 0.900, 0.910, 0.920 |",
    ]
    assert fill.policies(tmp_path)[2:] == [
        "| sft | 0.100 | -1.00 | 0.00 | 0.100 | 0.00 | 0.00 |",
        "| ppo | 1.00 | 2.50 | 4.00 | 0.700 | 0.910 | 0.0100 |",
    ]


def test_found_in_reads_a_response_as_the_judge_does():
    judge = fill.load_judge(str(ROOT / "data/tiny_assistant"))
    prompt = "\n\nHuman: What is best for my tomato?\n\nAssistant:"
    best = "Good question. Water the tomato daily. Do not shade a tomato."
    found = fill.found_in(judge, prompt, best)
    assert [name for name, is_so in found.items() if is_so] == ["the maximal gold, 3"]
    worst = "Oil the bike chain. And so it goes. Water the water. Shame on you."
    found = fill.found_in(judge, prompt, worst)
    assert [name for name, is_so in found.items() if not is_so] == ["the maximal gold, 3"]


def test_changes_are_paired_by_seed():
    """Optimality falls by 0.1 in seed 0 and rises by 0.3 in seed 1, whatever the order of rows."""
    base = {"seed": [0, 1], "objective": [1.0, 2.0], "optimality": [0.5, 0.6], "gold": [0.0, 1.0]}
    runs = {"seed": [1, 0], "objective": [2.5, 1.0], "optimality": [0.9, 0.4], "gold": [1.0, 0.5]}
    changes = fill.changes(pandas.DataFrame(runs), pandas.DataFrame(base))
    assert changes == ["+0.250", "+0.100", "+0.25", "1 of 2"]


def test_ablations_have_three_seeds_or_one():
    """A name that stands twice in the recorded file would give more."""
    lines = fill.ablations(ROOT)[2:]
    counts = [line.split(" of ")[-1] for line in lines]
    assert counts == ["3 |"] * len(fill.ABLATIONS) + ["1 |"] * len(fill.MORE_STEPS)


def test_movie_methods_use_the_optimum_of_ppo(tmp_path):
    """(0.5 - 0.1) / (2.1 - 0.1) = 0.2 for PPO; (0.5 - 0) / (2.1 - 0) = 0.238 for the others."""
    for folder in ("gae", "rloo", "grpo", "reinforce", "dpo"):
        start, name = (0.1, "ppo") if folder == "gae" else (0.0, "ppo")
        name = "dpo" if folder == "dpo" else name
        rows = f"sft,0,0,0,{start},,\n{name},0,1,2,0.5,,\noptimum,0,0,0,2.1,,\n"
        recorded(tmp_path, f"results/movie_methods/{folder}/evaluation.csv", EVALUATION + rows)
        recorded(tmp_path, f"results/movie_methods/{folder}/{name}.csv", "seconds\n1\n70.4\n")
    lines = fill.movie_methods(tmp_path)[2:]
    assert lines[0] == "| PPO | 0.500 | 0.200 | 1.00 | 2.00 | 70 |"
    assert lines[-1] == "| DPO | 0.500 | 0.238 | 1.00 | 2.00 | 70 |"


def test_before_after_shows_three_prompts_without_the_speakers(tmp_path):
    header = "Prompt,Before,After,score_before,score_after,gold_before,gold_after\n"
    row = '"\n\nHuman: Who {}?\n\nAssistant:",No.,Yes.,0.5,1.5,-1,{}\n'
    text = header + "".join(row.format(i, i) for i in range(4))
    recorded(tmp_path, "results/seed0/ppo_samples.csv", text)
    assert fill.before_after(tmp_path)[2:] == [
        "| Who 0? | No. (-1) | Yes. (+0) |",
        "| Who 1? | No. (-1) | Yes. (+1) |",
        "| Who 2? | No. (-1) | Yes. (+2) |",
    ]


def test_quoted_output_is_code(tmp_path):
    """Blocks of lines, indented by four; an empty line stays empty."""
    walk = "prompt\n\nslot\n  18\n\nafter one step:\n\nslot\n"
    recorded(tmp_path, "results/seed0/walk.txt", walk)
    before = ["    prompt", "", "    slot", "      18"]
    assert fill.TABLES["walk_before"](tmp_path) == before
    assert fill.TABLES["walk_after"](tmp_path) == ["    after one step:", "", "    slot"]


@pytest.mark.parametrize("name", [name for name in fill.TABLES if not name.startswith("walk_")])
def test_recorded_files_fill_every_table(name):
    lines = fill.TABLES[name](ROOT)
    assert len(lines) >= 3 and "nan" not in "".join(lines)
    assert len({line.count("|") for line in lines}) == 1


def test_tables_of_the_repository_are_up_to_date():
    """If this fails, run python -m docs.experiments.fill."""
    main(FillConfig(check=True))
