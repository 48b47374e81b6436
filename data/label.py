"""Collect comparisons: a person says which of two responses is better.

    python -m rlhf.tools.label --checkpoint runs/sft.pt --out my_comparisons.csv
    python -m rlhf.tools.label --pairs pairs.jsonl --web
    python -m rlhf.tools.label --again
    python train_reward.py --comparison-files my_comparisons.csv

Shows a prompt and two responses, at the terminal (data/label_terminal.py) or on a page in the
browser (data/label_web.py). Each vote is written to the file at once: if the process is killed, no
vote is lost, and a second call continues where the first stopped. data/label_votes.py has the file,
data/label_pairs.py the pairs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import label_terminal, label_web
from data.label_pairs import ListedPairs, SampledPairs, pairs_again, pairs_of_file
from data.label_reward import RewardCheck
from data.label_votes import Labelling, agreement, read_votes
from rlhf.data import load_prompts
from rlhf.run.commands import command
from rlhf.run.device import pick_device
from rlhf.run.files import check_file
from rlhf.run.flags import arg, check_positive
from rlhf.run.heldout import HELDOUT_SHARE
from rlhf.run.loading import load_policy, tokenizer_of


@dataclass(frozen=True)
class LabelConfig:
    """Compare pairs of responses, and keep the votes."""

    checkpoint: str = arg("runs/sft.pt", "sft.pt or ppo.pt that gives the responses")
    pairs: str = arg("", "file of pairs to label, instead of sampled ones")
    out: str = arg("my_comparisons.csv", "file of votes; an existing one is continued")
    reward: str = arg("", "reward.pt to compare with after the last vote")
    again: bool = arg(False, "label the pairs of --out again, into *_again.csv")
    web: bool = arg(False, "label on a page in the browser")
    port: int = arg(0, "port of the page (0: any that is free)")
    count: int = arg(0, "stop when the file holds N votes (0: never)")
    data: str = arg("", "data set folder (empty: the checkpoint's)")
    max_new_tokens: int = arg(40, "longest response in tokens")
    device: str = arg("auto", "auto: a CUDA GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = arg(0, "random seed")

    def __post_init__(self):
        check_positive(self, "max_new_tokens")
        if not self.out:
            raise ValueError("--out must name a file")
        if self.pairs and self.again:
            raise ValueError("--again takes the pairs of --out; leave out --pairs")
        if self.port and not self.web:
            raise ValueError("--port needs --web")
        if self.port > 65535:
            raise ValueError(f"--port is {self.port}: it must be at most 65535")

    def lock_file(self) -> Path:
        return Path(f"{self.out}.lock")

    def votes_file(self) -> Path:
        """Where this pass is written."""
        out = Path(self.out)
        return out.with_name(f"{out.stem}_again.csv") if self.again else out


def main(cfg: LabelConfig, annotate: Callable[[Labelling], None] | None = None) -> None:
    """annotate: has the pairs answered; without it, a person does."""
    pairs = find_pairs(cfg)
    reward = None
    if cfg.reward:  # loaded first, so that a wrong name costs no votes
        reward = RewardCheck(Path(cfg.reward), cfg.data, pick_device(cfg.device))
    path = cfg.votes_file()
    labelling = Labelling(pairs, path, cfg.count)
    if labelling.votes:
        print(f"{path}: going on after {labelling.summary()}")
    if annotate is None:
        web = functools.partial(label_web.annotate, port=cfg.port)
        annotate = web if cfg.web else label_terminal.annotate
    annotate(labelling)
    print(f"{path}: {labelling.summary()}")
    if reward:
        print(reward.agreement(labelling.votes))
    if cfg.again:
        print(agreement(read_votes(Path(cfg.out)), labelling.votes))
    else:
        print(f"next: {command('reward')} --comparison-files {path}")


def find_pairs(cfg: LabelConfig) -> ListedPairs | SampledPairs:
    """The pairs that the flags ask for."""
    if cfg.again:
        first_pass = check_file(Path(cfg.out), "give --out the file of the first pass")
        return pairs_again(read_votes(first_pass), cfg.seed)
    if cfg.pairs:
        return pairs_of_file(Path(cfg.pairs), cfg.seed)
    path = Path(cfg.checkpoint)
    device = pick_device(cfg.device)
    gpt, checkpoint = load_policy(path, "sft", "ppo")
    data = cfg.data or checkpoint["config"]["data"]
    tokenizer = tokenizer_of(path, checkpoint, data)
    limit = gpt.config.block_size - cfg.max_new_tokens
    prompts = load_prompts(
        data, tokenizer, limit, share=checkpoint["config"].get("heldout", HELDOUT_SHARE)
    )
    return SampledPairs(gpt.to(device), prompts, tokenizer, cfg.max_new_tokens, cfg.seed)
