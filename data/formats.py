"""The files that people have, read into rows of one form: preference pairs, instructions,
conversations and rankings, in JSON, CSV, parquet or plain text.

FORMATS says how a file is read, by the ending of its name; SHAPES says what it is, by the names of
its columns. A row that teaches nothing is dropped and counted. A row that cannot be read is an
error that names it.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from itertools import chain, combinations, cycle
from pathlib import Path
from typing import NamedTuple

import pandas

from rlhf.run.errors import InputError
from rlhf.run.files import check_file
from rlhf.run.messages import ASSISTANT, HUMAN, TextOrMessages, as_text, last_turn
from rlhf.run.tables import (
    LONGEST_CELL,
    check_rows,
    letters,
    row_fault,
    split_rows,
    strip_blanks,
)

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
# What a column may be called, for each of its roles: without case, spaces and signs.
COLUMN_NAMES = {
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "system": ("system", "systemprompt"),
    "context": ("input", "context"),
    "chosen": ("chosen", "chosenresponse", "preferred"),
    "rejected": ("rejected", "rejectedresponse", "dispreferred"),
    "response": ("response", "completion", "answer", "output"),
    "label": ("label", "thumbs", "thumbsup"),
    "messages": ("messages", "conversations", "conversation", "text"),
}


class Shape(NamedTuple):
    """What a file is: the roles that its columns must have and, of these, the responses, from worst
    to best."""

    about: str
    needed: tuple[str, ...]
    responses: tuple[str, ...]


OPTIONAL = ("prompt", "system", "context")  # roles that a file of any shape may have
# The first that fits is taken.
SHAPES = [
    Shape("preference pairs", ("rejected", "chosen"), ("rejected", "chosen")),
    Shape("responses with thumbs", ("prompt", "response", "label"), ("response",)),
    Shape("prompts with responses", ("prompt", "response"), ("response",)),
    Shape("conversations", ("messages",), ("messages",)),
    Shape("prompts", ("prompt",), ()),
]
THUMBS = {"true": "up", "1": "up", "up": "up", "false": "down", "0": "down", "down": "down"}
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
NAME_THEM = (
    "name them with the flags of prepare: --response, --chosen and --rejected, or --ranked "
    '"worst,middle,best"'
)


class Row(NamedTuple):
    """table: "prompts" (no response), "demonstrations", "up", "down" (one), "comparisons" (chosen,
    rejected). prompt: as a cell of a data set's CSV holds it."""

    table: str
    prompt: str
    responses: tuple[str, ...]


class Source(NamedTuple):
    """What a file was taken for, its rows, the number of each one's record from 0, how many were
    dropped and why, and the names of the columns that were used."""

    about: str
    rows: list[Row]
    numbers: list[int]
    dropped: Counter
    columns: list[str]


class Dropped(Exception):
    """Why a row is left out."""


def read_file(path: Path, named: dict[str, str]) -> Source:
    """The rows of a file.

    Args: named: {role: name of its column}, for names that are not in COLUMN_NAMES; "ranked":
        names of columns of responses from worst to best, with commas between them.
    Raises: InputError if the file cannot be read, or is of no known shape.
    """
    check_file(path, "give the path of a data file")
    try:
        records, found = read_records(path)
        return to_rows(records, named, found)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole .gz file ({error}); fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None


def read_prompts(path: Path) -> dict[str, int]:
    """{each prompt of a file, as the CSV of a data set holds it: the number of its first record,
    from 0}. Prints what the file was taken for.

    Raises InputError as read_file does.
    """
    source = read_file(path, {})
    print(f"{path}: {source.about}")
    prompts = {}
    for row, number in zip(source.rows, source.numbers):
        prompts.setdefault(row.prompt, number)
    for reason, count in source.dropped.items():
        print(f"{reason}: {count:,} rows")
    print(f"{len(prompts):,} different prompts")
    return prompts


# ---- a file -> records: [{column: cell}] ----


def read_records(path: Path) -> tuple[list[dict], str]:
    """The records, and their format in words. Raises InputError, ValueError or gzip's errors."""
    data = path.read_bytes()
    name = path.name.lower()
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return read_parquet(data), "parquet"
    if suffix not in FORMATS:
        raise ValueError(f"the name must end in .parquet, {', '.join(FORMATS)}, or these and .gz")
    text, encoding = decode(data)
    records, found = FORMATS[suffix](path, text)
    return records, f"{found}, {encoding}"


