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
from fastgrpo.models.lora_file import lora_files, read_lora
from fastgrpo.models.lora_formats import FORMATS
from fastgrpo.testing import FAMILIES, load_family

# Whose networks are those of another.
SAME = (
    "flux_kontext", "qwen_image_edit", "qwen_image_edit_plus", "flux2_klein", "wan_image", "wan_image_experts", "wan_video",
)  # fmt: skip
NAMES = [name for name in FAMILIES if name not in SAME]
CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"
# The transformers that no other program trains LoRAs of.
WITHOUT_NAMES = {"bagel": "BagelTransformer", "qwen_image_21": "QwenImage21Transformer2DModel"}
SECOND = {"weight_name": "pytorch_lora_weights_2.safetensors", "load_into_transformer_2": True}


def load(name: str, folder: Path):
    family = load_family(name)
    return load_model(family.model, path=folder, dtype=torch.float32, device=CPU, **family.settings)


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
        "output": str(run),
        "model": {"name": load_family(name).model, "path": str(base), "train": "full" if full else "lora"},
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
    out = export(folder, "diffusers", tmp_path / "out")
    for arguments in ({}, SECOND)[: len(stock.transformers)]:
        stock.pipeline.load_lora_weights(out, **arguments)
    assert torch.equal(images(name, stock), expected)
    assert (out / LORA).read_bytes() == (folder / LORA).read_bytes()


def test_peft_reads_the_lora(run, tmp_path: Path) -> None:
    name, base, folder, expected = run
    model = load(name, base)
    out = export(folder, "peft", tmp_path / "out")
    for network, transformer in model.transformers.items():  # it is put into them
        PeftModel.from_pretrained(transformer, out / network if len(model.transformers) > 1 else out)
    assert torch.equal(images(name, model), expected)


def test_comfyuis_and_kohyas_files_are_read_back_or_refused_by_name(run, tmp_path: Path, capsys) -> None:
    """What other programs make of them is in test_lora_formats."""
    name, base, folder, expected = run
    for form in FORMATS[2:]:
        if name in WITHOUT_NAMES:
            assert main(["export", str(folder), "--format", form, "--output", str(tmp_path / form)]) == 2
            assert f"no {form} format for {WITHOUT_NAMES[name]}" in capsys.readouterr().err and not list(tmp_path.iterdir())
            continue
        noises = ("_high_noise", "_low_noise") if name == "wan_experts" else ("",)
        files = [f"run{noise}.safetensors" for noise in noises]
        out = export(folder, form, tmp_path / form)
        assert sorted(file.name for file in out.iterdir()) == files
        networks, loras = load(name, base).transformers.values(), sorted(folder.glob("*.safetensors"))
        for network, lora, file in zip(networks, loras, files, strict=True):
            own, found = read_lora(lora, network), read_lora(out / file, network)
            assert found.layers.keys() == own.layers.keys()
            assert all(torch.equal(a, b) for n in own.layers for a, b in zip(found.layers[n], own.layers[n], strict=True))


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
    layers = read_lora(folder, next(iter(load(name, base).transformers.values()))).layers
    prefix = "language_model.model." if name == "bagel" else ""
    assert changed and changed <= {f"{prefix}{layer}.weight" for layer in layers}
    for layer, (a, b) in layers.items():
        expected = before[f"{prefix}{layer}.weight"].double() + b.double() @ a.double()
        torch.testing.assert_close(after[f"{prefix}{layer}.weight"].double(), expected, rtol=2**-8, atol=1e-6)
    assert (tmp_path / "out" / "transformer" / "config.json").is_file() == (name != "bagel")


