"""LoRA files of other programs: what is written is read by readers that are not ours, and what they write is read here.

ComfyUI and kohya's trainers patch the network as it was published: weight += alpha / r B A under the published name, with
alpha = r where there is none. diffusers' converters of whole published networks then say which layers that is.
Updates B A are compared by what they make of a few random numbers, as at FLUX's own width they are large.
"""

import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgrpo.models import model_class
from fastgrpo.models.lora_file import read_lora
from fastgrpo.models.lora_formats import FORMATS, Factors, Layers, linear_layers, read_layers, written
from fastgrpo.models.lora_names import COMFYUI, KOHYA
from fastgrpo.testing import load_family

RANK = 3
META = torch.device("meta")


def wide_flux() -> Any:
    """One block of each kind at FLUX.1's own width, which diffusers' converters have written into them."""
    with META:
        return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def tiny(name: str) -> nn.Module:
    return load_family(name).make().transformer


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: tiny("sd3"), "flux": wide_flux, "flux2": lambda: tiny("flux2"), "qwen_image": lambda: tiny("qwen_image"),
    "wan": lambda: tiny("wan"), "z_image": lambda: tiny("z_image"),
}  # fmt: skip
CONVERTERS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "qwen_image": dict,  # it has no other names
}
# What diffusers' `load_lora_weights` reads beside its own format.
DIFFUSERS_READS = [
    ("wan", "comfyui"), ("flux2", "comfyui"), ("flux2", "kohya"), ("qwen_image", "comfyui"), ("qwen_image", "kohya"),
    ("z_image", "kohya"), ("flux", "kohya"),
]  # fmt: skip


def lora_of(name: str, network: nn.Module) -> Layers:
    """Random factors for the layers that a run of the family trains."""
    torch.manual_seed(0)
    targets = [f".{t}" for t in targets_of(name, network)]
    linears = {n: one for n, one in linear_layers(network).items() if any(f".{n}".endswith(t) for t in targets)}
    return {
        n: Factors(torch.randn(RANK, one.in_features), torch.randn(one.out_features, RANK)) for n, one in linears.items()
    }


def targets_of(name: str, network: nn.Module) -> tuple[str, ...]:
    if name != "flux2":
        return model_class(name).lora_targets
    blocks = len(network.single_transformer_blocks)
    return (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out", "linear_in", "linear_out", "attn.to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(blocks)),
    )  # fmt: skip


def update(a: Tensor, b: Tensor) -> Tensor:
    """What B A makes of random numbers: (out, 3)."""
    return b @ (a @ torch.randn(a.shape[1], 3, generator=torch.Generator().manual_seed(1)))


def updates(layers: Layers) -> dict[str, Tensor]:
    return {name: update(a, b) for name, (a, b) in layers.items()}


def assert_equal_updates(found: dict[str, Tensor], layers: Layers) -> None:
    """Of every layer, and of no other."""
    expected = updates(layers)
    assert {name for name, one in found.items() if one.any()} == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-3)


class Published(dict):
    """A published network of which only some weights are known; all others are 0."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(21504 if "linear1" in key else 6)

    def pop(self, key: str, *_: Any) -> Tensor:
        return super().pop(key) if key in self else self[key]


def converted(name: str, patches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Updates of published weights as updates of diffusers' layers."""
    published = Published({f"{module}.weight": update for module, update in patches.items()})
    state = CONVERTERS[name](published)
    return {key.removesuffix(".weight"): one for key, one in state.items() if key.endswith(".weight") and one.dim() == 2}


