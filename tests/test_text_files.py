"""Texts that people write: what ends a line, what a mark is, and what is no UTF-8."""

from pathlib import Path

import pytest

from fastgrpo.text_files import numbered_lines, read_text

INSIDE = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]  # str.splitlines cuts at each of them


@pytest.mark.parametrize("character", INSIDE)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_line_feeds_alone(character: str, end: str, tmp_path: Path) -> None:
    lines = [f"one{character}line", "", f"{character}", "last"]
    (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
    assert numbered_lines(tmp_path / "a.txt") == list(enumerate(lines, 1))
    assert read_text(tmp_path / "a.txt") == "\n".join(lines)


@pytest.mark.parametrize("text", ["", "a\n", "É 猫 🙂\n\n b"])
def test_a_byte_order_mark_is_no_part_of_the_text(text: str, tmp_path: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + text.encode())
        assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one\nzwei für\n".encode("latin-1"), r"a\.txt:2: byte 0xfc is not UTF-8; save the file as UTF-8, .*iconv"),
        ("\r\nbœuf".encode("cp1252"), r"a\.txt:2: byte 0x9c is not UTF-8"),
        (b"ok\nhalf \xed\xa0\xbd", r"a\.txt:2: byte 0xed is not UTF-8"),  # a surrogate by itself
        (b"cut \xe7\x8c", r"a\.txt:1: byte 0xe7 is not UTF-8"),
        ("a\nb".encode("utf-16"), r"a\.txt:1: is UTF-16; .*iconv -f UTF-16 "),
        (b"\xfe\xff" + "a\nb".encode("utf-16-be"), r"a\.txt:1: is UTF-16;"),
        ("a\nb".encode("utf-32"), r"a\.txt:1: is UTF-32;"),
        ("a\nb".encode("utf-16-le"), r"a\.txt:1: a NUL, as in UTF-16"),
        (b"a\nb\nc\0", r"a\.txt:3: a NUL"),
        (b"a\rb\r", r"a\.txt:1: a carriage return without a line feed"),
        (b"a\nb\r\r\n", r"a\.txt:2: a carriage return"),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", r"a\.txt:2: begins with a byte order mark"),
    ],
)
def test_what_would_be_read_as_other_words_is_refused_with_its_line(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "a.txt")


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none.txt", "No such file")):
        with pytest.raises(ValueError, match=rf"{path.name}: cannot be read \({why}"):
            read_text(path)