def read_parquet(data: bytes) -> list[dict]:
    """The records. Raises ValueError if the package for it is missing, or the file is broken."""
    try:
        frame = pandas.read_parquet(io.BytesIO(data))
    except ImportError:
        raise ValueError("parquet needs pyarrow: pip install pyarrow, or save as JSON") from None
    return json.loads(frame.to_json(orient="records"))


def decode(data: bytes) -> tuple[str, str]:
    """The text, and its encoding: UTF-8, UTF-16 with a byte-order mark, or Windows-1252, which
    Excel writes in western Europe. Raises ValueError if it is probably another one."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16"), "UTF-16"
    if b"\0" in data:
        raise ValueError("holds NUL bytes, as UTF-16 without a mark does; save the file in UTF-8")
    try:
        return data.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        # Broken UTF-8 holds whole characters of it too. Text of other alphabets has many letters
        # that are not ASCII, and five bytes are no letters in Windows-1252.
        many = sum(byte > 127 for byte in data) > len(data) / 5
        if many or re.search(rb"[\xc2-\xf4][\x80-\xbf]|[\x81\x8d\x8f\x90\x9d]", data):
            raise ValueError(f"{error}; save the file in UTF-8") from None
        text = data.decode("windows-1252")
        example = re.search(r"\w{0,20}[^\x00-\x7f]\w{0,20}", text)[0]
        return text, f"Windows-1252, not UTF-8: check that {example} is spelled right"


def read_json(path: Path, text: str) -> tuple[list[dict], str]:
    """One JSON value: a list or an object; or a value a line."""
    try:
        return rows_of(parse_json(text)), "JSON"
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                records.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON value: {error}") from None
    return records, "JSON lines"


def parse_json(text: str):
    """The value. Raises ValueError if the text is not JSON, or an object has a key twice."""
    return json.loads(text, object_pairs_hook=unique)


def unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(
            f"a JSON object has a key twice: {', '.join(key for key, _ in pairs):.200}"
        )
    return found


def rows_of(value) -> list:
    """The rows of a JSON value: a list; or an object that is one row, or holds lists of rows as
    splits."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    splits = [split for split in value.values() if is_list(split, dict)]
    if not splits or is_messages(splits[0]):
        return [value]
    return list(chain(*splits))


def is_list(value, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def read_table(path: Path, text: str) -> tuple[list[dict], str]:
    """A table with the separator that is most common in its header."""
    first_line = text.lstrip().partition("\n")[0]
    separator = max(SEPARATORS, key=re.sub('"[^"]*"', "", first_line).count)
    header, *rows = split_rows(path, text, separator)
    if len(set(header)) < len(header):
        raise ValueError(f"a column comes twice: {', '.join(header)}")
    check_rows(path, "the row", [row_fault(cells, header) for cells in rows])
    records = [dict(zip(header, cells)) for cells in rows]
    return records, f"CSV, separator {SEPARATORS[separator]}"


def read_lines(path: Path, text: str) -> tuple[list[dict], str]:
    lines = with_newlines(text).split("\n")
    return [{"prompt": line} for line in lines if line.strip()], "a prompt a line"


FORMATS = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".txt": read_lines,
}

# ---- records -> rows ----


def to_rows(records: list[dict], named: dict[str, str], found: str) -> Source:
    """The rows of all records, of the shape of the first one.

    Args: named: as for read_file; found: the format in words. Raises: ValueError if a record cannot
        be read, if none is left, or if the first one is of no known shape.
    """
    if not records:
        raise ValueError("no rows")
    rows = []
    numbers = []
    dropped = Counter()
    for number, record in enumerate(records, start=1):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"{record!r:.60} has no named columns")
            if number == 1:
                shape, fields = find_shape(record, named)
            rows += convert(record, shape, fields)
            numbers += [number - 1] * (len(rows) - len(numbers))
        except Dropped as reason:
            dropped[f"dropped, {reason}"] += 1
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    if not rows:
        reasons = ", ".join(dropped)
        raise ValueError(f"taken for {shape.about}, and no row is left: {reasons}")
    used = list(fields.values())
    about = f"{len(records):,} rows, {shape.about} ({found}; columns {', '.join(used)})"
    unused = [name for name in records[0] if name not in used]
    if unused:
        about += f", not used: {', '.join(name or '(no name)' for name in unused)}"
    if unused and not shape.responses:
        about += f"; if these are responses, {NAME_THEM}"
    return Source(about, rows, numbers, dropped, used)


