"""data/movie_ratings: small archives, whose votes and means are worked by hand, and the real
ones."""

import doctest
import hashlib
import importlib.util
import io
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pandas
import pytest
import torch

from rlhf.data import load_comparisons, load_demonstrations, load_prompts
from rlhf.methods.rankings import load_rankings
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.judge import load_judge
from rlhf.run.loading import find_tokenizer, load_reward_model
from tests.helpers import ROOT, real_data
from tests.helpers import rows as rows_of

FOLDER = ROOT / "data" / "movie_ratings"
FILES = {
    "prompts",
    "prompts_heldout",
    "demonstrations",
    "demonstrations_heldout",
    "comparisons",
    "comparisons_heldout",
    "rankings",
    "ratings",
    "ratings_heldout",
    "judge_weights",
}


def load(name, monkeypatch):
    """A file of the data set under a name of its own, because other data sets have files of these
    names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location(f"movie_ratings_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    return module


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def prepare(module_patch):
    return load("prepare", module_patch)


@pytest.fixture(scope="module")
def judge(module_patch):
    return load("judge", module_patch)


class InOrder(random.Random):
    """Draws what comes first, so that a test knows what was drawn."""

    def sample(self, population, k):
        return list(population)[:k]

    def shuffle(self, items):
        pass

    def choice(self, items):
        return items[0]

    def randint(self, low, high):
        return low


def sentence(prepare, text="a sentence.", votes=(0,), gold=0.0, block=0, ratings=()):
    return prepare.Sentence(text, block, list(ratings), list(votes), gold)


# ---- small archives in the layout of the real ones ----


def write_archives(folder, texts, ratings, reviews):
    """texts: {id: bytes}; ratings: {id: list}; reviews: {name in the zip: bytes}. Like the real
    archives they also hold other snippets, whose ids are like 1_12, a README, carriage returns and
    a BOM."""
    folder.mkdir(parents=True, exist_ok=True)
    text_lines = []
    for number, text in texts.items():
        mean = statistics.fmean(ratings[number])
        text_lines.append(b"%s\t%.6f\t%s" % (number.encode(), mean, text))
    rating_lines = []
    for number, values in reversed(ratings.items()):
        rating_lines.append(f"{number}\t0.0\t0.0\t{values}\r\n".encode())
    bom = b"\xef\xbb\xbf"
    members = {
        "movieReviewSnippets_GroundTruth.txt": bom + b"\r\n".join(text_lines),
        "movieReviewSnippets_anonDataRatings.txt": bom + b"".join(rating_lines),
        "amazonReviewSnippets_GroundTruth.txt": b"1_12\t1.0\tWorks well.\r\n",
        "_README_.txt": b"a word of thanks",
    }
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(folder / "movie_reviews.zip", "w") as archive:
        archive.writestr("movie_reviews/README", b"a word of thanks")
        archive.writestr("movie_reviews/pos/", b"")
        for name, content in reviews.items():
            archive.writestr(name, content)
    return folder


WORDS = (
    "film plot actor scene story joke ending music hero script camera dialogue moment laugh star "
    "sequel picture cast theme tone"
).split()
GOOD = "lovely moving sharp funny warm".split()
BAD = "dull tired silly stale bland".split()


def small_text(rng, good):
    parts = [f"the {rng.choice(WORDS)} is {rng.choice(GOOD if good else BAD)}" for _ in range(5)]
    return " ".join(parts) + " ."


@pytest.fixture(scope="module")
def small_archives(tmp_path_factory):
    """120 sentences in four blocks of 20 raters, of which the first half is good, and 40 reviews of
    13 sentences. One sentence of each review quotes a rated sentence."""
    rng = random.Random(5)
    texts = {str(i): small_text(rng, i <= 60).encode() for i in range(1, 121)}
    ratings = {}
    for number in texts:
        sign = 1 if int(number) <= 60 else -1
        ratings[number] = [rng.choice((1, 2, 3, 4)) * sign for _ in range(20)]
    reviews = {}
    for i in range(40):
        lines = [small_text(rng, i % 2).encode() for _ in range(12)]
        lines.append(b"as was said , " + texts[str(3 * i + 1)])
        folder = "pos" if i % 2 else "neg"
        reviews[f"movie_reviews/{folder}/cv{i:03}.txt"] = b"\n".join(lines)
    return write_archives(tmp_path_factory.mktemp("archives"), texts, ratings, reviews)


SMALL = {"vocab_size": 300, "pairs": 200, "rankings": 20, "max_tokens": 150}


def checksums(prepare, folder):
    found = {}
    for url in prepare.SHA256:
        path = folder / url.rsplit("/", 1)[1]
        found[url] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def few_draws(prepare, monkeypatch):
    """noise_table draws 1,000 pairs instead of 100,000, which takes a second."""
    draw_groups = prepare.draw_groups

    def draw_few(items, size, count, rng):
        return draw_groups(items, size, 1000 if count == 100_000 else count, rng)

    monkeypatch.setattr(prepare, "draw_groups", draw_few)


@pytest.fixture
def small(prepare, small_archives, few_draws, monkeypatch):
    """A function that makes the small data set in a folder, with the flags that a test gives."""
    monkeypatch.setattr(prepare, "SHA256", checksums(prepare, small_archives))

    def make(out, **flags):
        files = {"source": str(small_archives), "out": str(out)}
        prepare.main(prepare.PrepareConfig(**files | SMALL | flags))
        return out

    return make


# ---- reading ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "It's  a  MOVIE    and an album    you won't miss.",
            "it's - a - movie - and an album - you won't miss.",
        ),
        ("''Red Dragon'' never cuts corners.", "red dragon never cuts corners."),
        (
            "Chris    the naïve cliché – with 9 ½ Weeks",
            "chris - the naive cliche - with 9 1/2 weeks",
        ),
        (
            "Lilo &amp; Stitch...once, (E)ventually ... twice",
            "lilo & stitch... once, (e)ventually... twice",
        ),
        (
            'he said , " rat race " ( 1999 ) : flat-out silly ! ',
            "he said, rat race (1999): flat out silly!",
        ),
        ("doesn\x12t it ? \x13 no , \x14 she said \x16 twice", "doesn't it? no, she said - twice"),
        (
            "it cost $8 . 50 in the u . s . , mr . pitt -- so",
            "it cost $8.50 in the u.s., mr. pitt - so",
        ),
        (
            "_can_ * not * , soft- hearted and/or 2 / 10 . . . ",
            "can not, soft hearted and/or 2/10...",
        ),
        ("' they ' said . ' \r", "' they said."),
        ("...and so on   ", "and so on"),
        (" . . . ? ", ""),
    ],
)
def test_one_form_is_the_same_for_both_sources(prepare, text, expected):
    assert prepare.one_form(text) == expected
    assert prepare.one_form(expected) == expected


def test_docstring_examples_are_true(prepare, judge):
    for module in (prepare, judge):
        assert doctest.testmod(module).failed == 0
    assert doctest.testmod(prepare).attempted >= 4


def test_votes_and_gold_match_hand_computation(prepare, tmp_path):
    """Sentence 1 has ratings 4, 2, -1, 3, 0. Half of five is two voters, here the first two: votes
    4 and 2, gold (-1 + 3 + 0) / 3 = 2/3. Sentence 30 is in the same block, with the same voters,
    and has gold (0 + 0 + 4) / 3. Sentence 31 is in the next block, whose two raters give vote -3
    and gold 1. The byte 0xff is not UTF-8 and is dropped."""
    ratings = {"1": [4, 2, -1, 3, 0], "30": [1, 1, 0, 0, 4], "31": [-3, 1]}
    texts = {"1": b"First    \xffof all, ''this''", "30": b"Thirty", "31": "Zoë".encode()}
    path = write_archives(tmp_path, texts, ratings, {}) / "hutto_ICWSM_2014.tar.gz"
    first, last, other = prepare.read_ratings(path, InOrder())
    Sentence = prepare.Sentence
    assert first == Sentence("first - of all, this", 0, ratings["1"], [4, 2], 2 / 3)
    assert last == Sentence("thirty", 0, ratings["30"], [1, 1], 4 / 3)
    assert other == Sentence("zoe", 1, ratings["31"], [-3], 1.0)


def test_voters_are_drawn_once_per_block(prepare, tmp_path):
    """Raters 0 to 5 give their own number as a rating, so the votes name the voters."""
    texts = {str(i): b"text" for i in range(1, 301)}
    ratings = {number: [*range(6)] for number in texts}
    path = write_archives(tmp_path, texts, ratings, {}) / "hutto_ICWSM_2014.tar.gz"
    sentences = prepare.read_ratings(path, random.Random(0))
    voters = {}
    for number, rated in enumerate(sentences):
        voters.setdefault(number // 30, set()).add(tuple(rated.votes))
        assert len(rated.votes) == 3
        assert rated.gold == pytest.approx((15 - sum(rated.votes)) / 3)
    assert len(voters) == 10 and all(len(block) == 1 for block in voters.values())
    assert len(set.union(*voters.values())) > 4


def test_read_reviews_gives_stars_and_lines(prepare, tmp_path):
    reviews = {
        "movie_reviews/pos/cv2.txt": b"good , \xff it is .\n \nyes ! \n",
        "movie_reviews/neg/cv1.txt": b"no .",
    }
    path = write_archives(tmp_path, {}, {}, reviews) / "movie_reviews.zip"
    assert prepare.read_reviews(path) == [(False, ["no."]), (True, ["good, it is.", "yes!"])]


def test_find_archive_rejects_missing_and_wrong_files(
    prepare, small_archives, tmp_path, monkeypatch
):
    cfg = prepare.PrepareConfig(source=str(tmp_path))
    message = "does not hold hutto_ICWSM_2014.tar.gz; it comes from https://raw"
    with pytest.raises(InputError, match=message):
        prepare.find_archive(cfg, prepare.RATINGS_URL)
    shutil.copy(small_archives / "movie_reviews.zip", tmp_path)
    with pytest.raises(InputError, match="is not the expected file"):
        prepare.find_archive(cfg, prepare.REVIEWS_URL)
    monkeypatch.setattr(prepare, "SHA256", checksums(prepare, small_archives))
    assert prepare.find_archive(cfg, prepare.REVIEWS_URL) == tmp_path / "movie_reviews.zip"


def test_find_archive_offline_says_where_to_put_a_copy(prepare, tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/movie_reviews.zip"  # nobody listens there
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    monkeypatch.setattr(prepare, "SHA256", {url: "0" * 64})
    message = f"could not fetch {url} .* put it at {tmp_path}/downloads/movie_reviews.zip"
    with pytest.raises(InputError, match=message):
        prepare.find_archive(prepare.PrepareConfig(), url)
    (tmp_path / "downloads" / "movie_reviews.zip").write_bytes(b"a page that asks for a password")
    with pytest.raises(InputError, match="is not the expected file"):
        prepare.find_archive(prepare.PrepareConfig(), url)


# ---- splitting ----


def test_split_keeps_texts_with_equal_letters_together(prepare):
    """50 texts are spelled in two ways each. 10 of the 50 are held out, in both spellings."""
    sentences = []
    for i in range(50):
        sentences += [sentence(prepare, f"a mess {i}."), sentence(prepare, f"a mess{i} ...")]
    train, heldout = prepare.split_sentences(sentences, random.Random(1))
    keys = {prepare.letters(rated.text) for rated in train}
    heldout_keys = {prepare.letters(rated.text) for rated in heldout}
    assert len(heldout) == 20 and len(train) == 80 and not keys & heldout_keys
    assert heldout != prepare.split_sentences(sentences, random.Random(2))[1]


def test_split_reviews_is_balanced(prepare):
    """Of 100 good and 100 bad reviews the judge gets 50 of each. Of the other 50 of each, 50/20 =
    2.5, rounded up to 3, are held out."""
    reviews = [prepare.Review(i % 2 == 0, [str(i)]) for i in range(200)]
    parts = prepare.split_reviews(reviews, random.Random(1))
    assert [len(part) for part in parts] == [100, 94, 6]
    assert [sum(review.favourable for review in part) for part in parts] == [50, 47, 3]
    reviews = [review for part in parts for review in part]
    assert len({review.lines[0] for review in reviews}) == 200


def test_find_leaks_compares_letters_only(prepare):
    """The second text holds a held-out sentence with other punctuation. "often hilarious" is too
    short to count. The third held-out sentence is in no single text, only across the end of one and
    the beginning of the next."""
    heldout_texts = [
        "Nothing about this movie works!",
        "often hilarious",
        "these films are dull and so was I",
    ]
    heldout = [sentence(prepare, text) for text in heldout_texts]
    texts = [
        "often hilarious, always long.",
        "well: nothing about this 'movie' works. at all.",
        "these films are dull",
        "and so was i",
    ]
    assert prepare.find_leaks(texts, heldout) == {texts[1]}


def test_length_counts_prompt_and_end_of_text(prepare):
    """If each byte is a token, "Review: ab" has 10 tokens, and 11 with end-of-text."""
    ranks = [bytes([byte]) for byte in range(256)]
    assert prepare.find_too_long(["ab", "abc"], ranks, 11) == {"abc"}


# ---- rows ----


def test_draw_groups_takes_all_items_about_equally_often(prepare):
    """Seven items in groups of three: each shuffle gives two groups without a common item, so 10
    groups take 5 shuffles."""
    groups = prepare.draw_groups([*range(7)], 3, 10, random.Random(0))
    assert len(groups) == 10 and all(len(set(group)) == 3 for group in groups)
    for at in range(0, 10, 2):
        assert len({*groups[at], *groups[at + 1]}) == 6
    assert len(set(groups)) > 5
    with pytest.raises(InputError, match="only 2 sentences are left"):
        prepare.draw_groups([1, 2], 3, 1, random.Random(0))


def test_make_comparisons_matches_hand_computation(prepare):
    """InOrder draws the first vote of each: 1 and 3, a tie of 3 and 3, -4 and 1, and 1 and 2 of the
    same sentence. The second and the last pair are left out."""
    a = sentence(prepare, "a", [1, 4])
    b = sentence(prepare, "b", [3, -4])
    c = sentence(prepare, "c", [3])
    d = sentence(prepare, "d", [-4, 4])
    pairs = [(a, b), (b, c), (d, a), (a, a._replace(votes=[2]))]
    assert prepare.make_comparisons(pairs, InOrder()) == [
        ("Review:", "b", "a", 3, 1),
        ("Review:", "a", "d", 1, -4),
    ]


def test_all_votes_are_equally_likely(prepare):
    """Votes 3, -1, -1, 0 against a constant 0 win 1/4 of 4,000 draws, lose 1/2 and tie 1/4, within
    4 standard errors: 4 sqrt(4000/4 x 3/4) = 110 and 4 sqrt(4000/4) = 127."""
    pair = sentence(prepare, "a", [3, -1, -1, 0]), sentence(prepare, "b", [0])
    rows = prepare.make_comparisons([pair] * 4000, random.Random(0))
    wins = sum(row[1] == "a" for row in rows)
    assert abs(wins - 1000) < 110 and abs(len(rows) - wins - 2000) < 127


def test_make_rankings_matches_hand_computation(prepare):
    """Votes 3, 1, 3, -2 have ranks 1, 3, 1, 4. A group of four equal votes is left out, and its
    number is not used again."""
    first = tuple(sentence(prepare, text, [vote]) for text, vote in zip("abcd", (3, 1, 3, -2)))
    tied = tuple(rated._replace(votes=[2]) for rated in first)
    rows = prepare.make_rankings([first, tied, first], InOrder())
    assert rows[:4] == [("Review:", text, rank, 1) for text, rank in zip("abcd", (1, 3, 1, 4))]
    assert [row[3] for row in rows[4:]] == [3] * 4


def test_order_by_gold_keeps_pairs_with_a_clear_gap(prepare):
    """Gold 1.5 and 0 differ by more than 1. Gold 1 and 0 do not."""
    high, middle, low = [sentence(prepare, gold=gold) for gold in (1.5, 1.0, 0.0)]
    assert prepare.order_by_gold([(low, high), (middle, low), (high, low)]) == [(high, low)] * 2


def test_prompts_are_openings_with_three_more_words_to_come(prepare):
    """They have two to five words. None comes twice, and none that is taken comes again."""
    long = sentence(prepare, "one two three four five six seven eight")
    short = sentence(prepare, "one two three four")
    for seed in range(20):
        (prompt,) = prepare.make_prompts([long, short], random.Random(seed))
        assert 2 <= len(prompt.split()) - 1 <= 5
        assert "Review: one two three four five".startswith(prompt)
    assert len({*prepare.make_prompts([long] * 50, random.Random(0))}) == 4
    every = {"Review: one two", "Review: one two three four"}
    assert not every & {*prepare.make_prompts([long] * 50, random.Random(0), frozenset(every))}


def test_demonstrations_are_cut_within_the_first_five_words(prepare):
    """Prompt and response together are the text again. At least one word is left for the
    response."""
    texts = ["a b c d e f g"] * 300 + ["lone", "two words"] * 20
    rows = prepare.make_demonstrations(texts, random.Random(0))
    assert len(rows) == 340 and all(response for _, response in rows)
    whole = {f"{prompt} {response}" for prompt, response in rows}
    assert whole == {"Review: a b c d e f g", "Review: lone", "Review: two words"}
    sizes = {len(prompt.split()) - 1 for prompt, response in rows if response.endswith("g")}
    assert sizes == {0, 1, 2, 3, 4, 5}
    assert {prompt for prompt, response in rows if response == "lone"} == {"Review:"}
    assert rows != prepare.make_demonstrations(texts, random.Random(1))


# ---- the judge ----


def test_fit_judge_matches_hand_computation(prepare):
    """Two reviews are favourable and three are not. "good" is in two favourable ones and in one of
    the others: log 12/22 minus log 11/23. "bad" is in none and in two, twice in one of them: log
    10/22 minus log 12/23. "film" is in one of each kind. "rare" is in one review only and is left
    out. No pair of words spans two lines."""
    reviews = [
        prepare.Review(True, ["good", "film"]),
        prepare.Review(True, ["good good", "rare"]),
        prepare.Review(False, ["bad", "bad good", "film"]),
        prepare.Review(False, ["bad"]),
        prepare.Review(False, []),
    ]
    weights = prepare.fit_judge(reviews)
    assert weights == pytest.approx(
        {
            "bad": math.log(10 / 22 * 23 / 12),
            "film": math.log(11 / 22 * 23 / 11),
            "good": math.log(12 / 22 * 23 / 11),
        }
    )
    assert list(weights) == sorted(weights)


def test_score_text_matches_hand_computation(judge):
    """Three features have weights, "good", "film" and "good film". "good" comes twice and counts
    once. The score is (2 + 0 - 0.5) / sqrt 3."""
    weights = {"good": 2.0, "film": 0.0, "good film": -0.5, "bad": -3.0}
    assert judge.score_text("Good film, odd but good", weights) == pytest.approx(1.5 / 3**0.5)
    assert judge.score_text("nothing known", weights) == judge.score_text("", weights) == 0.0


def test_score_text_does_not_depend_on_the_order_of_a_set(judge):
    """1 + 1e16 - 1e16 gives 1 or 0 in floating point, depending on the order. The exact sum is
    1."""
    for i in range(20):
        weights = {f"a{i}": 1.0, f"b{i}": 1e16, f"c{i}": -1e16}
        assert judge.score_text(f"a{i} b{i} c{i}", weights) == 1 / 3**0.5


def test_judge_scores_prompt_and_response_as_one_text(judge, monkeypatch):
    weights = {"not good": -1.0, "good": 0.5, "review": 9.0}
    monkeypatch.setattr(judge, "load_weights", lambda: weights)
    scores = judge.score(["Review: not", "Review:"], ["good.", "good."])
    assert scores == pytest.approx([-0.5 / 2**0.5, 0.5])
    hostile = ["", " ", "\x00", "漢字 naïve", "<|endoftext|>" * 50, "good " * 10_000, "\ud800"]
    assert all(map(math.isfinite, judge.score(["Review:"] * len(hostile), hostile)))
    with pytest.raises(ValueError, match="pairs"):
        judge.score(["Review:"], [])


def test_judge_without_weights_says_what_to_run(tmp_path):
    shutil.copy(FOLDER / "judge.py", tmp_path)
    message = "weights.csv does not exist: run `python data/movie_ratings/prepare.py`"
    with pytest.raises(FileNotFoundError, match=message):
        load_judge(str(tmp_path)).score(["Review:"], ["good."])


# ---- how far people agree ----


def test_noise_table_matches_hand_computation(prepare):
    """The first ten raters say 2 and 0, a gap of 2, so the pair is in the row "1 to 2". The next
    one says -1 and 0 and disagrees. The means of three are 1 and 0 and agree. The means of ten are
    0.2 and 0 and agree. Both sentences are in one block, so the last column has the pair once. Of
    the other rows only the last, "0 to 8", has any pairs."""
    a = sentence(prepare, "a", ratings=[2] * 10 + [-1, 2, 2] + [0] * 5 + [-1, 0])
    b = sentence(prepare, "b", ratings=[0] * 20)
    c = sentence(prepare, "c", ratings=[4] * 19)
    lines = prepare.noise_table([a, b, c], InOrder()).split("\n")
    cells = {line[:16].strip(): line.split(" | ")[1:] for line in lines[2:]}
    assert [cell.split() for cell in cells["1 to 2"]] == [
        ["0.000", "0.00", "100,000"],
        ["1.000", "0.00", "100,000"],
        ["1.000", "0.00", "100,000"],
        ["0.000", "0.00", "1"],
    ]
    assert cells["0 to 8"] == cells["1 to 2"] and cells["2 to 3"][0].split() == ["-", "0"]


def test_noise_table_counts_ties_separately(prepare, few_draws):
    """One rater says 1 and 1, a tie. The order of the pair makes no difference."""
    a = sentence(prepare, ratings=[3] * 10 + [1] * 10, block=0)
    b = sentence(prepare, ratings=[0] * 10 + [1] * 10, block=1)
    a = a._replace(ratings=a.ratings[:11] + [2, 2] + a.ratings[13:])
    for pair in ([a, b], [b, a]):
        cells = prepare.noise_table(pair, InOrder()).split("\n")[5].split(" | ")
        assert cells[0].strip() == "2 to 3"
        assert [cell.split() for cell in cells[1:]] == [
            ["-", "1,000"],
            ["1.000", "0.00", "1,000"],
            ["1.000", "0.00", "1,000"],
            ["-", "0"],
        ]


def test_noise_table_asks_the_same_person_about_both_sentences_of_a_block(prepare, few_draws):
    """20 people, from stern to generous, all rate b one above a. Each person has them in order, and
    two different people often do not."""
    people = [rating for rating in range(-4, 1) for _ in range(4)]
    a = sentence(prepare, ratings=people)
    b = sentence(prepare, ratings=[rating + 1 for rating in people])
    far = [rated._replace(block=9, ratings=[4] * 20) for rated in (a, b)]
    for seed in range(2):
        lines = prepare.noise_table([a, b, *far], random.Random(seed)).split("\n")
        cells = lines[3].split(" | ")
        assert cells[0].strip() == "0.5 to 1" and cells[4].split() == ["1.000", "0.00", "1"]


def test_agreement_matches_hand_computation(prepare):
    """Gold is 2, 1, 0 and the reader says 5, 3, 1: the correlation is 1. Of three pairs one is in
    order, one is not, and one is equal, which counts half."""
    numbers = {"a": 5.0, "b": 3.0, "c": 1.0, "d": 3.0}
    a = sentence(prepare, "a", gold=2.0)
    b = sentence(prepare, "b", gold=1.0)
    c = sentence(prepare, "c", gold=0.0)
    d = sentence(prepare, "d", gold=3.0)
    pairs = [(a, b), (c, a), (b, d)]
    shown = prepare.agreement(lambda rated: numbers[rated.text], [a, b, c], pairs)
    assert shown == pytest.approx((1.0, 0.5))


# ---- all of it ----


def check_data_set(prepare, folder, limit):
    """What holds for each data set made here: the files load, and held-out text is not in training
    text."""
    csvs = {f"{name}.csv" for name in FILES}
    others = {"tokenizer.tiktoken", "judge.py"}
    assert {path.name for path in folder.iterdir()} == csvs | others
    tokenizer = find_tokenizer(str(folder))
    for heldout in (False, True):
        assert load_prompts(str(folder), tokenizer, limit, heldout)
        assert load_demonstrations(str(folder), tokenizer, limit, heldout)
        assert load_comparisons(str(folder), tokenizer, limit, heldout)
    load_rankings(str(folder), tokenizer, limit)

    tables = {name: rows_of(folder / f"{name}.csv") for name in FILES}
    heldout = {prepare.letters(row["Response"]) for row in tables["ratings_heldout"]}
    learned = [f"{row['Prompt']} {row['Response']}" for row in tables["demonstrations"]]
    compared = both_sides(tables["comparisons"])
    ranked = {row["Response"] for row in tables["rankings"]}
    rated = {row["Response"] for row in tables["ratings"]}
    assert not heldout & {prepare.letters(text) for text in compared | ranked | rated}
    everything = "|".join(map(prepare.letters, learned))
    assert not [key for key in heldout if len(key) >= 20 and key in everything]
    assert compared | ranked <= {text.removeprefix("Review: ") for text in learned}
    heldout_compared = both_sides(tables["comparisons_heldout"])
    assert {prepare.letters(text) for text in heldout_compared} <= heldout
    prompts = [row["Prompt"] for row in tables["prompts"] + tables["prompts_heldout"]]
    assert len({*prompts}) == len(prompts)
    for row in tables["comparisons_heldout"]:
        assert float(row["ChosenGold"]) - float(row["RejectedGold"]) > 1
    for row in tables["comparisons"]:
        assert int(row["ChosenRating"]) > int(row["RejectedRating"])

    example = tables["demonstrations"][0]  # a cut between words does not change a text's tokens
    prompt, response = example["Prompt"], example["Response"]
    cut = tokenizer.encode(prompt) + tokenizer.encode(" " + response)
    assert tokenizer.encode(f"{prompt} {response}") == cut
    return tables


def both_sides(comparisons):
    """The different texts of comparisons."""
    return {row["Chosen"] for row in comparisons} | {row["Rejected"] for row in comparisons}


def test_small_data_set_has_the_expected_counts(prepare, small, tmp_path, capsys):
    """120 different sentences, of which 24 are held out. 40 reviews: 20 for the judge, 18 to learn
    from, 2 held out."""
    tables = check_data_set(prepare, small(tmp_path / "out"), SMALL["max_tokens"])
    out = capsys.readouterr().out
    assert "120 rated sentences: 96 to train on, 24 held out" in out
    assert "40 reviews: 20 for the judge, 18 for the language model, 2 held out" in out
    assert len(tables["ratings_heldout"]) == 24 and len(tables["ratings"]) == 96
    leaks = 96 + 18 * 13 - len(tables["demonstrations"])
    assert f"{leaks} training texts hold a held-out sentence" in out and 0 < leaks < 18
    assert len(tables["demonstrations_heldout"]) == 24 + 2 * 13
    assert f"{200 - len(tables['comparisons'])} of 200 comparisons" in out
    for name, rows in tables.items():
        assert f"{name}.csv: {len(rows):,} rows" in out
    judge = load_judge(str(tmp_path / "out"))
    good, bad = judge.score(["Review:"] * 2, ["lovely and warm.", "dull and stale."])
    assert good > 0 > bad


@pytest.mark.slow
def test_same_seed_makes_the_same_bytes(prepare, small, small_archives, tmp_path):
    """Also in a process where Python orders its sets in another way. Another seed makes another
    data set."""
    first, other = small(tmp_path / "first"), small(tmp_path / "other", seed=1)
    settings = {"source": str(small_archives), "out": str(tmp_path / "again")} | SMALL
    code = (
        f"import prepare; prepare.SHA256 = {checksums(prepare, small_archives)!r}; "
        f"prepare.main(prepare.PrepareConfig(**{settings!r}))"
    )
    command = [sys.executable, "-B", "-c", code]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, env=environment)
    for path in sorted(first.iterdir()):
        content = path.read_bytes()
        assert content == (tmp_path / "again" / path.name).read_bytes(), path.name
        if path.name != "judge.py":
            assert content != (other / path.name).read_bytes(), path.name


def test_pairs_and_rankings_flags_change_only_their_files(small, tmp_path):
    few = small(tmp_path / "few", pairs=50)
    many = small(tmp_path / "many", pairs=100, rankings=30)
    changed = set()
    for path in few.iterdir():
        if path.read_bytes() != (many / path.name).read_bytes():
            changed.add(path.name)
    assert changed == {"comparisons.csv", "rankings.csv"}
    rows = rows_of(few / "comparisons.csv")
    assert rows_of(many / "comparisons.csv")[: len(rows)] == rows


def test_texts_that_do_not_fit_are_dropped(prepare, small, tmp_path, capsys):
    """With a vocabulary of 300 a text of 20 words takes about 40 to 60 tokens."""
    tables = check_data_set(prepare, small(tmp_path / "out", max_tokens=55), 55)
    assert 0 < len(tables["ratings_heldout"]) < 24
    assert "take more than 55 tokens: dropped" in capsys.readouterr().out


def test_nothing_is_written_if_too_few_sentences_are_left(small, tmp_path):
    with pytest.raises(InputError, match="only [01] sentences are left"):
        small(tmp_path / "out", max_tokens=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_error_on_the_command_line_is_one_line_and_status_2(tmp_path):
    """Run as a user does, from another folder. There is no traceback."""
    script = str(FOLDER / "prepare.py")
    command = [sys.executable, "-B", script, "--out", "out", "--source", "nowhere"]
    got = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = "error: --source nowhere does not hold hutto_ICWSM_2014.tar.gz"
    assert got.returncode == 2 and got.stderr.startswith(message) and got.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_prepare_config_rejects_a_vocabulary_without_the_bytes(prepare, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(prepare.PrepareConfig, ["--vocab-size", "257"])
    assert stop.value.code == 2 and "error: --vocab-size is 257" in capsys.readouterr().err


# ---- the real archives ----


@pytest.fixture(scope="module")
def archives():
    """The folder that holds both."""
    real_data("movie_reviews.zip")
    return real_data("hutto_ICWSM_2014.tar.gz").parent


@pytest.fixture(scope="module")
def real(prepare, archives, tmp_path_factory):
    """The real data set, with a small vocabulary, which is faster, and room for the longer rows
    that this makes."""
    out = tmp_path_factory.mktemp("real")
    settings = {"source": str(archives), "out": str(out), "vocab_size": 512, "max_tokens": 160}
    prepare.main(prepare.PrepareConfig(**settings))
    return out


@pytest.mark.slow
def test_rating_positions_are_the_same_people_within_a_block(prepare, archives):
    """This is why voters are drawn by position. Subtract its sentence's mean from each rating:
    somebody generous is above 0 each time. Between neighbours in a block of 30 the correlation,
    position by position, is above 0.25. Between the last sentence of a block and the first of the
    next, if both have as many ratings (32 such pairs of sentences), it is 0 within 4 standard
    errors."""
    sentences = prepare.read_ratings(archives / "hutto_ICWSM_2014.tar.gz", random.Random(0))
    assert len(sentences) == 10_605
    assert {len(rated.ratings) for rated in sentences} == {*range(15, 30)}
    pairs = {True: ([], []), False: ([], [])}
    for first, second in zip(sentences, sentences[1:]):
        if len(first.ratings) == len(second.ratings):
            for rated, numbers in zip((first, second), pairs[first.block == second.block]):
                mean = statistics.fmean(rated.ratings)
                numbers += [rating - mean for rating in rated.ratings]
    assert statistics.correlation(*pairs[True]) > 0.25
    assert abs(statistics.correlation(*pairs[False])) < 4 / len(pairs[False][0]) ** 0.5
    blocks = {}
    for rated in sentences:
        blocks.setdefault(rated.block, set()).add(len(rated.ratings))
    assert all(len(lengths) == 1 for lengths in blocks.values())


@pytest.mark.slow
def test_real_data_set_has_the_expected_counts(prepare, real, capsys):
    """All sentences are in about equally many comparisons."""
    tables = check_data_set(prepare, real, 160)
    assert len(tables["ratings_heldout"]) == 2122
    counts = {}
    for row in tables["comparisons"]:
        for side in ("Chosen", "Rejected"):
            counts[row[side]] = counts.get(row[side], 0) + 1
    assert len(counts) == 8482  # two texts come twice
    assert min(counts.values()) >= 4 and max(counts.values()) <= 34


@pytest.mark.slow
def test_gold_is_the_mean_of_the_raters_who_do_not_vote(prepare, real, archives):
    """The votes and the ratings behind gold are all ratings: sum of votes + (number of others) *
    gold = sum."""
    path = archives / "hutto_ICWSM_2014.tar.gz"
    sums = set()
    for rated in prepare.read_ratings(path, random.Random("0 voters")):
        assert len(rated.votes) == len(rated.ratings) // 2
        others = len(rated.ratings) - len(rated.votes)
        total = sum(rated.votes) + others * rated.gold
        assert math.isclose(total, sum(rated.ratings), abs_tol=1e-9)
        sums.add((rated.text, f"{rated.gold:.6g}", f"{statistics.fmean(rated.votes):.6g}"))
    shown = set()
    for row in rows_of(real / "ratings_heldout.csv"):
        shown.add((row["Response"], row["Gold"], row["VotersMean"]))
    assert shown <= sums and len(shown) == 2122


@pytest.mark.slow
def test_ratings_in_comparisons_are_votes_of_voters(prepare, real, archives):
    path = archives / "hutto_ICWSM_2014.tar.gz"
    votes = {}
    for rated in prepare.read_ratings(path, random.Random("0 voters")):
        votes.setdefault(rated.text, set()).update(rated.votes)
    for row in rows_of(real / "comparisons.csv"):
        assert int(row["ChosenRating"]) in votes[row["Chosen"]]
        assert int(row["RejectedRating"]) in votes[row["Rejected"]]


@pytest.mark.slow
def test_texts_of_both_sources_look_alike(real):
    """They are in lower case, with one space between words, none before a comma, and no hyphen
    inside a word. No sign is common in one source and missing in the other."""
    rated = "\n".join(row["Response"] for row in rows_of(real / "ratings_heldout.csv"))
    learned = "\n".join(row["Response"] for row in rows_of(real / "demonstrations.csv"))
    for text in (rated, learned):
        assert text.isascii() and text == text.lower() and "  " not in text and '"' not in text
        assert not re.search(r"\w-\w", text)
        assert not re.search(r" [,.!?;:] ", text)
    rare = {sign for sign in set(learned) - set(rated) if learned.count(sign) > 50}
    assert not rare, rare


@pytest.mark.slow
def test_judge_agrees_with_people_above_chance(real):
    """It orders 74 to 82 % of the held-out pairs as gold does (data/movie_ratings/README.md)."""
    judge = load_judge(str(real))
    rows = rows_of(real / "comparisons_heldout.csv")
    prompts = ["Review:"] * len(rows)
    chosen = judge.score(prompts, [row["Chosen"] for row in rows])
    rejected = judge.score(prompts, [row["Rejected"] for row in rows])
    assert 0.74 < statistics.fmean(a > b for a, b in zip(chosen, rejected)) < 0.82


@pytest.mark.slow
def test_readme_counts_are_those_of_the_files(real):
    """The counts of demonstrations depend on the tokenizer, which is smaller here. The others do
    not: no rated sentence is too long with either tokenizer."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FILES - {"demonstrations", "demonstrations_heldout"}:
        assert f"| `{name}.csv` | {len(rows_of(real / f'{name}.csv')):,} |" in readme, name