@pytest.mark.parametrize("run", ["wan_experts"], indirect=True)
def test_of_two_experts_the_one_that_was_trained_is_written(run, tmp_path: Path) -> None:
    name, base, folder, _ = run
    low = Path(shutil.copytree(folder, tmp_path / "low"))
    (low / LORA).unlink()
    for form, expected in (
        ("diffusers", SECOND["weight_name"]), ("kohya", "low_low_noise.safetensors"),
        ("peft", "transformer_2/adapter_model.safetensors"), ("merged", "transformer_2/diffusion_pytorch_model.safetensors"),
    ):  # fmt: skip
        out = export(low, form, tmp_path / form)
        assert [one.relative_to(out).as_posix() for one in out.rglob("*.safetensors")] == [expected]


@pytest.mark.parametrize("run", ["wan_experts"], indirect=True)
def test_the_loras_of_two_experts_are_read_from_every_format(run, tmp_path: Path) -> None:
    """And both are known by content, so that a run does not go on from another second one."""
    name, base, folder, expected = run
    for form in FORMATS:
        out = export(folder, form, tmp_path / form)
        assert {one for one in out.rglob("*") if one.is_file()} == set(lora_files(out))
        model = load(name, base)
        model.load_trained(out)
        assert torch.equal(images(name, model), expected)
    low = load_model("wan", path=base, dtype=torch.float32, device=CPU, experts="low", **load_family(name).settings)
    with pytest.raises(ValueError, match=r"model\.experts = low: .*run_high_noise.safetensors is of the other expert"):
        low.continue_lora(tmp_path / "kohya", rank=4, alpha=4, reference="base")
    low.continue_lora(tmp_path / "kohya" / "run_low_noise.safetensors", rank=4, alpha=4, reference="base")
    high = tmp_path / "kohya" / "run_high_noise.safetensors"
    with pytest.raises(
        ValueError, match=r"run_high_noise.safetensors: holds no LoRA of the expert transformer; name a folder"
    ):
        load(name, base).load_trained(high)
    high.rename(high.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"kohya: holds no LoRA of the expert transformer; .* or train one expert"):
        load(name, base).continue_lora(tmp_path / "kohya", rank=4, alpha=4, reference="base")
    shutil.copy(high.with_name("other.safetensors"), tmp_path / "comfyui" / "their_low_noise.safetensors")
    with pytest.raises(ValueError, match=r"run_low_noise.* and their_low_noise.* are both of the expert transformer_2"):
        lora_files(tmp_path / "comfyui")


@pytest.mark.parametrize("run", ["sd3"], indirect=True)
def test_merged_are_the_files_that_the_run_has_read(run, tmp_path: Path, capsys) -> None:
    """Those of a variant, or of another transformer; one that is a file or quantised is refused."""
    name, base, folder, _ = run
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    plain, half = (f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "fp16.safetensors"))
    weights = load_file(file := moved / "transformer" / plain)
    save_file({n: one + 1 for n, one in weights.items()}, moved / "transformer" / half)
    other = Path(shutil.copytree(moved / "transformer", tmp_path / "other"))
    save_file({n: one + 2 for n, one in weights.items()}, other / plain)

    def merged(output: str, *settings: str) -> int:
        sets = [part for one in (f"model.path={moved}", *settings) for part in ("--set", one)]
        return main(["export", str(folder), "--format", "merged", "--output", str(tmp_path / output), *sets])

    layers = read_lora(folder, load(name, base).transformer).layers
    for shift, (written, *settings) in enumerate(
        ((plain,), (half, "model.variant=fp16"), (plain, f"model.transformer={other}"))
    ):
        assert merged(str(shift), *settings) == 0
        out = tmp_path / str(shift) / "transformer"
        assert sorted(one.name for one in out.iterdir()) == sorted(["config.json", written])
        after = load_file(out / written)
        changed = {n for n, one in weights.items() if not torch.equal(after[n], one + shift)}
        assert changed == {f"{layer}.weight" for layer in layers}
    assert merged("no", f"model.transformer={file}") == 2
    assert f"model.transformer = {file}: is one file, into which nothing is merged" in capsys.readouterr().err
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    assert merged("no", f"model.transformer={other}") == 2
    assert "quantised" in capsys.readouterr().err and not (tmp_path / "no").exists()


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
