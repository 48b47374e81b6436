"""Make a data set of real human judgements: sentences of film reviews, each rated by 15 to 29 people from -4 to +4.

    python data/movie_ratings/prepare.py                   # fetches 6 MB, writes into this folder; under a minute
    python data/movie_ratings/prepare.py --source DIR      # DIR holds the two archives already

The sentences and their ratings are Hutto and Gilbert's (ICWSM 2014); whole reviews, for the language model and the
judge, are Pang and Lee's (2004). Nobody compared two sentences, so a comparison is made of two ratings, one drawn for
each side: labels as noisy as people are. README.md here has the rules, the counts and how far people agree.
"""

import html
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import correlation, fmean
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # where rlhf/ is
from judge import features, score_text

from data.bpe import train_bpe, write_ranks
from rlhf.support.cli import InputError, arg, check_positive, run
from rlhf.support.tables import write_csv
from data.download import check_sha256, fetch
from rlhf.tokenizer import load_tokenizer

RATINGS_URL = ("https://raw.githubusercontent.com/cjhutto/vaderSentiment/master/additional_resources/"
               "hutto_ICWSM_2014.tar.gz")
REVIEWS_URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/movie_reviews.zip"
SHA256 = {
    RATINGS_URL: "d1d8e49abaaa76967dfc43ee3c21fadaba719c33f9fe837a0dca6462ffb980dd",
    REVIEWS_URL: "a41211ae685019137410268134db6a1a14428c89b671eb83056151a878539008",
}

PROMPT = "Review:"  # every text is this, one space, words
BLOCK = 30  # sentences in a row that the same people rated; see Sentence
HELD_OUT = 0.2  # of the sentences
LEAK_LETTERS = 20  # a held-out sentence this long must not occur in the training text
HELD_OUT_PAIRS, GAP = 7_000, 1.0  # so many pairs are drawn, and kept where gold differs by more than GAP
RANKED = 4  # sentences in a ranking
PANEL = 10  # raters whose mean the noise table takes for the truth
SMOOTHING, RARE = 10, 2  # of the judge: added to each count; features in fewer reviews are left out


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
            raise ValueError(f"--vocab-size is {self.vocab_size}: 256 bytes, end-of-text and pad make 258 at least")


