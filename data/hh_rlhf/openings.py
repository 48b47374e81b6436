"""Write what people say first in dialogues, as a file of prompts for `rlhf.tools.prepare`.

    python data/hh_rlhf/openings.py harmless-base.jsonl.gz --words 12 --out openings.jsonl

Whole dialogues are long, and PPO reads each prompt four times a step. The first messages are short,
and they suffice to train a policy and to judge it. Each is written once.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where rlhf/ is
from data.formats import read_file
from data.tables import first_turn
from rlhf.run.errors import InputError
from rlhf.run.files import replacing
from rlhf.run.flags import arg
from rlhf.run.messages import read_prompt
from rlhf.run.program import run


@dataclass(frozen=True)
class OpeningsConfig:
    """Write the first messages of dialogues as prompts."""

    files: tuple[str, ...] = arg((), "what rlhf.tools.prepare reads", flag=False)
    words: int = arg(12, "longest message, in words")
    out: str = arg("openings.jsonl", "file to write")


def main(cfg: OpeningsConfig) -> None:
    if not cfg.files:
        raise InputError("give one or more files of dialogues")
    openings = {}
    for file in cfg.files:
        for row in read_file(Path(file), {}).rows:
            opening = first_turn(read_prompt(row.prompt))
            if len(opening.split()) <= cfg.words:
                openings[opening] = None
    with replacing(Path(cfg.out), encoding="utf-8") as file:
        for opening in openings:
            prompt = [{"role": "user", "content": opening}]
            file.write(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
    print(f"{cfg.out}: {len(openings):,} prompts")


if __name__ == "__main__":
    run(main, OpeningsConfig)
