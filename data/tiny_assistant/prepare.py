"""Make the bundled data set again, byte for byte.

    python data/tiny_assistant/prepare.py         # writes beside this file, in about two seconds

Everything follows from judge.py's topics and phrases and one seed: questions, the responses of
helpers good and bad, the votes of noisy annotators, and the byte-pair ranks of the tokenizer.
README.md here gives the counts.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from judge import KIND, RAMBLING, RUDE, TOPICS, preference_probability, score_one

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # where rlhf/ is
from data.bpe import train_bpe, write_ranks
from rlhf.run.files import write_csv
from rlhf.run.flags import arg
from rlhf.run.program import run

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
# Of the seen topic-and-form combinations, the share of prompts held out all the same.
HELD_OUT_GREETINGS = 0.13

# ---- how the helpers write: four habits, drawn independently of each other ----
P_BOTH_SORTS = 0.5  # completeness: says what to do *and* what to avoid; otherwise one of the two
# relevance: the advice is about this topic; otherwise the helper misread and is about another
P_RELEVANT = 0.6
P_KIND = 0.4  # tone: a kind sentence opens the response
P_RUDE = 0.35  # tone: a rude sentence closes it
P_RAMBLING = 0.4  # rambling: one sentence of small talk

DEMONSTRATIONS = 3000
DEMONSTRATIONS_HELD_OUT = 400
COMPARISONS = 12000
COMPARISONS_HELD_OUT = 1500
# 256 bytes, 542 merges, end-of-text and pad (rlhf/tokenizer.py adds the last two).
VOCAB_SIZE = 800


@dataclass(frozen=True)
class PrepareConfig:
    """Make the bundled data set again, byte for byte."""

    out: str = arg(str(Path(__file__).parent), "folder to write to")
    seed: int = arg(0, "another seed draws another world of the same kind")


def make_prompts(rng: random.Random) -> tuple[list[str], list[str]]:
    """All questions as (training, held-out), disjoint; UNSEEN_FORMS forms of each topic are only in
    the second."""
    train = []
    heldout = []
    for topic in TOPICS:
        unseen = rng.sample(FORMS, UNSEEN_FORMS)
        for form in FORMS:
            for greeting in GREETINGS:
                prompt = f"\n\nHuman: {greeting}{form.format(topic)}\n\nAssistant:"
                if form in unseen or rng.random() < HELD_OUT_GREETINGS:
                    heldout.append(prompt)
                else:
                    train.append(prompt)
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
    """Two different responses to a prompt and the annotator's noisy vote: (prompt, chosen,
    rejected)."""
    first = make_response(rng, prompt)
    second = make_response(rng, prompt)
    while second == first:
        second = make_response(rng, prompt)
    p = preference_probability(score_one(prompt, first), score_one(prompt, second))
    if rng.random() < p:
        return prompt, first, second
    return prompt, second, first


def take_turns(prompts: list[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def make_demonstrations(
    rng: random.Random, prompts: list[str], count: int
) -> list[tuple[str, str]]:
    return [(prompt, make_response(rng, prompt)) for prompt in take_turns(prompts, count)]


def make_comparisons(
    rng: random.Random, prompts: list[str], count: int
) -> list[tuple[str, str, str]]:
    return [make_comparison(rng, prompt) for prompt in take_turns(prompts, count)]


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

    demonstrations = make_demonstrations(rng, train, DEMONSTRATIONS)
    write_rows(out / "demonstrations.csv", ("Prompt", "Response"), demonstrations)
    comparisons = make_comparisons(rng, train, COMPARISONS)
    write_rows(out / "comparisons.csv", ("Prompt", "Chosen", "Rejected"), comparisons)
    rows = make_demonstrations(rng, heldout, DEMONSTRATIONS_HELD_OUT)
    write_rows(out / "demonstrations_heldout.csv", ("Prompt", "Response"), rows)
    rows = make_comparisons(rng, heldout, COMPARISONS_HELD_OUT)
    write_rows(out / "comparisons_heldout.csv", ("Prompt", "Chosen", "Rejected"), rows)

    texts = [f"{prompt} {response}" for prompt, response in demonstrations]  # only training text
    ranks = train_bpe(texts, VOCAB_SIZE - 2)
    write_ranks(ranks, out / "tokenizer.tiktoken")
    print(f"{out / 'tokenizer.tiktoken'}: {len(ranks)} ranks")


if __name__ == "__main__":
    run(main, PrepareConfig)
