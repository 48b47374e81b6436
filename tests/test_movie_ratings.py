"""data/movie_ratings: real votes from real archives, and from small ones whose votes and means are worked by hand."""

import csv
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

import pytest
import torch

from rlhf.common import InputError
from rlhf.data import find_tokenizer, load_comparisons, load_demonstrations, load_prompts
from rlhf.judge import load_judge
from rlhf.rankings import load_rankings
from tests.conftest import ROOT

FOLDER = ROOT / "data" / "movie_ratings"
ARCHIVES = ROOT.parent / "shared" / "data"
FILES = {"prompts", "prompts_heldout", "demonstrations", "demonstrations_heldout", "comparisons", "comparisons_heldout",
         "rankings", "ratings_heldout", "judge_weights"}


def load(name, monkeypatch):
    """prepare.py or judge.py as a module of its own; other data sets have files of the same names."""
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
    """Draws what comes first, so that what was drawn is known."""

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


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- small archives in the layout of the real ones ----


def write_archives(folder, texts, ratings, reviews):
    """texts: {id: bytes}; ratings: {id: list}; reviews: {name in the zip: bytes}. With what the real archives have
    besides: other snippets, whose ids are like 1_12, a README, carriage returns and a BOM."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {
        "movieReviewSnippets_GroundTruth.txt": b"\xef\xbb\xbf" + b"\r\n".join(
            b"%s\t%.6f\t%s" % (number.encode(), statistics.fmean(ratings[number]), text)
            for number, text in texts.items()),
        "movieReviewSnippets_anonDataRatings.txt": b"\xef\xbb\xbf" + "".join(
            f"{number}\t0.0\t0.0\t{values}\r\n" for number, values in reversed(ratings.items())).encode(),
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


WORDS = ("film plot actor scene story joke ending music hero script camera dialogue moment laugh star sequel "
         "picture cast theme tone").split()
GOOD, BAD = "lovely moving sharp funny warm".split(), "dull tired silly stale bland".split()


def small_text(rng, good):
    parts = [word for _ in range(5) for word in ("the", rng.choice(WORDS), "is", rng.choice(GOOD if good else BAD))]
    return " ".join(parts) + " ."


@pytest.fixture(scope="module")
def small_archives(tmp_path_factory):
    """120 sentences in four blocks of 20 raters, the first half good; 40 reviews of 13 sentences, one of which quotes a
    rated sentence."""
    rng = random.Random(5)
    texts = {str(i): small_text(rng, i <= 60).encode() for i in range(1, 121)}
    ratings = {number: [rng.choice((1, 2, 3, 4)) * (1 if int(number) <= 60 else -1) for _ in range(20)]
               for number in texts}
    reviews = {}
    for i in range(40):
        lines = [small_text(rng, i % 2).encode() for _ in range(12)] + [b"as was said , " + texts[str(3 * i + 1)]]
        reviews[f"movie_reviews/{'pos' if i % 2 else 'neg'}/cv{i:03}.txt"] = b"\n".join(lines)
    return write_archives(tmp_path_factory.mktemp("archives"), texts, ratings, reviews)


SMALL = {"vocab_size": 300, "pairs": 200, "rankings": 20, "max_tokens": 150}


def checksums(prepare, folder):
    return {url: hashlib.sha256((folder / url.rsplit("/", 1)[1]).read_bytes()).hexdigest() for url in prepare.SHA256}


@pytest.fixture
def small(prepare, small_archives, monkeypatch):
    """A call that makes the small data set, in a folder and with flags of the test's choice."""
    monkeypatch.setattr(prepare, "SHA256", checksums(prepare, small_archives))

    def make(out, **flags):
        prepare.main(prepare.PrepareConfig(source=str(small_archives), out=str(out), **{**SMALL, **flags}))
        return out

    return make


