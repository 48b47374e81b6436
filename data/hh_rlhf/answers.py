"""A second reward for HH-RLHF: -1 for evading a benign question, otherwise 0.

    python data/hh_rlhf/answers.py hh/prompts.csv --times 6
    python train_ppo.py --data hh --out runs/hh --reward-weights 1 6 \\
        --reward runs/hh/reward.pt data/hh_rlhf/answers.py

The reward model of HH-RLHF prefers refusals whatever the prompt is, so PPO learns to refuse
everything. The questions in benign.jsonl are benign. A response to any other prompt gets 0. The
first command repeats each benign question in PPO's prompts, six times in all.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where rlhf/ is
from rlhf.run.errors import InputError
from rlhf.run.files import check_file, write_csv
from rlhf.run.flags import arg
from rlhf.run.messages import read_prompt
from rlhf.run.program import run
from rlhf.run.tables import read_csv

LINES = Path(__file__).with_name("benign.jsonl").read_text(encoding="utf-8").splitlines()
BENIGN = {json.loads(line)["prompt"][-1]["content"] for line in LINES}

SENTENCE = re.compile(r"[^.!?]+[.!?]*")
NO_ANSWER = re.compile(
    r"""
      \b(sorry | apologi[sz]e | afraid | not\ sure | no\ idea | rather\ not | unable)\b
    | \bI\ (can't | cannot | couldn't | don't | didn't | won't | wouldn't)\b
    | \bI\ (can | could | do | did | will | would)\ not\b
    | \bI('m | \ am)\ not\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


def is_benign(prompt) -> bool:
    """prompt: text or messages."""
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]) in BENIGN


def evades(response: str) -> bool:
    """Whether it starts with a question, or one of its first two sentences declines to answer."""
    sentences = SENTENCE.findall(response.replace("’", "'"))
    if not sentences or sentences[0].endswith("?"):
        return True
    return bool(NO_ANSWER.search(" ".join(sentences[:2])))


def score(prompts, responses):
    pairs = zip(prompts, responses)
    return [-float(is_benign(prompt) and evades(response)) for prompt, response in pairs]


# ---- more benign questions among the prompts ----


@dataclass(frozen=True)
class RepeatConfig:
    """Write the benign questions several times into a file of prompts."""

    files: tuple[str, ...] = arg((), "prompts.csv of the data set", flag=False)
    times: int = arg(6, "how often each benign question occurs")


def main(cfg: RepeatConfig) -> None:
    if not cfg.files:
        raise InputError("give the prompts.csv of the data set")
    if cfg.times < 1:
        raise InputError(f"--times {cfg.times}: it must be at least 1")
    for file in cfg.files:
        path = check_file(Path(file))
        cells = list(dict.fromkeys(read_csv(path, ("Prompt",))["Prompt"]))
        benign = [cell for cell in cells if is_benign(read_prompt(cell))]
        cells += benign * (cfg.times - 1)
        write_csv(path, [{"Prompt": cell} for cell in cells])
        share = cfg.times * len(benign) / len(cells)
        print(f"{file}: {len(cells):,} prompts, {100 * share:.0f} % benign questions")


if __name__ == "__main__":
    run(main, RepeatConfig)