def plain_name(name: str) -> str:
    """A column's name without case, spaces and signs, as COLUMN_NAMES has it."""
    return letters(name).replace("_", "")


def find_shape(record: dict, named: dict[str, str]) -> tuple[Shape, dict[str, str]]:
    """The shape, and {role: column} of its columns. Raises ValueError if it is none of SHAPES."""
    with_names = [name for name in record if plain_name(name)]  # an index may have none
    columns = {plain_name(name): name for name in with_names}
    if len(columns) < len(with_names):
        raise ValueError(f"two columns have the same name: {', '.join(record)}")
    fields = {}
    for role, names in COLUMN_NAMES.items():
        for name in (plain_name(named.get(role, "")), *names):
            if name in columns and columns[name] not in fields.values():
                fields[role] = columns[name]
                break
    shapes = SHAPES
    if "ranked" in named:
        ranked = tuple(plain_name(name) for name in named["ranked"].split(","))
        fields |= {name: columns[name] for name in ranked if name in columns}
        shapes = [Shape("rankings", ("prompt", *ranked), ranked), *SHAPES]
    for shape in shapes:
        if set(shape.needed) <= fields.keys():
            roles = dict.fromkeys((*shape.needed, *OPTIONAL))
            return shape, {role: fields[role] for role in roles if role in fields}
    raise ValueError(
        f"no known columns (found: {', '.join(map(repr, record))}); {NAME_THEM}, and the prompt's "
        f"with --prompt"
    )


def convert(record: dict, shape: Shape, fields: dict[str, str]) -> list[Row]:
    """The rows of one record.

    Raises Dropped if it teaches nothing, ValueError if a cell is of another type.
    """
    missing = [fields[role] for role in shape.needed if fields[role] not in record]
    if missing:
        raise ValueError(f"no {missing[0]!r}, which the first row has; split the file by kinds")
    cells = {role: record.get(name) for role, name in fields.items()}
    around = [read_string(cells.get(role)).strip() for role in ("system", "context")]
    prompt = join_prompt(read_cell(cells.get("prompt")), *around)
    if not shape.responses:
        return [Row("prompts", prompt_cell(prompt), ())]
    sides = []
    for role in shape.responses:
        before, response = split_side(prompt, read_cell(cells[role]))
        sides.append((prompt_cell(before), checked_response(response)))
    cell, best = sides[-1]
    if any(other != cell for other, _ in sides):
        raise Dropped("responses to different prompts")
    if "label" in cells:
        side = THUMBS.get(str(cells["label"]).lower())
        if side is None:
            raise ValueError(
                f"{cells['label']!r:.60} is neither thumbs up nor down (true, false, 1, 0); give "
                f"the column another name if it is something else"
            )
        return [Row(side, cell, (best,))]
    if len(sides) == 1:
        return [Row("demonstrations", cell, (best,))]
    rows = []
    for (_, worse), (_, better) in combinations(sides, 2):
        if worse != better:
            rows.append(Row("comparisons", cell, (better, worse)))
    if not rows:
        raise Dropped("the same response on both sides")
    return rows


# ---- cells -> prompts (text or messages) and responses ----

# In a cell of a CSV file, as JSON; with ShareGPT's keys too, which a data set does not have.
LOOKS_LIKE_MESSAGES = re.compile(r"\[\s*\{\s*[\"'](role|content|from|value)[\"']\s*:")


def is_messages(cell) -> bool:
    """[{"role": ..., "content": ...}, ...], or ShareGPT's [{"from": ..., "value": ...}, ...]."""
    return is_list(cell, dict) and bool(cell) and ("role" in cell[0] or "from" in cell[0])


