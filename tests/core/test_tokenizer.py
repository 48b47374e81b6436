"""Text to ids and back, the files of ranks, and which tokenizer a data set has."""

import base64

import pytest

from rlhf.run.errors import InputError
from rlhf.run.loading import find_tokenizer
from rlhf.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def tokenizer(bundled):
    return load_tokenizer(str(bundled / "tokenizer.tiktoken"))


def test_tokenizer_rejects_equal_pad_and_end_of_text(tokenizer):
    with pytest.raises(ValueError, match="never learns to stop"):
        Tokenizer("x", tokenizer.encoding, eos_id=3, pad_id=3)


@pytest.mark.parametrize(
    "text",
    ["\n\nHuman: Tell me about a wet tent.\n\nAssistant:", "naïve 漢字 \x00 <|endoftext|>", ""],
)
def test_tokenizer_decodes_what_it_encoded(tokenizer, text):
    """No text becomes one of the two special ids."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids) and all(
        i < tokenizer.vocab_size for i in ids
    )


def test_tokenizer_special_ids_are_the_last_two(tokenizer):
    assert tokenizer.vocab_size <= 1024
    assert (tokenizer.eos_id, tokenizer.pad_id) == (
        tokenizer.vocab_size - 2,
        tokenizer.vocab_size - 1,
    )
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id]) == "<|endoftext|><|pad|>"


def test_tokenizer_merges_the_lowest_rank_first(tmp_path):
    """Ranks "ab" 256, "abc" 257, "bc" 258. "abcbc" becomes ab c bc, then abc bc."""
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"bc"]
    path = tmp_path / "x.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    assert load_tokenizer(str(path)).encode("abcbc") == [257, 258]


def test_load_tokenizer_reads_a_changed_file_again(tmp_path, bundled):
    """tiktoken's own reader would return its cached copy of the first file. The two fingerprints
    differ."""
    path = tmp_path / "x.tiktoken"
    path.write_bytes((bundled / "tokenizer.tiktoken").read_bytes())
    first = load_tokenizer(str(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:300]))
    second = load_tokenizer(str(path))
    assert second.vocab_size == 302 and first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("IQ== zero\n", "expected `base64-token rank`"),
        ("no base64! 0\n", "expected `base64-token rank`"),
        ("IQ== 0\n", "256 single"),
        ("", "256 single"),
    ],
)
def test_load_tokenizer_rejects_garbled_ranks(tmp_path, content, message):
    path = tmp_path / "x.tiktoken"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(path))


def test_load_tokenizer_rejects_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer file"):
        load_tokenizer(str(tmp_path / "x.tiktoken"))


def test_load_tokenizer_gpt2_has_the_ids_of_gpt2(gpt2_ranks):
    """50,257 tokens, end-of-text 50256. "Hello world" is 15496 995 in GPT-2's own vocabulary."""
    gpt2 = load_tokenizer("gpt2")
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256) and gpt2.pad_id != gpt2.eos_id
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.eos_id not in gpt2.encode(
        "<|endoftext|>"
    )


def test_find_tokenizer_takes_the_folders_own_or_gpt2s(small_data, monkeypatch):
    assert find_tokenizer(str(small_data)).vocab_size <= 1024
    (small_data / "tokenizer.tiktoken").unlink()
    monkeypatch.setattr("rlhf.run.loading.load_tokenizer", lambda name: name)
    assert find_tokenizer(str(small_data)) == "gpt2"


def test_find_tokenizer_takes_the_one_that_is_named(small_data, monkeypatch):
    monkeypatch.setattr("rlhf.run.loading.load_tokenizer", lambda name: name)
    assert find_tokenizer(str(small_data), "gpt2") == "gpt2"


def test_find_tokenizer_rejects_missing_folder(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        find_tokenizer(str(tmp_path / "missing"))


def test_find_tokenizer_rejects_a_file_and_a_folder_without_csv_files(tmp_path):
    """Before it fetches GPT-2's ranks for them."""
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("{}")
    with pytest.raises(InputError, match="demonstrations.jsonl is a file; give the folder that"):
        find_tokenizer(str(path))
    with pytest.raises(InputError, match="or no CSV file in it"):
        find_tokenizer(str(tmp_path))
