"""The documentation pages agree with the code."""

import re
import textwrap
from types import SimpleNamespace

import torch

import train_ppo
from rlhf.run.flags import parse_cli
from rlhf.run.loading import find_tokenizer
from tests.helpers import ROOT, rows, tiny


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


def test_own_reward_of_the_page_trains(trained, tmp_path, monkeypatch):
    """The class of docs/data.md in load_models: the score is the number of "please" in the
    text, which is 0 here, or --missing-eos-score."""
    data, out, _ = trained
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = {"torch": torch}
    source = re.search(r"    class MyReward.*?tokens.device\)\n", page, flags=re.S)[0]
    exec(textwrap.dedent(source), names)
    line = "    frozen = Frozen("
    assert (ROOT / "train_ppo.py").read_text(encoding="utf-8").count(line) == 1
    tokenizer = find_tokenizer(str(data))
    ids = torch.tensor([tokenizer.encode("Human: please please\n\nAssistant: Yes, please.")])
    own = names["MyReward"](SimpleNamespace(gpt=None), tokenizer)
    assert own(ids, torch.tensor([ids.size(1)])).tolist() == [1]  # the prompt does not count
    frozen = train_ppo.Frozen

    def with_own_reward(reward_model, tokenizer, **others):
        own = names["MyReward"](reward_model, tokenizer)
        return frozen(reward_model=own, tokenizer=tokenizer, **others)

    monkeypatch.setattr(train_ppo, "Frozen", with_own_reward)
    models = ["--sft", out / "sft.pt", "--reward", out / "reward.pt"]
    flags = tiny("ppo", "--data", data, "--out", tmp_path, *models)
    train_ppo.main(parse_cli(train_ppo.PPOConfig, flags))
    assert {float(row["score_after"]) for row in rows(tmp_path / "ppo_samples.csv")} <= {0.0, -3.0}


def test_one_response_quotes_numbers_of_the_recorded_walk():
    """Each number with three decimals in the page's prose is in walk.txt, or is one of the sums
    worked on the page."""
    page = (ROOT / "docs" / "one_response.md").read_text(encoding="utf-8")
    walk = (ROOT / "docs" / "results" / "seed0" / "walk.txt").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- table.*?<!-- end -->", "", page, flags=re.S)
    worked = {"0.148"}  # from the rounded numbers
    quoted = {number.lstrip("-") for number in re.findall(r"-?\d\.\d{3}", prose)}
    assert len(quoted) > 20 and quoted - worked <= set(re.findall(r"\d\.\d{3}", walk))
