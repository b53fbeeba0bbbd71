"""Weights by a formula: the same numbers wherever a network is made, so that no file of weights has to be kept."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np


def formula_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A value for each parameter, float32, from its name and shape alone. Scales of norms lie around 1."""
    weights = {}
    for name, shape in shapes.items():
        key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype=np.uint64)
        numbers = np.random.Generator(np.random.Philox(key=key)).uniform(-1, 1, tuple(shape))
        if len(shape) > 1:
            # Of an embedding each row is a token's own; of a layer the inputs are added up.
            spread = 1.0 if "embed" in name or "shared" in name else math.sqrt(3 / math.prod(shape[1:]))
            numbers = numbers * spread
        else:
            numbers = 0.2 * numbers + (1.0 if name.endswith("weight") else 0.0)
        weights[name] = numbers.astype(np.float32)
    return weights
