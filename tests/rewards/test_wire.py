"""The wire format: what is packed comes back exactly, and what is damaged is refused."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.rewards.serving.wire import MAGIC, PREAMBLE, WireError, pack, unpack

LIMITS = (64, 1 << 20)
WORDS = ["a red circle", "", "grünes Dreieck", "\N{SNOWMAN}\N{GRINNING FACE}", "שלום", '\x00\n"\\', "\ud800", "x" * 3000]
LEAVES = [None, True, False, 0, -1, 2**70, 0.1, -1e-300, "", "ключ", [], {}]


def nested(rng: np.random.Generator, depth: int) -> Any:
    """Something that JSON can say."""
    kind = rng.integers(0, 4 if depth else 2)
    if kind == 2:
        return [nested(rng, depth - 1) for _ in range(rng.integers(0, 4))]
    if kind == 3:
        return {WORDS[rng.integers(len(WORDS))]: nested(rng, depth - 1) for _ in range(rng.integers(0, 4))}
    return LEAVES[rng.integers(len(LEAVES))]


def example(seed: int) -> tuple[torch.Tensor, list[str], list[dict]]:
    rng = np.random.default_rng(seed)
    count, frames = int(rng.integers(1, 6)), [int(rng.integers(1, 4))] * int(rng.integers(0, 2))
    shape = [count, *frames, 3, int(rng.integers(1, 20)), int(rng.integers(1, 20))]
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    prompts = [WORDS[rng.integers(len(WORDS))] for _ in range(count)]
    return images, prompts, [{"prompt": prompt, "more": nested(rng, 3)} for prompt in prompts]


@pytest.mark.parametrize("form", ["raw", "png"])
@pytest.mark.parametrize("seed", range(20))
def test_round_trip_is_exact(seed: int, form: str) -> None:
    images, prompts, metadata = example(seed)
    found = unpack(pack(images, prompts, metadata, form), *LIMITS)
    assert torch.equal(found.images, images) and found.images.dtype == torch.uint8
    assert found.prompts == prompts and found.metadata == metadata
    assert json.dumps(found.metadata) == json.dumps(metadata), "1 and 1.0 and True are equal, but not the same"


def test_a_transposed_view_is_packed_as_it_looks() -> None:
    images = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3).permute(0, 3, 1, 2)
    assert torch.equal(unpack(pack(images, ["", ""], [{}, {}]), *LIMITS).images, images)


@pytest.mark.parametrize("form", ["raw", "png"])
def test_truncations_and_flipped_bits_are_refused(form: str) -> None:
    data = pack(torch.full((2, 3, 4, 4), 7, dtype=torch.uint8), ["é", "b"], [{"a": 1}, {}], form)
    for length in range(len(data)):
        with pytest.raises(WireError):
            unpack(data[:length], *LIMITS)
    for place in range(len(data)):
        with pytest.raises(WireError):
            unpack(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :], *LIMITS)
    with pytest.raises(WireError):
        unpack(data + b"\0", *LIMITS)


def forged(body: bytes = bytes(48), **changes: Any) -> bytes:
    """A request whose checksum is right and whose header says something else; None leaves a key out."""
    header = {"version": 1, "format": "raw", "dtype": "uint8", "shape": [1, 3, 4, 4], "sizes": []}
    header = {**header, "prompts": ["a"], "metadata": [{}], **changes}
    head = json.dumps({key: value for key, value in header.items() if value is not None}).encode()
    return PREAMBLE.pack(MAGIC, len(head), zlib.crc32(head + body)) + head + body


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version = 2: expected 1"),
        ({"version": True}, "version = True: expected 1"),
        ({"dtype": "float32"}, "dtype = 'float32': expected uint8"),
        ({"format": "pickle"}, "format = 'pickle': expected raw or png"),
        ({"format": None}, "the header has .* expected"),
        ({"more": 1}, "the header has .* expected"),
        ({"shape": [1, 4, 4, 3]}, r"shape = \[1, 4, 4, 3\]: expected"),
        ({"shape": [-1, 3, -4, 4]}, "shape = .*: expected"),
        ({"shape": [1.0, 3, 4, 4]}, "shape = .*: expected"),
        ({"shape": "big"}, "shape = 'big': expected"),
        ({"shape": [0, 3, 4, 4], "prompts": [], "metadata": []}, "B at least 1"),
        ({"shape": [1, 3, 4, 5]}, "48 bytes of pixels, the shape says 60"),
        ({"prompts": ["a", "b"]}, "prompts: 2 for 1 images"),
        ({"prompts": "a"}, "prompts: 'a' for 1 images"),
        ({"prompts": [1]}, "prompts: expected strings only"),
        ({"metadata": []}, "metadata: 0 for 1 images"),
        ({"metadata": [[]]}, "metadata: expected objects only"),
        ({"metadata": [{"a": float("nan")}]}, "NaN is not JSON"),
        ({"format": "png", "sizes": [48]}, "PNG 0 cannot be read"),
        ({"format": "png", "sizes": [47]}, "sizes: expected the bytes of each of 1 PNGs, 48 in all"),
        ({"format": "png", "sizes": [100, -52]}, "sizes: expected"),
    ],
)
def test_a_header_that_is_wrong_is_named(changes: dict, message: str) -> None:
    assert unpack(forged(), *LIMITS).prompts == ["a"]
    with pytest.raises(WireError, match=message):
        unpack(forged(**changes), *LIMITS)


def test_limits_hold_before_anything_is_unpacked() -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    data = pack(images, [""] * 3, [{}] * 3)
    for limits, message in (((2, 1 << 20), "3 images: at most 2"), ((3, 100), "576 bytes of pixels: at most 100")):
        with pytest.raises(WireError, match=message) as caught:
            unpack(data, *limits)
        assert caught.value.status == 413
    png = pack(images[:1], [""], [{}], "png")
    head = PREAMBLE.size + PREAMBLE.unpack_from(png)[1]
    body = png[head:]
    with pytest.raises(WireError, match=r"PNG 0 is RGB \(8, 8\), expected RGB \(4, 4\)"):
        unpack(forged(body, format="png", sizes=[len(body)]), *LIMITS)
    with pytest.raises(WireError, match="the header is not JSON"):
        deep = b"[" * 100_000
        unpack(PREAMBLE.pack(MAGIC, len(deep), zlib.crc32(deep)) + deep, *LIMITS)


def test_what_cannot_be_said_is_refused_by_the_sender() -> None:
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for bad in ({"a": float("inf")}, {"a": object()}):
        with pytest.raises(WireError, match="metadata that JSON cannot say"):
            pack(image, ["a"], [bad])
    with pytest.raises(WireError, match="images of torch.float32"):
        pack(image.float(), ["a"], [{}])
    with pytest.raises(WireError, match="prompts: 2 for 1 images"):
        pack(image, ["a", "b"], [{}])
