"""What the properties of tests/fuzz are made of: the property itself, and damage to bytes and values.

A person's input works, or is refused in words for a person: a line that names what is wrong. There is no third way.
"""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
from hypothesis import strategies as st

from fastgrpo.commands.errors import is_refusal
from fastgrpo.text_files import one_line

OUTCOMES: dict[str, Counter[str]] = {}  # test -> how many of its inputs ended how
HANGS = 60  # seconds after which an input counts as one that hangs

ODD_TEXTS = (
    "", " ", "\0", "\n", "\r", "\x85", "\u2028", "\ufeff", "\ud800", "é", "🙂", "~", "~nobody", ".", "..", "/", "-", "--",
    "a:b", "null", "true", "no", "nan", ".inf", "1e400", "0x", "012", "1_000", "2020-01-01", "<<", "*a", "&a", "!!float x",
    "!!python/none", "{", "[", "]", "{}", "[]", '"', "'", "%", "@", "${HOME}", "$(id)", "../../etc/passwd", "/etc/passwd",
    "/dev/zero", "x" * 5000,
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e300, -1e300,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
ODD_BYTES = (
    b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r", b"\n", b"\x85", b"\xed\xa0\x80", b"\x80", b": ", b"- ", b"{", b"}",
    b"[", b"]", b"'", b'"', b"#", b"&a ", b"*a", b"<<: *a", b"!!float ", b"!!python/object:os.system ", b"\t", b"  ",
    b"9" * 5000, b"[" * 5000, b"\xff" * 8, b"\x7f\xff\xff\xff",
)  # fmt: skip

odd_texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=8)
scalars = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats() | odd_texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3), max_leaves=6
)
# Where, as a share of the whole; how much goes; and what comes in its place.
cuts = st.tuples(
    st.floats(0, 1), st.sampled_from((0, 0, 1, 1, 2, 8, 64, 10**9)), st.sampled_from(ODD_BYTES) | st.binary(max_size=4)
)
damages = st.lists(cuts, min_size=1, max_size=4)


def damaged(content: bytes, damage: list[tuple[float, int, bytes]]) -> bytes:
    """The bytes after each of the cuts."""
    for share, gone, instead in damage:
        place = int(share * len(content))
        content = content[:place] + instead + content[place + gone :]
    return content


def odd_json(data: st.DataObject, value: Any) -> Any:
    """A value of JSON in which one place holds another value, or nothing, or stands under another name."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(value, key=str)))
        rest = {name: one for name, one in value.items() if name != key}
        kind = data.draw(st.sampled_from(("inside", "inside", "inside", "gone", "renamed")))
        if kind == "gone":
            return rest
        return rest | ({data.draw(odd_texts): value[key]} if kind == "renamed" else {key: odd_json(data, value[key])})
    if isinstance(value, list) and value and data.draw(st.integers(0, 3)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], odd_json(data, value[place]), *value[place + 1 :]]
    return data.draw(values)


def as_json(value: Any) -> bytes:
    """As Python's writer has it, which knows NaN and takes half a character."""
    return json.dumps(value, ensure_ascii=True).encode()


def works_or_is_refused(call: Callable[[], Any], *named: object) -> Any:
    """What the call returns; None where it was refused. named: what the refusal must say, a file for example."""
    try:
        with not_hanging():
            result = call()
    except Exception as error:
        if not is_refusal(error):
            raise
        check_refusal(one_line(str(error)), *named)
        count("refused")
        return None
    count("worked")
    return result


def count(outcome: str) -> None:
    """Of one input of the test that is running."""
    OUTCOMES.setdefault(os.environ["PYTEST_CURRENT_TEST"].split(" ")[0], Counter())[outcome] += 1


def check_refusal(message: str, *named: object) -> None:
    """A refusal is a line that names what it is about."""
    assert message.strip() and message.isprintable(), message
    for name in named:
        assert str(name) in message, f"{name} is not named in: {message}"


@contextmanager
def not_hanging() -> Iterator[None]:
    def end(*_: object) -> NoReturn:
        pytest.fail(f"this input hangs: no end after {HANGS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
