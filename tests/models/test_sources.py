"""A transformer from elsewhere: folders, files of other programs, quantised ones, and whole runs that start from them."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.drawing import drawn
from support.runs import ForkServer, rows
from support.tiny_model import TINY_WEIGHTS
from torch import Tensor

from fastgrpo.models import load_model, model_class
from fastgrpo.testing import load_family

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = ["evaluation.every=0", "evaluation.images=2", "evaluation.images_between=2", "evaluation.samples=2"]
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pipelines")
    for name in ("sd3", "wan", "z_image"):
        load_family(name).save(base / name)
    return {name: base / name for name in ("sd3", "wan", "z_image")}


def images(name: str, folder: Path, dtype: torch.dtype = torch.float32, **base) -> Tensor:
    family = load_family(name)
    model = load_model(name, path=folder, dtype=dtype, device=CPU, **base, **family.settings)
    return drawn(model, family.prompts[:1], num_steps=2, guidance_scale=1.0)


def without_weights(folder: Path, copy: Path) -> Path:
    """A copy in which only the transformer's config is left of it, as a download that leaves the large files out."""
    shutil.copytree(folder, copy)
    (copy / "transformer" / WEIGHTS).unlink()
    return copy


def in_wans_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Wan's own code names its weights, with the prefix of ComfyUI's checkpoints."""
    rules = (
        (r"condition_embedder\.(time|text)_embedder\.linear_([12])", lambda m: f"{m[1]}_embedding.{2 * int(m[2]) - 2}"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
        (r"scale_shift_table", "modulation"),
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"norm([23])", lambda m: f"norm{5 - int(m[1])}"),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[f"model.diffusion_model.{name}"] = tensor
    return renamed


def in_z_images_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Z-Image's own code names its weights, with queries, keys and values in one."""
    renamed = {}
    for name, tensor in state.items():
        if ".to_q.weight" in name:
            qkv = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            renamed[name.replace("to_q", "qkv")] = torch.cat(qkv)
        elif ".to_k." not in name and ".to_v." not in name:
            name = name.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
            renamed[name.replace("all_final_layer.2-1", "final_layer").replace("all_x_embedder.2-1", "x_embedder")] = tensor
    return renamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "renamed"), [("sd3", dict), ("wan", in_wans_names), ("z_image", in_z_images_names)])
def test_the_same_weights_draw_the_same_images_from_wherever_they_are_read(
    name: str, renamed, dtype: torch.dtype, folders, tmp_path: Path
) -> None:
    """From the pipeline, from a folder, and from one file under whichever names; Wan keeps layers in float32."""
    part = folders[name] / "transformer"
    state = load_file(part / WEIGHTS)
    save_file({key: tensor.contiguous() for key, tensor in renamed(state).items()}, tmp_path / "one.safetensors")
    bare = without_weights(folders[name], tmp_path / "bare")
    expected = images(name, folders[name], dtype)
    assert torch.equal(images(name, bare, dtype, transformer=part), expected)
    assert torch.equal(images(name, bare, dtype, transformer=tmp_path / "one.safetensors"), expected)
    save_file({key: tensor + 0.1 for key, tensor in state.items()}, tmp_path / "other.safetensors")
    assert not torch.equal(images(name, bare, dtype, transformer=tmp_path / "other.safetensors"), expected)


def test_what_a_full_fine_tuning_wrote_is_the_base_of_another_run(folders, tmp_path: Path) -> None:
    family = load_family("sd3")
    model = load_model("sd3", path=folders["sd3"], dtype=torch.float32, device=CPU, **family.settings)
    model.train_all(keep_reference=False)
    torch.manual_seed(1)
    trained = {name: p.detach() + torch.randn_like(p) * 0.05 for name, p in model.transformer.named_parameters()}
    model.save_trained(tmp_path, trained)
    model.load_trained(tmp_path)
    expected = drawn(model, family.prompts[:1], num_steps=2, guidance_scale=1.0)
    assert torch.equal(images("sd3", folders["sd3"], transformer=tmp_path / "transformer"), expected)
    assert not torch.equal(images("sd3", folders["sd3"]), expected)


def test_a_variant_is_read_where_a_part_has_it(folders, tmp_path: Path) -> None:
    """Beside the plain weights, which are others then; and a part without it is read as it is."""
    mixed = Path(shutil.copytree(folders["sd3"], tmp_path / "mixed"))
    plain = mixed / "transformer" / WEIGHTS
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    save_file({key: tensor + 0.1 for key, tensor in load_file(plain).items()}, plain)
    expected = images("sd3", folders["sd3"])
    assert torch.equal(images("sd3", mixed, variant="fp16"), expected)
    assert not torch.equal(images("sd3", mixed), expected)
    plain.unlink()
    with pytest.raises(ValueError, match=r"transformer/ holds weights of the variant fp16 only: set model\.variant to fp16"):
        images("sd3", mixed)
    with pytest.raises(ValueError, match=r"model\.variant = 'bf16': no part of .* has weights of that variant"):
        images("sd3", folders["sd3"], variant="bf16")


