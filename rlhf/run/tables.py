"""The one reader of every CSV file that a user gives: data sets, votes, rankings.

Text comes in as it was written, or not at all. The format is RFC 4180 in UTF-8: a cell that holds a
comma, a line end or a quotation mark stands in quotation marks, and those inside it are doubled. A
cell without them may still hold some, in pairs. A file that breaks these rules is refused, because
every guess about it can move text from one cell to another.

Two things are changed in every cell: line ends become LF, and blanks at its two ends are removed.
Line ends at its beginning stay, because prompts may start with them.
"""

import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame

from rlhf.run.errors import InputError
from rlhf.run.files import PREPARE, check_file

LONGEST_CELL = 100_000  # characters

NOT_A_CELL = (
    "the quotation marks do not match, or a lone CR ends a line; a cell that holds a separator, a "
    "quotation mark or a line end needs quotation marks around all of it, and each inside doubled"
)


def read_csv(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> DataFrame:
    """The named columns as text, and the optional ones if they are there.

    Raises InputError if the file is missing, faulty or has no rows, if a column is missing, or if a
    cell of these columns is empty, too long or holds a NUL byte.
    """
    header, *rows = split_rows(path, read_text(path))
    check_header(path, header, columns, optional)
    if not rows:
        raise InputError(f"{path} has a header but no rows")
    check_rows(path, "the row", [row_fault(cells, header) for cells in rows])
    table = {}
    for name in (*columns, *optional):
        if name in header:
            place = header.index(name)
            table[name] = [strip_blanks(cells[place]) for cells in rows]
            check_rows(path, name, [text_fault(text) for text in table[name]])
    return DataFrame(table)


# ---- from bytes to rows ----


def read_text(path: Path, cut: bool = False) -> str:
    """The text of a file in UTF-8. Raises InputError if it is in another encoding.

    Args: cut: the file may end within a character, which is left out.
    """
    data = check_file(path).read_bytes()
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        return decoder.decode(data, final=not cut)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8, but in UTF-16, Latin-1 or another encoding "
            f"({error}); save it as UTF-8"
        ) from None


def cell_pattern(separator: str) -> re.Pattern:
    """A cell with quotation marks around it, or one without, which does not begin with a mark; then
    the separator or the line end behind it. A second CR is what Windows makes of CRLF."""
    letter = rf'[^"{separator}\r\n]'
    quoted = r'"[^"]*(?:""[^"]*)*"'
    plain = rf'(?![^\S\n{separator}]*"){letter}*(?:(?<!\\)"{letter}+"(?!"){letter}*)*'
    return re.compile(f"({quoted}|{plain})([{separator}]|\r*\n)")


def split_rows(path: Path, text: str, separator: str = ",") -> list[list[str]]:
    """The cells of the header and of all rows, without empty lines.

    Raises InputError if there is no header, or a cell breaks the rules above.
    """
    text = text.replace("\r\n", "\n") + "\n"
    rows = []
    cells = []
    at = 0
    for cell in cell_pattern(separator).finditer(text):
        if cell.start() > at:
            break
        at = cell.end()
        cells.append(unquoted(cell[1]))
        if cell[2] != separator:
            if cell[1] or len(cells) > 1:
                rows.append(cells)
            cells = []
    if at < len(text):
        line = 1 + text.count("\n", 0, at)
        raise InputError(f"{path}, line {line}: {NOT_A_CELL}; {PREPARE} with any separator")
    if not rows:
        raise InputError(f"{path} is empty; its first line must name the columns")
    return rows


def unquoted(cell: str) -> str:
    """A cell's text, with LF for line ends."""
    if cell.startswith('"'):
        return cell[1:-1].replace('""', '"').replace("\r", "\n")
    return cell


def strip_blanks(cell: str) -> str:
    """The text without blanks at its two ends. Line ends at its beginning stay."""
    return cell.rstrip().lstrip(" \t\xa0")


# ---- checks ----


def check_header(
    path: Path, header: list[str], columns: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    """Raise InputError if a column is missing, comes twice, or is spelled in another way."""
    for name in (*columns, *optional):
        similar = [other for other in header if letters(other) == letters(name)]
        if similar == [name] or not similar and name in optional:
            continue
        what = "two columns" if name in similar else "no column"
        found = ", ".join(map(ascii, similar or header))
        raise InputError(
            f"{path}: {what} {name!r} (found: {found[:200]}); with other columns or separators: "
            f"{PREPARE}"
        )


def letters(name: str) -> str:
    """A name without case, signs, spaces and invisible characters."""
    return re.sub(r"\W", "", name).casefold()


def row_fault(cells: list[str], header: list[str]) -> str:
    if cells == header:
        return "repeats the header, as if files were joined"
    if len(cells) == len(header):
        return ""
    return (
        f"has {len(cells)} cells, the header {len(header)}: put quotation marks around text that "
        f"holds a separator or a line end"
    )


def text_fault(text: str) -> str:
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "holds a NUL byte"
    if len(text) > LONGEST_CELL:
        return f"is longer than {LONGEST_CELL:,} characters"
    return ""


def check_rows(
    path: Path,
    what: str,
    faults: Sequence[str],
    fix: str = "fix or remove them",
    index: Sequence[int] = range(sys.maxsize),
) -> None:
    """Raise InputError that names the first faulty row and counts them.

    Args: faults: what is wrong with `what` in each row, "" if nothing is; index: the rows' numbers
        in the file, from 0, if they are not all of its rows.
    """
    wrong = [(number, fault) for number, fault in zip(index, faults) if fault]
    if wrong:
        number, fault = wrong[0]
        raise InputError(
            f"{path}, row {number + 1}: {what} {fault} ({len(wrong)} such rows); {fix}"
        )


def check_lengths(
    path: Path, index: Sequence[int], lengths: list[int], limit: int, what: str, fix: str = ""
) -> None:
    """Raise InputError if a row is longer than limit, in tokens.

    Args: index: the rows' numbers in the file, from 0; lengths: of the rows; what: is measured;
        fix: one more way out, for the message.
    """
    room = f"tokens and there is room for {limit}"
    faults = [f"takes {length} {room}" if length > limit else "" for length in lengths]
    fix = f"shorten or remove them, {fix}give SFT a larger --block-size or `prepare` a smaller one"
    check_rows(path, what, faults, fix, index)
