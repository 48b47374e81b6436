"""The reader of CSV files: text comes in as it was written, or not at all."""

import random
from pathlib import Path

import pandas
import pytest

from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.tables import check_lengths, read_csv

BOTH = ("Prompt", "Response")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(tmp_path, content, columns=BOTH):
    """The cells of a file with this content."""
    return read_csv(write(tmp_path / "x.csv", content), columns).values.tolist()


# ---- read ----


@pytest.mark.parametrize(
    ("content", "cells"),
    [
        ("1.50,nan\nNA,None\n", [["1.50", "nan"], ["NA", "None"]]),
        ('"a, ""b""\nc",d', [['a, "b"\nc', "d"]]),
        ('he said "no",5 " 6 " 7\n', [['he said "no"', '5 " 6 " 7']]),
        ('""""," ""x"" "\n', [['"', '"x"']]),
        ("a,b\n\n\nc,d\n\n", [["a", "b"], ["c", "d"]]),
        ("a\x85b\u2028c\x0bd,\u200be\n", [["a\x85b\u2028c\x0bd", "\u200be"]]),
    ],
)
def test_read_csv_takes_text_as_it_is(tmp_path, content, cells):
    """Numbers and NA stay text. Quotation marks come in pairs. Empty lines are no rows. No other
    character than LF and CR ends a line."""
    assert read(tmp_path, f"Prompt,Response\n{content}") == cells
    assert read(tmp_path, f"\ufeffPrompt,Response\n{content}") == cells


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_read_csv_makes_line_ends_lf(tmp_path, end):
    """Inside cells CRLF and a lone CR as well. Rows end in LF, CRLF, or what a text file of Windows
    makes of CRLF."""
    content = f'Prompt,Response{end}"a\r\nb\n\nc\rd",e{end}{end}f,"g"{end}'
    assert read(tmp_path, content) == [["a\nb\n\nc\nd", "e"], ["f", "g"]]


def test_read_csv_removes_blanks_around_text(tmp_path):
    """Of all columns. Line ends stay where a text begins."""
    assert read(tmp_path, "Prompt,Response\n  a b ,\tc\xa0\n") == [["a b", "c"]]
    assert read(tmp_path, 'Prompt,Response\n" \n\n a: \n","\n b\t"\n') == [["\n\n a:", "\n b"]]


def test_read_csv_takes_optional_columns_if_they_are_there(tmp_path):
    path = write(tmp_path / "x.csv", "Answer,Other,Prompt\ntie,\0,a\n")
    frame = read_csv(path, ("Prompt",), optional=("Answer", "Votes"))
    assert frame.to_dict("records") == [{"Prompt": "a", "Answer": "tie"}]


# ---- refused ----

MARKS = "line 3: the quotation marks do not match, or a lone CR ends a line; a cell that holds"


@pytest.mark.parametrize(
    "rows",
    [
        'a,"unclosed\nb,c\nd,"x"\ne,f',  # was one response of three lines
        '"Hello" she said,ok',  # was: Hello she said
        'a,"never closed\nb,c',
        'a,"b" ',
        'a, "b"',  # was: "b", with its marks
        'say "hi, there",ok',  # was: say "hi
        '12" nail,ok',
        'she said ""hi"",ok',
        'a,"b""',
        'a" b ""c"" d",ok',
        'say \\"hi\\",ok',  # of programs that write \\" for a quotation mark
        "first\rsecond,ok",  # was two prompts
        "a,b\rc,d",
        'a,"b"\rc,d',
    ],
)
def test_read_csv_rejects_marks_that_do_not_match_and_a_lone_cr(tmp_path, rows):
    with pytest.raises(InputError, match=MARKS):
        read(tmp_path, f"Prompt,Response\nfine,fine\n{rows}\n")


