"""An option of train_reward.py: rankings of K responses to a prompt, in place of comparisons of two.

    rankings.csv        Prompt, Response, Rank       the rows of one prompt are one ranking; the lower the better
                        Group                        optional: tells rankings of the same prompt apart

Annotators who rank K responses give K(K-1)/2 comparisons for little more work. Those are not independent, so a prompt's
pairs are one element of the loss, and its responses go through the model once, not once a pair (Ouyang et al. 2022,
section 3.5).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data import encode_response, pad_rows
from rlhf.losses import ranking_loss
from rlhf.support.cli import InputError
from rlhf.support.runtime import autocast
from rlhf.support.tables import check_lengths, read_csv
from rlhf.tokenizer import Tokenizer


class Ranking(NamedTuple):
    responses: list[list[int]]  # prompt, response and end-of-text of each
    ranks: list[int]

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return sum(map(len, self.responses))


def load_rankings(path: Path, tokenizer: Tokenizer, limit: int) -> list[Ranking]:
    """One Ranking a prompt (and group), in the order in which they first come. A response that comes again in its
    ranking counts once, where it stands first: against itself it can teach nothing. A ranking without a pair (a single
    response, or all tied) is dropped. Both counts are printed."""
    found, lengths, again = {}, [], 0
    frame = read_csv(path, ("Prompt", "Response", "Rank"), optional=("Group",))
    for row, (prompt, response, rank, *group) in enumerate(frame.itertuples(index=False), start=1):
        if not (rank.strip().isdecimal() and len(rank) < 11 and int(rank) < 2**31):
            raise InputError(f"{path}, row {row}: Rank is {rank[:40]!r}; it must be a whole number below 2**31")
        ranking = found.setdefault((prompt, *group), Ranking([], []))
        tokens = tokenizer.encode(prompt) + encode_response(tokenizer, response)
        lengths.append(len(tokens))
        if tokens in ranking.responses:
            again += 1
            continue
        ranking.responses.append(tokens)
        ranking.ranks.append(int(rank))
    check_lengths(path, lengths, limit, "the prompt with its response")
    if again:
        print(f"{path}: {again} responses left out, which come twice in their ranking")
    kept = [ranking for ranking in found.values() if len(set(ranking.ranks)) > 1]
    if len(kept) < len(found):
        print(f"{path}: {len(found) - len(kept)} of {len(found)} rankings dropped, they have no two ranks")
    if not kept:
        raise InputError(f"{path}: no ranking has two responses of different rank; there is nothing to learn")
    return kept


def ranking_batch(rows: list[Ranking], pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens (R, T) and lengths (R,) of all responses of all rows; ranks (N, K), -1 where a row has fewer than K."""
    tokens, lengths = pad_rows([response for row in rows for response in row.responses], pad_id, device)
    K = max(len(row.ranks) for row in rows)
    return tokens, lengths, torch.tensor([row.ranks + [-1] * (K - len(row.ranks)) for row in rows], device=device)


def score_rankings(model, rows: list[Ranking], pad_id: int, device, amp) -> tuple[Tensor, Tensor]:
    """The loss of a batch of rankings, and the margins of all its pairs, better minus worse."""
    tokens, lengths, ranks = ranking_batch(rows, pad_id, device)  # (R, T), (R,), (N, K)
    with autocast(device, amp):
        flat = model(tokens, lengths)  # (R,)
    scores = flat.new_zeros(ranks.shape).masked_scatter(ranks >= 0, flat)  # (N, K)
    better = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & (ranks.unsqueeze(2) >= 0)  # (N, K, K): i beats j
    return ranking_loss(scores, ranks), (scores.unsqueeze(2) - scores.unsqueeze(1))[better].detach()
