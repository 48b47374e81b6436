"""The documentation pages agree with the code."""

import re

from tests.helpers import ROOT, rows


def test_metrics_page_lists_the_columns_of_the_three_csvs(trained):
    """docs/metrics.md has a table per CSV: the first cells of its rows are the CSV's columns, in
    the same order."""
    _, out, _ = trained
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in ("sft.csv", "reward.csv", "ppo.csv"):
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        documented = re.findall(r"^\| `(\w+)` \|", section, flags=re.M)
        assert documented == list(rows(out / name)[0]), (
            f"docs/metrics.md: one row per column of {name}"
        )


def test_one_response_quotes_numbers_of_the_recorded_walk():
    """Each number with three decimals in the page's prose is in walk.txt, or is one of the sums
    worked on the page."""
    page = (ROOT / "docs" / "one_response.md").read_text(encoding="utf-8")
    walk = (ROOT / "docs" / "results" / "seed0" / "walk.txt").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- table.*?<!-- end -->", "", page, flags=re.S)
    worked = {"0.148"}  # from the rounded numbers
    quoted = {number.lstrip("-") for number in re.findall(r"-?\d\.\d{3}", prose)}
    assert len(quoted) > 20 and quoted - worked <= set(re.findall(r"\d\.\d{3}", walk))
