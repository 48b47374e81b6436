"""The pairs that a person votes on: sampled from a policy, of a file, or of earlier votes.

Each class has next_pair(votes), the pair to show after these votes, and left(votes), how many there
are; None means that there is no pair, and that there is no end.
"""

import random
from pathlib import Path

from data.formats import as_cell, read_file
from data.label_votes import Pair, Vote
from data.tables import pair_up
from rlhf.data import Prompt, choose_batch, pad_prompts
from rlhf.model import GPT
from rlhf.rollout import decode_responses
from rlhf.run.device import make_generator
from rlhf.run.errors import InputError
from rlhf.sampling import generate, has_ended
from rlhf.tokenizer import Tokenizer

BLOCK = 16  # pairs sampled at once
PATIENCE = 640  # pairs in a row that leave nothing to choose


# ---- of a policy: they follow from (checkpoint, seed, number) ----


class SampledPairs:
    """The numbered pairs of a policy. They are sampled in blocks, and each block once.

    Both sides are drawn alike, so which is first is random.
    """

    def __init__(
        self,
        gpt: GPT,
        prompts: list[Prompt],
        tokenizer: Tokenizer,
        max_new_tokens: int,
        seed: int,
    ):
        self.gpt = gpt
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.blocks: dict[int, list[Pair]] = {}

    def left(self, votes: list[Vote]) -> None:
        return None

    def next_pair(self, votes: list[Vote]) -> Pair:
        """The first pair to show whose number is above those of all votes."""
        return self.first_from(1 + max((vote.pair for vote in votes), default=-1))

    def first_from(self, number: int) -> Pair:
        """The first pair to show that has this number or a higher one."""
        last_block = (number + PATIENCE) // BLOCK
        for block in range(number // BLOCK, last_block + 1):
            for pair in self.block(block):
                if pair.number >= number:
                    return pair
        raise InputError(
            f"the last {PATIENCE} pairs left nothing to choose: both answers were the same, or one "
            f"was cut off; give a larger --max-new-tokens, or another --checkpoint"
        )

    def block(self, block: int) -> list[Pair]:
        """The pairs of a block that are shown."""
        if block not in self.blocks:
            prompts = choose_batch(self.prompts, BLOCK, block, self.seed)
            answers = self.sample_answers(prompts, block)
            self.blocks[block] = self.make_pairs(prompts, answers, block)
        return self.blocks[block]

    def sample_answers(self, prompts: list[Prompt], block: int) -> list[str]:
        """Two answers to each prompt, one after the other; "" for one that was cut off."""
        tokenizer = self.tokenizer
        device = next(self.gpt.parameters()).device
        twice = [prompt for prompt in prompts for _ in range(2)]
        tokens, prompt_lens = pad_prompts(twice, tokenizer.pad_id, device)  # (B, P), (B,)
        generator = make_generator(device, self.seed, "label", block)
        tokens, mask = generate(
            self.gpt, tokens, prompt_lens, self.max_new_tokens, tokenizer.stop_ids, generator
        )  # (B, T), (B, T-1)
        texts = decode_responses(tokenizer, tokens, mask)
        ended = has_ended(tokens, mask, tokenizer.stop_ids).tolist()
        return [text if has_end else "" for text, has_end in zip(texts, ended)]

    def make_pairs(self, prompts: list[Prompt], answers: list[str], block: int) -> list[Pair]:
        pairs = []
        for i, prompt in enumerate(prompts):
            first, second = answers[2 * i : 2 * i + 2]
            if self.leaves_a_choice(prompt, first, second):
                pairs.append(Pair(block * BLOCK + i, as_cell(prompt.given), first, second))
        return pairs

    def leaves_a_choice(self, prompt: Prompt, first: str, second: str) -> bool:
        """Not if an answer is empty or was cut off, if both are equal, or if a reward model could
        not read one again: it does not fit, or holds a NUL byte, as untrained models say it."""
        if not first or not second or first == second or "\0" in first + second:
            return False
        lengths = [len(self.tokenizer.response_ids(side)) for side in (first, second)]
        return len(prompt.tokens) + max(lengths) <= self.gpt.config.block_size


# ---- that exist already ----


class ListedPairs:
    """Pairs of a list, each once. Those without a vote are shown, in their order."""

    def __init__(self, pairs: list[Pair]):
        self.pairs = list({pair.key: pair for pair in pairs}.values())

    def left(self, votes: list[Vote]) -> int:
        return len(self.without_vote(votes))

    def next_pair(self, votes: list[Vote]) -> Pair | None:
        return next(iter(self.without_vote(votes)), None)

    def without_vote(self, votes: list[Vote]) -> list[Pair]:
        done = {vote.shown.key for vote in votes}
        return [pair for pair in self.pairs if pair.key not in done]


def pairs_of_file(path: Path, seed: int) -> ListedPairs:
    """The comparisons of a file in any form that data/formats.py reads, in its order. Which side is
    first is drawn, so that it says nothing about which one the file calls better.

    Raises InputError if the file cannot be read, or has no comparisons.
    """
    source = read_file(path, {})
    print(f"{path}: {source.about}")
    for reason, count in source.dropped.items():
        print(f"{path}: {reason}: {count:,} rows")

    def rows_of(table: str) -> list[tuple[str, ...]]:
        return [(row.prompt, *row.responses) for row in source.rows if row.table == table]

    comparisons = rows_of("comparisons") + pair_up(rows_of("up"), rows_of("down"))
    if not comparisons:
        raise InputError(
            f"{path} has no comparisons: name two columns prompt, chosen and rejected (in either "
            f"order, if nobody has chosen yet)"
        )
    pairs = []
    for number, (prompt, *sides) in enumerate(comparisons):
        random.Random(f"{seed} pair {number}").shuffle(sides)
        pairs.append(Pair(number, prompt, *sides))
    return ListedPairs(pairs)


def pairs_again(votes: list[Vote], seed: int) -> ListedPairs:
    """The pairs of earlier votes in another order, with the sides drawn anew. Skipped ones are left
    out. Raises InputError if there are none."""
    pairs = []
    for vote in votes:
        if vote.answer != "skip":
            sides = [vote.chosen, vote.rejected]
            random.Random(f"{seed} again {vote.pair}").shuffle(sides)
            pairs.append(Pair(vote.pair, vote.prompt, *sides))
    if not pairs:
        raise InputError("there are no votes to repeat; label once without --again first")
    pairs.sort(key=lambda pair: random.Random(f"{seed} order {pair.number}").random())
    return ListedPairs(pairs)
