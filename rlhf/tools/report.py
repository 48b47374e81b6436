"""One page about a run: whether it worked, how training went, the texts before and after, and what
each quantity of PPO does to each token.

    python -m rlhf.tools.report runs        # writes runs/report.html

The page is one file that a browser opens without a network. It shows what the folder holds, also
while the run still lasts; a stage without its files is left out. The numbers stand in the page as
JSON, and its script draws them (report.html, beside this file). Text of data and models stays text.
"""

import importlib
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas
import torch

from rlhf.data import load_comparisons
from rlhf.evaluate import describe
from rlhf.methods.look import by_token, take_step, vote_margins
from rlhf.model import PolicyWithValue
from rlhf.run.checkpoints import load_weights
from rlhf.run.commands import PROGRAMS, command
from rlhf.run.device import Compute, setup
from rlhf.run.errors import InputError
from rlhf.run.files import replacing
from rlhf.run.flags import arg, to_json
from rlhf.run.program import run
from rlhf.tools.optimality import Run, RunConfig, load_run

TEMPLATE = Path(__file__).with_suffix(".html")
STAGES = {"sft": "SFTConfig", "reward": "RewardConfig", "ppo": "PPOConfig"}
TABLES = (*STAGES, "reward_evaluation", "evaluation", "ppo_samples")
TEXTS = ("Prompt", "last_turn", "Before", "After")  # columns of ppo_samples.csv
# What the page holds at most, so that it stays below 500 KB:
POINTS = 300  # of a curve
FIRST, WORST = 20, 5  # prompts with responses: the first, and those with the least gold
LONGEST = 600  # characters of a prompt or response
PAIRS = 2_000  # comparisons
ROLLOUT, SHOWN = 32, 6  # responses of a PPO step, and how many of them are shown


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, a page about a run."""

    folder: str = arg("runs", "folder of the run", flag=False)
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    reward: tuple[str, ...] = arg((), "PPO's rewards (empty: the reward model)")


def main(cfg: ReportConfig) -> None:
    folder = Path(cfg.folder)
    tables = {name: read_table(folder / f"{name}.csv") for name in TABLES}
    if not any(tables.values()):
        raise InputError(f"{folder} holds no sft.csv, reward.csv or ppo.csv; name a run's folder")
    contents = {
        "folder": cfg.folder,
        "tables": tables,
        "stages": {kind: read_stage(folder, kind) for kind in STAGES},
        "machine": f"{platform.platform()}, {torch.get_num_threads()} threads",
        "commit": find_commit(TEMPLATE.parents[2]),
    }
    try:
        ask_models(contents, RunConfig(str(folder / "ppo.pt"), "", cfg.reward, cfg.data))
    except InputError as error:
        contents["missing"] = str(error)
    path = folder / "report.html"
    with replacing(path, encoding="utf-8") as file:
        file.write(make_page(contents))
    print(f"wrote {path}; open it in a browser")


# ---- what lies in the folder ----


def read_table(path: Path) -> dict | None:
    """{"columns": names, "data": rows} of a CSV, not more than the page shows; None if there is no
    such file."""
    if not path.is_file():
        return None
    types = dict.fromkeys(TEXTS, str)
    frame = pandas.read_csv(path, dtype=types, keep_default_na=False, na_values="")
    if "step" in frame:
        groups = frame.index // math.ceil(len(frame) / POINTS)
        frame = frame.groupby(groups).first()  # of each column, the first that is not empty
    if "Before" in frame:
        leave_out_texts(frame)
    return json.loads(frame.to_json(orient="split", index=False, double_precision=6))


def leave_out_texts(frame: pandas.DataFrame) -> None:
    """Keep the texts of the FIRST rows of ppo_samples.csv, and of the WORST by gold, else score."""
    worst = frame.sort_values(["gold_after", "score_after"]).index[:WORST]
    shown = frame.index.isin([*range(FIRST), *worst])
    for name in frame.columns.intersection(TEXTS):
        frame[name] = frame[name].where(shown, "").str[:LONGEST]


def read_stage(folder: Path, kind: str) -> dict:
    """The settings and warnings of a stage as text, its default settings, and its command."""
    script = importlib.import_module(PROGRAMS[kind])
    config = getattr(script, STAGES[kind])
    return {
        "settings": read_text(folder / f"{kind}.json"),
        "warnings": read_text(folder / f"{kind}_warnings.txt"),
        "defaults": to_json(config()),
        "command": command(kind),
    }


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def find_commit(root: Path) -> str:
    """The commit of the clone in this folder, which is the run's if the page is made right after
    it; "" if it is no clone."""
    lines = read_text(root / ".git" / "logs" / "HEAD").splitlines()  # old commit, new commit, ...
    return lines[-1].split()[1] if lines else ""


# ---- what the models say ----


def ask_models(contents: dict, cfg: RunConfig) -> None:
    """Add a PPO step, token by token, and the reward model's opinion of the votes.

    Raises InputError if a file is missing, or if code is needed that the user has not named.
    """
    run = load_run(cfg)
    config = run.checkpoint["config"]
    tokenizer = run.frozen.tokenizer
    max_gold = getattr(run.judge, "MAX_SCORE", None)
    contents |= {"kl_coef": run.checkpoint["kl_coef"], "max_gold": max_gold}
    if config.get("advantage") == "gae":
        contents["responses"] = follow_responses(run, setup(cfg.device, config["amp"]))
    if run.frozen.reward_model is not None:
        data = cfg.data or config["data"]
        pairs = load_comparisons(data, tokenizer, run.frozen.context, True, config["heldout"])
        margins = vote_margins(run.frozen.reward_model, pairs[:PAIRS], tokenizer.pad_id)
        contents["margins"] = margins


def with_values(run: Run) -> PolicyWithValue:
    """The policy with its value network, or with the value head on its own network.

    Raises InputError if there is neither.
    """
    config = run.checkpoint["config"]
    if config.get("advantage") != "gae":  # DPO has none
        raise InputError(
            f"{run.path} has no value network to follow: give a ppo.pt of --advantage gae"
        )
    value_gpt = None
    if config["value_network"] != "shared":
        # It has the sizes of the reward model or, without one, of the policy.
        sized = run.frozen.reward_model or run
        value_gpt = type(sized.gpt)(sized.gpt.config)
    policy = PolicyWithValue(run.gpt, value_gpt)
    load_weights(run.path, policy, run.checkpoint["model"])
    return policy.to(next(run.gpt.parameters()).device)


def follow_responses(run: Run, compute: Compute) -> list[dict]:
    """The first SHOWN responses of a PPO step, with the numbers of each token."""
    prompts = run.prompts[:ROLLOUT]
    config = run.checkpoint["config"]
    kl_coef = run.checkpoint["kl_coef"]
    policy = with_values(run)
    rollout, columns = take_step(policy, run.frozen, prompts, kl_coef, config, compute)
    tokenizer = run.frozen.tokenizer
    described = describe(prompts, rollout, tokenizer, run.judge)
    responses = []
    for row, response in enumerate(described[:SHOWN]):
        numbers = by_token(rollout, row, columns, tokenizer)
        responses.append({**asdict(response), "columns": numbers})
    return responses


# ---- the page ----


def make_page(contents: dict) -> str:
    """The template with the contents as JSON.

    What HTML or JavaScript could take for their own is escaped, so that no text of the run ends the
    element that the JSON stands in.
    """
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace("CONTENTS", text)


if __name__ == "__main__":
    run(main, ReportConfig)
