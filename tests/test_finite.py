"""Numbers that are not finite are named, with how many there are and where."""

import math

import pytest
import torch

from fastgrpo.finite import NotFinite, at, check_finite
from fastgrpo.models.adapter import to_pixels


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