# ---- the linear model ----


@pytest.fixture(scope="module")
def linear(module_patch):
    return load("linear", module_patch)


def test_linear_features_match_hand_computation(linear):
    """Each of "good", "film" and "good film" is in two of three texts: idf 1 + log 3/2. "bad" and
    "not" are in one only and are left out. The first two texts have three features with the same
    idf, so each x is 1 / sqrt 3. The third text has none."""
    texts = ["good film not", "a good film", "bad"]
    idf = linear.count_features(texts)
    expected = pytest.approx(1 + math.log(3 / 2))
    assert idf == {"film": expected, "good": expected, "good film": expected}
    words = linear.count_words(texts, idf)
    assert words.indices.tolist() == [0, 1, 2, 0, 1, 2]
    assert words.begins.tolist() == [0, 3, 6]
    assert words.x.tolist() == pytest.approx([3**-0.5] * 6)
    weight = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    scores = linear.score(words, weight).tolist()
    assert scores == pytest.approx([7 / 3**0.5, 7 / 3**0.5, 0])


def test_linear_fit_finds_the_minimum(linear):
    """One feature has x = 1 in the chosen text and is not in the rejected one. f(w) = log(1 +
    exp(-w)) + decay w^2 has its minimum where sigmoid(-w) = 2 decay w, so decay = 1 / (2 (1 + e))
    puts it at w = 1."""
    x = torch.tensor([1.0], dtype=torch.float64)
    words = linear.Words(torch.tensor([0]), torch.tensor([0, 1]), x)
    decay = 1 / (2 * (1 + math.e))
    weight = linear.fit(words, torch.tensor([0]), torch.tensor([1]), decay)
    assert weight.item() == pytest.approx(1, abs=1e-5)


