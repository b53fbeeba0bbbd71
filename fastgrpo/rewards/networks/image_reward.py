"""ImageReward v1.0 (arXiv 2304.05977): what people think of an image for its prompt; standardised, about -2 to 2.

    state = BLIP's text encoder over the prompt, attending to the image's patches, at the first token
    score = (head(state) - mean) / std          head: five linear maps, 768-1024-128-64-16-1

The folder holds ImageReward.pt and med_config.json of THUDM/ImageReward, and the tokenizer of bert-base-uncased. The
checkpoint has the names of Salesforce's BLIP: those of the text encoder are transformers' too, those of the vision
encoder are renamed. transformers' BLIP computes the same; its own default for the vision norms is another epsilon.
"""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from fastgrpo.data.pixels import as_arrays
from fastgrpo.rewards.networks.network import NetworkReward, load_network, mlp_head, rename_weights
from fastgrpo.rewards.networks.pixels import crop_and_normalize, shorter_side

CHECKPOINT, REPOSITORY = "ImageReward.pt", "THUDM/ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of both sizes of BLIP's vision encoder; no tensor tells
RULES = (
    (r"^blocks\.", "encoder.layers."), (r"\.attn\.proj\.", ".self_attn.projection."), (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."), (r"^norm\.", "post_layernorm."),
    (r"^cls_token$", "embeddings.class_embedding"), (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
)  # fmt: skip


class ImageReward(NetworkReward):
    """BLIP with a head on its first token."""

    name = "image_reward"
    needs: ClassVar[dict[str, str]] = {
        CHECKPOINT: REPOSITORY, "med_config.json": REPOSITORY,
        "tokenizer.json or vocab.txt": "google-bert/bert-base-uncased",
    }  # fmt: skip

    def build(self, folder: Path) -> None:
        weights = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        seen, read = (
            rename_weights(part_of(weights, "blip.visual_encoder."), RULES),
            part_of(weights, "blip.text_encoder."),
        )
        vision, source = vision_config(seen), folder / CHECKPOINT
        self.vision = load_network(BlipVisionModel, self.device, source, config=vision, state_dict=seen)
        config = text_config(json.loads((folder / "med_config.json").read_text(encoding="utf-8")), vision.hidden_size)
        self.text = load_network(BlipTextModel, self.device, source, config=config, state_dict=read, add_pooling_layer=False)
        self.head = mlp_head(config.hidden_size)
        self.head.load_state_dict(part_of(weights, "mlp."))
        self.head.to(self.device)
        self.tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        patches = self.vision(self.pixels(images)).last_hidden_state
        states = self.text(
            tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device),
            encoder_hidden_states=patches,
        ).last_hidden_state  # fmt: skip
        return (self.head["layers"](states[:, 0]).squeeze(-1) - MEAN) / STD

    def pixels(self, images: Tensor) -> Tensor:
        """The published transform of torchvision: shorter side by PIL's bicubic, crop, floats, CLIP's mean and deviation."""
        size = self.vision.config.image_size
        height, width = shorter_side(images.shape[-2], images.shape[-1], size)
        pictures = [Image.fromarray(array) for array in as_arrays(images)]
        resized = [np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in pictures]
        return crop_and_normalize(
            torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self.device).float() / 255, size
        )


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one part, by their names within it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def vision_config(weights: dict[str, Tensor]) -> BlipVisionConfig:
    """The vision encoder's sizes, which its tensors tell: the published file has no configuration for it."""
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    side = round((weights["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]), patch_size=patch,
        image_size=side * patch, num_hidden_layers=len({name.split(".")[2] for name in weights if ".layers." in name}),
        num_attention_heads=width // HEAD_WIDTH, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip


def text_config(med: dict, vision_width: int) -> BlipTextConfig:
    """BLIP's own configuration of its text encoder; `is_decoder` gives transformers' layers their cross-attention.

    med's encoder_width is of the base size: BLIP itself overwrites it by the width of the vision encoder that it has."""
    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "vocab_size", "hidden_act", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    return BlipTextConfig(**{key: med[key] for key in kept}, encoder_hidden_size=vision_width, is_decoder=True)
