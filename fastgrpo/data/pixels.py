"""Images as other libraries than torch expect them."""

import numpy as np
from torch import Tensor


def as_arrays(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) -> (B, H, W, 3) on the CPU, each image as PIL takes it."""
    return images.permute(0, 2, 3, 1).cpu().numpy()
