"""What is BAGEL's own, beside what test_models asks of every family."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.drawing import ode_arguments
from support.helpers import NoSync
from transformers import Qwen3Config, Qwen3Model

from fastgrpo.data.embedding_files import EmbeddingFiles
from fastgrpo.models import load_model
from fastgrpo.models.bagel import Bagel, BagelConditioning
from fastgrpo.models.bagel_folder import published_name, read_autoencoder
from fastgrpo.models.bagel_network import GEN, BagelTransformer, PositionTable
from fastgrpo.policy import Policy
from fastgrpo.sampling.rollout import rollout
from fastgrpo.testing import load_family
from fastgrpo.testing.bagel import original_names, tiny_autoencoder, velocity_ref

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two red squares left of one cat", ""]
ROOM = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bagel")
    load_family("bagel").save(path)
    return path


def load(path: Path, **settings: object) -> Bagel:
    settings = {"max_text_tokens": ROOM, "height": 16, "width": 16, "dtype": torch.float32} | settings
    return load_model("bagel", path=path, device=CPU, **settings)


@pytest.fixture(scope="module")
def model(folder: Path) -> Bagel:
    return load(folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def tokens(model: Bagel, prompt: str) -> list[int]:
    tokenizer = model.pipeline.tokenizer
    opening, closing = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    return [opening, *tokenizer.encode(prompt), closing] if prompt else []


@torch.no_grad()
def velocity(model: Bagel, x: torch.Tensor, conditioning: BagelConditioning, sigma: float = 0.7) -> torch.Tensor:
    return model.velocity(x, torch.full((len(x),), sigma), conditioning)


def latents(model: Bagel, count: int) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(3))


def test_what_is_kept_of_a_prompt_is_what_transformers_computes(model: Bagel) -> None:
    """Its Qwen3 is Qwen2 with norms of queries and keys; with biases that leaves the last projection's, here zero."""
    config, state = model.transformer.config, model.transformer.state_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps")  # fmt: skip
    qwen = Qwen3Model(Qwen3Config(
        **{name: config[name] for name in names}, head_dim=model.transformer.head_width, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )).eval()  # fmt: skip
    understood = {name: tensor for name, tensor in state.items() if name.startswith(("embed", "layers")) and GEN not in name}
    missing, unexpected = qwen.load_state_dict(understood, strict=False)
    assert not unexpected and all(name == "norm.weight" or name.endswith("o_proj.bias") for name in missing)
    for layer in qwen.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    ids = tokens(model, PROMPTS[1])
    with torch.no_grad():
        cache = qwen(torch.tensor([ids]), use_cache=True).past_key_values
    found = model.encode([PROMPTS[1]])
    assert found.length.tolist() == [len(ids)] and found.keys.shape[3] == ROOM
    for i in range(config.num_hidden_layers):
        for kept, expected in ((found.keys, cache.layers[i].keys), (found.values, cache.layers[i].values)):
            torch.testing.assert_close(kept[0, i, :, : len(ids)], expected[0], rtol=1e-5, atol=1e-5)
            assert not kept[0, i, :, len(ids) :].any()


