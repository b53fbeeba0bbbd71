"""What the text encoders read of a prompt: they cut one that is longer than model.max_text_tokens."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """How a prompt comes to the tokenizer of the text encoder that reads most of it."""

    tokenizer: Any
    prompt: str  # cleaned as the pipeline does
    text: str  # the prompt within its template
    room: int  # tokens of the text that are read
    marks: bool = True  # whether the tokenizer adds marks of its own


def cut_line(cut: Mapping[Any, str], count: int, max_text_tokens: int) -> str:
    """What a run says of prompts of which the text encoders read the beginning alone. count: of all prompts."""
    prompt, part = next(iter(cut.items()))
    text = prompt if isinstance(prompt, str) else prompt.text
    lost = text[len(part) :] or text
    shown = lost if len(lost) <= 60 else f"{lost[:57]}..."
    return (
        f"{len(cut)} of {count} prompts are longer than model.max_text_tokens = {max_text_tokens} and are cut, for example "
        f"{text[:60]!r} before {shown!r}; a reward reads all of it"
    )


def part_read(reading: Reading) -> str:
    """The part of the prompt that is read, from its beginning; all of it where nothing is cut."""
    tokenizer, prompt, text, room, marks = reading
    if len(text.encode(errors="replace")) < room - 2:  # a token is a byte at least, besides a mark at either end
        return prompt
    # Cut one token later than it will be, as only the tokenizer knows which of the tokens are marks.
    if len(tokenizer(text, truncation=True, max_length=room + 1, add_special_tokens=marks).input_ids) <= room:
        return prompt
    cut = tokenizer(text, truncation=True, max_length=room, add_special_tokens=marks, return_offsets_mapping=True)
    end = max(stop for _, stop in cut.offset_mapping)
    return prompt[: max(0, end - max(0, text.find(prompt)))]
