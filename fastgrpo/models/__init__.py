"""Model adapters by name. The names are strings, so that a family's libraries load only when it is used.

An adapter is a class of six members, see `fastgrpo.models.sd3`: `transformer`, `sigmas`, `encode`, `velocity`, `decode` and
`save_lora`. A new family is one file here and one line in `MODELS`.
"""

import importlib
from typing import Any

MODELS = {
    "sd3": "fastgrpo.models.sd3:SD3",
}


def load_model(name: str, **arguments: Any) -> Any:
    """The adapter called `name`, loaded with its class's own arguments."""
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(**arguments)
