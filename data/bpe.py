"""Byte-pair encoding's other half: learning the ranks that rlhf/tokenizer.py reads. Used by the
data sets' prepare.py.

Sennrich et al. 2016, on bytes as GPT-2 does: start from the 256 bytes and keep joining the most
common neighbours.
"""

import base64
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from rlhf.run.files import replacing

# rlhf.tokenizer.PATTERN without \p, which Python's own `re` does not know. The two differ only in
# rare signs (a superscript two is a letter here), and a merge that is never met does no harm.
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

Word = tuple[bytes, ...]  # cut into tokens


def single_bytes(data: Iterable[int]) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def join_pair(word: Word, left: bytes, right: bytes) -> Word:
    """Every occurrence of the pair, from the left, made one token.

    >>> join_pair((b"a", b"b", b"c", b"a", b"b"), b"a", b"b")
    (b'ab', b'c', b'ab')
    """
    joined = []
    at = 0
    while at < len(word):
        if word[at : at + 2] == (left, right):
            joined.append(left + right)
            at += 2
        else:
            joined.append(word[at])
            at += 1
    return tuple(joined)


class PairCounts:
    """How often each pair of neighbours occurs, and the numbers of the words that hold it.

    After a merge, only words that hold the joined pair are counted again.
    """

    def __init__(self):
        self.counts = Counter()
        self.holders = defaultdict(set)

    def add(self, number: int, word: Word, times: int) -> None:
        for pair in zip(word, word[1:]):
            self.counts[pair] += times
            self.holders[pair].add(number)

    def remove(self, word: Word, times: int) -> None:
        for pair in zip(word, word[1:]):
            self.counts[pair] -= times
            if not self.counts[pair]:
                del self.counts[pair]

    def most_common(self) -> tuple[bytes, bytes]:
        """Of pairs equally common, the last in byte order."""
        most = max(self.counts.values())
        return max(pair for pair, count in self.counts.items() if count == most)


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The tokens in the order of their ranks, which are their ids: 256 bytes, then one per merge.

    Texts are cut into words first, and no merge crosses a cut. Stops early if no pair is left.

    >>> train_bpe(["ab abab"], 258)[256:]      # "ab" thrice; then all once, "abab" is the last
    [b'ab', b'abab']
    """
    counts = Counter()  # of the words
    for text in texts:
        counts.update(WORDS.findall(text))
    words = [tuple(single_bytes(word.encode("utf-8"))) for word in counts]
    times = list(counts.values())
    pairs = PairCounts()
    for number, word in enumerate(words):
        pairs.add(number, word, times[number])

    tokens = single_bytes(range(256))
    while len(tokens) < vocab_size and pairs.counts:
        left, right = pairs.most_common()
        tokens.append(left + right)
        for number in pairs.holders.pop((left, right)):
            pairs.remove(words[number], times[number])
            words[number] = join_pair(words[number], left, right)
            pairs.add(number, words[number], times[number])
    return tokens


def write_ranks(tokens: list[bytes], path: Path) -> None:
    """tiktoken's own format: a token in base64, a space, its rank; one per line."""
    lines = []
    for rank, token in enumerate(tokens):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    with replacing(path) as file:
        file.writelines(lines)


def vocabulary_size(texts: Iterable[str]) -> int:
    """A size for text of this length: 512 for a few pages, 2,000 for a megabyte, 8,192 at most."""
    characters = sum(map(len, texts))
    return min(8192, max(512, 2 * math.isqrt(characters)))
