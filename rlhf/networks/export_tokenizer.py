"""The tokenizer of what was trained, as one of Hugging Face's transformers."""

import copy
import json

from torch import nn

from rlhf.networks.hf_tokenizer import HFTokenizer
from rlhf.networks.pretrained import package
from rlhf.run.messages import ASSISTANT, BEGINNINGS
from rlhf.tokenizer import Tokenizer

PAD = "<|pad|>"
# Messages as a model without a template reads them (rlhf.run.messages.as_text), and an end behind a
# response.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ "
    + json.dumps(BEGINNINGS)
    + "[message['role']] + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ " + json.dumps(ASSISTANT) + " }}{% endif %}"
)


def exported_tokenizer(tokenizer: Tokenizer):
    """A tokenizer of transformers that gives the same ids, of a cut vocabulary the whole's.

    It reads a special token in a text as one, unless it is called with split_special_tokens=True.
    """
    if isinstance(tokenizer, HFTokenizer):
        made = copy.deepcopy(tokenizer.original)
        begin = "".join(made.convert_ids_to_tokens(tokenizer.begin))
        template = tokenizer.template or begin + CHAT_TEMPLATE
        made.chat_template = with_system(template, tokenizer.system)
        return made
    transformers = package("transformers")
    encoding = tokenizer.encoding
    converter = package("transformers.convert_slow_tokenizer").TikTokenConverter(
        pattern=encoding._pat_str, extra_special_tokens=encoding._special_tokens
    )
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # not from a file
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        eos_token="<|endoftext|>",
        pad_token=PAD if PAD in encoding.special_tokens_set else "<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def with_system(template: str, system: str) -> str:
    """A chat template that puts a system message before messages that have none."""
    if not system:
        return template
    message = json.dumps({"role": "system", "content": system}, ensure_ascii=False)
    return (
        "{% if messages[0]['role'] != 'system' %}{% set messages = ["
        + message
        + "] + messages %}{% endif %}"
        + template
    )


def separate_pad(made, model: nn.Module, end: int) -> None:
    """Let a classifier of the last token, which is the last that is no pad, read the end of a
    response."""
    if made.pad_token_id in (None, end):
        made.add_special_tokens({"pad_token": PAD})
    if len(made) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(made), mean_resizing=False)
    model.config.pad_token_id = made.pad_token_id


def score_template(made, end: int) -> str:
    """A chat template whose text ends where a score is read, and not with a line feed."""
    last = json.dumps(made.convert_ids_to_tokens(end))
    return (
        "{% set text %}"
        + made.chat_template
        + "{% endset %}{{ text.rstrip().removesuffix(END) + END }}".replace("END", last)
    )


def generation_config(made, ends: list[int]):
    """The settings with which transformers samples as this project does: from the whole
    distribution, until any of the end tokens."""
    return package("transformers").GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=made.pad_token_id
    )