def write_gguf(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Writes matrices in 8 bits, with a scale for each 32 numbers, and returns the numbers that they stand for."""
    import gguf

    writer, kind = gguf.GGUFWriter(str(file), "x"), gguf.GGMLQuantizationType.Q8_0
    exact = {}
    for name, tensor in state.items():
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            exact[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
        else:
            writer.add_tensor(name, tensor.numpy())
            exact[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@needs_gguf
def test_a_gguf_draws_as_the_numbers_that_it_stands_for(folders, tmp_path: Path) -> None:
    exact = write_gguf(load_file(folders["sd3"] / "transformer" / WEIGHTS), tmp_path / "q8.gguf")
    save_file(exact, tmp_path / "exact.safetensors")
    found, expected = (
        images("sd3", folders["sd3"], transformer=tmp_path / name) for name in ("q8.gguf", "exact.safetensors")
    )
    assert (found.int() - expected.int()).abs().max() <= 1


@needs_gguf
def test_what_a_quantised_base_cannot_do_is_refused(folders, tmp_path: Path) -> None:
    write_gguf(load_file(folders["sd3"] / "transformer" / WEIGHTS), tmp_path / "q8.gguf")
    settings = load_family("sd3").settings
    model = load_model(
        "sd3", path=folders["sd3"], transformer=tmp_path / "q8.gguf", dtype=torch.float32, device=CPU, **settings
    )
    with pytest.raises(
        ValueError, match=r"model\.train = 'full': the transformer's weights are quantised \(gguf\); take lora"
    ):
        model.train_all(keep_reference=False)
    with pytest.raises(ValueError, match=r"rollout\.precision = 'fp8': .* quantised \(gguf\); take model"):
        model.prepare_drafts()
    with pytest.raises(ValueError, match=r"model\.compile = true: .* quantised \(gguf\); take false"):
        model.compile()


def missing(state: dict) -> None:
    state.pop("proj_out.weight")


def misshapen(state: dict) -> None:
    state["proj_out.weight"] = torch.zeros(3, 5)


def scaled(state: dict) -> None:
    state["proj_out.weight"] = state["proj_out.weight"].to(torch.float8_e4m3fn)
    state["proj_out.weight_scale"] = torch.ones(1)


REFUSED = [
    (missing, r"lacks proj_out\.weight, one of 1 missing tensors of a SD3Transformer2DModel"),
    (misshapen, r"holds proj_out\.weight as \(3, 5\), where its config\.json makes it \(\d+, \d+\)"),
    (scaled, r"holds weights of 8 bits with their scales \(proj_out\.weight_scale\), .* take the weights in bfloat16"),
    (dict.clear, "(lacks|holds no weights)"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_weights_that_do_not_fit_are_refused_wherever_they_lie(spoil, message: str, folders, tmp_path: Path) -> None:
    """In the pipeline's folder, in a folder beside it, and in one file; no weights are read."""
    check = model_class("sd3").check_files
    spoiled = Path(shutil.copytree(folders["sd3"], tmp_path / "sd3"))
    state = load_file(spoiled / "transformer" / WEIGHTS)
    spoil(state)
    save_file(state, spoiled / "transformer" / WEIGHTS)
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=rf"^model\.path = {spoiled}: transformer/ {message}"):
        check(spoiled)
    with pytest.raises(ValueError, match=rf"^model\.transformer = {spoiled}/transformer: {message}"):
        check(folders["sd3"], transformer=spoiled / "transformer")
    with pytest.raises(ValueError, match=rf"^model\.transformer = {tmp_path}/one\.safetensors: {message}"):
        check(folders["sd3"], transformer=tmp_path / "one.safetensors")


