"""LAION's aesthetic predictor, version 2: how much people would like an image, whatever its prompt; about 4 to 7.

    score = head(f(image) / |f(image)|)          f: CLIP ViT-L/14, head: five linear maps, 768-1024-128-64-16-1

From github.com/christophschuhmann/improved-aesthetic-predictor, which holds `head`, the file
sac+logos+ava1-l14-linearMSE.pth; `path` is openai/clip-vit-large-patch14. The raw score, as Flow-GRPO trains on it.
"""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import CLIPModel

from fastgrpo.rewards.networks.clip import CLIP_L, WEIGHTS, normalize
from fastgrpo.rewards.networks.network import BatchSize, NetworkReward, load_network, mlp_head
from fastgrpo.rewards.networks.pixels import preprocess

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


class Aesthetic(NetworkReward):
    """Scores the image only; the prompt is ignored."""

    name = "aesthetic"
    needs: ClassVar[dict[str, str]] = {"config.json": CLIP_L, WEIGHTS: CLIP_L}

    def __init__(
        self,
        device: torch.device,
        *,
        path: str = "",  # the folder of CLIP
        head: str = "",  # the file of the head's weights; left out: looked for in the folder `path`
        batch_size: BatchSize = 32,  # images that go through the network at once
    ) -> None:
        self.file = Path(head or Path(path) / HEAD)
        super().__init__(device, path=path, batch_size=batch_size)

    def build(self, folder: Path) -> None:
        if not self.file.is_file():
            raise ValueError(
                f"reward.settings.aesthetic.head = {self.file}: no such file; "
                f"get {HEAD} from github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        self.network = load_network(CLIPModel, self.device, folder)
        del self.network.text_model  # half a gigabyte that nothing here reads
        self.head = mlp_head(self.network.config.projection_dim)
        self.head.load_state_dict(torch.load(self.file, map_location="cpu", weights_only=True))
        self.head.to(self.device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = preprocess(images, self.network.config.vision_config.image_size).to(self.device)
        return self.head["layers"](normalize(self.network.get_image_features(pixels).pooler_output)).squeeze(-1)
