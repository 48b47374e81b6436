"""The tokenizer of a model of Hugging Face's transformers, with its chat template."""

import functools
import hashlib
import inspect
import itertools
from pathlib import Path

from rlhf.networks.pretrained import from_pretrained
from rlhf.run.errors import InputError
from rlhf.run.files import check_file
from rlhf.run.messages import TextOrMessages, as_text
from rlhf.run.tables import read_text
from rlhf.tokenizer import Tokenizer

# What a chat template is tried with: a turn of each speaker.
QUESTION = {"role": "user", "content": "Question"}
ANSWER = {"role": "assistant", "content": "Answer"}
# It is no character, so it stands in no text, and no token holds it together with a neighbour.
NO_CHARACTER = "\ufdd0"


class HFTokenizer(Tokenizer):
    """A model's own tokenizer, with the interface of rlhf.tokenizer.Tokenizer.

    With a chat template, prompt_ids are those of apply_chat_template, and response_ids are what the
    template puts behind them, up to the end of the turn. A special token in a message is text.
    Without one, both together are the tokenizer's ids of prompt, space and response. If the model
    expects a begin-of-text token, it is part of the prompt.

    Args:
        template: auto: the model's own, if it has one; none; the name of a .jinja file; or the text
            of a template.
        system: the system message of each prompt that has none. Needs a template.
        kept: if not empty, token i is the model's token kept[i], and a token that is not kept is
            spelled in bytes.
    Raises: InputError if the template cannot be used.
    """

    def __init__(
        self, init: str, template: str = "auto", system: str = "", kept: tuple[int, ...] = ()
    ):
        self.name = init
        self.original = load_tokenizer(init)
        self.vocab = self.original.get_vocab()
        # Bytes are called <0x41>, as in SentencePiece, or else by letters, as in GPT-2.
        self.has_byte_names = "<0x41>" in self.vocab
        self.kept = kept or range(max(self.vocab.values()) + 1)
        self.new_ids = {old: new for new, old in enumerate(self.kept)}
        self.vocab_size = len(self.kept)
        self.template = find_template(template, self.original)
        self.system = system
        if system and not self.template:
            raise InputError(f"--system needs a chat template, and --init {init} has none in use")
        contents = f"{self.original.backend_tokenizer.to_str()}{kept}{self.template}{system}"
        self.fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]

        # Begin-of-text, if the model expects it: it goes before a prompt without a template.
        empty = self.original("")["input_ids"]
        starts = (self.original.bos_token_id, self.original.cls_token_id)
        self.begin = [old for old in empty[:1] if old in starts]
        end_of_text = self.original.eos_token or self.original.sep_token  # the latter of BERT
        ends = [self.end_of_turn(), self.vocab.get(end_of_text), *end_tokens(init)]
        # Without repetition, in this order.
        stops = [self.new_ids[old] for old in dict.fromkeys(ends) if old in self.new_ids]
        if not stops:
            raise InputError(
                f"--init {init}: the tokenizer names no end-of-text token; give it one (eos_token)"
            )
        self.stop_ids = tuple(stops)
        self.eos_id = stops[0]
        # Any token but eos_id can be the pad. The model's own may be that, or have no row in the
        # embedding.
        self.pad_id = int(self.eos_id == 0)

    def prompt_ids(self, prompt: TextOrMessages) -> list[int]:
        """Ids of a prompt: text, or messages. With a template, text is a message of the user."""
        if not self.template:
            # A word's token holds the space before it: the response brings that space.
            text = as_text(prompt).rstrip(" ")
            return self.renumbered(self.begin + self.text_ids(text))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.renumbered(self.chat_ids(messages))

    def response_ids(self, response: str) -> list[int]:
        """Ids of a response, the end of the turn included."""
        end = self.kept[self.eos_id]
        if not self.template:
            return self.renumbered(self.following_ids(" " + response.strip()) + [end])
        prompt = self.chat_ids([QUESTION])
        both = self.chat_ids([QUESTION, {**ANSWER, "content": response}])
        ids = both[len(prompt) :]
        if both[: len(prompt)] != prompt:  # a token spans the end of the prompt
            ids = self.following_ids(response)
        return self.renumbered([*itertools.takewhile(lambda old: old != end, ids), end])

    def encode(self, text: str) -> list[int]:
        """Ids of the text only: no begin-of-text, and special tokens in it are text."""
        return self.renumbered(self.text_ids(text))

    def decode(self, ids: list[int]) -> str:
        # A model may have logits of more than its tokens.
        old = [self.kept[i] for i in ids if i < len(self.kept)]
        return self.original.decode(old, clean_up_tokenization_spaces=False)

    # ---- in the model's own ids ----

    def text_ids(self, text: str) -> list[int]:
        """Ids of the text only."""
        encoded = self.original(text, add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]

    def following_ids(self, text: str) -> list[int]:
        """Ids of a text that follows another one: SentencePiece puts no space before it."""
        return self.text_ids(NO_CHARACTER + text)[len(self.text_ids(NO_CHARACTER)) :]

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The template's ids. Special tokens in the messages are text."""
        return self.apply_template(messages, return_dict=False, sanitize_control_tokens=True)

    def apply_template(self, messages: list[dict[str, str]], **options):
        """What apply_chat_template makes of messages. If the last one is the user's, a response may
        follow.

        Raises InputError if the template refuses the messages, as some do a system message.
        """
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        options["chat_template"] = self.template
        options["add_generation_prompt"] = messages[-1]["role"] == "user"
        try:
            return self.original.apply_chat_template(messages, **options)
        except Exception as error:  # whatever the template raises
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"--init {self.name}: the chat template refuses the messages ({roles}): {error}; "
                f"change them, leave out --system, or give --template none or FILE.jinja"
            ) from None

    def end_of_turn(self) -> int | None:
        """The first special token that the template puts behind a response; None if there is none.

        Raises InputError if the template does not put the response where it asks for it.
        """
        if not self.template:
            return None
        options = inspect.signature(self.original.apply_chat_template).parameters
        if "sanitize_control_tokens" not in options:  # special tokens in messages would be read
            raise InputError("a chat template needs transformers 5.20: pip install -U .[hf]")
        prompt = self.apply_template([QUESTION], tokenize=False)
        both = self.apply_template([QUESTION, ANSWER], tokenize=False)
        answer = ANSWER["content"]
        if not (QUESTION["content"] in prompt and both.startswith(prompt) and answer in both):
            raise InputError(
                f"--init {self.name}: the chat template does not put a response where it asks for "
                f"one; give --template auto, none, or a FILE.jinja that does"
            )
        end = both.rpartition(answer)[2]
        added = self.original.added_tokens_decoder
        ids = self.original.encode(end, add_special_tokens=False)
        return next((old for old in ids if old in added and added[old].special), None)

    # ---- a part of the vocabulary ----

    def renumbered(self, originals: list[int]) -> list[int]:
        """This tokenizer's ids of the model's."""
        ids = []
        for old in originals:
            if old in self.new_ids:
                ids.append(self.new_ids[old])
            else:
                ids += [self.new_ids[byte] for byte in self.spell(old)]
        return ids

    def spell(self, old: int) -> list[int]:
        """The model's ids of the bytes of one of its tokens."""
        text = self.original.convert_ids_to_tokens(old).replace("\u2581", " ")
        if self.has_byte_names:
            names = [f"<0x{byte:02X}>" for byte in text.encode()]
        else:  # a letter for each byte; but a token that was added later holds spaces as they are
            names = text.translate({32: "Ġ", 9: "ĉ", 10: "Ċ"})
        return [self.vocab[name] for name in names]


@functools.lru_cache(maxsize=2)  # loading takes up to a minute
def load_tokenizer(init: str):
    return from_pretrained("AutoTokenizer", init)


def find_template(template: str, original) -> str:
    """The text of the chat template that --template means; "" for none."""
    if template == "none":
        return ""
    if template == "auto":
        return original.get_chat_template() if original.chat_template else ""
    if template.endswith(".jinja"):
        return read_text(check_file(Path(template), "give --template auto, none or FILE.jinja"))
    return template


def end_tokens(init: str) -> list[int]:
    """The end tokens in the generation_config.json of a model, if it has one."""
    try:
        ends = from_pretrained("GenerationConfig", init).eos_token_id
    except InputError:
        return []
    return ends if isinstance(ends, list) else [ends]
