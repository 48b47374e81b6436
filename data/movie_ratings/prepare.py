"""Make a data set of real human judgements: sentences of film reviews, each rated by 15 to 29
people from -4 to +4.

    python data/movie_ratings/prepare.py                # fetches 6 MB, writes into this folder;
                                                        # under a minute
    python data/movie_ratings/prepare.py --source DIR   # DIR holds the two archives already

The sentences and their ratings are Hutto and Gilbert's (ICWSM 2014); whole reviews, for the
language model and the judge, are Pang and Lee's (2004). Nobody compared two sentences, so a
comparison is made of two ratings, one drawn for each side: labels as noisy as people are. README.md
here has the rules, the counts and how far people agree.
"""

import html
import json
import math
import random
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import correlation, fmean
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # where rlhf/ is
from judge import features, score_text

from data.bpe import train_bpe, write_ranks
from data.download import check_sha256, fetch
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.flags import arg, check_positive
from rlhf.run.program import run
from rlhf.tokenizer import load_tokenizer

RATINGS_URL = (
    "https://raw.githubusercontent.com/cjhutto/vaderSentiment/master/additional_resources/"
    "hutto_ICWSM_2014.tar.gz"
)
REVIEWS_URL = (
    "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/movie_reviews.zip"
)
SHA256 = {
    RATINGS_URL: "d1d8e49abaaa76967dfc43ee3c21fadaba719c33f9fe837a0dca6462ffb980dd",
    REVIEWS_URL: "a41211ae685019137410268134db6a1a14428c89b671eb83056151a878539008",
}

PROMPT = "Review:"  # every text is this, one space, words
BLOCK = 30  # sentences in a row that the same people rated; see Sentence
HELD_OUT = 0.2  # of the sentences
LEAK_LETTERS = 20  # a held-out sentence this long must not occur in the training text
HELD_OUT_PAIRS = 7_000  # drawn, and kept if their gold differs by more than GAP
GAP = 1.0
RANKED = 4  # sentences in a ranking
PANEL = 10  # raters whose mean the noise table takes for the truth
SMOOTHING = 10  # of the judge: added to each count
RARE = 2  # of the judge: features in fewer reviews are left out


@dataclass(frozen=True)
class PrepareConfig:
    """Make prompts, demonstrations, comparisons and rankings of rated film-review sentences."""

    source: str = arg("", "folder that holds both archives, instead of a download")
    out: str = arg("", "folder to write to; empty: this script's")
    seed: int = arg(0, "of the split and of every draw")
    pairs: int = arg(70_000, "pairs of training sentences to vote on; ties are dropped")
    rankings: int = arg(12_000, "groups of four training sentences to rank")
    vocab_size: int = arg(4096, "tokens, end-of-text and pad included")
    max_tokens: int = arg(80, "longest prompt and response together; longer texts are dropped")

    def __post_init__(self):
        check_positive(self, "pairs", "rankings", "max_tokens")
        if self.vocab_size < 258:
            raise ValueError(
                f"--vocab-size is {self.vocab_size}: 256 bytes, end-of-text and pad make 258 at "
                f"least"
            )


class Sentence(NamedTuple):
    """A rated sentence.

    The file names no raters, but the same people rated 30 sentences in a row, and their ratings
    stand in the same order (test_rating_positions_are_the_same_people_within_a_block). So half of a
    block's positions are voters, the same for all its sentences, and gold is the mean of the
    others' ratings. Whether somebody rated several blocks is unknown.
    """

    text: str
    block: int
    ratings: list[int]
    votes: list[int]
    gold: float


class Review(NamedTuple):
    """A whole review, a sentence a line, and whether its author's stars are favourable."""

    favourable: bool
    lines: list[str]


@dataclass
class Parts:
    """What the data set is made of."""

    train: list[Sentence]
    heldout: list[Sentence]
    passages: list[str]  # of the reviews that the language model reads
    heldout_passages: list[str]
    judged: list[Review]  # the judge's

    def train_texts(self) -> list[str]:
        return self.passages + [sentence.text for sentence in self.train]

    def heldout_texts(self) -> list[str]:
        return self.heldout_passages + [sentence.text for sentence in self.heldout]

    def without(self, dropped: set[str]) -> "Parts":
        train = [sentence for sentence in self.train if sentence.text not in dropped]
        heldout = [sentence for sentence in self.heldout if sentence.text not in dropped]
        passages = [text for text in self.passages if text not in dropped]
        heldout_passages = [text for text in self.heldout_passages if text not in dropped]
        return Parts(train, heldout, passages, heldout_passages, self.judged)


