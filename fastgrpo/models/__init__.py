"""Model adapters by name. The names are strings, so that a family's libraries load only when it is used.

An adapter is a class of six members, see `fastgrpo.models.sd3`: `transformer`, `sigmas`, `encode`, `velocity`, `decode` and
`save_lora`. A new family is one file here and one line in `MODELS`.
"""

import importlib
import logging
from typing import Any

MODELS = {
    "sd3": "fastgrpo.models.sd3:SD3",
}


def load_model(name: str, **arguments: Any) -> Any:
    """The adapter called `name`, from its class's own `load`."""
    # diffusers asks transformers for image processors that no text-to-image model needs, which says so at every start.
    logging.getLogger("transformers.utils.import_utils").addFilter(lambda r: "requires torchvision" not in r.getMessage())
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute).load(**arguments)
