"""Numbers that are not finite are named, with how many there are and where."""

import math
from pathlib import Path

import pytest
import torch
from support.tiny_model import load_tiny_model

from fastgrpo.finite import NotFinite, at, check_finite, first_not_finite
from fastgrpo.models.adapter import to_pixels
from fastgrpo.trained_files import write_trained


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_found(value: float) -> None:
    tensor = torch.zeros(3, 5)
    check_finite("velocity", tensor)
    tensor[1, 2] = value
    with pytest.raises(NotFinite, match="^iteration 4: the velocity is not finite in 1 of 15 numbers$"), at("iteration 4"):
        check_finite("velocity", tensor)
    with pytest.raises(NotFinite, match=f"^the loss is {value}$"):
        check_finite("loss", value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pixel_that_is_no_number_is_not_black(dtype: torch.dtype) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=dtype)
    assert to_pixels(images).unique().tolist() == [128]
    images[1, 0, 2, 3] = math.nan
    with pytest.raises(NotFinite, match="decoder's output is not finite in 1 of 96 numbers"):
        to_pixels(images)


def test_tensors_without_numbers_pass() -> None:
    assert to_pixels(torch.zeros(1, 3, 2, 2, device="meta")).dtype == torch.uint8


def test_a_lora_that_is_not_finite_is_neither_written_nor_read(tmp_path: Path) -> None:
    model = load_tiny_model()
    model.add_lora(rank=2, alpha=2)
    trained = {name: p.detach().clone() for name, p in model.transformer.named_parameters() if p.requires_grad}
    name = next(iter(trained))
    trained[name].view(-1)[0] = math.nan
    with pytest.raises(NotFinite, match=f"^the average of {name} is not finite in 1 of "):
        write_trained(model, tmp_path, 1, trained)
    assert not list(tmp_path.iterdir())
    model.save_trained(tmp_path, trained)
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.safetensors: the A of .* is not finite in 1 of "):
        load_tiny_model().load_trained(tmp_path)


def test_the_first_of_many_tensors_is_named() -> None:
    tensors = {"a": torch.zeros(3), "b": torch.tensor([1.0, math.inf]), "c": torch.tensor([math.nan])}
    assert (
        first_not_finite(tensors) == "b" and first_not_finite({"a": tensors["a"]}) is None and first_not_finite({}) is None
    )
    assert first_not_finite({"m": torch.zeros(2, device="meta"), "c": tensors["c"]}) == "c"
