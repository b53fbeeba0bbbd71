"""From the file of a picture to its pixels: the one way in for every picture that a model is shown or trained on.

A picture is read as people see it. It is turned as its EXIF says, and what is transparent lies on white. 16 bits a channel
are scaled to 8, and CMYK goes through the file's own colour profile where it has one. Of an animation and of a file of
several pages `load_picture` reads the first picture and `load_pictures` all. RGB of 8 bits without an orientation keeps its
bits.

`load_image` of diffusers, with which the stock pipelines read a picture to edit, turns it too. But it shows the colours that
are hidden under transparency, clips 16-bit greys to white, and knows no profile.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, ImageSequence

MAX_BYTES = 2**29  # of a file: 89 million pixels, Pillow's limit, of 16-bit RGB without compression
TURNED = (5, 6, 7, 8)  # orientations in EXIF whose rows are the columns of the file
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def load_picture(path: Path) -> Image.Image:
    """The picture in a file, in RGB with 8 bits a channel.

    Raises ValueError, with the file's name, where there is no file, or one that is cut or damaged, too large, or whose
    pixels have no known white. `PIL.Image.MAX_IMAGE_PIXELS` and `MAX_BYTES` are the limits, looked at before anything is
    unpacked.
    """
    with _opened(path) as image:
        return _as_seen(image)


def load_pictures(path: Path) -> list[Image.Image]:
    """All pictures in a file in their order, as `load_picture` reads one: of an animation its frames, each as it is seen."""
    with _opened(path) as image:
        return [_as_seen(frame) for frame in ImageSequence.Iterator(image)]


def picture_count(path: Path) -> int:
    """How many pictures `load_pictures` reads, and ValueError as there; none of them is unpacked."""
    with _opened(path) as image:
        return getattr(image, "n_frames", 1)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture of a file, not unpacked yet. What goes wrong with it, inside too, is a ValueError with the file's name."""
    if not os.path.isfile(path):  # which is false of names too long for the system, where Path.is_file raises
        raise ValueError(f"{path}: no such file")
    if (size := os.path.getsize(path)) > MAX_BYTES:
        raise ValueError(f"{path}: has {size} bytes, more than {MAX_BYTES} (MAX_BYTES of {__name__}); save it smaller")
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(path) as image:
            if limit and image.width * image.height > limit:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: has more than {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS); scale it down") from None
    except Exception as error:  # the readers of Pillow raise whatever they meet in a damaged file
        raise ValueError(f"{path}: cannot be read ({error or type(error).__name__})") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of the picture that `load_picture` returns, read from the file's beginning alone."""
    with Image.open(path) as image:
        # Of a TIFF Pillow gives the size as it is seen.
        lies = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.height, image.width) if lies else image.size


def _as_seen(image: Image.Image) -> Image.Image:
    """The picture at which an opened file stands, upright and in RGB."""
    # Pillow gives greys of 16 bits from a PNG or PPM in 32, which elsewhere may mean anything.
    grey = image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))
    upright = ImageOps.exif_transpose(image)
    return _as_rgb(_from_16_bits(upright) if grey else upright)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, which say not what is white; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        # Pillow has no way from premultiplied grey to colours but through grey.
        straight = image.convert("LA") if image.mode == "La" else image
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None  # it is None only where the image is changed in place
        return converted
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greys from 0 to 65535 as greys from 0 to 255, with what a PNG names as transparent."""
    grey = np.asarray(image).astype(np.uint32)  # (H, W)
    scaled = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled
