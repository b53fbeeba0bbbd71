"""Pixels of picture files, against what the file formats say a viewer shows."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastgrpo.data.images import load_targets
from fastgrpo.data.pictures import MAX_BYTES, load_picture, load_pictures, picture_count, picture_size

WHITE = [255, 255, 255]
# EXIF's orientation -> what was done to the pixels (H, W, 3) when they were stored, in the words of its standard: the 0th
# row and column of what is stored are these sides of what is seen.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,  # top, left
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.transpose(1, 0, 2),  # left, top
    6: lambda x: x[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda x: x[::-1].transpose(1, 0, 2),  # left, bottom
}


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3)"""
    picture = load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def noise(height: int = 5, width: int = 7, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(samples: np.ndarray, colour: int, transparent: bytes = b"") -> bytes:
    """A PNG of samples (H, W, channels) of 16 bits, by the standard and not by Pillow, which writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_of_8_bits_keeps_its_bits(form: str, tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a", form)
    assert np.array_equal(pixels(tmp_path / "a"), noise())


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_as_its_exif_says(orientation: int, form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](noise())))
    stored.save(tmp_path / "a", form, exif=exif.tobytes(), **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(pixels(tmp_path / "a"), noise()) and picture_size(tmp_path / "a") == (7, 5)


@pytest.mark.parametrize("orientation", STORED)
def test_a_16_bit_scan_is_turned_too(orientation: int, tmp_path: Path) -> None:
    grey = noise()[..., :1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](grey.astype(np.uint16) * 257)[..., 0])
    Image.fromarray(stored).save(tmp_path / "a", "PNG", exif=exif.tobytes())
    assert np.array_equal(pixels(tmp_path / "a"), grey.repeat(3, 2))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The colour (H, W, 3) over white, by the definition: alpha of it, and the rest white."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "TGA", "WEBP"])
def test_what_is_transparent_lies_on_white(form: str, tmp_path: Path) -> None:
    rgba = noise(channels=4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a", form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    found = pixels(tmp_path / "a")
    assert (found[0] == 255).all() and np.array_equal(found[1], rgba[1, :, :3])
    assert np.abs(found - over_white(rgba[..., :3], rgba[..., 3])).max() <= 1


def test_grey_with_alpha_and_one_transparent_grey_or_colour(tmp_path: Path) -> None:
    grey = noise(channels=2)
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    expected = over_white(grey[..., :1].repeat(3, 2), grey[..., 1])
    assert np.abs(pixels(tmp_path / "la.png") - expected).max() <= 1
    one = np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8)
    Image.fromarray(one).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "rgb.png").tolist() == [[[9, 9, 9], WHITE]]
    Image.fromarray(one[..., 0]).save(tmp_path / "l.png", transparency=9)
    assert pixels(tmp_path / "l.png").tolist() == [[WHITE, [1, 1, 1]]]


@pytest.mark.parametrize(("form", "transparency"), [("PNG", bytes([255, 0, 128])), ("PNG", 1), ("GIF", 1)])
def test_a_palette_with_transparency(form: str, transparency: bytes | int, tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "a", form, transparency=transparency)
    red, hidden, blue = pixels(tmp_path / "a")[0].tolist()
    assert red == [200, 0, 0] and hidden == WHITE
    assert blue == ([127, 127, 227] if isinstance(transparency, bytes) else [0, 0, 200])


def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[[0], [127], [257], [0x4000], [0x8080], [0xFF00], [0xFFFF]]], np.uint16)
    expected = np.rint(values / 65535 * 255)
    for name, samples, colour in (("grey", values, 0), ("rgb", values.repeat(3, 2), 2)):
        (tmp_path / name).write_bytes(png(samples, colour))
        # Pillow reads colours of 16 bits by their high byte, up to one level darker.
        assert np.abs(pixels(tmp_path / name) - expected).max() <= (0 if name == "grey" else 1)
    opaque, clear = np.full_like(values, 0xFFFF), np.zeros_like(values)
    for colour, channels in ((4, 1), (6, 3)):
        for alpha, seen in ((opaque, expected), (clear, np.full_like(expected, 255))):
            (tmp_path / "alpha").write_bytes(png(np.concatenate([values.repeat(channels, 2), alpha], 2), colour))
            assert np.abs(pixels(tmp_path / "alpha") - seen).max() <= 1
    (tmp_path / "key").write_bytes(png(values, 0, transparent=struct.pack(">H", 0x4000)))
    expected[0, 3] = 255
    assert np.array_equal(pixels(tmp_path / "key"), expected.repeat(3, 2))
    for form in ("TIFF", "PPM"):
        Image.fromarray(values[..., 0]).save(tmp_path / form, form)
        assert np.array_equal(pixels(tmp_path / form)[..., 0], np.rint(values[..., 0] / 257))


def test_numbers_without_a_known_white_are_refused(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif: cannot be read \(its pixels are 32-bit numbers"):
            load_picture(tmp_path / "a.tif")


def test_one_bit_grey_palette_and_the_first_frame(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    assert pixels(tmp_path / "one.png").tolist() == [[WHITE, [0, 0, 0]]]
    Image.new("L", (1, 1), 7).save(tmp_path / "grey.png")
    assert pixels(tmp_path / "grey.png").tolist() == [[[7, 7, 7]]]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        more = {"lossless": True} if form == "WEBP" else {}
        frames[0].save(tmp_path / "frames", form, save_all=True, append_images=frames[1:], **more)
        assert (pixels(tmp_path / "frames") == [255, 0, 0]).all(), form


def test_cmyk_without_a_profile_is_read_by_the_formula(tmp_path: Path) -> None:
    """R = (1 - C) (1 - K), and so on."""
    cmyk = noise(16, 16, channels=4)
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "a.tif")
    share = 1 - cmyk / 255
    assert np.abs(pixels(tmp_path / "a.tif") - 255 * share[..., :3] * share[..., 3:]).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    flat.save(tmp_path / "a.jpg", quality=95)  # with Adobe's mark, by which the values are stored inverted
    assert np.abs(pixels(tmp_path / "a.jpg") - [255, 0, 0]).max() <= 3


def test_cmyk_goes_through_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile of CMYK may be shipped here: what is looked at is that the file's own is what converts."""
    asked: list[bytes] = []

    def convert(image: Image.Image, profile: io.BytesIO, target: object, outputMode: str) -> Image.Image:
        asked.append(profile.read())
        return Image.new(outputMode, image.size, "teal")

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    Image.new("CMYK", (2, 2)).save(tmp_path / "a.jpg", icc_profile=b"the profile")
    assert pixels(tmp_path / "a.jpg")[0, 0].tolist() == [0, 128, 128] and asked == [b"the profile"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read"):
        load_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_a_cut_file_is_refused_by_name(form: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, form)
    for share in (0.02, 0.5, 0.9):
        (tmp_path / "cut").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
        with pytest.raises(ValueError, match=r"/cut: cannot be read"):
            load_picture(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"/none: no such file"):
        load_picture(tmp_path / "none")


@pytest.mark.parametrize("limit", [20, 34])  # Pillow itself warns above its limit and refuses above twice that
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_refused_with_the_limit(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise(7, 5)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    load_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit if limit == 34 else 10)
    with pytest.raises(ValueError, match=rf"a\.png: has more than {Image.MAX_IMAGE_PIXELS} pixels"):
        load_picture(tmp_path / "a.png")


def test_images_to_train_on_are_read_in_the_same_way(tmp_path: Path) -> None:
    rgba = noise(8, 8, channels=4)
    rgba[..., 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert (load_targets([{"target": str(tmp_path / "a.png")}], (8, 8)) == 255).all()


def test_a_file_of_too_many_bytes_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a file with a hole, which takes no space
    with pytest.raises(ValueError, match=rf"a\.png: has {MAX_BYTES + 1} bytes, more than {MAX_BYTES}"):
        load_picture(tmp_path / "a.png")


ANIMATED = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}


@pytest.mark.parametrize("form", ANIMATED)
def test_an_animation_is_read_frame_by_frame_as_it_is_seen(form: str, tmp_path: Path) -> None:
    """A frame that a file stores as what changed, and what is transparent in it, are whole pictures on white."""
    frames = [Image.new("RGBA", (9, 5), (0, 0, 0, 0)) for _ in range(4)]
    for i, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (i, 1, i + 3, 4))
    file = tmp_path / "moving"
    frames[0].save(file, form, save_all=True, append_images=frames[1:], disposal=2, **ANIMATED[form])
    assert picture_count(file) == 4
    expected = np.full((4, 5, 9, 3), 255, dtype=np.uint8)
    for i in range(4):
        expected[i, 1:4, i : i + 3] = [255, 0, 0]
    assert np.array_equal(np.stack([np.asarray(frame) for frame in load_pictures(file)]), expected)
    assert np.array_equal(pixels(file), expected[0])
    Image.fromarray(noise()).save(still := tmp_path / "still.png")
    assert picture_count(still) == 1 and np.array_equal(np.asarray(load_pictures(still)[0]), noise())


@pytest.mark.parametrize("read", [load_pictures, picture_count])
def test_an_animation_that_cannot_be_read_is_refused_by_name(read: Callable[[Path], object], tmp_path: Path) -> None:
    file = tmp_path / "cut.webp"
    with pytest.raises(ValueError, match=r"cut\.webp: no such file"):
        read(file)
    frames = [Image.fromarray(noise(seed=i)) for i in range(3)]
    frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.webp: cannot be read"):
        read(file)
