"""What `fastgrpo export` writes of every family, by readers that are not ours: diffusers, PEFT, the classes of the base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.drawing import drawn
from torch import Tensor

from fastgrpo.commands.cli import main
from fastgrpo.models import load_model
from fastgrpo.models.lora_file import read_lora
from fastgrpo.models.lora_formats import FORMATS
from fastgrpo.testing import FAMILIES, load_family

OF_THE_SAME_NETWORKS = ("flux_kontext", "qwen_image_edit", "flux2_klein", "wan_video")  # as others
NAMES = [name for name in FAMILIES if name not in OF_THE_SAME_NETWORKS]
CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"


def load(name: str, folder: Path):
    return load_model(name, path=folder, dtype=torch.float32, device=CPU, **load_family(name).settings)


def images(name: str, model) -> Tensor:
    return drawn(model, load_family(name).prompts, num_steps=2, guidance_scale=1.0)


def written_run(name: str, base: Path, run: Path, full: bool = False) -> Tensor:
    """A run's folder with trained weights that have an effect; the images of the model that it trained."""
    model = load(name, base)
    torch.manual_seed(1)
    if full:
        model.train_all(keep_reference=False)
    else:
        model.add_lora(rank=4, alpha=8)
    trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * (0.05 if full else 0.3))
    run.mkdir(parents=True)
    model.save_trained(run, {n: p.detach().clone() for n, p in trained.items()})
    (run / "config.yaml").write_text(json.dumps({
        "output": str(run), "model": {"name": name, "path": str(base), "train": "full" if full else "lora"},
        "prompts": {"train": "/a.txt", "eval": "/b.txt"},
        "reward": {"train": "jpeg_compressibility", "eval": "jpeg_compressibility"},
    }))  # fmt: skip
    return images(name, model)


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Tensor]:
    """Of each family: its name, the base, a run with a LoRA, and the trained model's images."""
    folder = tmp_path_factory.mktemp(request.param)
    load_family(request.param).save(folder / "base")
    return request.param, folder / "base", folder / "run", written_run(request.param, folder / "base", folder / "run")


def export(run: Path, form: str, output: Path) -> Path:
    assert main(["export", str(run), "--format", form, "--output", str(output)]) == 0
    return output


def nearly(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected.float()).abs().max() <= 1)


def test_the_stock_pipeline_reads_the_lora(run, tmp_path: Path) -> None:
    name, base, folder, expected = run
    stock = load(name, base)
    stock.pipeline.load_lora_weights(export(folder, "diffusers", tmp_path / "out"))
    assert torch.equal(images(name, stock), expected)
    assert (tmp_path / "out" / LORA).read_bytes() == (folder / LORA).read_bytes()


def test_peft_reads_the_lora(run, tmp_path: Path) -> None:
    name, base, folder, expected = run
    model = load(name, base)
    PeftModel.from_pretrained(model.transformer, export(folder, "peft", tmp_path / "out"))  # puts it into the transformer
    assert torch.equal(images(name, model), expected)


def test_comfyuis_and_kohyas_files_are_read_back_or_refused_by_name(run, tmp_path: Path, capsys) -> None:
    """What other programs make of them is in test_lora_formats."""
    name, base, folder, expected = run
    for form in FORMATS[2:]:
        if name == "bagel":
            assert main(["export", str(folder), "--format", form, "--output", str(tmp_path / form)]) == 2
            assert f"no {form} format for BagelTransformer" in capsys.readouterr().err and not list(tmp_path.iterdir())
            continue
        network = load(name, base).transformer
        own, found = read_lora(folder, network), read_lora(export(folder, form, tmp_path / form), network)
        assert found.layers.keys() == own.layers.keys()
        assert all(torch.equal(a, b) for n in own.layers for a, b in zip(found.layers[n], own.layers[n], strict=True))
        assert [file.name for file in (tmp_path / form).iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("full", [False, True])
def test_merged_files_take_the_place_of_the_bases(run, full: bool, tmp_path: Path) -> None:
    name, base, folder, expected = run
    if full:
        folder = tmp_path / "full"
        expected = written_run(name, base, folder, full=True)
    merged = export(folder, "merged", tmp_path / "merged")
    before = images(name, load(name, base))
    for file in (one for one in base.rglob("*") if one.is_file() and not (merged / one.relative_to(base)).exists()):
        target = merged / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    found = images(name, load(name, merged))
    assert nearly(found, expected) and not torch.equal(found, before)


def shards_of(file: Path, weights: dict[str, Tensor]) -> list[Path]:
    """The file's content in two files with an index, as `save_pretrained` writes large ones."""
    names, notes = list(weights), {"format": "pt", "of": "the base"}
    files = [file.with_name(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    index = {name: files[n % 2].name for n, name in enumerate(names)}
    for shard in files:
        save_file({name: weights[name] for name in names if index[name] == shard.name}, shard, metadata=notes)
    file.unlink()
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return files


def test_the_bases_files_dtype_and_other_weights_stay(run, tmp_path: Path) -> None:
    """BAGEL's file also holds what nothing here reads."""
    name, base, folder, _ = run
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    file = moved / ("ema.safetensors" if name == "bagel" else "transformer/diffusion_pytorch_model.safetensors")
    before = {n: one.bfloat16() for n, one in load_file(file).items()}
    if name == "bagel":
        save_file(before, file, metadata={"of": "the base"})
    files = [file] if name == "bagel" else shards_of(file, before)
    arguments = ["--format", "merged", "--output", str(tmp_path / "out"), "--set", f"model.path={moved}"]
    assert main(["export", str(folder), *arguments]) == 0
    after = {}
    for shard in (tmp_path / "out" / one.relative_to(moved) for one in files):
        after |= load_file(shard)
        with safe_open(shard, "pt") as opened:
            assert opened.metadata()["of"] == "the base"
    assert after.keys() == before.keys() and all(one.dtype == torch.bfloat16 for one in after.values())
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    layers = read_lora(folder, load(name, base).transformer).layers
    prefix = "language_model.model." if name == "bagel" else ""
    assert changed and changed <= {f"{prefix}{layer}.weight" for layer in layers}
    for layer, (a, b) in layers.items():
        expected = before[f"{prefix}{layer}.weight"].double() + b.double() @ a.double()
        torch.testing.assert_close(after[f"{prefix}{layer}.weight"].double(), expected, rtol=2**-8, atol=1e-6)
    assert (tmp_path / "out" / "transformer" / "config.json").is_file() == (name != "bagel")


@pytest.mark.parametrize("run", ["sd3"], indirect=True)
def test_what_cannot_be_written_is_refused(run, tmp_path: Path, capsys) -> None:
    name, base, folder, _ = run
    command = ["export", str(folder), "--format", "peft", "--output", str(tmp_path)]
    assert main(command) == 2 and "is there already; name a new folder" in capsys.readouterr().err
    written_run(name, base, tmp_path / "full", full=True)
    command = ["export", str(tmp_path / "full"), "--format", "peft", "--output", str(tmp_path / "out")]
    assert main(command) == 2 and "trained every weight and has no LoRA; take merged" in capsys.readouterr().err
    assert main(["export", str(base), "--format", "peft", "--output", str(tmp_path / "out")]) == 2
    assert "not the folder of a run" in capsys.readouterr().err and not (tmp_path / "out").exists()
