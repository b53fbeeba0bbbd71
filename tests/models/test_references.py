"""What a prompt becomes, against recordings made with the libraries that the published weights were used with first.

The stock pipeline of today cannot show where the libraries beneath it changed: it would have changed with them. The folders
in references/ are of the form in which weights were published then; see references/record.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.formula import formula_weights
from support.reference_prompts import PROMPTS, edited_image

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models import load_model, model_class
from fastgrpo.testing import load_family

REFERENCES = Path(__file__).parent / "references"
RECORDED = sorted(file.parent.name for file in REFERENCES.glob("*/outputs.safetensors"))


def published(name: str, folder: Path) -> Path:
    """The tiny pipeline of a family, its readers of prompts as they were recorded."""
    load_family(name).save(folder)
    for part in (REFERENCES / name).iterdir():
        if part.is_dir():
            shutil.rmtree(folder / part.name)
            shutil.copytree(part, folder / part.name)
    for part, shapes in json.loads((REFERENCES / name / "weights.json").read_text(encoding="utf-8")).items():
        weights = {key: torch.from_numpy(array) for key, array in formula_weights(shapes).items()}
        save_file(weights, folder / part / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", RECORDED)
def test_prompts_are_read_as_when_the_weights_came_out(name: str, tmp_path: Path) -> None:
    family = load_family(name)
    settings = family.settings | {"height": 16, "width": 24}
    if "input_size" in model_class(name).takes:
        settings["input_size"] = "output"  # which is the recorded image's own
    model = load_model(
        name, path=published(name, tmp_path / name), dtype=torch.float32, device=torch.device("cpu"), **settings
    )
    edited_image().save(tmp_path / "image.png")
    recorded = load_file(REFERENCES / name / "outputs.safetensors")
    for i, text in enumerate(PROMPTS):
        prompt = ImagePrompt(text, (tmp_path / "image.png",)) if model.image_conditioned else text
        found = model.encode([prompt])._asdict()
        for key, expected in ((key.partition(".")[2], value) for key, value in recorded.items() if key[0] == str(i)):
            length = expected.shape[1]
            torch.testing.assert_close(found[key][:, :length], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
            # What follows in a batch of one length is padding.
            if "mask" in found:
                assert found["mask"].sum() == length
            elif "length" in found:
                assert found["length"].item() == length
            else:
                assert found[key].shape == expected.shape


def test_the_recordings_are_of_other_prompts_and_of_old_libraries() -> None:
    assert RECORDED == ["flux", "flux2", "flux2_klein", "qwen_image", "qwen_image_edit", "sd3", "wan", "z_image"]
    for name in RECORDED:
        recorded = load_file(REFERENCES / name / "outputs.safetensors")
        one, other = recorded["0.embeds"][0], recorded["1.embeds"][0]
        length = min(len(one), len(other))
        assert one.isfinite().all() and (one[:length] - other[:length]).abs().max() > 0.1 * one.abs().max()