def stream(cfg: PrepareConfig, part: str) -> random.Random:
    """Random numbers for one part of the data set, so that a flag changes only its own part."""
    return random.Random(f"{cfg.seed} {part}")


# ---- one form for both sources ----

# Lower case and without hyphens inside words, because one of the two sources has lost them. Each
# pattern with what it is replaced by, in this order.
FORM = [
    # Control characters are what curly quotes, dashes and dots became in the reviews.
    (r"[\x12’`]", "'"),
    (r"\x05", "..."),
    ("\u2044", "/"),  # the bar of a fraction such as one half
    (r"[\x16–]|--+|\s-\s|  +(?=\S)", " - "),  # in the sentences, dashes became spaces
    # The reviews no longer tell opening from closing quotation marks.
    (r"[\x13\x14\"*_=~^|\\{}<>@]|''", ""),
    (r"[^\x00-\x7f]", ""),
    (r"(?<=\w)- *(?=\w)", " "),
    (r"\.( ?\.)+", "... "),
    (r"\s+([,.;:!?)\]%])", r"\1"),  # in the reviews, all punctuation stands apart
    (r"([(\[$#])\s+", r"\1"),
    (r" ?/ ?", "/"),
    (r"(\d\.) (?=\d)", r"\1"),
    (r"\b(\w\.) (?=\w\.)", r"\1"),  # "u. s. a." -> "u.s.a."
    (r"\s'(?=\s|$)", ""),
    (r"\s+", " "),
    (r"^[^\w'($#&]+|[ -]+$", ""),  # "... and so on", cut off from the sentence before
]


def one_form(text: str) -> str:
    """The text as the models read it, from either source.

    >>> one_form("It's a movie    and a ''laid back'' album    you won't want to miss.")
    "it's a movie - and a laid back album - you won't want to miss."
    >>> one_form('mr . pitt ( above ) is a " laid-back " hero , $8 . 50 well spent . . . ')
    'mr. pitt (above) is a laid back hero, $8.50 well spent...'
    """
    text = html.unescape(text).lower()
    text = unicodedata.normalize("NFKD", text)  # takes letters and their accents apart
    for pattern, replacement in FORM:
        text = re.sub(pattern, replacement, text)
    return text


def letters(text: str) -> str:
    """Only letters and digits: texts that agree in them count as the same.

    >>> letters("a mess...")
    'amess'
    """
    return re.sub("[^a-z0-9]", "", text.lower())


# ---- reading ----


def find_archive(cfg: PrepareConfig, url: str) -> Path:
    """The archive of that name, from --source or fetched, with the right checksum."""
    if not cfg.source:
        return fetch(url, HERE / "downloads", SHA256[url])
    path = Path(cfg.source) / url.rsplit("/", 1)[1]
    if not path.is_file():
        raise InputError(f"--source {cfg.source} does not hold {path.name}; it comes from {url}")
    check_sha256(path, SHA256[url])
    return path


