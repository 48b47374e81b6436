"""How often a reward model agrees with the votes. It is told after the last vote, never before: who
knows the model's choice is no independent judge of it."""

from pathlib import Path

import torch

from data.label_votes import DECIDED, Vote, share_in_words
from rlhf.data import pad_rows
from rlhf.run.loading import load_reward_model, tokenizer_of
from rlhf.run.messages import read_prompt

PAIRS = 16  # that are scored at once


class RewardCheck:
    """A reward model, to be asked when the votes are there."""

    def __init__(self, path: Path, data: str, device: torch.device):
        """data: folder with its tokenizer (empty: the checkpoint's). Raises InputError if it cannot
        be loaded."""
        model, checkpoint = load_reward_model(path)
        self.path = path
        self.model = model.to(device)
        self.tokenizer = tokenizer_of(path, checkpoint, data or checkpoint["config"]["data"])

    def agreement(self, votes: list[Vote]) -> str:
        """One line: in how many votes with a better side that has the higher score. Pairs that are
        too long for the model do not count."""
        rows = []
        for vote in votes:
            pair = [self.ids(vote, side) for side in (vote.chosen, vote.rejected)]
            if vote.answer in DECIDED and max(map(len, pair)) <= self.model.gpt.config.block_size:
                rows += pair
        same = 0
        for at in range(0, len(rows), 2 * PAIRS):
            chosen, rejected = self.scores(rows[at : at + 2 * PAIRS])
            same += int((chosen > rejected).sum())
        share = share_in_words(same, len(rows) // 2)
        return f"{self.path} gives the better side the higher score: {share}"

    def ids(self, vote: Vote, side: str) -> list[int]:
        prompt_ids = self.tokenizer.prompt_ids(read_prompt(vote.prompt))
        return prompt_ids + self.tokenizer.response_ids(side)

    @torch.no_grad()
    def scores(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows chosen, rejected, chosen, ... -> scores of the chosen (n,) and the rejected (n,)."""
        device = next(self.model.parameters()).device
        tokens, lengths = pad_rows(rows, self.tokenizer.pad_id, device)  # (2n, T), (2n,)
        scores = self.model(tokens, lengths)  # (2n,)
        return scores[::2], scores[1::2]
