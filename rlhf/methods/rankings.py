"""An option of train_reward.py: rankings of K responses to a prompt, in place of comparisons of
two.

    rankings.csv   Prompt, Response, Rank   the rows of one prompt are one ranking; lower is better
                   Group                    optional: separates rankings of the same prompt

Annotators who rank K responses give K(K-1)/2 comparisons for little more work. Those are not
independent, so a prompt's pairs are one element of the loss, and its responses go through the model
once rather than once per pair (Ouyang et al. 2022, section 3.5).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data import pad_rows
from rlhf.losses import ranking_loss
from rlhf.model import RewardModel
from rlhf.run.device import Compute
from rlhf.run.errors import InputError
from rlhf.run.heldout import HELDOUT_SHARE, read_rows
from rlhf.run.tables import check_lengths, check_rows
from rlhf.tokenizer import Tokenizer

# ---- reading ----


class Ranking(NamedTuple):
    responses: list[list[int]]  # prompt, response and end-of-text of each
    ranks: list[int]

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return sum(map(len, self.responses))


def load_rankings(
    folder: str, tokenizer: Tokenizer, limit: int, share: float = HELDOUT_SHARE
) -> list[Ranking]:
    """The folder's rankings to train on: one per prompt (and group), in the order in which they
    first come.

    A response that comes again in its ranking counts once, where it stands first: against itself it
    can teach nothing. A ranking without a pair (a single response, or all tied) is dropped. Both
    counts are printed.
    """
    [(path, frame)] = read_rows(folder, "rankings", heldout=False, share=share)
    check_rows(path, "Rank", [rank_fault(rank) for rank in frame["Rank"]], index=frame.index)
    tokens = []
    for row in frame.itertuples():
        tokens.append(tokenizer.prompt_ids(row.Prompt) + tokenizer.response_ids(row.Response))
    lengths = [len(ids) for ids in tokens]
    check_lengths(path, frame.index, lengths, limit, "the prompt with its response")

    keys = [name for name in ("PromptCell", "Group") if name in frame]
    different = frame.assign(tokens=tokens).drop_duplicates([*keys, "Response"])
    rankings = []
    for _, rows in different.groupby(keys, sort=False):
        rankings.append(Ranking(rows["tokens"].tolist(), rows["Rank"].astype(int).tolist()))
    kept = [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]
    if len(different) < len(frame):
        repeated = len(frame) - len(different)
        print(f"{path}: {repeated} responses left out, which come twice in their ranking")
    if len(kept) < len(rankings):
        dropped = f"{len(rankings) - len(kept)} of {len(rankings)} rankings dropped"
        print(f"{path}: {dropped}, they have no two ranks")
    if not kept:
        raise InputError(
            f"{path}: no ranking has two responses of different rank; there is nothing to learn"
        )
    return kept


def rank_fault(rank: str) -> str:
    """What is wrong with a rank, or ""."""
    if rank.isdecimal() and len(rank) < 11 and int(rank) < 2**31:
        return ""
    return f"is {rank[:40]!r}; it must be a whole number below 2**31"


# ---- the loss ----


def ranking_batch(rows: list[Ranking], pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens (R, T) and lengths (R,) of all responses of all rows; ranks (N, K), -1 where a row
    has fewer than K."""
    responses = []
    for row in rows:
        responses += row.responses
    tokens, lengths = pad_rows(responses, pad_id, device)  # (R, T), (R,)
    K = max(len(row.ranks) for row in rows)
    padded = [row.ranks + [-1] * (K - len(row.ranks)) for row in rows]
    return tokens, lengths, torch.tensor(padded, device=device)


def score_rankings(
    model: RewardModel, rows: list[Ranking], pad_id: int, compute: Compute
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch of rankings; the margins of all pairs, better minus worse; the scores."""
    tokens, lengths, ranks = ranking_batch(rows, pad_id, compute.device)  # (R, T), (R,), (N, K)
    with compute.autocast():
        flat = model(tokens, lengths)  # (R,)
    scores = flat.new_zeros(ranks.shape).masked_scatter(ranks >= 0, flat)  # (N, K)
    return ranking_loss(scores, ranks), pair_margins(scores, ranks).detach(), flat.detach()


def pair_margins(scores: Tensor, ranks: Tensor) -> Tensor:
    """The score of the better minus that of the worse, of all pairs: (N, K), (N, K) -> (pairs,)."""
    first = ranks.unsqueeze(2)  # (N, K, 1)
    second = ranks.unsqueeze(1)  # (N, 1, K)
    better = (first < second) & (first >= 0)  # (N, K, K): True where i beats j
    margins = scores.unsqueeze(2) - scores.unsqueeze(1)  # (N, K, K)
    return margins[better]
