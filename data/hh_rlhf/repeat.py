"""Give benign questions more weight: repeat their rows in a file of a data set.

    python data/hh_rlhf/repeat.py hh/demonstrations.csv --times 4
    python data/hh_rlhf/repeat.py hh/prompts.csv --times 3

The questions are those of benign.jsonl. A second time changes nothing.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where rlhf/ is
from rlhf.run.errors import InputError
from rlhf.run.files import check_file, write_csv
from rlhf.run.flags import arg
from rlhf.run.messages import last_turn, read_prompt
from rlhf.run.program import run
from rlhf.run.tables import read_csv

LINES = Path(__file__).with_name("benign.jsonl").read_text(encoding="utf-8").splitlines()
BENIGN = {json.loads(line)["prompt"][-1]["content"] for line in LINES}


@dataclass(frozen=True)
class RepeatConfig:
    """Repeat the rows of benign questions."""

    files: tuple[str, ...] = arg((), "CSV files of the data set, with a column Prompt", flag=False)
    times: int = arg(3, "how often each of these rows occurs")


def main(cfg: RepeatConfig) -> None:
    if not cfg.files:
        raise InputError("give a CSV file of the data set, such as hh/prompts.csv")
    if cfg.times < 1:
        raise InputError(f"--times {cfg.times}: it must be at least 1")
    for file in cfg.files:
        path = check_file(Path(file))
        table = read_csv(path, ("Prompt",), ("Response", "Chosen", "Rejected")).drop_duplicates()
        rows = table.to_dict("records")
        benign = [row for row in rows if last_turn(read_prompt(row["Prompt"])) in BENIGN]
        rows += benign * (cfg.times - 1)
        write_csv(path, rows)
        share = 100 * cfg.times * len(benign) / len(rows)
        print(f"{file}: {len(rows):,} rows, {share:.0f} % of them benign questions")


if __name__ == "__main__":
    run(main, RepeatConfig)
