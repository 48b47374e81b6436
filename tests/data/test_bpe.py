"""Byte-pair training, compared with the plain algorithm, which counts every pair again after every
merge."""

import re
from collections import Counter

import pytest

from data.bpe import WORDS, join_pair, train_bpe, write_ranks
from rlhf.tokenizer import PATTERN, load_tokenizer

TEXTS = [
    "the cat sat on the mat, the hat on the cat",
    "that's  naïve: 10 mats_and 10 hats\n\n",
    "漢字 漢字 aaaa aaa",
]


BYTES = [bytes([byte]) for byte in range(256)]


def plain(texts, vocab_size):
    words = Counter()
    for text in texts:
        for word in WORDS.findall(text):
            words[tuple(BYTES[byte] for byte in word.encode())] += 1
    tokens = list(BYTES)
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(left + right)
        words = Counter({join_pair(word, left, right): count for word, count in words.items()})
    return tokens


def test_train_bpe_equals_the_plain_algorithm():
    """It counts only the words that a merge changes. There is less to join than 400 tokens need."""
    for size in (256, 257, 270, 400):
        assert train_bpe(TEXTS, size) == plain(TEXTS, size)


def test_train_bpe_stops_if_nothing_is_left_to_join():
    assert train_bpe(["ab"], 999)[256:] == [b"ab"]
    assert train_bpe([], 999) == BYTES


def test_words_are_cut_as_by_the_tokenizer():
    """WORDS is the tokenizer's pattern with \\p{L} and \\p{N} spelled out. Nothing of a text is
    lost."""
    assert PATTERN.replace(r"\p{L}", "L").replace(r"\p{N}", "N") == (
        r"'(?:[sdmt]|ll|ve|re)| ?L+| ?N+| ?[^\sLN]+|\s+(?!\S)|\s+"
    )
    for text in TEXTS:
        assert "".join(WORDS.findall(text)) == text
    reason = "tiktoken's own pattern engine for Python is not installed"
    regex = pytest.importorskip("regex", reason=reason)
    for text in [*TEXTS, "हिन्दी e\u0301 x²"[:-1]]:
        assert WORDS.findall(text) == regex.findall(PATTERN, text)
    assert WORDS.findall("it's 12_a  é!\n") == ["it", "'s", " 12", "_", "a", " ", " é", "!", "\n"]


def test_written_ranks_make_a_tokenizer(tmp_path):
    tokens = train_bpe(TEXTS, 280)
    write_ranks(tokens, tmp_path / "own.tiktoken")
    tokenizer = load_tokenizer(str(tmp_path / "own.tiktoken"))
    assert tokenizer.vocab_size == 282 and tokenizer.encode(" the") == [tokens.index(b" the")]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    first_line = (tmp_path / "own.tiktoken").read_text().splitlines()[0]
    assert re.fullmatch(r"[A-Za-z0-9+/=]+ 0", first_line)
