"""A model's settings: one list, which the configuration and the models share."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch

from fastgrpo.config.keys import ModelConfig
from fastgrpo.models import MODELS, configured_model
from fastgrpo.models.settings import Settings

CPU = torch.device("cpu")


def test_a_configuration_has_every_setting_with_the_same_type_and_default() -> None:
    def typed(cls: type) -> dict[str, tuple]:
        hints = get_type_hints(cls)  # without the bounds that a configuration adds
        return {field.name: (hints[field.name], field.default) for field in fields(cls)}

    settings = typed(Settings)
    del settings["max_text_tokens"]  # a configuration may leave it to the family
    assert settings.items() <= typed(ModelConfig).items()


@pytest.mark.parametrize("random_weights", [False, True])
def test_every_setting_of_a_configuration_reaches_the_model(random_weights: bool, monkeypatch) -> None:
    class Family:
        @classmethod
        def load(
            cls,
            *,
            path: Path,
            dtype: torch.dtype,
            device: torch.device,
            transformer: Path | None = None,
            variant: str | None = None,
            **settings: object,
        ) -> SimpleNamespace:
            made = SimpleNamespace(origin=path, dtype=dtype, device=device, settings=Settings(**settings))
            return SimpleNamespace(**vars(made), check_numbers=lambda *_: None)

        @classmethod
        def random(cls, architecture: str, *, dtype: torch.dtype, device: torch.device, **settings: object):
            return cls.load(path=architecture, dtype=dtype, device=device, **settings)

    monkeypatch.setitem(MODELS, "own", f"{__name__}:Family")
    monkeypatch.setitem(globals(), "Family", Family)
    chosen = {
        "max_text_tokens": 7, "height": 32, "width": 48, "input_size": 64, "num_frames": 5, "distilled_guidance": 2.5,
        "experts": "low", "idle_expert": "host", "strength": 0.5,
    }  # fmt: skip
    assert chosen.keys() == {field.name for field in fields(Settings)}
    section = ModelConfig(
        name="own", path=Path("weights"), architecture="design", dtype="bfloat16", random_weights=random_weights, **chosen
    )
    model = configured_model(section, CPU)
    assert model.settings == Settings(**chosen) and (model.dtype, model.device) == (torch.bfloat16, CPU)
    assert model.origin == ("design" if random_weights else Path("weights"))