class Sentence(NamedTuple):
    """A rated sentence.

    The file names no raters, but the same people rated 30 sentences in a row, and their ratings stand in the same order
    (test_rating_positions_are_the_same_people_within_a_block). So half of a block's positions are voters, the same for
    all its sentences, and gold is the mean of the others' ratings. Whether somebody rated several blocks is unknown.
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


# ---- one form for both sources: lower case and without hyphens inside words, since one of the two has lost them ----
FORM = tuple((re.compile(pattern), by) for pattern, by in (
    (r"[\x12’`]", "'"),  # control characters are what curly quotes, dashes and dots became in the reviews
    (r"\x05", "..."),
    ("\u2044", "/"),  # the bar of a fraction such as one half
    (r"[\x16–]|--+|\s-\s|  +(?=\S)", " - "),  # in the sentences, dashes became spaces
    (r"[\x13\x14\"*_=~^|\\{}<>@]|''", ""),  # the reviews no longer tell opening from closing quotation marks
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
))


def one_form(text: str) -> str:
    """The text as the models read it, from either source.

    >>> one_form("It's a movie    and a ''laid back'' album    you won't want to miss.")
    "it's a movie - and a laid back album - you won't want to miss."
    >>> one_form('mr . pitt ( above ) is a " laid-back " hero , $8 . 50 well spent . . . ')
    'mr. pitt (above) is a laid back hero, $8.50 well spent...'
    """
    text = unicodedata.normalize("NFKD", html.unescape(text).lower())  # takes letters and their accents apart
    for pattern, by in FORM:
        text = pattern.sub(by, text)
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


def read_ratings(path: Path, rng: random.Random) -> list[Sentence]:
    """The rated sentences in the file's order, from lines of fields with a tab between them:

        movieReviewSnippets_GroundTruth.txt         id, mean, text
        movieReviewSnippets_anonDataRatings.txt     id, mean, standard deviation, [ratings]
    """
    with tarfile.open(path) as archive:
        members = [archive.extractfile(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt").read()
                   for name in ("GroundTruth", "anonDataRatings")]
    texts, ratings = ([line.split("\t") for line in text.split("\n") if line.strip()]
                      for text in (member.decode("utf-8-sig", errors="replace") for member in members))
    ratings_of = {row[0]: json.loads(row[3]) for row in ratings}
    sentences, voters_of = [], {}
    for number, _, text in texts:
        rated, block = ratings_of[number], (int(number) - 1) // BLOCK
        if block not in voters_of:
            voters_of[block] = set(rng.sample(range(len(rated)), len(rated) // 2))
        votes = [rating for position, rating in enumerate(rated) if position in voters_of[block]]
        others = [rating for position, rating in enumerate(rated) if position not in voters_of[block]]
        sentences.append(Sentence(one_form(text), block, rated, votes, fmean(others)))
    return sentences


def read_reviews(path: Path) -> list[Review]:
    """The reviews in the order of their names, movie_reviews/pos/*.txt and movie_reviews/neg/*.txt."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"movie_reviews/(pos|neg)/.+\.txt", name))
        texts = [archive.read(name).decode("utf-8", errors="replace") for name in names]
    return [Review("/pos/" in name, [line for line in map(one_form, text.split("\n")) if line])
            for name, text in zip(names, texts)]


# ---- splitting ----


def split_sentences(sentences: list[Sentence], rng: random.Random) -> tuple[list[Sentence], list[Sentence]]:
    """(training, held-out); sentences that agree in their letters go the same way."""
    keys = list(dict.fromkeys(letters(sentence.text) for sentence in sentences))
    heldout = set(rng.sample(keys, round(HELD_OUT * len(keys))))
    return ([sentence for sentence in sentences if letters(sentence.text) not in heldout],
            [sentence for sentence in sentences if letters(sentence.text) in heldout])


def split_reviews(reviews: list[Review], rng: random.Random) -> tuple[list[Review], list[Review], list[Review]]:
    """(the judge's half, the language model's training part of the other half, a twentieth of that held out), with as
    many favourable reviews as others in each."""
    parts = [], [], []
    for favourable in (True, False):
        some = [review for review in reviews if review.favourable == favourable]
        rng.shuffle(some)
        half = len(some) // 2
        end = len(some) - math.ceil(half / 20)
        for part, cut in zip(parts, (some[:half], some[half:end], some[end:])):
            part += cut
    return parts


def cut_passages(reviews: list[Review]) -> list[str]:
    """The sentences of the reviews; one of fewer than eight words takes the next one with it.

    >>> cut_passages([Review(False, ["oh dear.", "what a bore.", "why did we ever think we would like this?", "no."])])
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
    """The texts in which a held-out sentence occurs, letter by letter. Shorter ones than LEAK_LETTERS ("often
    hilarious.") do not count: anybody may write those."""
    spelled = {text: letters(text) for text in texts}
    everything = "|".join(spelled.values())
    found = [key for key in (letters(sentence.text) for sentence in heldout)
             if len(key) >= LEAK_LETTERS and key in everything]
    return {text for text, key in spelled.items() if any(leak in key for leak in found)}


def find_too_long(texts: list[str], ranks: list[bytes], limit: int) -> set[str]:
    """The texts that take more than `limit` tokens, prompt and end-of-text included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.tiktoken"
        write_ranks(ranks, path)
        tokenizer = load_tokenizer(str(path))
    return {text for text in texts if len(tokenizer.encode(f"{PROMPT} {text}")) >= limit}


# ---- prompts, demonstrations, comparisons, rankings ----


def make_prompts(sentences: list[Sentence], rng: random.Random, taken: frozenset[str] = frozenset()) -> list[str]:
    """The first two to five words of each sentence that goes on for three more, in any order; each opening once, and
    none that is taken."""
    prompts = {}
    for sentence in rng.sample(sentences, len(sentences)):
        words, size = sentence.text.split(), rng.randint(2, 5)
        prompt = " ".join([PROMPT, *words[:size]])
        if len(words) >= size + 3 and prompt not in taken:
            prompts[prompt] = None
    return list(prompts)


def make_demonstrations(texts: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, response) of each text, in any order: none to five words in the prompt, all others in the response."""
    rows = []
    for text in rng.sample(texts, len(texts)):
        words = text.split()
        size = rng.randint(0, min(5, len(words) - 1))
        rows.append((" ".join([PROMPT, *words[:size]]), " ".join(words[size:])))
    return rows


def draw_groups(items: list, size: int, count: int, rng: random.Random) -> list[tuple]:
    """Groups of different items, every item about equally often: all of them in a random order, cut up; and again."""
    if len(items) < size:
        raise InputError(f"only {len(items)} sentences are left, and a group is of {size}; give a larger --max-tokens")
    groups = []
    while len(groups) < count:
        order = rng.sample(items, len(items))
        groups += zip(*(order[first::size] for first in range(size)))
    return groups[:count]


def make_comparisons(pairs: list[tuple[Sentence, Sentence]], rng: random.Random) -> list[tuple]:
    """(prompt, chosen, rejected, their ratings): one vote drawn for each side, the higher wins. Ties are left out."""
    rows = []
    for pair in pairs:
        (low, rejected), (high, chosen) = sorted((rng.choice(side.votes), side.text) for side in pair)
        if low < high and rejected != chosen:
            rows.append((PROMPT, chosen, rejected, high, low))
    return rows


def make_rankings(groups: list[tuple[Sentence, ...]], rng: random.Random) -> list[tuple]:
    """(prompt, response, rank, group): one vote drawn for each sentence, whose rank is 1 + how many votes of the group
    are higher. Groups that are all tied are left out."""
    rows = []
    for number, group in enumerate(groups, start=1):
        votes = [rng.choice(sentence.votes) for sentence in group]
        if len(set(votes)) > 1:
            rows += [(PROMPT, sentence.text, 1 + sum(other > vote for other in votes), number)
                     for sentence, vote in zip(group, votes)]
    return rows


def order_by_gold(pairs: list[tuple[Sentence, Sentence]]) -> list[tuple[Sentence, Sentence]]:
    """Those whose gold differs by more than GAP, each as (better, worse)."""
    ordered = [(a, b) if a.gold > b.gold else (b, a) for a, b in pairs]
    return [(better, worse) for better, worse in ordered if better.gold - worse.gold > GAP]


# ---- the judge, and how far people agree ----


def fit_judge(reviews: list[Review]) -> dict[str, float]:
    """Weights by the formula in judge.py."""
    counts, sizes = {True: Counter(), False: Counter()}, Counter(review.favourable for review in reviews)
    for review in reviews:
        counts[review.favourable].update(set().union(*map(features, review.lines)))

    def log_share(feature: str, favourable: bool) -> float:
        return math.log((counts[favourable][feature] + SMOOTHING) / (sizes[favourable] + 2 * SMOOTHING))

    return {feature: log_share(feature, True) - log_share(feature, False)
            for feature, count in sorted((counts[True] + counts[False]).items()) if count >= RARE}


def noise_table(sentences: list[Sentence], rng: random.Random) -> str:
    """How often raters order two sentences as the mean of ten others does, by the gap between the two means.

    Ten people of each block are drawn for those means and ten others to be held against them, so only sentences of 20
    raters or more take part. In the last column the two sentences are of one block, and one person rates both. A cell
    is the share that agrees, ties left out; the share of ties; the pairs.
    """
    people, panels = {}, []
    for sentence in sentences:
        if len(sentence.ratings) >= 2 * PANEL:
            if sentence.block not in people:
                people[sentence.block] = rng.sample(range(len(sentence.ratings)), 2 * PANEL)
            ratings = [sentence.ratings[position] for position in people[sentence.block]]
            panels.append((sentence.block, sum(ratings[:PANEL]), ratings[PANEL:]))
    drawn = draw_groups(panels, 2, 100_000, rng)
    of_one_block = [pair for pair in combinations(panels, 2) if pair[0][0] == pair[1][0]]
    columns = {"one rater": (1, drawn), "mean of 3": (3, drawn), "mean of 10": (10, drawn),
               "one, same for both": (1, of_one_block)}

    lines = ["gap of the means | " + " | ".join(name.ljust(20) for name in columns),
             "                 | " + " | ".join(["agree  ties    pairs"] * len(columns))]
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 3), (3, 8), (0, 8)):
        cells = []
        for raters, pairs in columns.values():
            margins = [(sum(x[:raters]) - sum(y[:raters])) * (1 if sum_x > sum_y else -1)
                       for (_, sum_x, x), (_, sum_y, y) in pairs if low * PANEL < abs(sum_x - sum_y) <= high * PANEL]
            untied = [margin > 0 for margin in margins if margin]
            shares = f"{fmean(untied):.3f}  {1 - len(untied) / len(margins):.2f}" if untied else "-"
            cells.append(f"{shares:11} {len(margins):8,}")
        lines.append(" | ".join([f"{low} to {high}".ljust(16), *cells]))
    return "\n".join(lines)


def agreement(read, heldout: list[Sentence], pairs: list[tuple[Sentence, Sentence]]) -> tuple[float, float]:
    """Of a reader, who gives a sentence a number: correlation with gold, and share of pairs (better, worse) whose first
    gets the higher number; equal numbers count half."""
    numbers = [(read(better), read(worse)) for better, worse in pairs]
    return (correlation([sentence.gold for sentence in heldout], list(map(read, heldout))),
            fmean((1 + (first > second) - (first < second)) / 2 for first, second in numbers))


# ---- all of it ----


def main(cfg: PrepareConfig) -> None:
    def rng(part: str) -> random.Random:  # one stream for each part, so that a flag changes only its own part
        return random.Random(f"{cfg.seed} {part}")

    def texts_of(some: list[Sentence]) -> list[str]:
        return [sentence.text for sentence in some]

    sentences = read_ratings(find_archive(cfg, RATINGS_URL), rng("voters"))
    reviews = read_reviews(find_archive(cfg, REVIEWS_URL))
    train, heldout = split_sentences(sentences, rng("sentences"))
    judged, read, heldout_read = split_reviews(reviews, rng("reviews"))
    print(f"{len(sentences):,} rated sentences: {len(train):,} to train on, {len(heldout):,} held out\n"
          f"{len(reviews):,} reviews: {len(judged):,} for the judge, {len(read):,} for the language model, "
          f"{len(heldout_read):,} held out", flush=True)

    passages, heldout_passages = cut_passages(read), cut_passages(heldout_read)
    leaks = find_leaks(passages + texts_of(train), heldout)
    print(f"{len(leaks):,} training texts hold a held-out sentence: dropped\n"
          f"training the tokenizer, about 20 seconds", flush=True)
    learned = [f"{PROMPT} {text}" for text in passages + texts_of(train) if text not in leaks]
    ranks = train_bpe(learned, cfg.vocab_size - 2)  # end-of-text and pad have no rank
    too_long = find_too_long(passages + heldout_passages + texts_of(sentences), ranks, cfg.max_tokens)
    print(f"{len(too_long):,} texts, {sum(sentence.text in too_long for sentence in sentences):,} of them rated, take "
          f"more than {cfg.max_tokens} tokens: dropped")
    dropped = leaks | too_long
    train, heldout = ([sentence for sentence in some if sentence.text not in dropped] for some in (train, heldout))
    texts, heldout_texts = ([text for text in some if text not in dropped] for some in
                            (passages + texts_of(train), heldout_passages + texts_of(heldout)))

    prompts = make_prompts(train, rng("prompts"))
    comparisons = make_comparisons(draw_groups(train, 2, cfg.pairs, rng("pairs")), rng("votes"))
    gold_pairs = order_by_gold(draw_groups(heldout, 2, HELD_OUT_PAIRS, rng("held-out pairs")))
    rankings = make_rankings(draw_groups(train, RANKED, cfg.rankings, rng("groups")), rng("ranks"))
    weights = fit_judge(judged)
    print(f"{cfg.pairs - len(comparisons):,} of {cfg.pairs:,} comparisons and "
          f"{cfg.rankings - len(rankings) // RANKED:,} of {cfg.rankings:,} rankings are tied: dropped")
    files = {
        "prompts": ("Prompt", zip(prompts)),
        "prompts_heldout": ("Prompt", zip(make_prompts(heldout, rng("held-out prompts"), frozenset(prompts)))),
        "demonstrations": ("Prompt,Response", make_demonstrations(texts, rng("demonstrations"))),
        "demonstrations_heldout": ("Prompt,Response", make_demonstrations(heldout_texts, rng("held-out texts"))),
        "comparisons": ("Prompt,Chosen,Rejected,ChosenRating,RejectedRating", comparisons),
        "comparisons_heldout": ("Prompt,Chosen,Rejected,ChosenGold,RejectedGold",
                                [(PROMPT, better.text, worse.text, better.gold, worse.gold)
                                 for better, worse in gold_pairs]),
        "rankings": ("Prompt,Response,Rank,Group", rankings),
        "ratings": ("Prompt,Response,Gold", [(PROMPT, sentence.text, sentence.gold) for sentence in train]),
        "ratings_heldout": ("Prompt,Response,Gold,VotersMean",
                            [(PROMPT, sentence.text, sentence.gold, fmean(sentence.votes)) for sentence in heldout]),
        "judge_weights": ("Feature,Weight", weights.items()),
    }
    tables = {name: [dict(zip(columns.split(","), row)) for row in rows] for name, (columns, rows) in files.items()}
    if empty := [name for name, rows in tables.items() if not rows]:
        raise InputError(f"{empty[0]}.csv would be empty; give more --pairs, --rankings or --max-tokens")

    print(f"\n{noise_table(train, rng('noise'))}\n\n"
          f"held-out sentences: correlation with gold ({len(heldout):,}), share of comparisons in gold's order "
          f"({len(gold_pairs):,})")
    votes = rng("one voter")
    for name, reader in (("mean of the voters", lambda sentence: fmean(sentence.votes)),
                         ("one voter", lambda sentence: votes.choice(sentence.votes)),
                         ("judge.py", lambda sentence: score_text(sentence.text, weights))):
        print("    {:18} {:.3f}  {:.3f}".format(name, *agreement(reader, heldout, gold_pairs)))

    out = Path(cfg.out or HERE)
    out.mkdir(parents=True, exist_ok=True)
    print(f"\nwriting to {out}")
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
        print(f"    {name}.csv: {len(rows):,} rows")
    write_ranks(ranks, out / "tokenizer.tmp")
    os.replace(out / "tokenizer.tmp", out / "tokenizer.tiktoken")
    print(f"    tokenizer.tiktoken: {len(ranks):,} ranks")
    if out.resolve() != HERE:
        shutil.copyfile(HERE / "judge.py", out / "judge.py")


if __name__ == "__main__":
    run(main, PrepareConfig)
