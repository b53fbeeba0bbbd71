"""What a prompt's record may be: what JSON can say and whoever reads it afterwards can take.

A record goes to tokenizers, rewards on other machines, the files of a run and its report. Whatever one of them could not
take would stop the run when that prompt's turn comes, so each record is looked at before anything is loaded.
"""

import json
import math
import reprlib
from typing import Any

MAX_DEPTH = 100  # of objects and lists in one another: copying and writing them is recursive
MAX_DIGITS = 1000  # of a whole number: Python reads up to 4300, and other readers of JSON fewer

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class NotJSON(ValueError):
    """A text that is no JSON at all."""


def parse_json(text: str) -> Any:
    """The value of strict JSON. ValueError, with what is wrong but not where: `NotJSON`, or JSON that is not taken."""
    try:
        return json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole, object_pairs_hook=_without_repetition
        )
    except json.JSONDecodeError as error:
        raise NotJSON(str(error)) from None
    except RecursionError:
        raise ValueError(f"objects and lists in one another more than {MAX_DEPTH} deep; flatten them") from None


def is_json(text: str) -> bool:
    """Whether a text is JSON that `parse_json` takes."""
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def check_record(record: Any) -> None:
    """Refuse what is no record of a prompt: ValueError with what is wrong, without its place."""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'expected an object with a text as its "prompt", found {_short.repr(record)}')
    if record["prompt"].isspace():
        raise ValueError(f'prompt = {record["prompt"]!r}: is blank; write a text, or "" where none is meant')
    if not isinstance(record.get("tag", ""), str):
        raise ValueError(f"tag = {_short.repr(record['tag'])}: names the prompt's category; give a text, or leave it out")
    waiting: list[tuple[str, Any, int]] = [("", record, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{path[:80]}...: objects and lists in one another more than {MAX_DEPTH} deep; flatten them")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"{path or 'record'}: the key {_short.repr(key)} is no text, as JSON's keys are")
                _check_text("a key", key)
            waiting += [(f"{path}.{key}" if path else key, item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value)]
        else:
            _check_value(path, value)


def _check_value(path: str, value: Any) -> None:
    if isinstance(value, str):
        _check_text(path, value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} = {value}: is not a number that JSON has; give a finite one, or null")
    elif isinstance(value, int):
        if value.bit_length() > MAX_DIGITS * math.log2(10):
            raise ValueError(f"{path}: a whole number of more than {MAX_DIGITS} digits; write it as a text")
    elif value is not None:
        raise ValueError(f"{path} = {_short.repr(value)}: JSON has no {type(value).__name__}; give a number, text or list")


def _check_text(path: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(f"{path}: {half} is half of a character (a lone surrogate); write all of it") from None


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON; write a finite number, or null")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:80]} is larger than any float; write a smaller one, or a text")
    return number


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a whole number of more than {MAX_DIGITS} digits; write it as a text")
    return int(text)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in record if keys.count(key) > 1)
        raise ValueError(f"the key {ascii(repeated)} stands twice in one object; keep one of them")
    return record
