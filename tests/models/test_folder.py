"""The look at a weights' folder before anything heavy is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from fastgrpo.models.folder import check_folder
from fastgrpo.testing import load_family

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
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b""), r"vae/ holds no weights .*cut"),
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
