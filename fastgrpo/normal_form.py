"""One form for texts that are compared: those that look the same are the same, whatever code points they are written in.

    compared("\\uff21\\uff22 CAFE\\u0301") == compared("ab cafÉ") == "abcafé"

Compatibility forms (full width, ligatures, combining accents) are those of Unicode's NFKC. Curly quotes and primes become
straight ones, and every hyphen that of the keyboard. Characters without a picture are dropped: zero-width and other format
characters, control characters, selectors of variants. Case and spaces do not count.
"""

import re
import unicodedata

SINGLE, DOUBLE, HYPHENS = "\u2018\u2019\u201a\u201b\u2032\u02bc", "\u201c\u201d\u201e\u201f\u2033", "\u2010\u2011\u2212"
STRAIGHT = str.maketrans({**dict.fromkeys(SINGLE, "'"), **dict.fromkeys(DOUBLE, '"'), **dict.fromkeys(HYPHENS, "-")})
# The grapheme joiner, fillers of Hangul and selectors of variants have no picture, and no category of their own.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def compared(text: str) -> str:
    """The text as it is compared; empty where it shows nothing."""
    # The invisible go first: they would keep an accent from its letter. A double prime is two primes in NFKC.
    shown = INVISIBLE.sub("", text.translate(STRAIGHT))
    shown = "".join(c for c in shown if not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc"))
    # Folding the case may leave what composes again, and composing what folds: twice is stable (Unicode, D146).
    for _ in range(2):
        shown = unicodedata.normalize("NFKC", shown.casefold())
    # An isolated accent becomes a space with the accent.
    return "".join(shown.split())
