"""data/formats.py on hand-made files of each shape and each fault."""

import codecs
import gzip
import json
import re

import pandas
import pytest

from data.formats import Row, parse_dialogue, read_file, read_prompts
from rlhf.run.errors import InputError
from rlhf.run.messages import as_text, read_prompt
from tests.helpers import real_data

ASK = "\n\nHuman: Why?\n\nAssistant:"
USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "So."}
BAD = {"role": "assistant", "content": "No."}
CELL = '[{"role": "user", "content": "Why?"}]'  # the same as ASK
PAIR = [("comparisons", "Why?", ("So.", "No."))]
DIALOGUE_PAIR = [("comparisons", CELL, ("So.", "No."))]
DIALOGUE = [("demonstrations", CELL, ("So.",))]
DEMONSTRATION = [("demonstrations", "Why?", ("So.",))]
TWO = [*DEMONSTRATION, ("demonstrations", "Who?", ("Me.",))]


def read(tmp_path, name, content, **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, columns)


def rows_of(*given, **columns):
    return [tuple(row) for row in read(*given, **columns).rows]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- shapes ----

SHAPES = {
    "pair": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, PAIR),
    "other case, blanks": ({" Prompt": "Why? ", "CHOSEN": " So.", "Rejected": "No.\n"}, PAIR),
    "HH-RLHF": ({"chosen": ASK + " So.", "rejected": ASK + " No."}, DIALOGUE_PAIR),
    "sides that repeat a dialogue": (
        {"prompt": ASK, "chosen": ASK + " So.", "rejected": ASK + " No."},
        DIALOGUE_PAIR,
    ),
    "TRL, conversational": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, DIALOGUE_PAIR),
    "TRL, implicit prompt": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, DIALOGUE_PAIR),
    "UltraFeedback": (
        {
            "prompt": "Why?",
            "prompt_id": "1f",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.5,
        },
        DIALOGUE_PAIR,
    ),
    "completion": ({"prompt": "Why?", "completion": " So."}, DEMONSTRATION),
    "completion, conversational": (
        {"prompt": [USER], "completion": [GOOD]},
        DIALOGUE,
    ),
    "question and answer": ({"id": 7, "question": "Why?", "answer": "So."}, DEMONSTRATION),
    "Alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        [("demonstrations", "Add.\n\n1, 2", ("3",))],
    ),
    "Alpaca without input": ({"instruction": "Why?", "input": "", "output": "So."}, DEMONSTRATION),
    "input and output": ({"input": "Why?", "output": "So."}, DEMONSTRATION),
    "KTO, up": ({"prompt": "Why?", "completion": "So.", "label": True}, [("up", "Why?", ("So.",))]),
    "KTO, down": (
        {"prompt": [USER], "completion": [GOOD], "label": 0},
        [("down", CELL, ("So.",))],
    ),
    "messages": ({"messages": [USER, GOOD]}, DIALOGUE),
    "messages, several turns": (
        {"messages": [{"role": "system", "content": "Be."}, USER, BAD, USER, GOOD, USER]},
        [
            (
                "demonstrations",
                '[{"role": "system", "content": "Be."}, {"role": "user", "content": "Why?"}, '
                '{"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]',
                ("So.",),
            )
        ],
    ),
    "messages and their prompt": ({"prompt": "Why?", "messages": [USER, GOOD]}, DIALOGUE),
    "ShareGPT": (
        {
            "id": "a",
            "conversations": [
                {"from": "system", "value": " "},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "So."},
            ],
        },
        DIALOGUE,
    ),
    "the history of a conversation as the prompt": (
        {"prompt": [USER, BAD, USER], "completion": [GOOD]},
        [
            (
                "demonstrations",
                '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}, '
                '{"role": "user", "content": "Why?"}]',
                ("So.",),
            )
        ],
    ),
    "system message beside the question": (
        {"system": "Be.", "question": "Why?", "chosen": "So.", "rejected": "No."},
        [
            (
                "comparisons",
                '[{"role": "system", "content": "Be."}, {"role": "user", "content": "Why?"}]',
                ("So.", "No."),
            )
        ],
    ),
    "empty system message": ({"system": "", "question": "Why?", "answer": "So."}, DEMONSTRATION),
    "text of a dialogue": ({"text": ASK + " So."}, DIALOGUE),
    "prompt": ({"prompt": "Why?"}, [("prompts", "Why?", ())]),
    "prompt, conversational": ({"prompt": [USER]}, [("prompts", CELL, ())]),
    "prompt in HH-RLHF's form": ({"prompt": ASK}, [("prompts", CELL, ())]),
    "query": ({"Query": "Why?", "n": None}, [("prompts", "Why?", ())]),
    "line ends": (
        {"prompt": "a\r\nb\rc", "response": "d\r\ne"},
        [("demonstrations", "a\nb\nc", ("d\ne",))],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_gives_the_expected_rows(tmp_path, name):
    record, expected = SHAPES[name]
    assert rows_of(tmp_path, "a.jsonl", lines(record)) == expected
    assert rows_of(tmp_path, "a.json", json.dumps([record] * 2, indent=2)) == expected * 2


def test_ranking_gives_all_pairs_and_its_best_response(tmp_path):
    text = "Prompt|Worst|So so|Best\nWhy?|No.|Maybe.|So.\n"
    expected = [
        ("comparisons", "Why?", ("Maybe.", "No.")),
        ("comparisons", "Why?", ("So.", "No.")),
        ("comparisons", "Why?", ("So.", "Maybe.")),
    ]
    assert rows_of(tmp_path, "a.csv", text, ranked="worst, so so,Best") == expected
    expected = [("comparisons", "Why?", ("So.", "No."))] * 2
    tied = "Prompt|Worst|So so|Best\nWhy?|No.|No.|So.\n"
    assert rows_of(tmp_path, "b.csv", tied, ranked="worst,so so,best") == expected


def test_columns_of_other_names_are_found_by_flags(tmp_path):
    record = {"Frage": "Why?", "gut": "So.", "schlecht": "No.", "prompt": "x"}
    names = {"prompt": "frage", "chosen": "gut", "rejected": "Schlecht"}
    assert rows_of(tmp_path, "a.jsonl", lines(record), **names) == PAIR
    record = {"prompt": "Why?", "answer": "x", "human_answer": "So."}
    assert rows_of(tmp_path, "a.jsonl", lines(record), response="human_answer") == DEMONSTRATION


def test_source_says_what_the_file_was_taken_for(tmp_path):
    text = "\ufeffPrompt;Response;id\nWhy?;So.;3\n"
    source = read(tmp_path, "a.csv", text)
    assert source.about == (
        "1 rows, prompts with responses (CSV, separator semicolon, UTF-8; columns Prompt, "
        "Response), not used: id"
    )
    assert source.columns == ["Prompt", "Response"] and not source.dropped


# ---- formats ----

TABLE = "Prompt,Response\nWhy?,So.\nWho?,Me.\n"
FORMATS = {
    "a.csv": TABLE,
    "b.csv": TABLE.replace("\n", "\r\n"),
    "c.csv": TABLE.replace(",", ";"),
    "d.tsv": TABLE.replace(",", "\t"),
    "e.csv": TABLE.replace(",", "|"),
    "f.csv": '"Prompt","Response"\n"Why?","So."\n\n"Who?","Me."',
    "g.csv": codecs.BOM_UTF8 + TABLE.encode(),
    "h.csv": TABLE.encode("utf-16"),
    "i.csv.gz": gzip.compress(TABLE.encode()),
    "j.CSV": TABLE,
    "m.json": json.dumps(
        {
            "train": [{"prompt": "Why?", "response": "So."}],
            "test": [{"prompt": "Who?", "response": "Me."}],
        },
        indent=1,
    ),
    "n.json": lines({"prompt": "Why?", "response": "So."}, {"prompt": "Who?", "response": "Me."}),
    "o.jsonl.gz": gzip.compress(
        lines({"prompt": "Why?", "response": "So."}, {"response": "Me.", "prompt": "Who?"}).encode()
    ),
    "p.jsonl": '{"prompt": "Why?", "response": "So."}\r\n\n{"prompt":"Who?","response":"Me."}',
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_gives_the_expected_rows(tmp_path, name):
    assert rows_of(tmp_path, name, FORMATS[name]) == TWO


def test_cells_keep_their_text(tmp_path):
    """Quotation marks, separators and line ends inside a cell; letters in Windows-1252."""
    text = 'Prompt;Response\n"a; ""b""\r\nc";"NA"\n'
    assert rows_of(tmp_path, "a.csv", text) == [("demonstrations", 'a; "b"\nc', ("NA",))]
    source = read(tmp_path, "b.csv", "Prompt;Response\nCaf\xe9?;Oui \u20ac\n".encode("cp1252"))
    assert source.rows == [("demonstrations", "Caf\xe9?", ("Oui \u20ac",))]
    assert "Windows-1252, not UTF-8: check that Caf\xe9 is spelled right" in source.about
    odd = "\u2028 \u0085 \U0001f600 <|endoftext|> \\n"
    record = {"prompt": f"a{odd}b", "response": f"c{odd}d"}
    text = json.dumps(record, ensure_ascii=False)
    assert rows_of(tmp_path, "c.jsonl", text) == [("demonstrations", f"a{odd}b", (f"c{odd}d",))]


def test_messages_in_a_cell_of_a_table_are_read_if_they_are_json(tmp_path):
    cell = json.dumps([USER, GOOD]).replace('"', '""')
    assert rows_of(tmp_path, "a.csv", f'messages\n"{cell}"\n') == DIALOGUE
    cell = cell.replace("role", "from").replace("content", "value")
    assert rows_of(tmp_path, "a.csv", f'messages\n"{cell}"\n') == DIALOGUE
    python = str([USER, GOOD]).replace('"', '""')
    refused(tmp_path, "b.csv", f'messages\n"{python}"\n', "row 1: a list of messages that is not")


def test_plain_text_is_a_prompt_a_line(tmp_path):
    expected = [("prompts", "Why?", ()), ("prompts", "Who?", ())]
    assert rows_of(tmp_path, "a.txt", "Why?\r\n\nWho?\n") == expected


def test_huge_cell_in_windows_1252_is_read_at_once(tmp_path):
    text = f"{'a' * 300_000} caf\xe9 {'a' * 300_000}\n"
    source = read(tmp_path, "a.txt", ("Why?\n" + text).encode("cp1252"))
    assert "check that caf\xe9 is" in source.about and len(source.rows) == 1


def test_parquet_is_read_by_pandas_or_refused_in_one_line(tmp_path, monkeypatch):
    """The engine, pyarrow, is not among the packages of the tests."""
    frame = pandas.DataFrame({"prompt": ["Why?"], "messages": [[USER, GOOD]]})
    monkeypatch.setattr(pandas, "read_parquet", lambda file: frame)
    assert rows_of(tmp_path, "a.parquet", b"PAR1") == DIALOGUE

    def without_engine(file):
        raise ImportError

    monkeypatch.setattr(pandas, "read_parquet", without_engine)
    refused(tmp_path, "a.parquet", b"PAR1", "pip install pyarrow")


# ---- what is dropped, and what is refused ----

DROPPED = [
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "an empty prompt"),
    ({"chosen": "a", "rejected": "b"}, "an empty prompt"),
    ({"prompt": [{"role": "user", "content": " "}], "chosen": "a", "rejected": "b"}, "empty pro"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "an empty response"),
    ({"prompt": "q", "chosen": " \n", "rejected": "b"}, "an empty response"),
    ({"prompt": "q", "chosen": "a", "rejected": "a "}, "the same response on both sides"),
    (
        {"prompt": "q", "chosen": "a\n\nHuman: b", "rejected": "c"},
        "a human's turn inside a response",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b" * 100_001}, "longer than 100,000 characters"),
    ({"prompt": "q" * 100_001, "chosen": "a", "rejected": "b"}, "longer than 100,000 characters"),
    (
        {"prompt": None, "chosen": ASK + " a", "rejected": "\n\nHuman: b\n\nAssistant: c"},
        "responses to different prompts",
    ),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "no message of the assistant"),
    (
        {"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"},
        "a prompt that does not end with the user's message",
    ),
    (
        {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
        "a message of the role 'tool'",
    ),
]


@pytest.mark.parametrize(("record", "reason"), DROPPED)
def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path, record, reason):
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    source = read(tmp_path, "a.jsonl", lines(good, record, record))
    assert [tuple(row) for row in source.rows] == PAIR
    [(counted, count)] = source.dropped.items()
    assert counted.startswith("dropped, ") and reason in counted and count == 2
    message = refused(tmp_path, "b.jsonl", lines(record, record), "and no row is left: dropped, ")
    assert reason in message


def refused(tmp_path, name, content, message, **columns):
    """The one line of the error, which names the file and matches the message."""
    with pytest.raises(InputError) as caught:
        read(tmp_path, name, content, **columns)
    found = str(caught.value)
    assert found.startswith(str(tmp_path / name)) and "\n" not in found
    assert re.search(message, found), found
    return found


OK = '{"prompt": "a", "response": "b"}'
REFUSED = [
    ("a.jsonl", f'{OK}\n{{"prompt": "a\n{OK}\n', "line 2 is no JSON value: Unterminated"),
    ("a.jsonl", f"{OK}\n{OK[:-1]}\n{OK}\n", "line 2 is no JSON value: Expecting"),
    ("a.jsonl", f"{OK}\n<html>\n", "line 2 is no JSON value: Expecting"),
    ("a.jsonl", f"{OK[:-1]}\n{OK}\n", "Expecting ',' delimiter: line 2"),
    ("a.json", f"[{OK},\n{OK}\n{OK}]", "line 3 column"),
    ("a.json", "[" * 100_000, "recursion"),
    ("a.json", "5", "row 1: 5 has no named columns"),
    ("a.json", '["a", "b"]', "row 1: 'a' has no named columns"),
    ("a.json", '{"prompt": ["a", "b"], "response": ["c", "d"]}', r"row 1: .* neither text nor"),
    ("a.json", "[]", "no rows"),
    ("a.jsonl", f"{OK}\n[1]\n", r"row 2: \[1\] has no named columns"),
    ("a.jsonl", f"{OK}\n" + '{"prompt": "a", "response": 4}', "row 2: 4 is neither text nor"),
    ("a.jsonl", f"{OK}\n" + '{"prompt": "a", "response": ["b"]}', "row 2: .* neither text"),
    ("a.jsonl", f"{OK}\n" + '{"prompt": {"a": 1}, "response": "b"}', "row 2: .* neither text"),
    ("a.jsonl", f"{OK}\n" + '{"prompt": NaN, "response": "b"}', "row 2: nan is neither text"),
    ("a.jsonl", f"{OK}\n" + '{"prompt": "a\\ud83d", "response": "b"}', "row 2: .* surrogates"),
    ("a.jsonl", f"{OK}\n" + '{"prompt": "a\\u0000", "response": "b"}', "row 2: a NUL"),
    ("a.jsonl", '{"prompt": "a", "Prompt ": "b", "response": "c"}', "two columns have the same"),
    ("a.jsonl", OK + '\n{"prompt": "a", "prompt": "b"}', "line 2 .* a key twice: prompt, prompt"),
    ("a.jsonl", '{"q": "a", "a": "b"}', r"no known columns \(found: 'q', 'a'\)"),
    ("a.jsonl", "", "Expecting value"),
    ("a.txt", "\n\n", "no rows"),
    ("a.csv", "", "is empty"),
    ("a.csv", "Prompt,Response\n", "no rows"),
    ("a.csv", "Prompt,Response\na,b\nc,d,e\n", "row 2: the row has 3 cells, the header 2"),
    ("a.csv", "Prompt,Response\na,b\nc\n", "row 2: the row has 1 cells, the header 2"),
    ("a.csv", 'Prompt;Response\na;"unclosed\nb;c\nd;"x"\ne;f\n', "line 2: the quotation marks"),
    ("a.csv", 'Prompt|Response\n"Hello" she said|ok\n', "line 2: the quotation marks do not"),
    ("a.tsv", 'Prompt\tResponse\na\t"b\n', "line 2: the quotation marks do not match"),
    ("a.csv", "Prompt,Response\na,b\rc\n", "line 2: .* or a lone CR"),
    ("a.csv", "Prompt,Prompt\na,b\n", "a column comes twice"),
    ("a.csv", "Prompt,Response\na,b\nc,d\0e\n", "holds NUL bytes"),
    ("a.csv", TABLE.encode("utf-16-le"), "holds NUL bytes"),
    ("a.csv", TABLE.encode("utf-16")[:-1], "truncated data"),
    (
        "a.csv",
        "\u043f\u0440\u0438,\u0432\u0435\u0442\n".encode("cp1251") * 9,
        "save the file in UTF-8",
    ),
    ("a.csv", "Prompt,Response\nab\x81c,d\n".encode("latin-1"), "save the file in UTF-8"),
    ("a.csv", f"{TABLE}caf\xe9,{'a' * 99}".encode() + b"\xe9\n", "save the file in UTF-8"),
    ("a.csv.gz", gzip.compress(TABLE.encode())[:-9], "ended before the end-of-stream"),
    ("a.csv.gz", TABLE, "Not a gzipped file"),
    ("a.xlsx", b"PK", "the name must end in"),
    ("prompts", "Why?", "the name must end in"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_faulty_file_is_refused_with_its_name_and_row(tmp_path, name, content, message):
    refused(tmp_path, name, content, message)


def test_label_that_is_no_thumb_is_refused(tmp_path):
    good = {"prompt": "a", "response": "b", "label": "up"}
    refused(
        tmp_path, "a.jsonl", lines(good, {**good, "label": "so so"}), "row 2: 'so so' is neither"
    )


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="a.csv does not exist"):
        read_file(tmp_path / "a.csv", {})


# ---- dialogues ----


def test_dialogue_becomes_messages_that_give_its_text_back():
    text = "\n\nHuman: Why? \n\nAssistant: So.\nIndeed.\n\nHuman:  Who?\n\nAssistant:"
    contents = ["Why? ", "So.\nIndeed.", " Who?"]
    messages = parse_dialogue(f"{text} \n")
    assert [message["content"] for message in messages] == contents
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert as_text(messages) == text


@pytest.mark.parametrize(
    "text",
    [
        "Why?",
        "\n\nHuman: Why?",
        "\n\nHuman: Why?\n\nHuman: Who?\n\nAssistant:",
        "\n\nHuman: Why?\n\nAssistant: So.\n\nAssistant:",
        "\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant:",
        "\n\nHuman:Why?\n\nAssistant:",
        "\n\nHuman: \n\nAssistant:",
        "Be kind.\n\nHuman: Why?\n\nAssistant:",
    ],
)
def test_text_that_is_no_clean_dialogue_stays_text(text):
    assert parse_dialogue(text) == text


# ---- real files ----


def test_real_hh_rlhf_rows_are_read():
    """Each line with its two dialogues split by hand. Three prompts do not become messages."""
    path = real_data("hh_rlhf/harmless_base_1900.jsonl.gz")
    source = read_file(path, {})
    assert "1,900 rows" in source.about
    assert len(source.rows) + sum(source.dropped.values()) == 1900
    sides = set()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            before, _, reply = json.loads(line)["chosen"].rpartition("\n\nAssistant:")
            sides.add((before + "\n\nAssistant:", reply.strip()))
    read = {(as_text(read_prompt(row.prompt)), row.responses[0]) for row in source.rows}
    assert read <= sides
    assert sum(isinstance(read_prompt(row.prompt), str) for row in source.rows) == 3


def test_real_notebook_files_are_read():
    folder = real_data("notebook_s1")
    assert len(read_file(folder / "sft_dataset.json", {}).rows) == 104
    assert len(read_file(folder / "prompt_dataset.csv", {}).rows) == 68
    names = "Least preferable response,Somewhat preferable response,Most preferable response"
    ranked = read_file(folder / "reward_dataset.csv", {"ranked": names})
    assert "46 rows" in ranked.about and "separator bar" in ranked.about
    assert [row.table for row in ranked.rows] == ["comparisons"] * 46 * 3
    unnamed = read_file(folder / "reward_dataset.csv", {})
    assert "prompts (CSV" in unnamed.about and "if these are responses, name" in unnamed.about


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",prompt,response\n0,Why?,So.\n", DEMONSTRATION),  # pandas writes its index so
        (",prompt\n0,Why?\n", [("prompts", "Why?", ())]),
        ("prompt,response,\nWhy?,So.,0\n", DEMONSTRATION),
        (",prompt,chosen,rejected\n7,Why?,So.,No.\n", [("comparisons", "Why?", ("So.", "No."))]),
    ],
)
def test_a_column_without_a_name_is_not_used(tmp_path, text, expected):
    path = tmp_path / "a.csv"
    path.write_text(text)
    source = read_file(path, {})
    assert source.rows == [Row(*row) for row in expected]
    assert "not used: (no name)" in source.about


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "prompt,response\nWhy?,So.\nprompt,response\n",
            "row 2: the row repeats the",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "response": "b"}\n',
            "row 2: no 'rejected', which the first row has; split the file",
        ),
        ("a.jsonl.gz", "no gzip", "is no whole .gz file"),
    ],
)
def test_joined_and_cut_files_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_file(path, {})


def test_read_prompts_has_each_prompt_once_with_its_first_row(tmp_path, capsys):
    """Rows that are dropped count too: an error can name the row of the file."""
    (tmp_path / "a.jsonl").write_text(
        lines(
            {"prompt": "Why?", "chosen": "So.", "rejected": "So."},
            {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
            {"prompt": "Who?", "chosen": "You.", "rejected": "He."},
            {"prompt": ASK, "chosen": "So.", "rejected": "No."},
        )
    )
    assert read_prompts(tmp_path / "a.jsonl") == {"Who?": 1, CELL: 3}
    printed = capsys.readouterr().out
    assert "4 rows, preference pairs" in printed and "2 different prompts" in printed
    assert "dropped, the same response on both sides: 1 rows" in printed
