"""Text <-> token ids, by tiktoken's byte-pair encoder with this project's ranks or GPT-2's."""

import hashlib
from pathlib import Path

import tiktoken

from rlhf.run.errors import InputError
from rlhf.run.files import read_ranks
from rlhf.run.messages import TextOrMessages, as_text

# GPT-2's pattern (Radford et al. 2019): contractions, words, numbers and signs, each with the space
# before it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """encode, decode, and the two ids that are not text.

    eos_id ends a response and is learned like any token. stop_ids are all that end a sampled
    response, eos_id first: a pretrained model may have several. pad_id only fills the rectangle
    after a row of data. No mask is made by looking for it, so it may be any valid id except eos_id.
    (The sampler knows no tokenizer and fills with 0, which works as well.)
    """

    template = ""  # of messages; only pretrained models have one

    def __init__(self, name: str, encoding: tiktoken.Encoding, eos_id: int, pad_id: int):
        if eos_id == pad_id:
            raise ValueError("pad and end-of-text must differ, or a model never learns to stop")
        self.name = name  # what load_tokenizer was given
        self.encoding = encoding
        self.eos_id = eos_id
        self.stop_ids = (eos_id,)
        self.pad_id = pad_id
        self.vocab_size = encoding.n_vocab
        # Tells vocabularies of the same size apart; a checkpoint keeps it.
        ranks = repr(sorted(encoding._mergeable_ranks.items()))
        self.fingerprint = hashlib.sha256(ranks.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of the text. "<|endoftext|>" inside it is text, not the special token."""
        return self.encoding.encode_ordinary(text)

    def prompt_ids(self, prompt: TextOrMessages) -> list[int]:
        """Ids of a prompt: text, or messages (rlhf/run/messages.py)."""
        return self.encode(as_text(prompt))

    def response_ids(self, response: str) -> list[int]:
        """Ids of a response: one space, the text, end-of-text.

        (A prompt ends in "Assistant:", and a word's token holds the space before it.) Prompt and
        response are encoded separately, so that a prompt has the same ids whatever follows it.
        """
        return self.encode(" " + response.strip()) + [self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; bytes that form no character become U+FFFD."""
        return self.encoding.decode(ids)


def load_tokenizer(path_or_name: str) -> Tokenizer:
    """A tokenizer from its name or file: "gpt2", or the path of a ranks file (base64 token, space,
    rank; one per line).

    Raises InputError if the file is missing or garbled, or GPT-2's ranks can be neither found nor
    fetched.
    """
    if path_or_name == "gpt2":
        return load_gpt2_tokenizer()
    path = Path(path_or_name)
    ranks = read_ranks(path)
    eos_id = len(ranks)
    pad_id = len(ranks) + 1
    special = {"<|endoftext|>": eos_id, "<|pad|>": pad_id}
    encoding = tiktoken.Encoding(
        path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    return Tokenizer(path_or_name, encoding, eos_id, pad_id)


def load_gpt2_tokenizer() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets through whatever its download met
        raise InputError(
            f"tiktoken could not fetch GPT-2's ranks ({type(error).__name__}); go online once, "
            f"set TIKTOKEN_CACHE_DIR to a folder that holds them, or make a data set with a "
            f"tokenizer of its own: python -m rlhf.tools.prepare"
        ) from error
    # GPT-2 has no pad token. The NUL byte is a valid id that text hardly ever holds; the vocabulary
    # stays 50,257.
    pad_id = encoding.encode_single_token(b"\x00")
    return Tokenizer("gpt2", encoding, encoding.eot_token, pad_id)