# ---- reading ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's  a  MOVIE    and an album    you won't miss.", "it's - a - movie - and an album - you won't miss."),
        ("''Red Dragon'' never cuts corners.", "red dragon never cuts corners."),
        ("Chris    the naïve cliché – with 9 ½ Weeks", "chris - the naive cliche - with 9 1/2 weeks"),
        ("Lilo &amp; Stitch...once, (E)ventually ... twice", "lilo & stitch... once, (e)ventually... twice"),
        ('he said , " rat race " ( 1999 ) : flat-out silly ! ', "he said, rat race (1999): flat out silly!"),
        ("doesn\x12t it ? \x13 no , \x14 she said \x16 twice", "doesn't it? no, she said - twice"),
        ("it cost $8 . 50 in the u . s . , mr . pitt -- so", "it cost $8.50 in the u.s., mr. pitt - so"),
        ("_can_ * not * , soft- hearted and/or 2 / 10 . . . ", "can not, soft hearted and/or 2/10..."),
        ("' they ' said . ' \r", "' they said."),
        ("...and so on   ", "and so on"),
        (" . . . ? ", ""),
    ],
)
def test_both_sources_get_one_form(prepare, text, expected):
    assert prepare.one_form(text) == expected
    assert prepare.one_form(expected) == expected


def test_docstring_examples(prepare, judge):
    for module in (prepare, judge):
        assert doctest.testmod(module).failed == 0
    assert doctest.testmod(prepare).attempted >= 4


def test_votes_and_gold_by_hand(prepare, tmp_path):
    """Sentence 1 has ratings 4 2 -1 3 0. Half of five is two voters, here those who come first: votes 4 and 2, gold
    (-1 + 3 + 0) / 3 = 2/3. Sentence 30 is of the same block, has the same voters, and gold (0 + 0 + 4) / 3; sentence
    31 begins another, whose two raters give vote -3 and gold 1. The byte 0xff is no UTF-8 and gets lost."""
    ratings = {"1": [4, 2, -1, 3, 0], "30": [1, 1, 0, 0, 4], "31": [-3, 1]}
    texts = {"1": b"First    \xffof all, ''this''", "30": b"Thirty", "31": "Zoë".encode()}
    path = write_archives(tmp_path, texts, ratings, {}) / "hutto_ICWSM_2014.tar.gz"
    first, last, other = prepare.read_ratings(path, InOrder())
    assert (first.text, first.block, first.votes, first.gold) == ("first - of all, this", 0, [4, 2], 2 / 3)
    assert (last.text, last.block, last.votes, last.gold) == ("thirty", 0, [1, 1], 4 / 3)
    assert (other.text, other.block, other.votes, other.gold) == ("zoe", 1, [-3], 1.0)
    assert first.ratings == ratings["1"]


def test_voters_are_drawn_and_are_the_same_throughout_a_block(prepare, tmp_path):
    """Raters 0 to 5 give their own number, so the votes name the voters."""
    texts = {str(i): b"text" for i in range(1, 301)}
    path = write_archives(tmp_path, texts, {number: [*range(6)] for number in texts}, {}) / "hutto_ICWSM_2014.tar.gz"
    sentences = prepare.read_ratings(path, random.Random(0))
    voters = [{tuple(some.votes) for some in sentences[at : at + 30]} for at in range(0, 300, 30)]
    assert all(len(block) == 1 for block in voters) and len(set.union(*voters)) > 4
    assert all(len(some.votes) == 3 and some.gold == pytest.approx((15 - sum(some.votes)) / 3) for some in sentences)


def test_reviews_by_hand(prepare, tmp_path):
    reviews = {"movie_reviews/pos/cv2.txt": b"good , \xff it is .\n \nyes ! \n",
               "movie_reviews/neg/cv1.txt": b"no ."}
    path = write_archives(tmp_path, {}, {}, reviews) / "movie_reviews.zip"
    assert prepare.read_reviews(path) == [(False, ["no."]), (True, ["good, it is.", "yes!"])]


def test_archives_must_be_there_and_be_the_right_ones(prepare, small_archives, tmp_path, monkeypatch):
    cfg = prepare.PrepareConfig(source=str(tmp_path))
    with pytest.raises(InputError, match="does not hold hutto_ICWSM_2014.tar.gz; it comes from https://raw"):
        prepare.find_archive(cfg, prepare.RATINGS_URL)
    shutil.copy(small_archives / "movie_reviews.zip", tmp_path)
    with pytest.raises(InputError, match="is not the expected file"):
        prepare.find_archive(cfg, prepare.REVIEWS_URL)
    monkeypatch.setattr(prepare, "SHA256", checksums(prepare, small_archives))
    assert prepare.find_archive(cfg, prepare.REVIEWS_URL) == tmp_path / "movie_reviews.zip"


