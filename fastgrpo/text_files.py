r"""Text files that people write: UTF-8 whatever the system's locale, with or without a byte order mark.

    read_text(path)          the whole text, each line ended by \n
    numbered_lines(path)     (1, the first line), (2, the second), ...

A line ends at \n or \r\n and nowhere else: what Unicode also calls a line's end (U+2028, U+2029, U+0085, a form feed, the
separators U+001C to U+001E) may stand inside a prompt and inside a string of JSON. A \r by itself could mean either, and a
text in another encoding would be read as other words, so both are refused with their line.
"""

import codecs
from pathlib import Path
from typing import NoReturn

HALF = 1000  # characters of a message that are shown of its beginning, and as many of its end, where the fix stands
MARK = "\ufeff"
# The marks of UTF-32 come first: that of its little-endian form begins with UTF-16's.
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """The text of a file. ValueError, with file and line: not UTF-8, a NUL, a lone carriage return, or unreadable."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    for mark, encoding in OTHER_MARKS.items():
        if data.startswith(mark):
            _refuse(path, 1, f"is {encoding}", encoding)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, data.count(b"\n", 0, error.start) + 1, f"byte 0x{data[error.start]:02x} is not UTF-8", "WINDOWS-1252")
    text = text.removeprefix(MARK).replace("\r\n", "\n")
    if "\0" in text:
        _refuse(path, _line_of(text, "\0"), "a NUL, as in UTF-16 without a byte order mark", "UTF-16LE")
    if "\r" in text:
        line = _line_of(text, "\r")
        raise ValueError(f"{path}:{line}: a carriage return without a line feed; end each line with a line feed")
    if f"\n{MARK}" in text:
        line = _line_of(text, f"\n{MARK}") + 1
        raise ValueError(f"{path}:{line}: begins with a byte order mark, as where files were joined; remove the mark")
    return text


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file with their numbers, from 1, without their ends. Raises what `read_text` does."""
    return list(enumerate(read_text(path).split("\n"), 1))


def _line_of(text: str, found: str) -> int:
    return text.count("\n", 0, text.index(found)) + 1


def _refuse(path: Path, line: int, what: str, encoding: str) -> NoReturn:
    way_out = f"save the file as UTF-8, for example with iconv -f {encoding} -t UTF-8"
    raise ValueError(f"{path}:{line}: {what}; {way_out}")


def one_line(text: str) -> str:
    """A message as one line that a terminal can be given: it may quote a file that somebody else wrote.

    A line's end or a control character stands as its escape, and of what is very long the middle is left out.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= 2 * HALF else f"{shown[:HALF]} ... {shown[-HALF:]}"