def test_linear_rejects_texts_without_a_common_word(linear, tmp_path):
    for name in ("comparisons.csv", "comparisons_heldout.csv"):
        (tmp_path / name).write_text("Prompt,Chosen,Rejected\nReview:,good,bad\n")
    with pytest.raises(InputError, match="no word of comparisons.csv comes in two texts"):
        linear.main(linear.LinearConfig(data=str(tmp_path)))


def test_linear_runs_on_the_small_data_set(linear, small, tmp_path, capsys):
    linear.main(linear.LinearConfig(data=str(small(tmp_path / "out"))))
    assert re.search(r"held out: [01]\.\d{3} of [\d,]+ comparisons", capsys.readouterr().out)


# ---- a classifier as the reward ----


@pytest.fixture(scope="module")
def favourable(module_patch):
    return load("favourable", module_patch)


def test_classifier_finds_the_minimum(favourable, monkeypatch):
    """Each text has one feature with x = 1. By symmetry the weights are w and -w and the bias is 0:
    log(1 + exp(-w)) + 2 decay w^2 is lowest where sigmoid(-w) = 4 decay w, with decay = 1 / (4 (1 +
    e)) at w = 1."""
    monkeypatch.setattr(favourable, "DECAY", 1 / (4 * (1 + math.e)))
    classifier = favourable.fit(
        ["good", "good", "bad", "bad"], torch.tensor([True, True, False, False])
    )
    logits = classifier.logits(["good", "bad", "so"]).tolist()
    assert logits == pytest.approx([1, -1, 0], abs=1e-5)


