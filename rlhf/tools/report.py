"""One page about a run: whether it worked, how training went, the texts before and after, and what
each quantity of PPO does to each token.

    python -m rlhf.tools.report runs        # writes runs/report.html

The page is one file that a browser opens without a network. It shows what the folder holds, also
while the run still lasts; a stage without its files is left out. The numbers stand in the page as
JSON, and its script draws them (report.html, beside this file). Text of data and models stays text.
"""

import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pandas

from rlhf.run.commands import PROGRAMS, command
from rlhf.run.errors import InputError
from rlhf.run.files import replacing
from rlhf.run.flags import arg
from rlhf.run.loading import judge_of
from rlhf.run.program import run
from rlhf.run.training import RESULTS
from rlhf.tools.sample import going_on

TEMPLATE = Path(__file__).with_suffix(".html")
# The clone's commit; nothing for the installed package.
GIT = f'git -C "{TEMPLATE.parent}" describe --always --dirty 2>/dev/null'
# Columns of ppo_samples.csv and ppo_tokens.csv
TEXTS = ("Prompt", "last_turn", "Before", "After", "prompt", "token")
# What the page holds at most, so that it stays below 500 KB:
NUMBERS = 5_000  # of a table
FIRST, WORST = 20, 5  # rows with responses: the first, and those with the least gold
CHARACTERS = 600  # of a prompt or response
TOKENS = 1_200  # of the responses of a PPO step


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, a page about a run."""

    folder: str = arg("runs", "folder of the run", flag=False)
    data: str = arg("", "data set folder (empty: the one it was trained on)")


def main(cfg: ReportConfig) -> None:
    folder = Path(cfg.folder)
    files = read_files(folder)
    if not files:
        raise InputError(f"{folder} holds no sft.csv, reward.csv or ppo.csv; name a run's folder")
    contents = {
        "folder": cfg.folder,
        "files": files,
        "commands": {name: command(name) for name in PROGRAMS},
        "machine": platform.platform(),
        "commit": subprocess.getoutput(GIT),
    }
    if "ppo.json" in files:
        data = json.loads(files["ppo.json"])["data"]
        with going_on("going on without the largest gold"):
            contents["max_gold"] = getattr(judge_of(cfg.data, data), "MAX_SCORE", None)
    path = folder / "report.html"
    with replacing(path, encoding="utf-8") as file:
        file.write(make_page(contents))
    print(f"wrote {path}; open it in a browser")


# ---- what lies in the folder ----


def read_files(folder: Path) -> dict[str, dict | str]:
    """{name: contents} of the results that are there: a CSV's by read_table, or the text."""
    files = {}
    for names in (*RESULTS.values(), ["ppo_tokens.csv"]):
        for path in map(folder.joinpath, names):
            if path.is_file():
                is_text = path.suffix != ".csv"
                files[path.name] = path.read_text("utf-8") if is_text else read_table(path)
    return files


def read_table(path: Path) -> dict:
    """`as_json` of a CSV, not more of it than the page shows."""
    shorter = dict.fromkeys(TEXTS, cut)
    frame = pandas.read_csv(path, converters=shorter, keep_default_na=False, na_values="")
    if "token" in frame:
        return as_json(frame[:TOKENS])
    step = 1 + frame.size // NUMBERS
    if "Before" not in frame:
        return as_json(frame.groupby(frame.index // step).first())  # the first that is not empty
    frame = frame[::step].copy()
    worst = frame.sort_values(["gold_after", "score_after"]).index[:WORST]
    others = frame.index.difference([*frame.index[:FIRST], *worst])
    frame.loc[others, frame.columns.intersection(TEXTS)] = None
    return as_json(frame)


def cut(text: str) -> str:
    return text[:CHARACTERS]


def as_json(frame: pandas.DataFrame) -> dict:
    """{"columns": names, "data": rows}; None for an empty cell."""
    return json.loads(frame.to_json(orient="split", index=False, double_precision=6))


# ---- the page ----


def make_page(contents: dict) -> str:
    """The template with the contents as JSON.

    No text of the run can end the element that the JSON stands in: that would take a "<".
    """
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("CONTENTS", text)


if __name__ == "__main__":
    run(main, ReportConfig)
