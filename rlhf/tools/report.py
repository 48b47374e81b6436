"""One page about a run: whether it worked, how training went, the texts before and after, and what
each quantity of PPO does to each token.

    python -m rlhf.tools.report runs        # writes runs/report.html

The page is one file that a browser opens without a network. It shows what the folder holds, also
while the run still lasts; a stage without its files is left out. The numbers stand in the page as
JSON, and its script draws them (report.html, beside this file). Text of data and models stays text.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas
import torch
from torch import Tensor

from rlhf.data import Prompt, pad_prompts
from rlhf.evaluate import describe
from rlhf.model import PolicyWithValue
from rlhf.ppo import assign_credit, update
from rlhf.rewards import shape_rewards
from rlhf.rollout import Rollout, collect, score_rows
from rlhf.run.checkpoints import load_weights
from rlhf.run.commands import PROGRAMS, command
from rlhf.run.device import make_generator
from rlhf.run.errors import InputError
from rlhf.run.files import replacing
from rlhf.run.flags import arg
from rlhf.run.optimizer import make_optimizer
from rlhf.run.program import run
from rlhf.run.training import RESULTS
from rlhf.tools.optimality import Run, RunConfig, load_run

TEMPLATE = Path(__file__).with_suffix(".html")
TEXTS = ("Prompt", "last_turn", "Before", "After")  # columns of ppo_samples.csv
# What the page holds at most, so that it stays below 500 KB:
NUMBERS = 5_000  # of a table
FIRST, WORST = 20, 5  # rows with responses: the first, and those with the least gold
CHARACTERS = 600  # of a prompt or response
RESPONSES = 12  # of a PPO step
TOKENS = 1_200  # of all these responses


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, a page about a run."""

    folder: str = arg("runs", "folder of the run", flag=False)
    sft: str = arg("", "the policy's reference (empty: sft.pt in the folder)")
    reward: tuple[str, ...] = arg((), "its rewards (empty: reward.pt in the folder)")
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
    }
    try:
        contents |= ask_models(RunConfig(str(folder / "ppo.pt"), cfg.sft, cfg.reward, cfg.data))
    except InputError as error:
        contents["missing"] = str(error)
    path = folder / "report.html"
    with replacing(path, encoding="utf-8") as file:
        file.write(make_page(contents))
    print(f"wrote {path}; open it in a browser")


# ---- what lies in the folder ----


def read_files(folder: Path) -> dict[str, dict | str]:
    """{name: contents} of the results that are there: a CSV's by read_table, or the text."""
    files = {}
    for names in RESULTS.values():
        for path in map(folder.joinpath, names):
            if path.is_file():
                is_table = path.suffix == ".csv"
                files[path.name] = read_table(path) if is_table else path.read_text("utf-8")
    return files


def read_table(path: Path) -> dict:
    """`as_json` of a CSV, not more of it than the page shows."""
    shorter = dict.fromkeys(TEXTS, cut)
    frame = pandas.read_csv(path, converters=shorter, keep_default_na=False, na_values="")
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


# ---- what the models say ----


def ask_models(cfg: RunConfig) -> dict:
    """Some responses, and the numbers of a PPO step on each of their tokens, in one table.

    Raises InputError if a file is missing, or if code is needed that the user has not named.
    """
    run = load_run(cfg)
    prompts = run.prompts[:RESPONSES]
    rollout, columns = take_step(run, prompts)
    tokenizer = run.frozen.tokenizer
    actions = rollout.tokens[:, 1:][rollout.mask].tolist()
    tokens = {"token": [tokenizer.decode([action]) for action in actions]}
    for name, x in columns.items():
        tokens[name] = x[rollout.mask].tolist()
    responses = describe(prompts, rollout, tokenizer, run.judge)
    return {
        "kl_coef": run.checkpoint["kl_coef"],
        "max_gold": getattr(run.judge, "MAX_SCORE", None),
        "responses": as_json(pandas.DataFrame(responses)),
        "tokens": as_json(pandas.DataFrame(tokens)[:TOKENS]),
    }


def take_step(run: Run, prompts: list[Prompt], seed: int = 0) -> tuple[Rollout, dict[str, Tensor]]:
    """Sample responses to the prompts, and take one gradient step on all of them.

    It is a step of train_ppo.py with GAE and a new optimizer.

    Returns: the rollout; {name: (B, T-1)}, where new_ means after the step.
    """
    config = run.checkpoint["config"]
    compute = run.compute
    policy = with_values(run)
    # ---- 1 generate, 2 score ----
    tokens, prompt_lens = pad_prompts(prompts, run.frozen.tokenizer.pad_id, compute.device)
    generator = make_generator(compute.device, seed, "walk")
    rollout = collect(policy, run.frozen, tokens, prompt_lens, generator, prompts)
    mask = rollout.mask
    # ---- 3 shape ----
    kl_coef = run.checkpoint["kl_coef"]
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)
    # ---- 4 credit ----
    one_minibatch = {"inner_epochs": 1, "minibatch_size": len(prompts)}
    cfg = SimpleNamespace(**config | one_minibatch)
    experience = assign_credit(rollout, rewards, cfg)
    # ---- 5 losses, 6 update ----
    optimizer = make_optimizer(policy, cfg.lr, weight_decay=0.0, eps=1e-5)
    update(policy, optimizer, compute, experience, cfg, step=0)
    with torch.no_grad():
        after = score_rows(policy, run.frozen, rollout.tokens, mask, prompt_lens)
    return rollout, {
        "logprob": rollout.logprobs,
        "ref": rollout.ref_logprobs,
        "reward": rewards,
        "value": rollout.values,
        "advantage": experience.returns - rollout.values,
        "whitened": experience.advantages,
        "return": experience.returns,
        "new_logprob": after.logprobs,
        "new_value": after.values,
    }


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
    return policy.to(run.compute.device)


# ---- the page ----


def make_page(contents: dict) -> str:
    """The template with the contents as JSON.

    No text of the run can end the element that the JSON stands in: that would take a "<".
    """
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("CONTENTS", text)


if __name__ == "__main__":
    run(main, ReportConfig)
