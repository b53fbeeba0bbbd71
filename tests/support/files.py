"""Files of one picture in several forms."""

from pathlib import Path

from PIL import Image, ImageDraw


def seen_alike(folder: Path) -> tuple[Path, Path]:
    """A plain picture, and one that looks the same but is stored on its side, with colours hidden under its alpha."""
    plain = Image.new("RGB", (24, 16), "white")
    ImageDraw.Draw(plain).rectangle((0, 0, 9, 7), fill="red")
    hiding = Image.new("RGBA", plain.size, (0, 90, 0, 0))
    hiding.paste((255, 0, 0, 255), (0, 0, 10, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    plain.save(folder / "plain.png")
    hiding.transpose(Image.Transpose.ROTATE_90).save(folder / "hiding.png", exif=exif.tobytes())
    return folder / "plain.png", folder / "hiding.png"
