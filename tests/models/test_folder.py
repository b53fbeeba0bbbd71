"""The look at a weights' folder before anything heavy is loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgrpo.models import model_class
from fastgrpo.models.folder import check_folder, readable
from fastgrpo.testing import FAMILIES, load_family

KIND = "StableDiffusion3Pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"


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
    told = r"holds a StableDiffusion3Pipeline, and this model\.name reads a FluxPipeline: set model\.name to sd3$"
    with pytest.raises(ValueError, match=told):
        check_folder(folder, "FluxPipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match=r"holds a StableDiffusionXLPipeline, .* FluxPipeline: no model\.name reads that$"):
        check_folder(folder, "FluxPipeline")


def test_what_lies_at_a_path_in_place_of_a_pipeline_is_told(folder: Path, tmp_path: Path) -> None:
    load_family("bagel").save(tmp_path / "bagel")
    one = folder / "vae" / WEIGHTS
    for path, told in (
        (
            Path("black-forest-labs/FLUX.1-dev"),
            r"`hf download black-forest-labs/FLUX\.1-dev --local-dir models/FLUX\.1-dev`",
        ),
        (tmp_path / "nowhere", "there is no such folder$"),
        (tmp_path / "bagel", "holds BAGEL as published: set model.name to bagel"),
        (
            folder / "transformer",
            "holds a single network: name the whole pipeline's folder, and this one in model.transformer",
        ),
        (one, "is one file, .* this file in model.transformer"),
    ):
        with pytest.raises(ValueError, match=f"^model.path = {path}: .*{told}"):
            check_folder(path, KIND)


@pytest.mark.parametrize(
    ("part", "file"), [("vae", WEIGHTS), ("text_encoder", "model.safetensors"), ("transformer", WEIGHTS)]
)
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(part: str, file: str, folder: Path) -> None:
    """In every network, whichever library's: diffusers would leave it without a value, transformers make it up."""
    state = load_file(folder / part / file)
    name = sorted(name for name in state if name.endswith("weight"))[-1]
    save_file({key: tensor for key, tensor in state.items() if key != name}, folder / part / file)
    with pytest.raises(ValueError, match=rf"{part}/ lacks {name}, one of 1 missing tensors of a \w+ as its config\.json"):
        check_folder(folder, KIND)
    save_file(state | {name: torch.zeros(3, 1)}, folder / part / file)
    with pytest.raises(ValueError, match=rf"{part}/ holds {name} as \(3, 1\), where its config\.json makes it \(\d+,"):
        check_folder(folder, KIND)


def test_names_of_every_release_are_read(folder: Path, tmp_path: Path) -> None:
    """transformers 4 kept places among a CLIP's weights, and had two ways to name those of Qwen2.5-VL."""
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    check_folder(folder, KIND)
    load_family("qwen_image").save(tmp_path / "qwen")
    file = tmp_path / "qwen" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    check_folder(tmp_path / "qwen", "QwenImagePipeline")
    older = {re.sub("^model", "model.language_model", name): tensor for name, tensor in state.items()}
    other = {re.sub("^visual", "model.visual", name): tensor for name, tensor in older.items()}
    assert len(other.keys() - state.keys()) > len(state) - 2  # all but the last layer
    save_file(other, file)
    check_folder(tmp_path / "qwen", "QwenImagePipeline")
    name = max(name for name in state if name.startswith("visual."))
    save_file({key: tensor for key, tensor in state.items() if key != name}, file)
    with pytest.raises(ValueError, match=rf"text_encoder/ lacks model\.{name}, one of 1 missing"):
        check_folder(tmp_path / "qwen", "QwenImagePipeline")


def test_a_class_that_is_not_installed_and_a_config_of_something_else_are_told(folder: Path) -> None:
    index = folder / "model_index.json"
    whole = index.read_text()
    index.write_text(whole.replace("SD3Transformer2DModel", "SD9Transformer2DModel"))
    with pytest.raises(
        ValueError, match="transformer/ is a SD9Transformer2DModel of diffusers, .* `pip install -U diffusers`"
    ):
        check_folder(folder, KIND)
    index.write_text(whole)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": "two"}))
    with pytest.raises(ValueError, match=r"transformer/ has a config\.json that makes no network \(TypeError"):
        check_folder(folder, KIND)


def test_pickles_alone_are_said(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"vae/ has its weights as \.bin only"):
        check_folder(folder, KIND)


def test_a_gguf_in_place_of_the_weights_is_told(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer" / "q4.gguf")
    with pytest.raises(
        ValueError, match=r"transformer/ holds no weights .*, but q4\.gguf: set model\.transformer to that file"
    ):
        check_folder(folder, KIND)


@pytest.mark.parametrize(
    ("key", "value"), [("stochastic_sampling", True), ("num_train_timesteps", 500), ("invert_sigmas", True)]
)
def test_a_schedule_that_would_be_ignored_is_refused(key: str, value: object, folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"scheduler/scheduler_config\.json says {key} = {value}; noise levels here are"):
        check_folder(folder, KIND)


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
