"""Simulated votes: rlhf.tools.label with the data set's judge.py in the place of a person.

    python -m docs.experiments.votes --checkpoint runs/sft.pt --out votes.csv --count 1000

The judge votes with its annotators' noise if it defines preference_probability, else for the higher
gold. If the judge is a language model, this is AI feedback (RLAIF, Bai et al. 2022).
"""

import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from data import label
from data.label import LabelConfig
from data.label_votes import Labelling, Pair
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import check_positive
from rlhf.run.judge import gold_scores, vote_probabilities
from rlhf.run.loading import judge_of
from rlhf.run.program import run


@dataclass(frozen=True)
class VotesConfig(LabelConfig):
    """Let the judge of the data set compare pairs of sampled responses."""

    out: str = "votes.csv"
    count: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "count")
        if self.web or self.again:
            raise ValueError("--web and --again need a person: python -m rlhf.tools.label")


def main(cfg: VotesConfig) -> None:
    checkpoint = load_checkpoint(Path(cfg.checkpoint), "sft", "ppo")
    data = checkpoint["config"]["data"]
    judge = judge_of(cfg.data, data)
    if judge is None:
        raise InputError(f"{cfg.data or data} has no judge.py")

    def annotate(labelling: Labelling) -> None:
        while pair := labelling.pair:
            rng = random.Random(f"{cfg.seed} vote {pair.number}")
            labelling.answer(judge_answer(judge, pair, rng))
            if len(labelling.votes) % 500 == 0:
                print(labelling.summary(), flush=True)

    label.main(cfg, annotate)


def judge_answer(judge: ModuleType, pair: Pair, rng: random.Random) -> str:
    """The judge's vote: with its annotators' noise if it knows that, else for the higher gold."""
    gold_first, gold_second = gold_scores(judge, [pair.prompt] * 2, [pair.first, pair.second])
    probabilities = vote_probabilities(judge, [gold_first], [gold_second])
    if probabilities is not None:
        return "first" if rng.random() < probabilities[0] else "second"
    if gold_first == gold_second:
        return "tie"
    return "first" if gold_first > gold_second else "second"


if __name__ == "__main__":
    run(main, VotesConfig)
