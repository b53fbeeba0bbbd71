"""A folder of images and captions: all of it is read, or what is not is named."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from fastgrpo.data.prompts import load_prompts


def picture(file: Path, caption: str | bytes | None = None) -> None:
    """A picture of any format, with the caption beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(file)
    if caption is not None:
        file.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)


def read(folder: Path) -> dict[str, str]:
    """The captions by the image's path in the folder, in their order."""
    prompts = load_prompts(folder, ("target",))
    assert list(prompts.places) == [record["target"] for record in prompts.metadata]
    names = [str(Path(record["target"]).relative_to(folder)) for record in prompts.metadata]
    return dict(zip(names, prompts.prompts, strict=True))


def test_every_format_that_pillow_reads_in_any_case_and_sub_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a.PNG", "b.jpeg", "c.bmp", "d.Tiff", "e.avif", "f.jp2", "g.ppm", "sub/deep/h.gif", "sub/i.x.webp", "z.ico"]
    for name in names:
        picture(tmp_path / name, f"of {name}\n")
    assert read(tmp_path) == {name: f"of {name}" for name in names}
    assert not caplog.records


def test_captions_are_texts_like_others(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", b"\xef\xbb\xbfun caf\xc3\xa9,\r\non two lines\r\n")
    (tmp_path / "a.txt").rename(tmp_path / "a.TXT")
    assert read(tmp_path) == {"a.png": "un café,\non two lines"}
    picture(tmp_path / "b.png", "caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt:1: byte 0xe9 is not UTF-8"):
        read(tmp_path)
    picture(tmp_path / "b.png", " \n")
    with pytest.raises(ValueError, match=r"b\.txt: is an empty caption"):
        read(tmp_path)


def test_what_is_left_out_is_named_once_with_its_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png", "a")
    picture(tmp_path / ".cache" / "thumb.png")
    for name in ("gone.txt", ".DS_Store", *(f"raw{i}.heic" for i in range(7))):
        (tmp_path / name).write_text("x")
    assert read(tmp_path) == {"a.png": "a"}
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING and f"{tmp_path}: images with captions: 1; left out: " in said
    assert "hidden: 2 (.DS_Store, .cache/thumb.png)" in said and "captions without an image: 1 (gone.txt)" in said
    assert "files of other kinds: 7 (raw0.heic, raw1.heic, raw2.heic, raw3.heic, raw4.heic, ...)" in said


def test_a_link_to_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "data" / "a.png", "a")
    picture(tmp_path / "elsewhere" / "b.png", "b")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert read(tmp_path / "data") == {"a.png": "a"}
    assert "links to folders: 1 (more)" in caplog.text


def test_what_is_ambiguous_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("x")
    with pytest.raises(ValueError, match=r"holds no images \(\.png.*; left out: files of other kinds: 1 \(a\.heic\)"):
        read(tmp_path)
    picture(tmp_path / "b.png", "b")
    picture(tmp_path / "c.png")
    picture(tmp_path / "sub" / "d.bmp")
    with pytest.raises(ValueError, match=r"c\.png: has no caption; write it to c\.txt .* 2 images have none: c\.png, sub/d"):
        read(tmp_path)
    for name in ("c.txt", "c.TXT", "sub/d.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"c\.txt: c\.TXT is a caption of the same name; remove one"):
        read(tmp_path)
    (tmp_path / "c.TXT").unlink()
    (tmp_path / "sub" / "d.bmp").write_bytes((tmp_path / "sub" / "d.bmp").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"sub/d\.bmp: .*cannot be read"):
        read(tmp_path)
