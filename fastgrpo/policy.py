"""A model as a policy: the network that an engine wraps and a rollout samples from."""

from torch import Tensor, nn


class Policy(nn.Module):
    """A model adapter's network as a module from (x, sigma, conditioning) to velocity: what an engine wraps."""

    def __init__(self, model) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.velocity = model.velocity

    def forward(self, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor:
        return self.velocity(x, sigma, conditioning)