def test_read_csv_rejects_old_line_ends(tmp_path):
    with pytest.raises(InputError, match="line 1: .* a lone CR ends a line"):
        read(tmp_path, "Prompt,Response\ra,b\r")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("x,Yes\0 sir\n", "row 1: Response holds a NUL byte"),
        ('x,y\n"  ",y\n"",y\n', r"row 2: Prompt is empty \(2 such rows\)"),
        ("x,y\nx,\xa0\n", r"row 2: Response is empty \(1 such"),
        (f"x,y\nx,a{' ' * 10**6}b\n", "row 2: Response is longer than 100,000 characters"),
        ("x,y\nx\n", "row 2: the row has 1 cells, the header 2: put quotation marks"),
        ("x,y\nx,y,z\nx,y,z\n", r"row 2: the row has 3 cells, the header 2: .* \(2 such rows\)"),
        ('"\n\nx",y\n\nx\n', "row 2: the row has 1 cells"),
        ("", "has a header but no rows"),
    ],
)
def test_read_csv_names_the_row_that_it_rejects(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, f"Prompt,Response\n{rows}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("Question,Response", r"no column 'Prompt' \(found: Question, Response; needed: Prompt"),
        ("\ufeff\ufeffPrompt,Response", r"no column 'Prompt' \(found: '\\ufeffPrompt'; "),
        ("\u200bPrompt,Response", r"no column 'Prompt' \(found: '\\u200bPrompt'; "),
        ("Prompt\xa0,Response", r"no column 'Prompt' \(found: 'Prompt\\xa0'; "),
        ("Prompt, Response", r"no column 'Response' \(found: ' Response'; "),
        ("id,prompt,Response", r"no column 'Prompt' \(found: 'prompt'; needed: Prompt, Response"),
        ("Prompt,Response,answer", r"no column 'Answer' \(found: 'answer'; "),
        ("Prompt,Response,Prompt", r"two columns 'Prompt' \(found: 'Prompt', 'Prompt'; "),
        ("Prompt;Response", "other columns or separators: `python -m rlhf.tools.prepare FILE"),
        ("Prompt\tResponse", r"found: Prompt\\tResponse; .* other columns or separators"),
    ],
)
def test_read_csv_shows_what_is_wrong_with_a_header(tmp_path, header, message):
    path = write(tmp_path / "x.csv", f"{header}\na,b,c\n")
    with pytest.raises(InputError, match=message):
        read_csv(path, BOTH, optional=("Answer",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Prompt,Response\na,b\n".encode("utf-16"), "not text in UTF-8, but in UTF-16"),
        (
            "Prompt,Response\na,b\n".encode("utf-16-be"),
            r"no column 'Prompt' \(found: '\\x00P\\x00r",
        ),
        ("Prompt,Response\na,né\n".encode("latin-1"), "not text in UTF-8, .*byte 0xe9"),
        ("Prompt,Response\na,né\n".encode()[:-2], "not text in UTF-8"),
        (b"", "is empty; its first line must name the columns"),
        (b"\r\n\n", "is empty; its first line must name the columns"),
    ],
)
def test_read_csv_rejects_another_encoding_and_an_empty_file(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_read_csv_rejects_missing_file(tmp_path):
    with pytest.raises(InputError, match="prompts.csv does not exist"):
        read_csv(tmp_path / "prompts.csv", ("Prompt",))


def test_check_lengths_names_the_first_row_that_is_too_long():
    check_lengths(Path("x.csv"), [0, 3], [3, 5], 5, "the prompt")
    message = r"x.csv, row 4: the prompt takes 6 tokens and there is room for 5 \(2 such"
    with pytest.raises(InputError, match=message):
        check_lengths(Path("x.csv"), [0, 3, 4], [3, 6, 7], 5, "the prompt")


# ---- writing and reading again ----


def random_text(rng):
    """Up to 12 characters of all of Unicode, or of those that mean something in a CSV file, between
    two letters."""
    characters = ["a"]
    for _ in range(rng.randrange(12)):
        code = rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])
        characters.append(rng.choice([chr(code), *'",,\n\r\r \t;']))
    return "".join([*characters, "b"])


def test_what_write_csv_writes_is_read_again_here_and_by_pandas(tmp_path):
    """500 rows of random text. Line ends inside cells become LF here; pandas leaves them."""
    rng = random.Random(0)
    table = [{"Prompt": random_text(rng), "Response": random_text(rng)} for _ in range(500)]
    path = tmp_path / "table.csv"
    write_csv(path, table)
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
    assert frame.to_dict("records") == table
    expected = []
    for row in table:
        expected.append([x.replace("\r\n", "\n").replace("\r", "\n") for x in row.values()])
    assert read_csv(path, BOTH).values.tolist() == expected


@pytest.mark.parametrize("text", ["a\rb", "a\nb", 'a "b", c', '"', '""', ",", "'", "\\", "\\n"])
def test_what_pandas_writes_is_read_again_or_refused(tmp_path, text):
    """pandas writes a lone CR without quotation marks where Python's csv module does."""
    path = tmp_path / "table.csv"
    table = [{"Prompt": text, "Response": "x"}, {"Prompt": "y", "Response": text}]
    pandas.DataFrame(table).to_csv(path, index=False)
    lone_cr = "\r" in text and '"' not in path.read_text()
    if lone_cr:
        with pytest.raises(InputError, match="a lone CR ends a line"):
            read_csv(path, BOTH)
        return
    text = text.replace("\r", "\n")
    assert read_csv(path, BOTH).values.tolist() == [[text, "x"], ["y", text]]
