"""What a request for scores looks like on the wire: JSON and pixels, never pickle, so that reading it runs no code.

    12 bytes   b"FGR1", length n of the header (uint32), CRC-32 of all that follows (uint32), little-endian
    n bytes    the header, JSON: {"version": 1, "format": "raw" or "png", "dtype": "uint8", "shape": [B, 3, H, W] or
               [B, T, 3, H, W], "prompts": [B strings], "metadata": [B objects], "sizes": [bytes of each PNG]}
    the rest   raw: the pixels in C order; png: the images one after the other, of clips frame by frame

The answer is JSON: {"scores": [B numbers], "reward": name, "version": of the reward}. The checksum tells a damaged request
from another one: a flipped bit in a pixel would else only change its score.
"""

import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VERSION = 1
PREAMBLE = struct.Struct("<4sII")
MAGIC = b"FGR1"
Format = Literal["raw", "png"]
FORMATS = get_args(Format)
HEADER_BYTES = 1 << 16  # allowed an image for its prompt and metadata, beside the pixels
KEYS = {"version", "format", "dtype", "shape", "prompts", "metadata", "sizes"}


class WireError(ValueError):
    """A request that cannot be read; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Request(NamedTuple):
    images: Tensor  # (B, 3, H, W) uint8, clips (B, T, 3, H, W)
    prompts: list[str]
    metadata: list[dict]


def pack(images: Tensor, prompts: list[str], metadata: list[dict], form: str = "raw") -> bytes:
    """The bytes of a request; metadata that JSON cannot say is refused."""
    _check_counts(list(images.shape), prompts, metadata)
    if images.dtype != torch.uint8 or form not in FORMATS:
        raise WireError(f"images of {images.dtype} as {form!r}: expected uint8 as one of {', '.join(FORMATS)}")
    pixels = images.detach().cpu().contiguous().numpy()
    if form == "raw":
        parts, sizes = [pixels.tobytes()], []
    else:
        parts = [_png(image) for image in pixels.reshape(-1, *pixels.shape[-3:])]
        sizes = [len(part) for part in parts]
    header = {"version": VERSION, "format": form, "dtype": "uint8", "shape": list(images.shape), "sizes": sizes}
    try:
        text = json.dumps({**header, "prompts": prompts, "metadata": metadata}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"metadata that JSON cannot say: {error}") from None
    head, body = text.encode(), b"".join(parts)
    return PREAMBLE.pack(MAGIC, len(head), zlib.crc32(body, zlib.crc32(head))) + head + body


def unpack(
    data: bytes | bytearray, max_images: int, max_bytes: int, before: Callable[[int], object] = lambda size: None
) -> Request:
    """The request in those bytes, of at most `max_images` images or clips and `max_bytes` of pixels; else a `WireError`.

    Raw pixels of a bytearray stay where they are. PNGs take more: `before` is called with the bytes of their pixels before
    they are unpacked, and may raise.
    """
    if len(data) < PREAMBLE.size:
        raise WireError(f"{len(data)} bytes: too short for a request")
    magic, length, checksum = PREAMBLE.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"starts with {magic!r}, not {MAGIC!r}: not a request of this format")
    rest = memoryview(data)[PREAMBLE.size :]
    if length > len(rest):
        raise WireError(f"the header has {length} bytes, the request {len(rest)}: it was cut short")
    if zlib.crc32(rest) != checksum:
        raise WireError("the checksum differs: the request was damaged or cut short")
    header = _header(bytes(rest[:length]))
    shape, prompts, metadata = header["shape"], header["prompts"], header["metadata"]
    _check_counts(shape, prompts, metadata)
    if shape[0] > max_images:
        raise WireError(f"{shape[0]} images: at most {max_images} a request", 413)
    size = math.prod(shape)
    if size > max_bytes:
        raise WireError(f"{size} bytes of pixels: at most {max_bytes}", 413)
    body = rest[length:]
    if header["format"] == "raw":
        pixels = _raw(body, size)
    else:
        before(size)
        pixels = _pngs(body, header["sizes"], shape)
    return Request(torch.from_numpy(pixels.reshape(shape)), prompts, metadata)


def _header(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        header = json.loads(text.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict) or header.keys() != KEYS:
        found = sorted(header) if isinstance(header, dict) else type(header).__name__
        raise WireError(f"the header has {found}, expected {sorted(KEYS)}")
    for key, expected in (("version", (VERSION,)), ("dtype", ("uint8",)), ("format", FORMATS)):
        if header[key] not in expected or isinstance(header[key], bool):
            raise WireError(f"{key} = {header[key]!r}: expected {' or '.join(map(str, expected))}")
    return header


def _check_counts(shape: Any, prompts: Any, metadata: Any) -> None:
    """One prompt and one record an image, of a shape that images have."""
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not whole or len(shape) not in (4, 5) or shape[-3] != 3:
        raise WireError(f"shape = {shape!r}: expected (B, 3, H, W) or (B, T, 3, H, W), B at least 1")
    for name, items, kind in (("prompts", prompts, str), ("metadata", metadata, dict)):
        if not isinstance(items, list) or len(items) != shape[0]:
            count = len(items) if isinstance(items, list) else repr(items)
            raise WireError(f"{name}: {count} for {shape[0]} images, expected one each")
        if not all(isinstance(item, kind) for item in items):
            raise WireError(f"{name}: expected {'strings' if kind is str else 'objects'} only")


def _raw(body: memoryview, size: int) -> np.ndarray:
    if len(body) != size:
        raise WireError(f"{len(body)} bytes of pixels, the shape says {size}")
    pixels = np.frombuffer(body, np.uint8)
    return pixels if pixels.flags.writeable else pixels.copy()  # a tensor may be written to


def _png(image: np.ndarray) -> bytes:
    """(3, H, W) -> its file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _pngs(body: memoryview, sizes: Any, shape: list[int]) -> np.ndarray:
    """-> (images, 3, H, W)."""
    count = math.prod(shape[:-3])
    whole = isinstance(sizes, list) and len(sizes) == count and all(type(size) is int and size > 0 for size in sizes)
    if not whole or sum(sizes) != len(body):
        raise WireError(f"sizes: expected the bytes of each of {count} PNGs, {len(body)} in all")
    images, start = np.empty((count, *shape[-3:]), np.uint8), 0
    for i, size in enumerate(sizes):
        try:
            with Image.open(io.BytesIO(body[start : start + size]), formats=["PNG"]) as picture:
                # Before anything is unpacked: a small file may claim to be a huge picture.
                if picture.size != (shape[-1], shape[-2]) or picture.mode != "RGB":
                    raise WireError(f"PNG {i} is {picture.mode} {picture.size}, expected RGB {(shape[-1], shape[-2])}")
                images[i] = np.asarray(picture).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise error if isinstance(error, WireError) else WireError(f"PNG {i} cannot be read: {error}") from None
        start += size
    return images