def named(file: Path, content: bytes = b"x" * 100) -> Path:
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda t, f: t / "nowhere", "there is no such folder or file"),
        (lambda t, f: named(t / "a.ckpt"), r"is no \.safetensors or \.gguf file"),
        (lambda t, f: named(t / "a.safetensors"), r"a\.safetensors is no file of safetensors"),
        (lambda t, f: f["sd3"], r"holds no config\.json; name .*sd3/transformer"),
        (lambda t, f: f["wan"] / "transformer", "holds a WanTransformer3DModel, and the pipeline's transformer is a SD3Tr"),
        (lambda t, f: f["wan"] / "transformer" / WEIGHTS, "holds no weights of a SD3Transformer2DModel"),
        pytest.param(lambda t, f: named(t / "a.gguf"), r"a\.gguf is no file of GGUF", marks=needs_gguf),
    ],
)
def test_what_is_no_transformer_of_the_pipeline_is_refused(source, message: str, folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^model\.transformer = .*{message}"):
        model_class("sd3").check_files(folders["sd3"], transformer=source(tmp_path, folders))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "quanto"}, "is quantised by quanto: `pip install optimum-quanto`"),
        ({"load_in_4bit": True}, "is quantised by bitsandbytes"),
        (
            {"quant_method": "gguf"},
            r"was made of a \.gguf, which is read from that file alone: set model\.transformer to it",
        ),
        ({"quant_method": "modelopt"}, "is quantised by modelopt; take one by torchao, bitsandbytes, quanto, gguf, or the"),
    ],
)
def test_a_quantised_folder_is_refused_where_it_cannot_be_read(section: dict, message: str, folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "sd3"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": section}))
    with pytest.raises(ValueError, match=f"transformer/ {message}"):
        model_class("sd3").check_files(folder)


@pytest.mark.processes
def test_a_whole_run_from_the_same_weights_elsewhere_is_the_same_run(tmp_path: Path, fork_server: ForkServer) -> None:
    """Trained, stopped, gone on with after the weights were moved, and sampled; other weights under the name are refused."""
    bare = without_weights(TINY_WEIGHTS, tmp_path / "bare")
    one = Path(shutil.copy(TINY_WEIGHTS / "transformer" / WEIGHTS, tmp_path / "one.safetensors"))
    os.rename(bare / "vae" / WEIGHTS, bare / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    sources = {
        "plain": [],
        "one": [f"model.path={bare}", "model.variant=fp16", f"model.transformer={one}"],
    }
    for name, settings in sources.items():
        fork_server.train(tmp_path / name, "iterations=2", *SHORT, *settings)
        assert rows(tmp_path / name) == rows(tmp_path / "plain") != []
        picture = tmp_path / f"{name}.png"
        fork_server.run("sample", str(tmp_path / name), "--prompt", "a red circle", "--output", str(picture))
        assert picture.read_bytes() == (tmp_path / "plain.png").read_bytes()
    moved = one.rename(tmp_path / "moved.safetensors")
    more = [*sources["one"][:2], f"model.transformer={moved}", *SHORT]
    fork_server.train(tmp_path / "one", "iterations=3", *more)
    save_file({key: tensor + 0.01 for key, tensor in load_file(moved).items()}, moved)
    printed = fork_server.train(tmp_path / "one", "iterations=4", *more, status=2)
    assert "another content of model.transformer" in printed


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_folder_of_torchao_is_trained_beside(folders, tmp_path: Path) -> None:
    """Whole numbers of 8 bits: nearly the images of the plain weights, and gradients for the LoRA alone."""
    from diffusers import SD3Transformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    packed = TorchAoConfig(Int8WeightOnlyConfig())
    part = folders["sd3"] / "transformer"
    SD3Transformer2DModel.from_pretrained(part, quantization_config=packed, dtype=torch.bfloat16).save_pretrained(tmp_path)
    found, expected = (images("sd3", folders["sd3"], torch.bfloat16, **b) for b in ({"transformer": tmp_path}, {}))
    assert (found.int() - expected.int()).abs().float().mean() < 3
    settings = load_family("sd3").settings
    model = load_model("sd3", path=folders["sd3"], transformer=tmp_path, dtype=torch.bfloat16, device=CPU, **settings)
    model.add_lora(rank=4, alpha=4)
    x = torch.randn(2, *model.latent_shape, dtype=torch.bfloat16)
    model.velocity(x, torch.tensor([0.5, 0.6]), model.encode(["a", "b"])).float().pow(2).sum().backward()
    trained = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.bfloat16 for name, p in trained.items())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


@needs_gguf
@pytest.mark.processes
def test_a_whole_run_from_a_gguf_is_that_of_its_numbers(tmp_path: Path, fork_server: ForkServer) -> None:
    save_file(
        write_gguf(load_file(TINY_WEIGHTS / "transformer" / WEIGHTS), tmp_path / "q8.gguf"), tmp_path / "exact.safetensors"
    )
    for name in ("q8.gguf", "exact.safetensors"):
        settings = [f"model.transformer={tmp_path / name}", "iterations=2", *SHORT]
        fork_server.train(tmp_path / Path(name).stem, *settings)
    found, expected = rows(tmp_path / "q8"), rows(tmp_path / "exact")
    assert len(found) == 2 and [row["first_ratio_deviation"] for row in found] == [0, 0]
    assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in expected], abs=0.02)
    more = [f"model.transformer={tmp_path / 'q8.gguf'}", "model.train=full"]
    printed = fork_server.train(tmp_path / "full", *more, status=2)
    assert "model.train = 'full'" in printed and "quantised (gguf)" in printed and "Traceback" not in printed
