"""Scores by CLIP: how near an image is to its prompt.

    image = f(image) / |f(image)|          text = g(prompt) / |g(prompt)|

    clip_score    image . text                          CLIP ViT-L/14 (arXiv 2103.00020), about 0.15 to 0.35
    pickscore     exp(logit_scale) image . text         PickScore_v1, a CLIP-H tuned on choices (arXiv 2305.01569), 16 to 26

Both are the raw published scores. Flow-GRPO trains on pickscore / 26 and on 100 image . text / 30: scales that its
advantages, divided by their deviation, do not see; in a sum of rewards the weight is the place for them.

A folder is the published repository. The processor of PickScore is the one of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, so
its tokenizer's files go into the folder too. Images pass through CLIP's published processor: the shorter side to 224 by
PIL's bicubic, centre crop, CLIP's mean and deviation. (Flow-GRPO's clip_scorer resizes bilinearly instead.)

E length of an embedding.
"""

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from fastgrpo.rewards.networks.network import TOKENIZER, NetworkReward, load_network
from fastgrpo.rewards.networks.pixels import preprocess

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WEIGHTS = "model.safetensors or pytorch_model.bin"


class ClipScore(NetworkReward):
    """The cosine of image and prompt."""

    low, high = -1.0, 1.0
    name = "clip_score"
    needs: ClassVar[dict[str, str]] = {"config.json": CLIP_L, WEIGHTS: CLIP_L, TOKENIZER: CLIP_L}

    def build(self, folder: Path) -> None:
        self.network: Any = self.load(folder)  # Any: a type checker takes transformers' configurations for mappings
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def load(self, folder: Path) -> CLIPModel:
        return load_network(CLIPModel, self.device, folder)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) uint8 -> (b, E) of length 1."""
        return normalize(self.network.get_image_features(self.pixels(images)).pooler_output)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """-> (b, E) of length 1. Always padded to the full length: then a score does not hang on the other prompts."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return normalize(self.network.get_text_features(**tokens.to(self.device)).pooler_output)

    def pixels(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) uint8 -> (b, 3, S, S) float32, what the network sees."""
        return preprocess(images, self.network.config.vision_config.image_size).to(self.device)


class PickScore(ClipScore):
    """The cosine times the temperature that PickScore learned, close to 100."""

    low, high = NetworkReward.low, NetworkReward.high
    name = "pickscore"
    needs: ClassVar[dict[str, str]] = {
        "config.json": "yuvalkirstain/PickScore_v1", WEIGHTS: "yuvalkirstain/PickScore_v1", TOKENIZER: CLIP_H,
    }  # fmt: skip

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.network.logit_scale.exp() * super().score(images, prompts)


def normalize(embeddings: Tensor) -> Tensor:
    """(B, E) -> (B, E) of length 1."""
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
