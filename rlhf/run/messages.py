"""Prompts: text, or a list of messages {"role": "system", "user" or "assistant", "content": text}.

In a CSV file a list of messages is a cell of JSON. The last message is the user's: the response
answers it. A model with a chat template of its own gets the messages; the own GPT reads them as
text, in the form of HH-RLHF (Bai et al. 2022):

    >>> as_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}])
    'Be kind.\\n\\nHuman: Hi!\\n\\nAssistant:'
"""

import json
import re

HUMAN = "\n\nHuman:"  # begins a turn of a dialogue in HH-RLHF's form
ASSISTANT = "\n\nAssistant:"
BEGINNINGS = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
# Other text may begin with a bracket: "[1, 2] are numbers".
LOOKS_LIKE_MESSAGES = re.compile(r"\[\s*\{\s*[\"'](role|content)[\"']\s*:")

TextOrMessages = str | list[dict[str, str]]


def read_prompt(cell: str) -> TextOrMessages:
    """The prompt in a cell of a CSV file: its text or, of a JSON list of messages, the messages.

    Raises ValueError, in words, if it looks like messages and is not a list of them that ends with
    the user's.
    """
    if not LOOKS_LIKE_MESSAGES.match(cell):
        return cell
    try:
        messages = json.loads(cell)
    except ValueError:
        raise ValueError("looks like messages, but is not JSON") from None
    for message in messages:
        if not is_message(message):
            raise ValueError(
                "has a message that is not {role, content}: system, user or assistant, and text"
            )
    if messages[-1]["role"] != "user":
        raise ValueError("must end with a message of the user")
    return messages


def is_message(value) -> bool:
    """Whether a value of JSON is {"role": of BEGINNINGS, "content": text}."""
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        return False
    return value["role"] in list(BEGINNINGS) and isinstance(value["content"], str)


def prompt_fault(cell: str) -> str:
    """What is wrong with a cell that holds a prompt, or ""."""
    try:
        read_prompt(cell)
    except ValueError as error:
        return str(error)
    return ""


def as_text(prompt: TextOrMessages) -> str:
    """The prompt as the own GPT reads it: text as it is, messages in HH-RLHF's form."""
    if isinstance(prompt, str):
        return prompt
    turns = [BEGINNINGS[message["role"]] + message["content"] for message in prompt]
    return "".join(turns) + ASSISTANT


def last_turn(prompt: TextOrMessages) -> str:
    """What the user says last: the content of the last message or, of a text, what stands between
    the last "Human:" and the "Assistant:" at its end."""
    if not isinstance(prompt, str):
        return prompt[-1]["content"].strip()
    text = prompt.strip().removesuffix(ASSISTANT.strip())
    return f"\n\n{text}".rpartition(HUMAN)[2].strip()


def in_one_line(prompt: TextOrMessages, width: int = 200) -> str:
    """The last turn as it is printed above responses: in one line, which begins with "Human:" in a
    dialogue. A line of more than `width` characters is cut."""
    line = " ".join(last_turn(prompt).split())
    if HUMAN.strip() in as_text(prompt):
        line = f"Human: {line}"
    return line if len(line) <= width else f"{line[:width]} ..."
