"""A folder of images, each with its caption in a .txt of the same name beside it; sub-folders are read too.

What is in the folder and not read is said: hidden files and folders, captions without an image, and files of other kinds.
"""

import functools
import logging
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fastgrpo.files import inside
from fastgrpo.text_files import read_text

LOG = logging.getLogger(__name__)
ALLOW_OUTSIDE = "put a copy beside the others, or set prompts.images_outside: true where that is meant"
SHOWN = 5  # names of files in a message


def captioned_images(folder: Path, links_out: bool = False) -> list[tuple[Path, str]]:
    """The images with their captions, in the order of their paths. ValueError: no images, or one without a caption.

    links_out: read captions that are links to files outside of the folder. Whose pictures are read sees to theirs.
    """
    images, captions, left_out = _sorted_out(folder)
    if not images:
        kinds = ".png, .jpg, .webp and whatever else Pillow reads"
        raise ValueError(f"{folder}: holds no images ({kinds}){_said(left_out, folder)}")
    without = [file for file in images if _stem(file) not in captions]
    if without:
        more = f"; {len(without)} images have none: {_names(without, folder)}" if len(without) > 1 else ""
        raise ValueError(f"{without[0]}: has no caption; write it to {without[0].stem}.txt beside it{more}")
    for caption in (captions[_stem(file)] for file in images):
        if not links_out and not inside(caption, folder):
            raise ValueError(f"{caption}: leads out of {folder}, to {caption.resolve()}; {ALLOW_OUTSIDE}")
    read = [(file, _caption(captions[_stem(file)])) for file in images]
    used = {_stem(file) for file in images}
    left_out["captions without an image"] = [file for stem, file in captions.items() if stem not in used]
    if any(left_out.values()):
        LOG.warning("%s: images with captions: %d%s", folder, len(read), _said(left_out, folder))
    return read


@functools.cache
def suffixes() -> frozenset[str]:
    """Those of every format that Pillow reads, in small letters."""
    formats = Image.registered_extensions()  # which loads all formats
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN)


def _sorted_out(folder: Path) -> tuple[list[Path], dict[Path, Path], dict[str, list[Path]]]:
    """The images, the captions by path without suffix, and what is neither, by what it is."""
    images: list[Path] = []
    captions: dict[Path, Path] = {}
    left_out: dict[str, list[Path]] = {"hidden": [], "links to folders": [], "files of other kinds": []}
    for file in sorted(folder.rglob("*")):
        suffix = file.suffix.lower()
        if file.is_dir():
            if file.is_symlink():
                left_out["links to folders"].append(file)
        elif any(part.startswith(".") for part in file.relative_to(folder).parts):
            left_out["hidden"].append(file)
        elif suffix in suffixes():
            images.append(file)
        elif suffix != ".txt":
            left_out["files of other kinds"].append(file)
        elif captions.setdefault(_stem(file), file) != file:
            raise ValueError(f"{file}: {captions[_stem(file)].name} is a caption of the same name; remove one of them")
    return images, captions, left_out


def _stem(file: Path) -> Path:
    return file.with_suffix("")


def _caption(file: Path) -> str:
    caption = read_text(file).strip()
    if not caption:
        raise ValueError(f'{file}: is an empty caption; write a text, or list the images in a .jsonl with "prompt": ""')
    return caption


def _said(left_out: dict[str, list[Path]], folder: Path) -> str:
    """What is left out, to end a sentence with; nothing where that is nothing."""
    said = [f"{what}: {len(files)} ({_names(files, folder)})" for what, files in left_out.items() if files]
    return f"; left out: {'; '.join(said)}" if said else ""


def _names(files: Iterable[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