def read_cell(cell) -> TextOrMessages:
    """A cell as text or as messages. Raises ValueError if it is neither."""
    if isinstance(cell, str) and LOOKS_LIKE_MESSAGES.match(cell.strip()):
        try:
            cell = parse_json(cell)
        except ValueError:
            message = "a list of messages that is not JSON; save the file as JSON lines"
            raise ValueError(message) from None
    if not is_messages(cell):
        return read_string(cell)
    messages = []
    for message in cell:
        role = str(message.get("role", message.get("from"))).lower()
        content = read_string(message.get("content", message.get("value"))).strip()
        if role not in ROLES:
            raise Dropped(f"a message of the role {role!r}")
        if content or role != "system":
            messages.append({"role": ROLES[role], "content": content})
    return messages


def read_string(cell) -> str:
    """Text with \\n for line ends, "" for null. Raises ValueError if it is no text."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise ValueError(f"{cell!r:.60} is neither text nor a list of messages")
    cell.encode("utf-8")  # half of a surrogate pair, which JSON can spell, raises a ValueError
    if "\0" in cell:
        raise ValueError(f"a NUL character in {cell!r:.60}; remove it")
    return with_newlines(cell)


def with_newlines(text: str) -> str:
    """The text with \\n at the end of each line, where Windows has \\r\\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def join_prompt(prompt: TextOrMessages, system: str, context: str) -> TextOrMessages:
    """The prompt with the columns beside it that belong to it: a system message, and what follows
    it, as Alpaca's "input"."""
    if isinstance(prompt, str):
        prompt = parse_dialogue(f"{prompt}\n\n{context}" if context else prompt)
    if not system or not prompt:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *prompt]


def parse_dialogue(text: str) -> TextOrMessages:
    """The messages of a dialogue in HH-RLHF's form, which ends with "Assistant:", if they take
    turns and as_text gives this text back. Otherwise the text.

    >>> parse_dialogue("\\n\\nHuman: Hi!\\n\\nAssistant:")
    [{'role': 'user', 'content': 'Hi!'}]
    """
    text = strip_blanks(text)
    contents = re.split("\n\n(?:Human|Assistant): ?", text)[1:-1]
    messages = []
    for role, content in zip(cycle(("user", "assistant")), contents):
        messages.append({"role": role, "content": content})
    filled = all(content.strip() for content in contents)
    if filled and len(contents) % 2 == 1 and as_text(messages) == text:
        return messages
    return text


def split_side(prompt: TextOrMessages, side: TextOrMessages) -> tuple[TextOrMessages, str]:
    """(prompt, response) of a response that may repeat its prompt.

    Of messages, the assistant's last one is the response, and those before it are the prompt or its
    end.
    """
    if isinstance(side, str):
        if not prompt:
            return split_text(side)
        text = as_text(prompt)
        return prompt, side.removeprefix(text) if text.endswith(ASSISTANT) else side
    while side and side[-1]["role"] != "assistant":
        side = side[:-1]
    if not side:
        raise Dropped("no message of the assistant")
    *before, response = side
    if before and isinstance(prompt, list) and before[: len(prompt)] != prompt:
        before = prompt + before
    return before or prompt, response["content"]


def split_text(text: str) -> tuple[TextOrMessages, str]:
    """(prompt, response) of a dialogue in HH-RLHF's form: the prompt goes up to the last
    "Assistant:". Of any other text, there is no prompt."""
    before, marker, response = text.rpartition(ASSISTANT)
    return parse_dialogue(before + marker), response


def prompt_cell(prompt: TextOrMessages) -> str:
    """The prompt as the CSVs of a data set hold it. Raises Dropped if it is of no use."""
    if prompt and isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise Dropped("a prompt that does not end with the user's message")
    if not prompt or not last_turn(prompt):
        raise Dropped("an empty prompt")
    return checked_length(strip_blanks(as_cell(prompt)))


def as_cell(prompt: TextOrMessages) -> str:
    """The cell of a CSV file that read_prompt reads as this prompt."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def checked_response(response: str) -> str:
    """The response without blanks around it. Raises Dropped if it is of no use."""
    response = response.strip()
    if not response:
        raise Dropped("an empty response")
    if HUMAN in response:
        raise Dropped("a human's turn inside a response")  # the model would go on for both
    return checked_length(response)


def checked_length(cell: str) -> str:
    if len(cell) > LONGEST_CELL:
        raise Dropped(f"longer than {LONGEST_CELL:,} characters")
    return cell
