"""An option of train_reward.py: rankings of K responses to a prompt, in place of comparisons of
two.

    rankings.csv   Prompt, Response, Rank   the rows of one prompt are one ranking; lower is better
                   Group                    optional: separates rankings of the same prompt

Annotators who rank K responses give K(K-1)/2 comparisons for little more work. Those are not
independent, so a prompt's pairs are one element of the loss, and its responses go through the model
once rather than once per pair (Ouyang et al. 2022, section 3.5).
"""

from typing import NamedTuple

from pandas import to_numeric
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
    ranks: list[int]  # 1, 2, ...; equal ranks are ties

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
    can teach nothing. A ranking without a pair (a single response, or all tied) is dropped. The
    number of rows that are left out is printed.
    """
    [(path, frame)] = read_rows(folder, "rankings", heldout=False, share=share)
    ranks = to_numeric(frame["Rank"], errors="coerce")
    faults = ["is not a number" if is_nan else "" for is_nan in ranks.isna()]
    check_rows(path, "Rank", faults, index=frame.index)
    tokens = []
    for row in frame.itertuples():
        tokens.append(tokenizer.prompt_ids(row.Prompt) + tokenizer.response_ids(row.Response))
    lengths = list(map(len, tokens))
    check_lengths(path, frame.index, lengths, limit, "the prompt with its response")

    keys = [name for name in ("PromptCell", "Group") if name in frame]
    frame = frame.assign(tokens=tokens, Rank=ranks)
    different = frame.drop_duplicates([*keys, "Response"])
    rankings = []
    for _, rows in different.groupby(keys, sort=False):
        places = rows["Rank"].rank(method="dense").astype(int).tolist()
        if max(places) > 1:
            rankings.append(Ranking(rows["tokens"].tolist(), places))
    if not rankings:
        raise InputError(
            f"{path}: no ranking has two responses of different rank; there is nothing to learn"
        )
    left_out = len(frame) - sum(len(ranking.ranks) for ranking in rankings)
    if left_out:
        print(
            f"{path}: {left_out} of {len(frame)} rows left out: responses that come again in their "
            f"ranking, and rankings without two ranks"
        )
    return rankings


# ---- the loss ----


def score_rankings(
    model: RewardModel, rows: list[Ranking], pad_id: int, compute: Compute
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch of rankings; the margins of all pairs, better minus worse; the scores of
    all R responses."""
    responses = [tokens for row in rows for tokens in row.responses]
    tokens, lengths = pad_rows(responses, pad_id, compute.device)  # (R, T), (R,)
    # A ranking of fewer than K responses ends with -1.
    ranks, _ = pad_rows([row.ranks for row in rows], -1, compute.device)  # (N, K)
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
