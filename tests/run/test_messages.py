"""rlhf.run.messages: prompts of text and of messages."""

import json

import pytest

from rlhf.run.messages import as_text, in_one_line, last_turn, prompt_fault, read_prompt

SYSTEM = {"role": "system", "content": "Be kind."}
HI = {"role": "user", "content": "Hi!"}
HELLO = {"role": "assistant", "content": "Hello."}
MORE = {"role": "user", "content": "Tell me\nmore."}


def test_messages_take_the_form_of_hh_rlhf():
    """Written by hand, after the files of HH-RLHF."""
    text = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Tell me\nmore.\n\nAssistant:"
    assert as_text([HI, HELLO, MORE]) == text
    assert as_text([SYSTEM, HI]) == "Be kind.\n\nHuman: Hi!\n\nAssistant:"
    assert as_text("Question: why?") == "Question: why?"


def test_a_cell_is_messages_only_if_it_looks_like_them():
    for text in ("Hi!", "[1] a footnote", '[{"a": 1}]', "{}"):
        assert read_prompt(text) == text
    assert read_prompt(json.dumps([HI, HELLO, MORE])) == [HI, HELLO, MORE]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ('[{"role": "user"', "is not JSON"),
        ("[{'role': 'user', 'content': 'x'}]", "is not JSON"),
        (json.dumps([{"role": "user"}]), "not {role, content}"),
        (json.dumps([{"role": "user", "content": 3}]), "not {role, content}"),
        (json.dumps([{**HI, "name": "x"}]), "not {role, content}"),
        ('[{"role": "user", "content": "x"}, 3]', "not {role, content}"),
        (json.dumps([{"role": "tool", "content": "x"}]), "not {role, content}: system, user"),
        (json.dumps([HI, HELLO]), "must end with a message of the user"),
    ],
)
def test_other_messages_are_refused(messages, message):
    assert message in prompt_fault(messages)
    with pytest.raises(ValueError, match=message):
        read_prompt(messages)


def test_the_last_turn_is_shown():
    """Of several turns, what the user says last; of a text without turns, all of it."""
    assert last_turn([HI, HELLO, MORE]) == "Tell me\nmore."
    assert last_turn(as_text([HI, HELLO, MORE])) == "Tell me\nmore."
    assert last_turn(as_text([SYSTEM, HI])) == "Hi!"
    assert last_turn("Human: Hi!\n\nAssistant:") == "Hi!"
    assert last_turn("Question: why?\n\nAnswer:") == "Question: why?\n\nAnswer:"
    assert in_one_line([HI, HELLO, MORE]) == "Human: Tell me more."
    assert in_one_line("one " * 100, 9) == "one one o ..."