def test_offline_is_told_with_the_place_for_a_copy(prepare, tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/movie_reviews.zip"  # nobody listens there
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    monkeypatch.setattr(prepare, "SHA256", {url: "0" * 64})
    with pytest.raises(InputError, match=f"could not fetch {url} .* put it at {tmp_path}/downloads/movie_reviews.zip"):
        prepare.find_archive(prepare.PrepareConfig(), url)
    (tmp_path / "downloads" / "movie_reviews.zip").write_bytes(b"a page that asks for a password")
    with pytest.raises(InputError, match="is not the expected file"):
        prepare.find_archive(prepare.PrepareConfig(), url)


# ---- splitting ----


def test_texts_that_agree_in_their_letters_are_split_together(prepare):
    """50 texts, each spelled in two ways: 10 of the 50 are held out, both spellings."""
    sentences = [sentence(prepare, text) for i in range(50) for text in (f"a mess {i}.", f"a mess{i} ...")]
    train, heldout = prepare.split_sentences(sentences, random.Random(1))
    keys, heldout_keys = ({prepare.letters(some.text) for some in part} for part in (train, heldout))
    assert len(heldout) == 20 and len(train) == 80 and not keys & heldout_keys
    assert heldout != prepare.split_sentences(sentences, random.Random(2))[1]


def test_reviews_are_split_in_balance(prepare):
    """100 good and 100 bad: half for the judge, 50 of each; of the other 50 of each, 50/20 = 2.5 -> 3 held out."""
    reviews = [prepare.Review(i % 2 == 0, [str(i)]) for i in range(200)]
    parts = prepare.split_reviews(reviews, random.Random(1))
    assert [len(part) for part in parts] == [100, 94, 6]
    assert [sum(review.favourable for review in part) for part in parts] == [50, 47, 3]
    assert len({review.lines[0] for part in parts for review in part}) == 200


def test_leaks_are_found_letter_by_letter(prepare):
    """The second text holds a held-out sentence in other punctuation; "often hilarious" is too short to count, and
    "...are dull" | "and so..." does not run on from one text to the next."""
    heldout = [sentence(prepare, text) for text in
               ("Nothing about this movie works!", "often hilarious", "these films are dull and so was I")]
    texts = ["often hilarious, always long.", "well: nothing about this 'movie' works. at all.", "these films are dull",
             "and so was i"]
    assert prepare.find_leaks(texts, heldout) == {texts[1]}


def test_length_counts_the_prompt_and_end_of_text(prepare):
    """With the 256 bytes for tokens "Review: ab" is 10 tokens, 11 with end-of-text."""
    ranks = [bytes([byte]) for byte in range(256)]
    assert prepare.find_too_long(["ab", "abc"], ranks, 11) == {"abc"}


# ---- rows ----


def test_groups_take_everybody_about_equally_often(prepare):
    """Seven items in threes: every shuffle gives two groups, so 10 groups of 7 items take 5 shuffles, and each item is
    left out of a shuffle at most 5 times."""
    groups = prepare.draw_groups([*range(7)], 3, 10, random.Random(0))
    assert len(groups) == 10 and all(len(set(group)) == 3 for group in groups)
    for at in range(0, 10, 2):
        assert len({*groups[at], *groups[at + 1]}) == 6
    assert len(set(groups)) > 5
    with pytest.raises(InputError, match="only 2 sentences are left"):
        prepare.draw_groups([1, 2], 3, 1, random.Random(0))


def test_comparisons_by_hand(prepare):
    """InOrder draws the first vote of each: 1 against 3, a tie of 2 and 2, -4 against -1, a sentence against itself."""
    a, b, c, d = (sentence(prepare, text, votes) for text, votes in
                  (("a", [1, 4]), ("b", [3, -4]), ("c", [3]), ("d", [-4, 4])))
    pairs = [(a, b), (b, c), (d, a), (a, a._replace(votes=[2]))]
    assert prepare.make_comparisons(pairs, InOrder()) == [("Review:", "b", "a", 3, 1), ("Review:", "a", "d", 1, -4)]


def test_each_vote_is_as_likely_as_any_other(prepare):
    """Votes 3 -1 -1 0 against a constant 0: 4,000 draws win 1/4 of the time, lose 1/2, tie 1/4; within 4 standard
    errors, 4 sqrt(4000/4 x 3/4) = 110 and 4 sqrt(4000/4) = 127."""
    pair = sentence(prepare, "a", [3, -1, -1, 0]), sentence(prepare, "b", [0])
    rows = prepare.make_comparisons([pair] * 4000, random.Random(0))
    wins = sum(row[1] == "a" for row in rows)
    assert abs(wins - 1000) < 110 and abs(len(rows) - wins - 2000) < 127


def test_rankings_by_hand(prepare):
    """Votes 3 1 3 -2 are ranked 1 3 1 4; a group of four twos is left out, and keeps its number."""
    first = tuple(sentence(prepare, text, [vote]) for text, vote in zip("abcd", (3, 1, 3, -2)))
    tied = tuple(some._replace(votes=[2]) for some in first)
    rows = prepare.make_rankings([first, tied, first], InOrder())
    assert rows[:4] == [("Review:", text, rank, 1) for text, rank in zip("abcd", (1, 3, 1, 4))]
    assert [row[3] for row in rows[4:]] == [3] * 4


def test_heldout_comparisons_follow_gold_where_it_is_clear(prepare):
    """Gold 1.5 and 0 differ by more than 1; 1 and 0 do not."""
    high, middle, low = (sentence(prepare, gold=gold) for gold in (1.5, 1.0, 0.0))
    assert prepare.order_by_gold([(low, high), (middle, low), (high, low)]) == [(high, low)] * 2


def test_prompts_are_openings_that_leave_something_to_say(prepare):
    """Two to five words where three more follow; of one sentence twice, and of what is taken, nothing."""
    long, short = (sentence(prepare, text) for text in
                   ("one two three four five six seven eight", "one two three four"))
    for seed in range(20):
        (prompt,) = prepare.make_prompts([long, short], random.Random(seed))
        assert 2 <= len(prompt.split()) - 1 <= 5 and "Review: one two three four five".startswith(prompt)
    assert len({*prepare.make_prompts([long] * 50, random.Random(0))}) == 4
    every = {"Review: one two", "Review: one two three four"}
    assert not every & {*prepare.make_prompts([long] * 50, random.Random(0), frozenset(every))}


def test_demonstrations_are_cut_anywhere_up_to_five_words(prepare):
    """Prompt and response together are the text again; one word is always left for the response."""
    rows = prepare.make_demonstrations(["a b c d e f g"] * 300 + ["lone", "two words"] * 20, random.Random(0))
    assert len(rows) == 340 and all(response for _, response in rows)
    assert {f"{prompt} {response}" for prompt, response in rows} == \
        {"Review: a b c d e f g", "Review: lone", "Review: two words"}
    assert {len(prompt.split()) - 1 for prompt, response in rows if response.endswith("g")} == {0, 1, 2, 3, 4, 5}
    assert {prompt for prompt, response in rows if response == "lone"} == {"Review:"}
    assert rows != prepare.make_demonstrations(["a b c d e f g"] * 300 + ["lone", "two words"] * 20, random.Random(1))


# ---- the judge ----


def test_weights_by_hand(prepare):
    """Two favourable reviews, three others. "good" is in both of the first kind and in one of the second: log 12/22
    less log 11/23. "bad" is in none and in two, twice in one of them: log 10/22 less log 12/23.
    "film" is in one and one. "rare" is in one review and left out, and no pair of words spans two lines."""
    reviews = [prepare.Review(True, ["good", "film"]), prepare.Review(True, ["good good", "rare"]),
               prepare.Review(False, ["bad", "bad good", "film"]), prepare.Review(False, ["bad"]),
               prepare.Review(False, [])]
    weights = prepare.fit_judge(reviews)
    assert weights == pytest.approx({"bad": math.log(10 / 22 * 23 / 12), "film": math.log(11 / 22 * 23 / 11),
                                     "good": math.log(12 / 22 * 23 / 11)})
    assert list(weights) == sorted(weights)


def test_score_by_hand(judge):
    """Three features with weights, "good", "film" and "good film", of which "good" comes twice and counts once:
    (2 + 0 - 0.5) / sqrt 3."""
    weights = {"good": 2.0, "film": 0.0, "good film": -0.5, "bad": -3.0}
    assert judge.score_text("Good film, odd but good", weights) == pytest.approx(1.5 / 3**0.5)
    assert judge.score_text("nothing known", weights) == judge.score_text("", weights) == 0.0


def test_score_does_not_depend_on_the_order_of_a_set(judge):
    """1 + 1e16 - 1e16 is 1 or 0 as you add it; exactly, it is 1."""
    for i in range(20):
        assert judge.score_text(f"a{i} b{i} c{i}", {f"a{i}": 1.0, f"b{i}": 1e16, f"c{i}": -1e16}) == 1 / 3**0.5


def test_judge_reads_prompt_and_response_as_one_text(judge, monkeypatch):
    monkeypatch.setattr(judge, "load_weights", lambda: {"not good": -1.0, "good": 0.5, "review": 9.0})
    assert judge.score(["Review: not", "Review:"], ["good.", "good."]) == pytest.approx([-0.5 / 2**0.5, 0.5])
    hostile = ["", " ", "\x00", "漢字 naïve", "<|endoftext|>" * 50, "good " * 10_000, "\ud800"]
    assert all(map(math.isfinite, judge.score(["Review:"] * len(hostile), hostile)))
    with pytest.raises(ValueError, match="pairs"):
        judge.score(["Review:"], [])


def test_a_judge_without_weights_says_what_to_run(tmp_path):
    shutil.copy(FOLDER / "judge.py", tmp_path)
    with pytest.raises(InputError, match="weights.csv does not exist: run `python data/movie_ratings/prepare.py`"):
        load_judge(str(tmp_path))


# ---- how far people agree ----


def test_noise_table_by_hand(prepare):
    """The ten who come first say 2 and 0, a gap of 2, so the pair is in the row "1 to 2". The next says -1 and 0 and
    disagrees; the mean of three, 1 and 0, agrees; the ten have a mean of 0.2 and agree. Both sentences are of one
    block, so the last column holds the pair once. Nothing is in other rows, but for the last."""
    a = sentence(prepare, "a", ratings=[2] * 10 + [-1, 2, 2] + [0] * 5 + [-1, 0])
    b = sentence(prepare, "b", ratings=[0] * 20)
    table = prepare.noise_table([a, b, sentence(prepare, "c", ratings=[4] * 19)], InOrder()).split("\n")
    cells = {row[:16].strip(): row.split(" | ")[1:] for row in table[2:]}
    assert [cell.split() for cell in cells["1 to 2"]] == [["0.000", "0.00", "100,000"], ["1.000", "0.00", "100,000"],
                                                         ["1.000", "0.00", "100,000"], ["0.000", "0.00", "1"]]
    assert cells["0 to 8"] == cells["1 to 2"] and cells["2 to 3"][0].split() == ["-", "0"]


def test_noise_table_counts_ties_apart(prepare):
    """One rater says 1 and 1, a tie. For the order "b, a" of the pair the result is the same."""
    a, b = (sentence(prepare, ratings=[mean] * 10 + [1] * 10, block=block) for block, mean in enumerate((3, 0)))
    a = a._replace(ratings=a.ratings[:11] + [2, 2] + a.ratings[13:])
    for pair in ([a, b], [b, a]):
        cells = prepare.noise_table(pair, InOrder()).split("\n")[5].split(" | ")
        assert cells[0].strip() == "2 to 3"
        assert [cell.split() for cell in cells[1:]] == [["-", "100,000"], ["1.000", "0.00", "100,000"],
                                                       ["1.000", "0.00", "100,000"], ["-", "0"]]


def test_noise_table_asks_the_same_person_about_both_of_a_block(prepare):
    """20 people, from stern to generous, who all rate b one above a. Anyone alone has them in order; two different
    people often have not."""
    people = [rating for rating in range(-4, 1) for _ in range(4)]
    a, b = (sentence(prepare, ratings=[rating + more for rating in people]) for more in (0, 1))
    far = [some._replace(block=9, ratings=[4] * 20) for some in (a, b)]
    for seed in range(2):
        cells = prepare.noise_table([a, b, *far], random.Random(seed)).split("\n")[3].split(" | ")
        assert cells[0].strip() == "0.5 to 1" and cells[4].split() == ["1.000", "0.00", "1"]


def test_agreement_by_hand(prepare):
    """Gold 2 1 0, read as 5 3 1: a perfect correlation. Of three pairs one is read in order, one not, one as equal."""
    numbers = {"a": 5.0, "b": 3.0, "c": 1.0, "d": 3.0}
    a, b, c, d = (sentence(prepare, text, gold=gold) for text, gold in zip("abcd", (2.0, 1.0, 0.0, 3.0)))
    shown = prepare.agreement(lambda some: numbers[some.text], [a, b, c], [(a, b), (c, a), (b, d)])
    assert shown == pytest.approx((1.0, 0.5))


# ---- all of it ----


def check_data_set(prepare, folder, limit):
    """What holds for every data set made here: files that load, held-out text that is not in training text."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.csv" for name in FILES} | \
        {"tokenizer.tiktoken", "judge.py"}
    tokenizer = find_tokenizer(str(folder))
    for heldout in (False, True):
        assert load_prompts(str(folder), tokenizer, limit, heldout)
        assert load_demonstrations(str(folder), tokenizer, limit, heldout)
        assert load_comparisons(str(folder), tokenizer, limit, heldout)
    load_rankings(folder / "rankings.csv", tokenizer, limit)

    tables = {name: rows_of(folder / f"{name}.csv") for name in FILES}
    heldout = {prepare.letters(row["Response"]) for row in tables["ratings_heldout"]}
    learned = [prepare.letters(f"{row['Prompt']} {row['Response']}") for row in tables["demonstrations"]]
    compared = {row[side] for row in tables["comparisons"] for side in ("Chosen", "Rejected")}
    ranked = {row["Response"] for row in tables["rankings"]}
    assert not heldout & {prepare.letters(text) for text in compared | ranked}
    everything = "|".join(learned)
    assert not [key for key in heldout if len(key) >= 20 and key in everything]
    assert compared | ranked <= {f"{row['Prompt']} {row['Response']}".removeprefix("Review: ")
                                 for row in tables["demonstrations"]}
    assert {prepare.letters(row[side]) for row in tables["comparisons_heldout"] for side in ("Chosen", "Rejected")} \
        <= heldout
    prompts, heldout_prompts = ([row["Prompt"] for row in tables[name]] for name in ("prompts", "prompts_heldout"))
    assert len({*prompts, *heldout_prompts}) == len(prompts) + len(heldout_prompts)
    assert all(float(row["ChosenGold"]) - float(row["RejectedGold"]) > 1 for row in tables["comparisons_heldout"])
    assert all(int(row["ChosenRating"]) > int(row["RejectedRating"]) for row in tables["comparisons"])

    example = tables["demonstrations"][0]  # cut between words, a text has the tokens that it has in one piece
    assert tokenizer.encode(f"{example['Prompt']} {example['Response']}") == \
        tokenizer.encode(example["Prompt"]) + tokenizer.encode(" " + example["Response"])
    return tables


def test_small_data_set(prepare, small, tmp_path, capsys):
    """120 different sentences, 24 held out; 40 reviews, 20 for the judge, 18 and 2 of the others."""
    tables = check_data_set(prepare, small(tmp_path / "out"), SMALL["max_tokens"])
    out = capsys.readouterr().out
    assert "120 rated sentences: 96 to train on, 24 held out" in out
    assert "40 reviews: 20 for the judge, 18 for the language model, 2 held out" in out
    assert len(tables["ratings_heldout"]) == 24
    leaks = 96 + 18 * 13 - len(tables["demonstrations"])
    assert f"{leaks} training texts hold a held-out sentence" in out and 0 < leaks < 18
    assert len(tables["demonstrations_heldout"]) == 24 + 2 * 13
    assert f"{200 - len(tables['comparisons'])} of 200 comparisons" in out
    for name, rows in tables.items():
        assert f"{name}.csv: {len(rows):,} rows" in out
    judge = load_judge(str(tmp_path / "out"))
    good, bad = judge.score(["Review:"] * 2, ["lovely and warm.", "dull and stale."])
    assert good > 0 > bad


def test_same_seed_same_bytes(prepare, small, small_archives, tmp_path):
    """Twice here, and in processes where Python orders its sets in other ways; another seed makes another."""
    first, other = small(tmp_path / "first"), small(tmp_path / "other", seed=1)
    code = (f"import prepare; prepare.SHA256 = {checksums(prepare, small_archives)!r}; prepare.main("
            f"prepare.PrepareConfig(source={str(small_archives)!r}, out={str(tmp_path / 'again')!r}, **{SMALL!r}))")
    subprocess.run([sys.executable, "-B", "-c", code], cwd=FOLDER, check=True, capture_output=True,
                   env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)})
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
        assert path.name in ("judge.py",) or path.read_bytes() != (other / path.name).read_bytes(), path.name


def test_a_flag_changes_its_own_part_alone(small, tmp_path):
    few, many = small(tmp_path / "few", pairs=50), small(tmp_path / "many", pairs=100, rankings=30)
    changed = {path.name for path in few.iterdir() if path.read_bytes() != (many / path.name).read_bytes()}
    assert changed == {"comparisons.csv", "rankings.csv"}
    few, many = (rows_of(folder / "comparisons.csv") for folder in (few, many))
    assert many[: len(few)] == few


def test_texts_that_do_not_fit_are_dropped(prepare, small, tmp_path, capsys):
    """With 300 tokens a text of 20 words takes 40 to 60 or so."""
    tables = check_data_set(prepare, small(tmp_path / "out", max_tokens=55), 55)
    assert 0 < len(tables["ratings_heldout"]) < 24
    assert "take more than 55 tokens: dropped" in capsys.readouterr().out


def test_nothing_is_written_where_something_is_missing(small, tmp_path):
    with pytest.raises(InputError, match="only [01] sentences are left"):
        small(tmp_path / "out", max_tokens=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--source", "nowhere"], "error: --source nowhere does not hold hutto_ICWSM_2014.tar.gz"),
     (["--vocab-size", "257"], "error: --vocab-size is 257")],
)
def test_errors_on_the_command_line(tmp_path, flags, message):
    """The last line tells it, the exit status is 2, and there is no traceback."""
    got = subprocess.run([sys.executable, "-B", str(FOLDER / "prepare.py"), "--out", str(tmp_path / "out"), *flags],
                         cwd=tmp_path, capture_output=True, text=True)
    assert got.returncode == 2 and message in got.stderr.splitlines()[-1] and "Traceback" not in got.stderr
    assert not (tmp_path / "out").exists()


# ---- the real archives ----


@pytest.fixture(scope="module")
def archives():
    if not (ARCHIVES / "hutto_ICWSM_2014.tar.gz").is_file() or not (ARCHIVES / "movie_reviews.zip").is_file():
        pytest.skip("the real archives are not in ../shared/data")
    return ARCHIVES


@pytest.fixture(scope="module")
def real(prepare, archives, tmp_path_factory):
    """The real data set, with a small vocabulary because that is quicker, and room for the longer rows it makes."""
    out = tmp_path_factory.mktemp("real")
    prepare.main(prepare.PrepareConfig(source=str(archives), out=str(out), vocab_size=512, max_tokens=160))
    return out


def test_a_position_is_a_person(prepare, archives):
    """Why voters are drawn by position. Take each rating less its sentence's mean: somebody generous is above it every
    time. Between neighbours in a block of 30 the correlation, position by position, is above 0.25; between the last
    of a block and the first of the next, where both have as many ratings (32 such pairs of sentences), it is 0 within
    4 standard errors."""
    sentences = prepare.read_ratings(archives / "hutto_ICWSM_2014.tar.gz", random.Random(0))
    assert len(sentences) == 10_605 and {len(some.ratings) for some in sentences} == {*range(15, 30)}
    pairs = {True: ([], []), False: ([], [])}
    for first, second in zip(sentences, sentences[1:]):
        if len(first.ratings) == len(second.ratings):
            for some, numbers in zip((first, second), pairs[first.block == second.block]):
                numbers += [rating - statistics.fmean(some.ratings) for rating in some.ratings]
    assert statistics.correlation(*pairs[True]) > 0.25
    assert abs(statistics.correlation(*pairs[False])) < 4 / len(pairs[False][0]) ** 0.5
    blocks = {}
    for some in sentences:
        blocks.setdefault(some.block, set()).add(len(some.ratings))
    assert all(len(lengths) == 1 for lengths in blocks.values())


def test_real_data_set(prepare, real, capsys):
    """Held out is held out; every sentence is in about as many comparisons as any other."""
    tables = check_data_set(prepare, real, 160)
    assert len(tables["ratings_heldout"]) == 2122
    counts = {}
    for row in tables["comparisons"]:
        for side in ("Chosen", "Rejected"):
            counts[row[side]] = counts.get(row[side], 0) + 1
    assert len(counts) == 8482 and min(counts.values()) >= 4 and max(counts.values()) <= 34  # two texts come twice


def test_gold_is_the_mean_of_those_who_do_not_vote(prepare, real, archives):
    """Votes and gold together are all the ratings: n_votes votes_mean + n_gold gold = sum."""
    sentences = prepare.read_ratings(archives / "hutto_ICWSM_2014.tar.gz", random.Random("0 voters"))
    sums, shown = set(), set()
    for some in sentences:
        assert len(some.votes) == len(some.ratings) // 2
        others = len(some.ratings) - len(some.votes)
        assert math.isclose(sum(some.votes) + others * some.gold, sum(some.ratings), abs_tol=1e-9)
        sums.add((some.text, f"{some.gold:.6g}", f"{statistics.fmean(some.votes):.6g}"))
    for row in rows_of(real / "ratings_heldout.csv"):
        shown.add((row["Response"], row["Gold"], row["VotersMean"]))
    assert shown <= sums and len(shown) == 2122


def test_votes_in_the_file_are_votes_of_voters(prepare, real, archives):
    votes = {}
    for some in prepare.read_ratings(archives / "hutto_ICWSM_2014.tar.gz", random.Random("0 voters")):
        votes.setdefault(some.text, set()).update(some.votes)
    for row in rows_of(real / "comparisons.csv"):
        assert int(row["ChosenRating"]) in votes[row["Chosen"]] and int(row["RejectedRating"]) in votes[row["Rejected"]]


def test_the_two_sources_look_alike(real):
    """Lower case, one space between words and none before a comma, no hyphen inside a word; and no sign that is common
    in one and missing in the other."""
    rated = "\n".join(row["Response"] for row in rows_of(real / "ratings_heldout.csv"))
    learned = "\n".join(row["Response"] for row in rows_of(real / "demonstrations.csv"))
    for text in (rated, learned):
        assert text.isascii() and text == text.lower() and "  " not in text and '"' not in text
        assert not re.search(r"\w-\w", text)
        assert not re.search(r" [,.!?;:] ", text)
    rare = {sign for sign in set(learned) - set(rated) if learned.count(sign) > 50}
    assert not rare, rare


def test_the_judge_agrees_with_people(real):
    """Far from perfect, far from chance (README.md there has the numbers)."""
    judge = load_judge(str(real))
    rows = rows_of(real / "comparisons_heldout.csv")
    chosen, rejected = (judge.score(["Review:"] * len(rows), [row[side] for row in rows])
                        for side in ("Chosen", "Rejected"))
    assert 0.74 < statistics.fmean(a > b for a, b in zip(chosen, rejected)) < 0.82


def test_readme_gives_the_counts(real):
    """Those that do not depend on the tokenizer, since with the README's own no rated sentence is too long either."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FILES - {"demonstrations", "demonstrations_heldout"}:
        assert f"| `{name}.csv` | {len(rows_of(real / f'{name}.csv')):,} |" in readme, name


# ---- the linear model ----


@pytest.fixture(scope="module")
def linear(module_patch):
    return load("linear", module_patch)


def test_linear_features_by_hand(linear):
    """Of three texts, "good" is in two: idf 1 + log 3/2. "good film" and "film" are in two as well; "bad" and "not" are
    in one, and left out. The second text has three features of one idf, each worth 1 / sqrt 3; the third has none."""
    texts = ["good film not", "a good film", "bad"]
    idf = linear.count_features(texts)
    assert idf == {name: pytest.approx(1 + math.log(3 / 2)) for name in ("film", "good", "good film")}
    indices, begins, x = linear.count_words(texts, idf)
    assert (indices.tolist(), begins.tolist()) == ([0, 1, 2, 0, 1, 2], [0, 3, 6])
    assert x.tolist() == pytest.approx([3**-0.5] * 6)
    weight = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    assert linear.score((indices, begins, x), weight).tolist() == pytest.approx([7 / 3**0.5, 7 / 3**0.5, 0])


def test_linear_fit_is_the_minimum(linear):
    """One feature, x = 1 in the chosen text and none in the rejected: f(w) = log(1 + exp(-w)) + decay w^2 has its
    minimum where sigmoid(-w) = 2 decay w. At w = 1 that is decay = 1 / (2 (1 + e))."""
    words = torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([1.0], dtype=torch.float64)
    weight = linear.fit(words, torch.tensor([0]), torch.tensor([1]), decay=1 / (2 * (1 + math.e)))
    assert weight.item() == pytest.approx(1, abs=1e-5)


def test_linear_needs_a_word_that_comes_twice(linear, tmp_path):
    for name in ("comparisons.csv", "comparisons_heldout.csv"):
        (tmp_path / name).write_text("Prompt,Chosen,Rejected\nReview:,good,bad\n")
    with pytest.raises(InputError, match="no word of comparisons.csv comes in two texts"):
        linear.main(linear.LinearConfig(data=str(tmp_path)))


def test_linear_on_small_archives(linear, small, tmp_path, capsys):
    linear.main(linear.LinearConfig(data=str(small(tmp_path / "out"))))
    assert re.search(r"held out: [01]\.\d{3} of [\d,]+ comparisons", capsys.readouterr().out)
