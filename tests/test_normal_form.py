"""Texts that look the same are the same, and those that do not are not."""

import unicodedata

import pytest

from fastgrpo.normal_form import compared

SAME = [
    ("Z\u00dcRICH", "zu\u0308rich"),
    ("\uff11\uff12\uff13 \uff2d\uff21\uff29\uff2e", "123 main"),
    ("Ben\u2019s \u201cBar\u201d", 'ben\'s "bar"'),
    ("\u201eGr\u00fc\u00dfe\u201f", '"GRÜSSE"'),
    ("6\u2032 2\u2033", "6' 2\""),
    ("re\u00adcy\u200bcle\ufeff", "recycle"),
    ("\u2066left\u2069 \u200fright\u200e", "leftright"),
    ("a\u200d\u034f\u0301", "\u00e1"),
    ("\u2665\ufe0f", "\u2665"),
    ("o\ufb03ce\u3000hours\u00a0", "officehours"),
    ("co\u2011op\u2010\u2212", "co-op--"),
    ("\u039f\u0394\u039f\u03a3 \u0391", "\u03bf\u03b4\u03bf\u03c2\u03b1"),  # the sigma that ends a word
    ("tab\tand\nline\r\n", "TABANDLINE"),
    ("\uff76\uff9e", "\u30ac"),
    ("\u1112\u1161\u11ab", "\ud55c"),
    ("null\x00\x07", "null"),
]
DIFFERENT = [("o", "0"), ("cafe", "caf\u00e9"), ("a.b", "ab"), ("it's", "its"), ("\u0430", "a"), ("\u2014", "-"), ("!", "")]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same_to_the_eye(a: str, b: str) -> None:
    assert compared(a) == compared(b) != ""


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_not_the_same_to_the_eye(a: str, b: str) -> None:
    assert compared(a) != compared(b)


def test_the_form_is_stable_for_every_character() -> None:
    """It is a form of itself, and of both of Unicode's, for every character and for each with an accent."""
    for code in (*range(0xD800), *range(0xE000, 0x20000)):
        for text in (chr(code), f"a{chr(code)}\u0301"):
            form = compared(text)
            assert compared(form) == form == compared(unicodedata.normalize("NFD", text)), hex(code)


@pytest.mark.parametrize("nothing", ["", " \t\u3000", "\u200b\u2060\ufeff", "\u3164\u115f", "\x00"])
def test_what_shows_nothing_is_empty(nothing: str) -> None:
    assert compared(nothing) == ""