def test_prompts_of_different_lengths_in_one_batch_are_each_alone(model: Bagel) -> None:
    together, x = model.encode(PROMPTS), latents(model, len(PROMPTS))
    v = velocity(model, x, together)
    assert len(set(together.length.tolist())) == len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = model.encode([prompt])
        for kept, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(kept[0], expected[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(velocity(model, x[i : i + 1], alone)[0], v[i], rtol=1e-5, atol=1e-5)
        assert (v[i] - v[i - 1]).abs().max() > 0.1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_lies_past_a_prompt_is_not_seen(model: Bagel, prompt: str) -> None:
    conditioning, x = model.encode([prompt]), latents(model, 1)
    past = (torch.arange(ROOM) >= conditioning.length[:, None])[:, None, None, :, None]
    spoilt = conditioning._replace(keys=conditioning.keys + past * 7.0, values=conditioning.values - past * 5.0)
    assert torch.equal(velocity(model, x, spoilt), velocity(model, x, conditioning))


def test_no_prompt_is_no_context_at_all(model: Bagel) -> None:
    empty, x = model.encode([""]), latents(model, 1)
    assert empty.length.tolist() == [0] and not empty.keys.any() and not empty.values.any()
    with torch.no_grad():
        expected = velocity_ref(model.transformer, [], x[0], 0.7)
        marks_only = velocity_ref(model.transformer, tokens(model, "x")[::2], x[0], 0.7)
    torch.testing.assert_close(velocity(model, x, empty)[0], expected, rtol=1e-5, atol=1e-5)
    assert (marks_only - expected).abs().max() > 0.01


@pytest.mark.parametrize("size", [(16, 24), (8, 4)])
def test_images_that_are_not_square(folder: Path, size: tuple[int, int]) -> None:
    """Positions by row and column, and a decoder that reads each token as its square of latents, channels last."""
    model, (rows, columns) = load(folder, height=size[0], width=size[1]), (size[0] // 4, size[1] // 4)
    assert model.latent_shape == (rows * columns, 64)
    x = latents(model, 1)
    with torch.no_grad():
        expected = velocity_ref(model.transformer, tokens(model, "a cat"), x[0], 0.3, (rows, columns))
    torch.testing.assert_close(velocity(model, x, model.encode(["a cat"]), 0.3)[0], expected, rtol=1e-5, atol=1e-5)
    unpacked = model.vae_latents(x, model.pipeline.vae)
    assert unpacked.shape == (1, 16, size[0] // 2, size[1] // 2) and model.decode(x).shape == (1, 3, *size)
    for token, row, column, channel in [(0, 0, 0, 0), (columns - 1, 1, 0, 3), (rows * columns - 1, 1, 1, 15)]:
        value = x[0, token, (row * 2 + column) * 16 + channel] / 0.3611 + 0.1159
        y, z = token // columns * 2 + row, token % columns * 2 + column
        torch.testing.assert_close(unpacked[0, channel, y, z], value)


@pytest.mark.parametrize("steps", [2, 14, 49])
def test_sigmas_are_the_published_schedule(model: Bagel, steps: int) -> None:
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(model.sigmas(steps).double(), 3 * t / (1 + 2 * t), rtol=1e-6, atol=1e-7)
    assert model.sigmas(steps)[0] == 1 and model.sigmas(steps)[-1] == 0


def test_guidance_is_the_published_one_for_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    v, without = (torch.randn(3, 16, 64, generator=generator) for _ in range(2))
    without[2] = 1.5 * v[2]  # guided, this one is shorter: it stays as it is
    found = Bagel.guide(v, without, 4.0)
    for i in range(3):
        plain, other = v[i].double(), without[i].double()
        guided = other + 4.0 * (plain - other)
        ratio = math.sqrt(plain.square().sum()) / (math.sqrt(guided.square().sum()) + 1e-8)
        torch.testing.assert_close(found[i].double(), guided * min(ratio, 1.0), rtol=1e-5, atol=1e-5)
        assert found[i].norm() <= v[i].norm() * (1 + 1e-6)
    assert (found[2].norm() / v[2].norm()).item() == pytest.approx(0.5, abs=1e-5)
    low = Bagel.guide(v.bfloat16(), without.bfloat16(), 4.0)
    assert low.dtype == torch.bfloat16 and (low.float() - found).abs().max() < 0.1


def test_a_guided_rollout_never_waits_for_the_device(model: Bagel) -> None:
    arguments = ode_arguments(model, PROMPTS[:2], 3, 4.0)
    with NoSync():
        result = rollout(Policy(model), *arguments)
    assert result.final.isfinite().all()


def test_positions_are_those_of_dit(folder: Path) -> None:
    side, width = 5, 16
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    for row, column in ((0, 0), (1, 4), (4, 2)):
        angles = [column * frequency, row * frequency]
        expected = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
        torch.testing.assert_close(PositionTable(side, width).pos_embed[row * side + column].double(), expected)


def test_a_long_prompt_keeps_both_marks(model: Bagel) -> None:
    text, opening_and_closing = "x" * 100, tokens(model, "x")[::2]
    cut = [opening_and_closing[0], *model.pipeline.tokenizer.encode(text)[: ROOM - 2], opening_and_closing[1]]
    x = latents(model, 1)
    assert model.encode([text]).length.tolist() == [ROOM]
    with torch.no_grad():
        expected = velocity_ref(model.transformer, cut, x[0], 0.7)
    torch.testing.assert_close(velocity(model, x, model.encode([text]))[0], expected, rtol=1e-5, atol=1e-5)


def test_training_leaves_what_reads_the_prompt_as_it_is(folder: Path) -> None:
    """So what is kept of it never goes stale, on disk neither."""
    model = load(folder)
    before, name = model.encode(PROMPTS), EmbeddingFiles(model, Path()).fingerprint
    model.add_lora(rank=4, alpha=8)
    with torch.no_grad():
        for n, parameter in model.transformer.named_parameters():
            assert parameter.requires_grad == ("lora" in n) and ("lora" not in n or GEN in n)
            if "lora" in n:
                parameter.normal_()
    assert all(torch.equal(a, b) for a, b in zip(model.encode(PROMPTS), before, strict=True))
    assert EmbeddingFiles(model, Path()).fingerprint == name


def test_full_training_copies_only_what_it_trains(folder: Path) -> None:
    model = load(folder)
    model.train_all(keep_reference=True)
    copied = dict(model.untrained.named_parameters())
    for name, parameter in model.transformer.named_parameters():
        assert parameter.requires_grad == (GEN in name)
        assert (copied[name] is parameter) == (GEN not in name) and not copied[name].requires_grad
    x, conditioning = latents(model, 2), model.encode(PROMPTS[:2])
    model.velocity(x, torch.tensor([0.9, 0.2]), conditioning).square().mean().backward()
    for name, parameter in model.transformer.named_parameters():
        assert (parameter.grad is not None) == (GEN in name), name


def test_a_whole_transformer_is_read_by_its_class(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.train_all(keep_reference=False)
    trained = {n: p.detach() + 1 for n, p in model.transformer.named_parameters() if p.requires_grad}
    model.save_trained(tmp_path, trained)
    state = BagelTransformer.from_pretrained(tmp_path, subfolder="transformer").state_dict()
    for name, parameter in model.transformer.named_parameters():
        assert torch.equal(state[name], trained.get(name, parameter))


def test_blocks_compile_without_a_break(folder: Path) -> None:
    model = load(folder)
    model.add_lora(rank=4, alpha=8)
    x, conditioning = latents(model, 1), model.encode(["a cat"])
    before = velocity(model, x, conditioning)
    for layer in model.transformer.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(velocity(model, x, conditioning), before)


def test_bfloat16(folder: Path, model: Bagel) -> None:
    low, x = load(folder, dtype=torch.bfloat16), latents(model, 1)
    assert {p.dtype for p in low.transformer.parameters()} == {torch.bfloat16}
    assert low.decode(x).dtype == torch.uint8
    v = velocity(low, x.bfloat16(), low.encode(["a cat"]))
    assert v.dtype == torch.bfloat16 and (v.float() - velocity(model, x, model.encode(["a cat"]))).abs().max() < 0.1


def test_the_autoencoder_is_read_under_its_original_names(tmp_path: Path) -> None:
    stored = tiny_autoencoder()
    original = original_names(stored.state_dict())
    assert "decoder.up.0.block.0.nin_shortcut.weight" in original and original["encoder.mid.attn_1.q.weight"].ndim == 4
    save_file(original, tmp_path / "ae.safetensors")
    found = read_autoencoder(tmp_path, torch.float32, CPU)
    assert found.config.scaling_factor == 0.3611 and found.config.shift_factor == 0.1159
    assert found.state_dict().keys() == stored.state_dict().keys()
    assert all(torch.equal(tensor, stored.state_dict()[name]) for name, tensor in found.state_dict().items())
    for key in ("decoder.conv_in.weight", "decoder.up.1.block.0.conv1.weight"):
        save_file({k: v for k, v in original.items() if k != key}, tmp_path / "ae.safetensors")
        with pytest.raises(
            ValueError, match=r"(?s)model\.path = .*ae\.safetensors is not FLUX's autoencoder: .*conv(_in|1)"
        ):
            read_autoencoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors", "llm_config.json", "tokenizer.json"])
def test_a_missing_or_empty_file_is_named(broken: Path, file: str) -> None:
    (broken / file).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"model\.path = .*: {file} missing or empty"):
        load(broken)
    (broken / file).unlink()
    with pytest.raises(ValueError, match=rf"model\.path = .*: {file} missing or empty"):
        load(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, key: w.pop(key), "lacks {}, one of 1 tensors of the generation path"),
        (
            lambda w, key: w.update({key.replace("q_proj", "qkv"): w[key].clone()}),
            "layers.1.self_attn.qkv_moe_gen.weight, one of 1",
        ),
        (lambda w, key: w.update({key: w[key][:8].clone()}), r"{} is \(8, 32\), where llm_config.json makes it \(32, 32\)"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_named(broken: Path, change, message: str) -> None:
    weights, key = load_file(broken / "ema.safetensors"), published_name("layers.1.self_attn.q_proj_moe_gen.weight")
    assert key == "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"
    change(weights, key)
    save_file(weights, broken / "ema.safetensors")
    with pytest.raises(ValueError, match=rf"model\.path = .*ema\.safetensors.*{message.format(key)}"):
        load(broken)


def test_a_config_that_transformers_5_wrote_is_read(broken: Path) -> None:
    sizes = json.loads((broken / "llm_config.json").read_text())
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}}
    (broken / "llm_config.json").write_text(json.dumps(sizes | nested))
    assert load(broken).transformer.config.rope_theta == nested["rope_parameters"]["rope_theta"]


def test_shards_and_what_is_for_other_families_are_refused(broken: Path) -> None:
    for key in ("transformer", "variant"):
        with pytest.raises(
            ValueError, match=rf"model\.{key} = x: BAGEL is read from its published folder alone; leave it out"
        ):
            Bagel.check_files(broken, **{key: "x"})
    (broken / "ema.safetensors").rename(broken / "ema-00001-of-00001.safetensors")
    (broken / "ema.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ema\.safetensors is in shards .*; save it as the one file of that name"):
        load(broken)


def test_sizes_and_tokens_that_are_missing_are_named(broken: Path) -> None:
    sizes = json.loads((broken / "llm_config.json").read_text())
    (broken / "llm_config.json").write_text(json.dumps({k: v for k, v in sizes.items() if k != "rope_theta"}))
    with pytest.raises(ValueError, match=r"model\.path = .*llm_config\.json lacks rope_theta"):
        load(broken)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (broken / file).read_text().replace("<|vision_end|>", "<|picture_end|>")
        (broken / file).write_text(text)
    with pytest.raises(ValueError, match=r"its tokenizer has no token <\|vision_end\|>"):
        load(broken)


def test_settings_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.width = 260: this model's positions end at 256"):
        load(folder, width=260)
    with pytest.raises(ValueError, match=r"model\.height = 18: must be a multiple of 4"):
        load(folder, height=18)
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 2: two are the prompt's marks"):
        load(folder, max_text_tokens=2)
    model = load(folder)
    with pytest.raises(ValueError, match=r"model\.attention = 'flash2'"):
        model.use_attention("flash2")
    with pytest.raises(ValueError, match=r"model\.lora: layers\.0\.self_attn\.q_proj reads the prompt"):
        model.add_lora(rank=4, alpha=8, targets=("q_proj", "q_proj_moe_gen"))


def test_weights_that_are_sharded_cannot_read_a_prompt(folder: Path) -> None:
    model = load(folder)
    model.transformer.embed_tokens.weight.data = torch.empty(0)  # as ZeRO-3 leaves a parameter
    with pytest.raises(ValueError, match=r"engine\.zero_stage = 3: .*take 1 or 2"):
        model.encode(["a cat"])