def test_classifier_reads_prompt_and_response(favourable, monkeypatch):
    """log sigmoid(1) = -log(1 + 1/e); the pair "not good" counts too."""
    idf = {"good": 1.0, "not good": 1.0}
    weight = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    classifier = favourable.Classifier(idf, weight, torch.tensor(0.0))
    monkeypatch.setattr(favourable, "classifier", lambda: classifier)
    scores = favourable.score(["Review: it is", "Review: it is not"], ["good", "good"])
    expected = [-math.log(1 + math.exp(-1)), -math.log(1 + math.exp(2 / math.sqrt(2)))]
    assert scores == pytest.approx(expected)


# ---- the second yardstick ----


@pytest.fixture(scope="module")
def people(module_patch):
    return load("people", module_patch)


def test_ridge_matches_hand_computation(people):
    """x = (1, -1), y = (3, -1): x y = 4 and x x = 2, so w = 4 / (2 + penalty)."""
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    y = torch.tensor([3.0, -1.0], dtype=torch.float64)
    weights = [people.ridge(x, y, penalty).item() for penalty in (0, 2, 6)]
    assert weights == pytest.approx([2, 1, 0.5])


def test_fit_finds_a_linear_function(people):
    """y = 2 + 3 a - b without noise: the smallest penalty is chosen, and unseen rows get their
    y."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = 2 + 3 * x[:, 0] - x[:, 1]
    unseen = torch.tensor([[1.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    assert people.fit(x, y).predict(unseen).tolist() == pytest.approx([0, 2], abs=0.01)


def test_features_are_last_and_mean_of_the_real_tokens(people):
    """Hidden states (1, 0), (3, 2), (100, 100), of which the last belongs to a pad in the first
    row."""
    hidden = torch.tensor([[1.0, 0], [3, 2], [100, 100]])  # (T, C)
    gpt = SimpleNamespace(hidden=lambda tokens: torch.stack([hidden] * len(tokens)))
    x = people.features(gpt, torch.zeros(2, 3, dtype=torch.long), torch.tensor([2, 1]))
    assert x.tolist() == [[3, 2, 2, 1], [1, 0, 1, 0]]


def test_batches_come_back_in_the_order_of_the_rows(people):
    rows = [[7] * length for length in (3, 1, 2) * 50]
    lengths = people.in_batches(lambda tokens, lengths: lengths, rows, 0, "rows")
    assert lengths.tolist() == [len(row) for row in rows]


@torch.no_grad()
def test_reward_model_of_a_run_scores_a_table(people, trained):
    """Each row by itself and without pads gives the same score."""
    data, out, _ = trained
    prompts = ["\n\nHuman: Hi!\n\nAssistant:", "A"]
    responses = ["b", "c d"]
    model, _ = load_reward_model(out / "reward.pt")
    tokenizer = find_tokenizer(str(data))
    expected = []
    for prompt, response in zip(prompts, responses):
        row = [*tokenizer.encode(prompt), *tokenizer.encode(f" {response}"), tokenizer.eos_id]
        expected.append(model(torch.tensor([row]), torch.tensor([len(row)])).item())
    assert abs(expected[0] - expected[1]) > 1e-3
    table = pandas.DataFrame({"Prompt": prompts, "Response": responses})
    got = people.score_with(out / "reward.pt", table, str(data))
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
