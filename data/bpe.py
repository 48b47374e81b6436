"""Byte-pair encoding's other half: learning the ranks that rlhf/tokenizer.py reads. Used by the data sets' prepare.py.

Sennrich et al. 2016, on bytes as GPT-2 does: start from the 256 bytes and keep joining the commonest neighbours.
"""

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

# rlhf.tokenizer.PATTERN without \p, which Python's own `re` does not know. The two differ only in rare signs (a
# superscript two is a letter here), and a merge that is never met does no harm.
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def join_pair(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    """Every occurrence of the pair, from the left, made one token.

    >>> join_pair((b"a", b"b", b"c", b"a", b"b"), b"a", b"b")
    (b'ab', b'c', b'ab')
    """
    joined, at = [], 0
    while at < len(word):
        if word[at : at + 2] == (left, right):
            joined.append(left + right)
            at += 2
        else:
            joined.append(word[at])
            at += 1
    return tuple(joined)


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The tokens in the order of their ranks, which are their ids: 256 bytes, then one a merge; of pairs equally common
    the last in byte order. Texts are cut into words first, and no merge crosses a cut.

    Stops early where no pair is left. Only words that hold the joined pair are counted anew.

    >>> train_bpe(["ab abab"], 258)[256:]      # "ab" thrice; then all once, "abab" is the last
    [b'ab', b'abab']
    """
    counts = Counter(word for text in texts for word in WORDS.findall(text))
    words = [tuple(bytes([byte]) for byte in word.encode("utf-8")) for word in counts]
    times = list(counts.values())
    pairs, holders = Counter(), defaultdict(set)  # how often each pair occurs; which words hold it
    for at, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[at]
            holders[pair].add(at)

    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size and pairs:
        most = max(pairs.values())
        left, right = max(pair for pair, count in pairs.items() if count == most)
        tokens.append(left + right)
        for at in holders.pop((left, right)):
            old, new = words[at], join_pair(words[at], left, right)
            for pair in zip(old, old[1:]):
                pairs[pair] -= times[at]
                if not pairs[pair]:
                    del pairs[pair]
            for pair in zip(new, new[1:]):
                pairs[pair] += times[at]
                holders[pair].add(at)
            words[at] = new
    return tokens


def write_ranks(tokens: list[bytes], path: Path) -> None:
    """tiktoken's own format: a token in base64, a space, its rank; one a line."""
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