@pytest.mark.parametrize("name", NETWORKS)
def test_comfyui_patches_the_layers_that_were_trained(name: str) -> None:
    """Its rule: diffusion_model.MODULE for every weight of the network, lora_B times lora_A, where there is no alpha."""
    network = NETWORKS[name]()
    layers = lora_of(name, network)
    patches = {}
    for key, b in (weights := written("comfyui", layers, network)).items():
        if key.endswith(".lora_B.weight"):
            module = key.removesuffix(".lora_B.weight")
            patches[module.removeprefix("diffusion_model.")] = update(weights[f"{module}.lora_A.weight"], b)
    assert len(weights) == 2 * len(patches) and all(key.startswith("diffusion_model.") for key in weights)
    assert_equal_updates(converted(name, patches), layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_kohyas_trainers_patch_the_layers_that_were_trained(name: str) -> None:
    """Their rule: lora_unet_ and a module's path with _ for its dots, lora_up times lora_down times alpha / rank.

    musubi-tuner's Z-Image has the modules of diffusers, all others have the published ones.
    """
    network = NETWORKS[name]()
    layers = lora_of(name, network)
    published = [key.removeprefix("diffusion_model.").rpartition(".lora_")[0] for key in written("comfyui", layers, network)]
    modules = linear_layers(network) if name == "z_image" else published
    weights, patches = written("kohya", layers, network), {}
    for module in modules:
        flat = f"lora_unet_{module.replace('.', '_')}"
        if f"{flat}.lora_up.weight" in weights:
            up, down = weights.pop(f"{flat}.lora_up.weight"), weights.pop(f"{flat}.lora_down.weight")
            patches[module] = weights.pop(f"{flat}.alpha").item() / len(down) * update(down, up)
    assert not weights
    assert_equal_updates(patches if name == "z_image" else converted(name, patches), layers)


@pytest.mark.parametrize(("name", "form"), DIFFUSERS_READS)
def test_diffusers_converter_reads_what_is_written(name: str, form: str) -> None:
    network = NETWORKS[name]()
    layers = lora_of(name, network)
    pipeline = getattr(diffusers, model_class(name).pipeline_class)
    state = pipeline.lora_state_dict(written(form, layers, network))
    assert_equal_updates(updates_of_diffusers(state), layers)


def updates_of_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = {key.removeprefix("transformer.").removesuffix(".lora_B.weight"): key for key in state if ".lora_B." in key}
    return {name: update(state[key.replace("lora_B", "lora_A")], state[key]) for name, key in ends.items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read_back(name: str, form: str) -> None:
    network = NETWORKS[name]()
    layers = lora_of(name, network)
    read = read_layers(written(form, layers, network), network)
    assert read.keys() == layers.keys()
    assert all(torch.equal(a, b) for n in layers for a, b in zip(read[n], layers[n], strict=True))


def test_layers_that_were_trained_together_are_read_as_diffusers_reads_them() -> None:
    """As sd-scripts and ai-toolkit train FLUX: one A for q, k and v, with an alpha that is not the rank."""
    network = wide_flux()
    torch.manual_seed(0)
    sizes = {"double_blocks_0_img_attn_qkv": (3072, 9216), "single_blocks_0_linear1": (3072, 21504)}
    weights = {}
    for module, (inside, out) in sizes.items():
        down, up = torch.randn(4, inside), torch.randn(out, 4)
        weights |= {f"lora_unet_{module}.lora_down.weight": down, f"lora_unet_{module}.lora_up.weight": up}
        weights[f"lora_unet_{module}.alpha"] = torch.tensor(1.0)
    expected = updates_of_diffusers(diffusers.FluxPipeline.lora_state_dict(dict(weights)))
    found = updates(read_layers(weights, network))
    assert found.keys() == expected.keys() and len(found) == 7
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-3) for name in found)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.{}.lora_A.weight", "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_A.default.weight",
        "{}.lora_A.weight", "unet.{}.lora.down.weight", "diffusion_model.{}.lora_down.weight",
        "transformer.{}.lora_down.weight", "lora_transformer_{_}.lora_down.weight", "lora_unet_{_}.lora_down.weight",
    ],
)  # fmt: skip
def test_a_layer_is_known_by_each_of_its_names(key: str) -> None:
    network, layer = tiny("sd3"), "transformer_blocks.0.attn.to_q"
    key = key.replace("{}", layer).replace("{_}", layer.replace(".", "_"))
    other = re.sub("lora([_.])A", r"lora\1B", key).replace("down", "up")
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    read = read_layers({key: a, other: b}, network)
    assert read.keys() == {layer} and torch.equal(read[layer].a, a) and torch.equal(read[layer].b, b)


PLAIN = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(3, 2)}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(4, 3), nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_x.dora_scale", "of a DoRA"), ("x.lora_magnitude_vector.weight", "of a DoRA"),
        ("lora_unet_x.lokr_w1", "of a LoKr"), ("lora_unet_x.hada_w1_a", "of a LoHa"), ("x.lora_mid.weight", "of a LoCon"),
        ("diffusion_model.x.diff", "a difference of whole weights"), ("diffusion_model.x.diff_b", "a difference of whole"),
        ("x.lora_B.bias", "with biases"), ("lora_te1_text_model_encoder.lora_down.weight", "is of a text encoder"),
        ("text_encoder.x.lora_A.weight", "is of a text encoder"), ("lora_unet_x.alpha", "and no number above 0"),
        ("x.lora_A.weight", "the A of 'x' stands without its other half"), ("y", "is no weight of a LoRA"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_by_the_key(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_layers({**PLAIN, key: torch.zeros(2, 4)}, Small())


def test_a_convolution_and_a_layer_that_is_there_twice_are_refused() -> None:
    convolution = {name: one[:, :, None, None] for name, one in PLAIN.items()}
    with pytest.raises(ValueError, match=r"the A of 'lora_unet_x' is torch.float32 \(2, 4, 1, 1\)"):
        read_layers(convolution, Small())
    twice = {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"'transformer.x' is a second update of x"):
        read_layers({**PLAIN, **twice}, Small())


def test_alpha_is_that_of_the_module_before_that_of_the_file() -> None:
    weights = {**PLAIN, "lora_unet_x.alpha": torch.tensor(6, dtype=torch.int64)}
    assert read_layers(weights, Small(), alpha=10)["x"].b.unique() == 3
    assert read_layers(PLAIN, Small(), alpha=10)["x"].b.unique() == 5


def test_a_network_without_the_format_and_a_layer_without_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no kohya format for Small; take diffusers, peft or merged"):
        written("kohya", {"x": Factors(torch.ones(1, 4), torch.ones(3, 1))}, Small())
    network = tiny("sd3")
    with pytest.raises(ValueError, match=r"comfyui format has no name for SD3Transformer2DModel's norm_out\.linear"):
        written("comfyui", {"norm_out.linear": Factors(torch.ones(1, 32), torch.ones(64, 1))}, network)
    assert COMFYUI.keys() == KOHYA.keys()


def test_the_file_is_found_in_a_folder_and_a_folder_of_many_is_refused(tmp_path) -> None:
    save_file(PLAIN, tmp_path / "mine.safetensors")
    assert read_lora(tmp_path, Small()).rank == 2
    save_file(PLAIN, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds several files of safetensors"):
        read_lora(tmp_path, Small())
    save_file(PLAIN, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: adapter_config\.json is missing beside it"):
        read_lora(tmp_path, Small())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    assert read_lora(tmp_path, Small()).layers["x"].b.unique() == 2
    with pytest.raises(ValueError, match="no such file or folder"):
        read_lora(tmp_path / "absent", Small())
