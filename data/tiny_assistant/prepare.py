"""Make the bundled data set again, byte for byte.

    python data/tiny_assistant/prepare.py              # writes beside this file, in about two seconds

Everything follows from judge.py's topics and phrases and one seed: questions, the responses of helpers good and bad,
the votes of noisy annotators, and the byte-pair ranks of the tokenizer. README.md here gives the counts.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from judge import KIND, RAMBLING, RUDE, TOPICS, preference_probability, score_one

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where rlhf/ is
from data.bpe import train_bpe, write_ranks
from rlhf.support.cli import arg, run
from rlhf.support.tables import write_csv

# ---- questions: every greeting x every form x every topic, 7 x 12 x 20 = 1,680 of them ----
GREETINGS = ("", "Hello. ", "Hi. ", "Help me. ", "Excuse me. ", "Good day. ", "Sorry. ")
FORMS = (
    "What should I do about {}?",
    "Can you help me with {}?",
    "I need advice about {}.",
    "Any ideas for {}?",
    "A friend asked me about {}.",
    "How would you handle {}?",
    "What is best for {}?",
    "I worry about {}.",
    "Tell me about {}.",
    "Where do I start with {}?",
    "What goes wrong with {}?",
    "It is about {} again.",
)
UNSEEN_FORMS = 3  # of the 12 forms, how many are never seen in training with a given topic
HELD_OUT_GREETINGS = 0.13  # of the seen topic-and-form combinations, the share of prompts held out all the same

# ---- how the helpers write: four habits, drawn independently of each other ----
P_BOTH_SORTS = 0.5  # completeness: says what to do *and* what to avoid; otherwise one of the two
P_RELEVANT = 0.6  # relevance: the advice is about this topic; otherwise the helper misread and is about another
P_KIND, P_RUDE = 0.4, 0.35  # tone: a kind sentence opens the response; a rude one closes it
P_RAMBLING = 0.4  # rambling: one sentence of small talk

DEMONSTRATIONS, DEMONSTRATIONS_HELD_OUT = 3000, 400
COMPARISONS, COMPARISONS_HELD_OUT = 12000, 1500
VOCAB_SIZE = 800  # 256 bytes, 542 merges, end-of-text and pad (the last two are added by rlhf/tokenizer.py)


@dataclass(frozen=True)
class PrepareConfig:
    """Make the bundled data set again, byte for byte."""

    out: str = arg(str(Path(__file__).parent), "folder to write to")
    seed: int = arg(0, "another seed draws another world of the same kind")


def make_prompts(rng: random.Random) -> tuple[list[str], list[str]]:
    """All questions as (training, held-out), disjoint; UNSEEN_FORMS forms of each topic are only in the second."""
    train, heldout = [], []
    for topic in TOPICS:
        unseen = rng.sample(FORMS, UNSEEN_FORMS)
        for form in FORMS:
            for greeting in GREETINGS:
                prompt = f"\n\nHuman: {greeting}{form.format(topic)}\n\nAssistant:"
                (heldout if form in unseen or rng.random() < HELD_OUT_GREETINGS else train).append(prompt)
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def make_response(rng: random.Random, prompt: str) -> str:
    """One helper's response: advice in order, small talk anywhere in it, a tone at either end."""
    topic = next(topic for topic in TOPICS if topic in prompt)
    if rng.random() >= P_RELEVANT:
        topic = rng.choice([other for other in TOPICS if other != topic])
    sorts = (0, 1) if rng.random() < P_BOTH_SORTS else (rng.randrange(2),)
    sentences = [rng.choice(TOPICS[topic][sort]) for sort in sorts]

    if rng.random() < P_RAMBLING:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(RAMBLING))
    if rng.random() < P_KIND:
        sentences.insert(0, rng.choice(KIND))
    if rng.random() < P_RUDE:
        sentences.append(rng.choice(RUDE))
    return " ".join(sentences)


def make_comparison(rng: random.Random, prompt: str) -> tuple[str, str, str]:
    """Two different responses to a prompt and the annotator's noisy vote: (prompt, chosen, rejected)."""
    first, second = make_response(rng, prompt), make_response(rng, prompt)
    while second == first:
        second = make_response(rng, prompt)
    likes_first = rng.random() < preference_probability(score_one(prompt, first), score_one(prompt, second))
    return (prompt, first, second) if likes_first else (prompt, second, first)


def write_rows(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    write_csv(path, [dict(zip(columns, row)) for row in rows])
    print(f"{path}: {len(rows):,} rows, {path.stat().st_size:,} bytes")


def main(cfg: PrepareConfig) -> None:
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(cfg.seed)
    train, heldout = make_prompts(rng)
    write_rows(out / "prompts.csv", ("Prompt",), [(prompt,) for prompt in train])
    write_rows(out / "prompts_heldout.csv", ("Prompt",), [(prompt,) for prompt in heldout])

    texts = []
    for suffix, prompts, demonstrations, comparisons in (
        ("", train, DEMONSTRATIONS, COMPARISONS),
        ("_heldout", heldout, DEMONSTRATIONS_HELD_OUT, COMPARISONS_HELD_OUT),
    ):
        turns = [prompts[i % len(prompts)] for i in range(max(demonstrations, comparisons))]
        rows = [(prompt, make_response(rng, prompt)) for prompt in turns[:demonstrations]]
        write_rows(out / f"demonstrations{suffix}.csv", ("Prompt", "Response"), rows)
        pairs = [make_comparison(rng, prompt) for prompt in turns[:comparisons]]
        write_rows(out / f"comparisons{suffix}.csv", ("Prompt", "Chosen", "Rejected"), pairs)
        texts = texts or [f"{prompt} {response}" for prompt, response in rows]  # the tokenizer sees training text only

    ranks = train_bpe(texts, VOCAB_SIZE - 2)
    write_ranks(ranks, out / "tokenizer.tiktoken")
    print(f"{out / 'tokenizer.tiktoken'}: {len(ranks)} ranks")


if __name__ == "__main__":
    run(main, PrepareConfig)