def read_member(archive: tarfile.TarFile, name: str) -> list[list[str]]:
    """The lines of one file of the ratings, each split into its fields at the tabs."""
    file = archive.extractfile(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
    text = file.read().decode("utf-8-sig", errors="replace")
    return [line.split("\t") for line in text.split("\n") if line.strip()]


def read_ratings(path: Path, rng: random.Random) -> list[Sentence]:
    """The rated sentences in the file's order, from lines of fields with a tab between them:

    movieReviewSnippets_GroundTruth.txt         id, mean, text
    movieReviewSnippets_anonDataRatings.txt     id, mean, standard deviation, [ratings]
    """
    with tarfile.open(path) as archive:
        texts = read_member(archive, "GroundTruth")
        ratings = read_member(archive, "anonDataRatings")
    ratings_of = {number: json.loads(values) for number, _, _, values in ratings}
    voters_of = {}  # {block: positions of its voters}
    sentences = []
    for number, _, text in texts:
        rated = ratings_of[number]
        block = (int(number) - 1) // BLOCK
        if block not in voters_of:
            voters_of[block] = set(rng.sample(range(len(rated)), len(rated) // 2))
        votes = []
        others = []
        for position, rating in enumerate(rated):
            side = votes if position in voters_of[block] else others
            side.append(rating)
        sentences.append(Sentence(one_form(text), block, rated, votes, fmean(others)))
    return sentences


def read_reviews(path: Path) -> list[Review]:
    """The reviews in the order of their names, movie_reviews/pos/*.txt and
    movie_reviews/neg/*.txt."""
    reviews = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(r"movie_reviews/(pos|neg)/.+\.txt", name):
                text = archive.read(name).decode("utf-8", errors="replace")
                lines = [one_form(line) for line in text.split("\n")]
                reviews.append(Review("/pos/" in name, [line for line in lines if line]))
    return reviews


# ---- splitting ----


def split_sentences(
    sentences: list[Sentence], rng: random.Random
) -> tuple[list[Sentence], list[Sentence]]:
    """(training, held-out); sentences that agree in their letters go the same way."""
    keys = [letters(sentence.text) for sentence in sentences]
    different = list(dict.fromkeys(keys))
    heldout_keys = set(rng.sample(different, round(HELD_OUT * len(different))))
    train = []
    heldout = []
    for key, sentence in zip(keys, sentences):
        part = heldout if key in heldout_keys else train
        part.append(sentence)
    return train, heldout


def split_reviews(
    reviews: list[Review], rng: random.Random
) -> tuple[list[Review], list[Review], list[Review]]:
    """(the judge's half, the language model's training part of the other half, a twentieth of that
    held out), with as many favourable reviews as others in each."""
    judged = []
    train = []
    heldout = []
    for favourable in (True, False):
        shuffled = [review for review in reviews if review.favourable == favourable]
        rng.shuffle(shuffled)
        half = len(shuffled) // 2
        end = len(shuffled) - math.ceil(half / 20)
        judged += shuffled[:half]
        train += shuffled[half:end]
        heldout += shuffled[end:]
    return judged, train, heldout


def cut_passages(reviews: list[Review]) -> list[str]:
    """The sentences of the reviews; one of fewer than eight words takes the next one with it.

    >>> lines = ["oh dear.", "what a bore.", "why did we ever think we would like this?", "no."]
    >>> cut_passages([Review(False, lines)])
    ['oh dear. what a bore. why did we ever think we would like this?']
    """
    passages = []
    for review in reviews:
        words = []
        for line in review.lines:
            words += line.split()
            if len(words) >= 8:
                passages.append(" ".join(words))
                words = []
    return passages


def find_leaks(texts: list[str], heldout: list[Sentence]) -> set[str]:
    """The texts in which a held-out sentence occurs, letter by letter. Shorter ones than
    LEAK_LETTERS ("often hilarious.") do not count: anybody may write those."""
    spelled = {text: letters(text) for text in texts}
    everything = "|".join(spelled.values())
    heldout_keys = [letters(sentence.text) for sentence in heldout]
    found = [key for key in heldout_keys if len(key) >= LEAK_LETTERS and key in everything]
    leaks = set()
    for text, key in spelled.items():
        if any(leak in key for leak in found):
            leaks.add(text)
    return leaks


def find_too_long(texts: list[str], ranks: list[bytes], limit: int) -> set[str]:
    """The texts that take more than `limit` tokens, prompt and end-of-text included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.tiktoken"
        write_ranks(ranks, path)
        tokenizer = load_tokenizer(str(path))
    return {text for text in texts if len(tokenizer.encode(f"{PROMPT} {text}")) >= limit}


# ---- prompts, demonstrations, comparisons, rankings ----


def make_prompts(
    sentences: list[Sentence], rng: random.Random, taken: frozenset[str] = frozenset()
) -> list[str]:
    """The first two to five words of each sentence that goes on for three more, in any order; each
    opening once, and none that is taken."""
    prompts = {}  # a set that keeps the order
    for sentence in rng.sample(sentences, len(sentences)):
        words = sentence.text.split()
        size = rng.randint(2, 5)
        prompt = " ".join([PROMPT, *words[:size]])
        if len(words) >= size + 3 and prompt not in taken:
            prompts[prompt] = None
    return list(prompts)


def make_demonstrations(texts: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, response) of each text, in any order: none to five words in the prompt, all others
    in the response."""
    rows = []
    for text in rng.sample(texts, len(texts)):
        words = text.split()
        size = rng.randint(0, min(5, len(words) - 1))
        prompt = " ".join([PROMPT, *words[:size]])
        response = " ".join(words[size:])
        rows.append((prompt, response))
    return rows


def draw_groups(items: list, size: int, count: int, rng: random.Random) -> list[tuple]:
    """Groups of different items, every item about equally often: all of them in a random order, cut
    up; and again."""
    if len(items) < size:
        raise InputError(
            f"only {len(items)} sentences are left, and a group is of {size}; give a larger "
            f"--max-tokens"
        )
    groups = []
    while len(groups) < count:
        order = rng.sample(items, len(items))
        members = [order[first::size] for first in range(size)]
        groups += zip(*members)
    return groups[:count]


def make_comparisons(pairs: list[tuple[Sentence, Sentence]], rng: random.Random) -> list[tuple]:
    """(prompt, chosen, rejected, their ratings): one vote drawn for each side, the higher wins.
    Ties are left out."""
    rows = []
    for pair in pairs:
        sides = [(rng.choice(side.votes), side.text) for side in pair]
        (low, rejected), (high, chosen) = sorted(sides)
        if low < high and rejected != chosen:
            rows.append((PROMPT, chosen, rejected, high, low))
    return rows


def make_rankings(groups: list[tuple[Sentence, ...]], rng: random.Random) -> list[tuple]:
    """(prompt, response, rank, group): one vote drawn for each sentence, whose rank is 1 + how many
    votes of the group are higher. Groups that are all tied are left out."""
    rows = []
    for number, group in enumerate(groups, start=1):
        votes = [rng.choice(sentence.votes) for sentence in group]
        if len(set(votes)) == 1:
            continue
        for sentence, vote in zip(group, votes):
            rank = 1 + sum(other > vote for other in votes)
            rows.append((PROMPT, sentence.text, rank, number))
    return rows


def order_by_gold(pairs: list[tuple[Sentence, Sentence]]) -> list[tuple[Sentence, Sentence]]:
    """Those whose gold differs by more than GAP, each as (better, worse)."""
    ordered = [(a, b) if a.gold > b.gold else (b, a) for a, b in pairs]
    return [(better, worse) for better, worse in ordered if better.gold - worse.gold > GAP]


# ---- the judge ----


def fit_judge(reviews: list[Review]) -> dict[str, float]:
    """Weights by the formula in judge.py."""
    counts = {True: Counter(), False: Counter()}  # reviews that hold each feature
    sizes = Counter(review.favourable for review in reviews)
    for review in reviews:
        held = set()
        for line in review.lines:
            held |= features(line)
        counts[review.favourable].update(held)

    def log_share(feature: str, favourable: bool) -> float:
        count = counts[favourable][feature] + SMOOTHING
        return math.log(count / (sizes[favourable] + 2 * SMOOTHING))

    total = counts[True] + counts[False]
    weights = {}
    for feature, count in sorted(total.items()):
        if count >= RARE:
            weights[feature] = log_share(feature, True) - log_share(feature, False)
    return weights


# ---- how far people agree ----


class Panel(NamedTuple):
    """A sentence with the ratings of 20 people of its block, the same for all its sentences."""

    block: int
    total: int  # of the first ten
    others: list[int]  # the ratings of the other ten


def make_panels(sentences: list[Sentence], rng: random.Random) -> list[Panel]:
    """Of the sentences with 20 raters or more. The people are drawn once per block."""
    people = {}  # {block: positions}
    panels = []
    for sentence in sentences:
        if len(sentence.ratings) >= 2 * PANEL:
            if sentence.block not in people:
                people[sentence.block] = rng.sample(range(len(sentence.ratings)), 2 * PANEL)
            ratings = [sentence.ratings[position] for position in people[sentence.block]]
            panels.append(Panel(sentence.block, sum(ratings[:PANEL]), ratings[PANEL:]))
    return panels


def agreement_cell(pairs: list[tuple[Panel, Panel]], raters: int, low: float, high: float) -> str:
    """How often the mean of so many raters orders the pairs as the panels do, of the pairs whose
    means differ by more than low and at most high."""
    margins = []
    for first, second in pairs:
        gap = first.total - second.total
        if low * PANEL < abs(gap) <= high * PANEL:
            margin = sum(first.others[:raters]) - sum(second.others[:raters])
            margins.append(margin if gap > 0 else -margin)
    untied = [margin > 0 for margin in margins if margin]
    shares = "-"
    if untied:
        tied = 1 - len(untied) / len(margins)
        shares = f"{fmean(untied):.3f}  {tied:.2f}"
    return f"{shares:11} {len(margins):8,}"


def noise_table(sentences: list[Sentence], rng: random.Random) -> str:
    """How often raters order two sentences as the mean of ten others does, by the gap between the
    two means.

    Ten people of each block are drawn for those means and ten others to be held against them, so
    only sentences of 20 raters or more take part. In the last column the two sentences are of one
    block, and one person rates both. A cell is the share that agrees, ties left out; the share of
    ties; the pairs.
    """
    panels = make_panels(sentences, rng)
    drawn = draw_groups(panels, 2, 100_000, rng)
    of_one_block = [(a, b) for a, b in combinations(panels, 2) if a.block == b.block]
    columns = {
        "one rater": (1, drawn),
        "mean of 3": (3, drawn),
        "mean of 10": (10, drawn),
        "one, same for both": (1, of_one_block),
    }
    names = [name.ljust(20) for name in columns]
    lines = [
        " | ".join(["gap of the means", *names]),
        " | ".join([" " * 16, *["agree  ties    pairs"] * len(columns)]),
    ]
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 3), (3, 8), (0, 8)):
        cells = [agreement_cell(pairs, raters, low, high) for raters, pairs in columns.values()]
        lines.append(" | ".join([f"{low} to {high}".ljust(16), *cells]))
    return "\n".join(lines)


Reader = Callable[[Sentence], float]  # gives a sentence a number


def agreement(
    read: Reader, heldout: list[Sentence], pairs: list[tuple[Sentence, Sentence]]
) -> tuple[float, float]:
    """Correlation of a reader with gold, and share of pairs (better, worse) whose first gets the
    higher number; equal numbers count half."""
    wins = []
    for better, worse in pairs:
        first = read(better)
        second = read(worse)
        wins.append((1 + (first > second) - (first < second)) / 2)
    golds = [sentence.gold for sentence in heldout]
    numbers = [read(sentence) for sentence in heldout]
    return correlation(golds, numbers), fmean(wins)


def print_agreement(
    cfg: PrepareConfig,
    parts: Parts,
    gold_pairs: list[tuple[Sentence, Sentence]],
    weights: dict[str, float],
) -> None:
    """The noise table, and how far the voters and the judge agree with gold."""
    print(f"\n{noise_table(parts.train, stream(cfg, 'noise'))}\n")
    print(
        f"held-out sentences: correlation with gold ({len(parts.heldout):,}), share of comparisons "
        f"in gold's order ({len(gold_pairs):,})"
    )
    rng = stream(cfg, "one voter")
    readers = {
        "mean of the voters": lambda sentence: fmean(sentence.votes),
        "one voter": lambda sentence: rng.choice(sentence.votes),
        "judge.py": lambda sentence: score_text(sentence.text, weights),
    }
    for name, read in readers.items():
        r, share = agreement(read, parts.heldout, gold_pairs)
        print(f"    {name:18} {r:.3f}  {share:.3f}")


# ---- all of it ----


def read_parts(cfg: PrepareConfig) -> Parts:
    """Both sources, read and split."""
    sentences = read_ratings(find_archive(cfg, RATINGS_URL), stream(cfg, "voters"))
    reviews = read_reviews(find_archive(cfg, REVIEWS_URL))
    train, heldout = split_sentences(sentences, stream(cfg, "sentences"))
    judged, learned, heldout_reviews = split_reviews(reviews, stream(cfg, "reviews"))
    print(
        f"{len(sentences):,} rated sentences: {len(train):,} to train on, {len(heldout):,} held out"
    )
    print(
        f"{len(reviews):,} reviews: {len(judged):,} for the judge, {len(learned):,} for the "
        f"language model, {len(heldout_reviews):,} held out",
        flush=True,
    )
    return Parts(train, heldout, cut_passages(learned), cut_passages(heldout_reviews), judged)


def drop_texts(cfg: PrepareConfig, parts: Parts) -> tuple[Parts, list[bytes]]:
    """The parts without leaks and texts that are too long, and the tokenizer's ranks."""
    leaks = find_leaks(parts.train_texts(), parts.heldout)
    print(f"{len(leaks):,} training texts hold a held-out sentence: dropped")
    print("training the tokenizer, about 20 seconds", flush=True)
    learned = [f"{PROMPT} {text}" for text in parts.train_texts() if text not in leaks]
    ranks = train_bpe(learned, cfg.vocab_size - 2)  # end-of-text and pad have no rank

    texts = parts.train_texts() + parts.heldout_texts()
    too_long = find_too_long(texts, ranks, cfg.max_tokens)
    sentences = parts.train + parts.heldout
    rated = sum(sentence.text in too_long for sentence in sentences)
    print(
        f"{len(too_long):,} texts, {rated:,} of them rated, take more than {cfg.max_tokens} "
        f"tokens: dropped"
    )
    return parts.without(leaks | too_long), ranks


def make_tables(
    cfg: PrepareConfig,
    parts: Parts,
    gold_pairs: list[tuple[Sentence, Sentence]],
    comparisons: list[tuple],
    rankings: list[tuple],
    weights: dict[str, float],
) -> dict[str, list[dict]]:
    """{name of a CSV: its rows}. Raises InputError if one would be empty."""
    prompts = make_prompts(parts.train, stream(cfg, "prompts"))
    heldout_prompts = make_prompts(
        parts.heldout, stream(cfg, "held-out prompts"), frozenset(prompts)
    )
    demonstrations = make_demonstrations(parts.train_texts(), stream(cfg, "demonstrations"))
    heldout_demonstrations = make_demonstrations(
        parts.heldout_texts(), stream(cfg, "held-out texts")
    )
    heldout_comparisons = []
    for better, worse in gold_pairs:
        heldout_comparisons.append((PROMPT, better.text, worse.text, better.gold, worse.gold))
    ratings = [(PROMPT, sentence.text, sentence.gold) for sentence in parts.train]
    heldout_ratings = []
    for sentence in parts.heldout:
        heldout_ratings.append((PROMPT, sentence.text, sentence.gold, fmean(sentence.votes)))

    sides = "Prompt,Chosen,Rejected"
    tables = {
        "prompts": table("Prompt", zip(prompts)),
        "prompts_heldout": table("Prompt", zip(heldout_prompts)),
        "demonstrations": table("Prompt,Response", demonstrations),
        "demonstrations_heldout": table("Prompt,Response", heldout_demonstrations),
        "comparisons": table(f"{sides},ChosenRating,RejectedRating", comparisons),
        "comparisons_heldout": table(f"{sides},ChosenGold,RejectedGold", heldout_comparisons),
        "rankings": table("Prompt,Response,Rank,Group", rankings),
        "ratings": table("Prompt,Response,Gold", ratings),
        "ratings_heldout": table("Prompt,Response,Gold,VotersMean", heldout_ratings),
        "judge_weights": table("Feature,Weight", weights.items()),
    }
    for name, rows in tables.items():
        if not rows:
            raise InputError(
                f"{name}.csv would be empty; give more --pairs, --rankings or --max-tokens"
            )
    return tables


def table(columns: str, rows: Iterable[tuple]) -> list[dict]:
    names = columns.split(",")
    return [dict(zip(names, row)) for row in rows]


def write_data_set(out: Path, tables: dict[str, list[dict]], ranks: list[bytes]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    print(f"\nwriting to {out}")
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
        print(f"    {name}.csv: {len(rows):,} rows")
    write_ranks(ranks, out / "tokenizer.tiktoken")
    print(f"    tokenizer.tiktoken: {len(ranks):,} ranks")
    if out.resolve() != HERE:
        shutil.copyfile(HERE / "judge.py", out / "judge.py")


def main(cfg: PrepareConfig) -> None:
    parts, ranks = drop_texts(cfg, read_parts(cfg))
    pairs = draw_groups(parts.train, 2, cfg.pairs, stream(cfg, "pairs"))
    comparisons = make_comparisons(pairs, stream(cfg, "votes"))
    heldout_pairs = draw_groups(parts.heldout, 2, HELD_OUT_PAIRS, stream(cfg, "held-out pairs"))
    gold_pairs = order_by_gold(heldout_pairs)
    groups = draw_groups(parts.train, RANKED, cfg.rankings, stream(cfg, "groups"))
    rankings = make_rankings(groups, stream(cfg, "ranks"))
    weights = fit_judge(parts.judged)
    print(
        f"{cfg.pairs - len(comparisons):,} of {cfg.pairs:,} comparisons and "
        f"{cfg.rankings - len(rankings) // RANKED:,} of {cfg.rankings:,} rankings are tied: dropped"
    )
    tables = make_tables(cfg, parts, gold_pairs, comparisons, rankings, weights)
    print_agreement(cfg, parts, gold_pairs, weights)
    write_data_set(Path(cfg.out or HERE), tables, ranks)


if __name__ == "__main__":
    run(main, PrepareConfig)
