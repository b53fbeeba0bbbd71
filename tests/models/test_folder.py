"""The look at a weights' folder before anything heavy is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from fastgrpo.models import model_class
from fastgrpo.models.folder import check_folder, readable
from fastgrpo.testing import FAMILIES, load_family

KIND = "StableDiffusion3Pipeline"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "sd3"
    load_family("sd3").save(folder)
    return folder


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "sd3"))


def test_a_complete_folder_passes(folder: Path) -> None:
    check_folder(folder, KIND)


def test_shards_are_looked_for(folder: Path) -> None:
    part = folder / "transformer"
    weights = part / "diffusion_pytorch_model.safetensors"
    weights.rename(part / "diffusion_pytorch_model-00001-of-00002.safetensors")
    names = {f"w{i}": f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model-00002-of-00002\.safetensors is missing"):
        check_folder(folder, KIND)
    shutil.copy(part / names["w1"], part / names["w2"])
    check_folder(folder, KIND)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "holds no model_index.json"),
        (lambda f: shutil.rmtree(f / "text_encoder_3"), r"text_encoder_3/ with its T5EncoderModel is missing"),
        (lambda f: (f / "vae" / "config.json").unlink(), r"vae/config\.json is missing"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), r"vae/ holds no weights"),
        (
            lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b""),
            r"vae/diff.* is an empty file.*cut",
        ),
    ],
)
def test_what_is_missing_is_named(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_folder(folder, KIND)


def test_another_family_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a StableDiffusion3Pipeline, and this model\.name reads a FluxPipeline"):
        check_folder(folder, "FluxPipeline")


def test_a_part_that_is_left_out_on_purpose_is_no_error(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    check_folder(folder, KIND)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4711\n".encode()
CUT = "was the download cut"
NOT_WHOLE = "(is no file of safetensors|must have|is not JSON)"
# What a download leaves that went wrong, and the words in which it is told.
SPOILED = {
    "pointer": (lambda content: POINTER, "is a pointer of git-lfs and not the file itself: run `git lfs pull` in "),
    "half": (lambda content: content[: len(content) // 2], f"{NOT_WHOLE}.* {CUT}"),
    "one byte less": (lambda content: (content.rstrip() if content[:1] == b"{" else content)[:-1], f"{NOT_WHOLE}.* {CUT}"),
    "empty": (lambda content: b"", f"empty.* {CUT}"),
    "page of an error": (lambda content: b"<html>404</html>", NOT_WHOLE),
}


def files_of(folder: Path) -> list[Path]:
    """Those that a model is read from; not the settings of generating text, which no pipeline reads."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".safetensors", ".json")]
    return [file for file in files if file.name != "generation_config.json"]


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_file_of_every_family_is_looked_at(name: str, how: str, tmp_path: Path) -> None:
    """Weights of every part, tokenizers and processors, configs and the index: one line with the file's name."""
    load_family(name).save(tmp_path)
    check = model_class(load_family(name).model).check_files
    check(tmp_path)
    spoil, message = SPOILED[how]
    files = files_of(tmp_path)
    assert len(files) > 3
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(spoil(whole))
        name = file.name
        with pytest.raises(ValueError, match=f"^model.path = {tmp_path}: .*({name}.*{message}|{name} missing or empty)"):
            check(tmp_path)
        file.write_bytes(whole)


@pytest.mark.parametrize("how", ["pointer", "half"])
def test_every_shard_is_looked_at(how: str, folder: Path) -> None:
    part = folder / "text_encoder"
    whole = (part / "model.safetensors").read_bytes()
    (part / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names:
        (part / name).write_bytes(whole)
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("abc", names, strict=True))}))
    check_folder(folder, KIND)
    (part / names[2]).write_bytes(SPOILED[how][0](whole))
    with pytest.raises(ValueError, match=f"text_encoder/{names[2]} .*{SPOILED[how][1]}"):
        check_folder(folder, KIND)
    (part / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text_encoder/model\.safetensors\.index\.json has no weight_map"):
        check_folder(folder, KIND)


def test_what_may_not_be_read_is_named() -> None:
    told = r"^model\.path = w: w/vae cannot be read \(Permission denied\)$"
    with pytest.raises(ValueError, match=told), readable("model.path = w"):
        raise PermissionError(13, "Permission denied", "w/vae")
