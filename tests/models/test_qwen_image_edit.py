"""What Qwen-Image-Edit and Qwen-Image-Edit-Plus read of their input images, and at which size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.drawing import drawn, noise
from support.files import seen_alike
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from fastgrpo.config.sizes import Size
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models import model_class
from fastgrpo.models.qwen_image import tell_images_from_text
from fastgrpo.models.qwen_image_edit import ImageProcessor
from fastgrpo.policy import sized
from fastgrpo.testing import load_family
from fastgrpo.testing.qwen_image import INPUT, smaller_inputs

EDIT, PLUS = "qwen_image_edit", "qwen_image_edit_plus"
PROMPTS = {name: load_family(name).prompts for name in (EDIT, PLUS)}


def load(name: str, **settings: Any) -> Any:
    family = load_family(name)
    pipeline = family.make()
    pipeline.set_progress_bar_config(disable=True)
    return model_class(name)(
        pipeline, dtype=torch.float32, device=torch.device("cpu"), **{**family.settings, **settings}
    )  # fmt: skip


def picture(folder: Path, width: int, height: int, name: str = "") -> Path:
    """A file with a picture of noise."""
    file = folder / f"{name}{width}x{height}.png"
    Image.effect_noise((width, height), 80).convert("RGB").save(file)
    return file


# Positions of the tokens of images in the text encoder


def positions_by_transformers_4(ids: list[int], grids: list[list[int]], image_token: int) -> Tensor:
    """(3, L), as `get_rope_index` of transformers 4.49 counts: a text on three axes alike, an image by its grid."""
    found: list[Tensor] = []
    start = 0

    def following() -> int:
        return int(found[-1].max()) + 1 if found else 0

    for frames, rows, columns in grids:
        rows, columns = rows // 2, columns // 2  # tokens are of two by two patches
        end = ids.index(image_token, start)
        found.append(torch.arange(end - start).expand(3, -1) + following())
        places = [(t * 0, row, column) for t in range(frames) for row in range(rows) for column in range(columns)]
        found.append(torch.tensor(places).T + following())
        start = end + frames * rows * columns
    found.append(torch.arange(len(ids) - start).expand(3, -1) + following())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", [EDIT, PLUS])
def test_tokens_of_images_have_their_places_by_row_and_column(name: str, tmp_path: Path) -> None:
    """As in transformers 4, which the models were published with; and the embeddings are those of these places."""
    model, images = load(name, max_text_tokens=500), (picture(tmp_path, 40, 120), picture(tmp_path, 90, 30))
    seen: dict[str, Any] = {}

    def record(_: Any, arguments: tuple, named: dict[str, Any]) -> None:
        seen.update({key: value for key, value in named.items() if value is not None})

    encoder = model.pipeline.text_encoder
    encoder.register_forward_pre_hook(record, with_kwargs=True)
    encoder.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    found = model.encode([ImagePrompt("draw a line", images if name == PLUS else images[:1])])
    asked = {key: seen[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    image_token = model.pipeline.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    expected = positions_by_transformers_4(asked["input_ids"][0].tolist(), asked["image_grid_thw"].tolist(), image_token)
    assert torch.equal(seen["position_ids"], expected[:, None])
    assert not torch.equal(expected[1], expected[2])  # not those of a text

    stock = load_family(name).make().text_encoder

    def embeds(**places: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = stock(**asked, **places, output_hidden_states=True).hidden_states[-1]
        return hidden[:, model.pipeline.prompt_template_encode_start_idx :]

    assert torch.equal(found.embeds[found.mask], embeds(position_ids=expected[:, None])[0])
    # Without the hook they are others. Where this fails the pipeline was mended, and the hook may go.
    assert (found.embeds[found.mask] - embeds()[0]).abs().max() > 1e-3


def test_what_a_caller_says_of_the_tokens_stays() -> None:
    encoder, ids, types = load(EDIT).pipeline.text_encoder, torch.zeros(1, 3), torch.ones(1, 3)
    grid = {"input_ids": ids, "image_grid_thw": torch.ones(1, 3)}
    for named in ({**grid, "mm_token_type_ids": types}, {"input_ids": ids}):
        assert tell_images_from_text(encoder, (), dict(named)) == ((), named)


# What is read


def test_the_image_is_read_by_the_encoder_and_by_the_transformer() -> None:
    model, prompts = load(EDIT), PROMPTS[EDIT]
    one, other = (model.encode([prompts[0]._replace(images=prompt.images)]) for prompt in prompts)
    assert not torch.equal(one.embeds, other.embeds) and not torch.equal(one.image, other.image)
    x, sigma = noise(model, 1), torch.tensor([0.7])
    with torch.no_grad():
        v = model.velocity(x, sigma, one)
        assert v.shape == x.shape
        for swapped in (one._replace(embeds=other.embeds), one._replace(image=other.image)):
            assert (model.velocity(x, sigma, swapped) - v).abs().max() > 1e-3


@pytest.mark.parametrize("name", [EDIT, PLUS])
def test_no_text_keeps_the_images(name: str) -> None:
    model, prompt = load(name), PROMPTS[name][0]
    nothing, space, full = (model.encode([prompt._replace(text=text)]) for text in ("", " ", prompt.text))
    assert all(torch.equal(a, b) for a, b in zip(nothing, space, strict=True))
    assert torch.equal(nothing.image, full.image) and nothing.mask.sum() < full.mask.sum()
    prompted = Embeddings(model).prompted(PROMPTS[name], 4.0)
    cond, uncond = prompted.cond, prompted.uncond
    assert torch.equal(cond.image, uncond.image) and not torch.equal(cond.image[0], cond.image[1])


def test_an_image_to_edit_is_read_as_people_see_it(tmp_path: Path) -> None:
    model = load(EDIT)
    plain, hiding = (model.encode([ImagePrompt("draw a line", (file,))]) for file in seen_alike(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(plain, hiding, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_images_of_different_shapes_are_those_of_the_stock_pipeline(count: int, tmp_path: Path) -> None:
    """Called as users call it, in a batch of two prompts; the stock pipeline takes one at a time."""
    shapes = [(40, 40), (120, 40), (30, 90)][:count]
    prompts = [
        ImagePrompt(text, tuple(picture(tmp_path, *shape, name=text) for shape in shapes)) for text in ("merge", "paint")
    ]
    model = load(PLUS, max_text_tokens=500)
    found = drawn(model, prompts, num_steps=3, guidance_scale=4.0)
    stock = load_family(PLUS).make()
    stock.set_progress_bar_config(disable=True)
    stock.text_encoder = model.pipeline.text_encoder  # which knows images from text
    for i, prompt in enumerate(prompts):
        images = [Image.open(file) for file in prompt.images]
        with smaller_inputs(INPUT):
            expected = stock(
                images, prompt.text, negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=3, height=16, width=16,
                latents=noise(model, 2)[i : i + 1], output_type="pt",
            ).images  # fmt: skip
        assert (found[i].float() - (expected[0] * 255).round()).abs().max() <= 1
    read = model.encode(prompts[:1])
    assert [image.shape[1] > 0 for image in read[2:]] == [i < count for i in range(3)]


def test_input_images_are_modulated_as_without_noise_where_the_model_asks_for_it() -> None:
    """zero_cond_t of Qwen-Image-Edit-2511, against the stock transformer, which copies from the host for it."""
    model, prompt = load(PLUS), PROMPTS[PLUS][0]
    conditioning, x, sigma = model.encode([prompt]), noise(model, 1), torch.tensor([0.7])
    images = [image.flatten(1, 2) for image in conditioning[2:]]
    network = model.transformer
    assert network.config.zero_cond_t

    def stock() -> Tensor:
        return network(
            hidden_states=torch.cat([x, *images], dim=1), timestep=sigma, encoder_hidden_states=conditioning.embeds,
            encoder_hidden_states_mask=conditioning.mask, img_shapes=[[(1, 4, 4), (1, 8, 8), (1, 8, 8)]], return_dict=False,
        )[0][:, : x.shape[1]]  # fmt: skip

    with torch.no_grad():
        expected = stock()
        assert torch.equal(model.velocity(x, sigma, conditioning), expected)
        for module in (network, *network.transformer_blocks):
            module.zero_cond_t = False
        assert (stock() - expected).abs().max() > 1e-3


# Sizes


@pytest.mark.parametrize("name", [EDIT, PLUS])
@pytest.mark.parametrize("shape", [(300, 300), (400, 250)])
def test_an_image_is_prepared_as_in_the_stock_pipeline(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """What the text encoder and the VAE are shown, to the last bit: at the published sizes, whatever the output's is."""
    file = picture(tmp_path, *shape)
    model = load(name, input_size=None, max_text_tokens=3072)
    pipeline, shown = model.pipeline, []

    def encode_prompt(*_: Any, image: Any, **__: Any) -> tuple[Tensor, None]:
        shown.append(image[0] if isinstance(image, list) else image)
        return torch.zeros(1, 1, 32), None

    def encode_image(image: Tensor, **_: Any) -> Tensor:
        shown.append(image)
        return torch.zeros(1, 4, 1, image.shape[-2] // 2, image.shape[-1] // 2)

    def stop(sigmas: Any, **_: Any) -> None:
        raise StopIteration

    pipeline.encode_prompt, pipeline._encode_vae_image, pipeline.scheduler.set_timesteps = encode_prompt, encode_image, stop
    image = model.encode([ImagePrompt("a", (file,))]).image
    with pytest.raises(StopIteration):
        pipeline(Image.open(file), "a", num_inference_steps=2)
    seen, pixels, stock_seen, stock_pixels = shown
    width, height = (1024, 1024) if shape == (300, 300) else (1280, 800)
    assert torch.equal(pixels, stock_pixels) and pixels.shape[-2:] == (height, width)
    assert seen.size == ((width, height) if name == EDIT else (384, 384) if shape == (300, 300) else (480, 288))
    assert seen.tobytes() == stock_seen.tobytes()
    assert image.shape == (1, height // 4, width // 4, 16)


@pytest.mark.parametrize(
    ("asked", "shape", "rows", "columns"),
    [(64, (50, 50), 64, 64), (64, (31, 62), 96, 32), ("output", (31, 62), 24, 16), ("output", (50, 50), 24, 16)],
)
def test_an_input_image_has_the_size_that_is_asked_for(
    asked: Any, shape: Any, rows: int, columns: int, tmp_path: Path
) -> None:
    model = load(EDIT, input_size=asked, height=24, width=16, max_text_tokens=500)
    prompt = ImagePrompt("draw a line", (picture(tmp_path, *shape),))
    assert model.encode([prompt]).image.shape == (1, rows // 4, columns // 4, 16)
    assert drawn(model, [prompt], num_steps=2, guidance_scale=4.0).shape == (1, 3, 24, 16)


def test_images_of_other_proportions_or_another_number_are_refused(tmp_path: Path) -> None:
    """By the start's look at all prompts, and by the encoder; in one run they would be rows of different lengths."""
    square, wide = picture(tmp_path, 40, 40), picture(tmp_path, 120, 40)
    like = picture(tmp_path, 90, 88)  # which is read at the same size
    for ask in ("read_in_part", "encode"):
        model = load(PLUS)
        getattr(model, ask)([ImagePrompt("a", (square, wide)), ImagePrompt("b", (like, wide))])
        for images, read in (((wide, square), "64 x 32 and 32 x 32"), ((square,), "32 x 32")):
            said = rf"read at {read}, and .*40x40.* at 32 x 32 and 64 x 32; all prompts .* model\.input_size: output"
            with pytest.raises(ValueError, match=said):
                getattr(model, ask)([ImagePrompt("c", images)])
        stretched = load(PLUS, input_size="output")
        for size in (Size(), Size(32, 16), Size(16, 32)):  # which a run may have in turn
            with sized(stretched, size):
                getattr(stretched, ask)([ImagePrompt("a", (square, wide)), ImagePrompt("b", (wide, square))])


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.input_size = 31: must be at least 32, or 'output'"):
        load(EDIT, input_size=31)
    with pytest.raises(ValueError, match=r"model\.input_size = 64: QwenImage has no such input; leave it out"):
        load("qwen_image", input_size=64)
    narrow = ImagePrompt("a", (picture(tmp_path, 4, 160),))
    with pytest.raises(ValueError, match=r"model\.input_size = 32: an input image 0\.025 times as wide as high has no row"):
        load(EDIT).encode([narrow])


def test_an_edit_that_does_not_fit_is_refused() -> None:
    model = load(EDIT, max_text_tokens=100)
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 100: .*is \d+ tokens; raise it"):
        model.encode([PROMPTS[EDIT][0]])


@pytest.mark.parametrize(("name", "images"), [(EDIT, 1), (PLUS, 3)])
def test_the_length_that_is_left_out_holds_the_images_and_a_text(name: str, images: int, tmp_path: Path) -> None:
    """At the size that is set. The tiny text encoder has a token for 8 x 8 pixels, and another for each letter."""
    model = load(name, input_size=128, max_text_tokens=None)
    assert model.settings.max_text_tokens == 512 + images * (128 // 8) ** 2
    prompt = ImagePrompt("a" * 150, (picture(tmp_path, 40, 40),) * images)
    assert not model.read_in_part([prompt]) and model.encode([prompt]).mask.sum() > 150 + images * (128 // 8) ** 2
    assert load(name, input_size="output", height=64, width=32, max_text_tokens=None).settings.max_text_tokens == (
        512 + images * 8 * 4
    )
    assert load(name, input_size=None, max_text_tokens=None).settings.max_text_tokens == model.longest_text


@pytest.mark.parametrize(("name", "expected"), [(EDIT, {None: 1881, 512: 836}), (PLUS, {None: 1100, 512: 1100, 256: 755})])
def test_the_length_that_is_left_out_is_the_published_processors(name: str, expected: dict) -> None:
    """Also where there is no processor, as for a model with random weights."""
    published = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056)
    model = load(name)
    for processor in (ImageProcessor(published, model.pipeline.tokenizer), None):
        model.pipeline.processor = processor
        for side, tokens in expected.items():
            model.settings = replace(model.settings, input_size=side)
            assert model.default_text_tokens == tokens


def test_embeddings_of_another_size_are_others() -> None:
    settings = [load(EDIT, **given).encoder_settings for given in ({}, {"input_size": 64}, {"input_size": "output"})]
    assert len({str(one) for one in settings}) == 3 and settings[0] == load(EDIT, height=32).encoder_settings
    tall = load(EDIT, input_size="output", height=32).encoder_settings
    assert tall != settings[2]
    assert load(EDIT, input_size=None).encoder_settings == load(EDIT, input_size=1024).encoder_settings
