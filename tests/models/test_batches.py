"""Prompts of every length in one batch, in images that are not square: what stands beside a sample is nothing to it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.config.sizes import Size
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models import load_model
from fastgrpo.records import take
from fastgrpo.testing import FAMILIES, Family, load_family
from fastgrpo.testing.pictures import picture

pytestmark = pytest.mark.slow  # every family
TEXTS = ["a red circle", "", "two blue squares left of a cat, " * 40]  # of which the last is longer than any limit


def prompts_of(family: Family, count: int) -> list[Any]:
    texts, own = TEXTS[:count], family.prompts[0]
    if isinstance(own, str):
        return texts
    pictures = [
        picture(f"batch{i}", (64, 32), "white", colour, (3, 2, 12 + i, 12))
        for i, colour in enumerate(("red", "blue", "navy"))
    ]
    return [ImagePrompt(text, (file,) * len(own.images)) for text, file in zip(texts, pictures, strict=False)]


@pytest.mark.filterwarnings("ignore:.*are longer than model.max_text_tokens")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_what_is_beside_it(name: str, tmp_path: Path) -> None:
    family = load_family(name)
    family.save(tmp_path)
    model = load_model(family.model, path=tmp_path, dtype=torch.float32, device=torch.device("cpu"), **family.settings)
    side = max(16, model.pixels_per_token)
    with model.sized(Size(side, 2 * side)):
        # Where an image is read with the text, a text that does not fit is refused.
        count = 2 if model.cuts_are_known else 3
        conditioning = model.encode(prompts_of(family, count))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, *model.latent_shape, generator=generator)
        sigma = torch.tensor([0.9, 0.5, 0.3])[:count]
        with torch.no_grad():
            together = model.velocity(x, sigma, conditioning)
            for i in range(count):
                alone = model.encode(prompts_of(family, count)[i : i + 1])
                v = model.velocity(x[i : i + 1], sigma[i : i + 1], alone)
                spread = v.std().item()
                torch.testing.assert_close(together[i : i + 1], v, rtol=0, atol=2e-5 * spread)
                other = model.velocity(x[i : i + 1], sigma[i : i + 1], take(conditioning, torch.tensor([i - 1])))
                assert (other - v).abs().max() > 1e-4 * spread, "the prompt has no effect"
        assert together.isfinite().all()
        images = model.decode(torch.randn(count, *model.latent_shape, generator=generator))
        assert images.shape[-2:] == (side, 2 * side)
