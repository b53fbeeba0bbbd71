"""Human Preference Score v2.1 (arXiv 2306.09341): the cosine of image and prompt under a CLIP-H tuned on human choices.

    score = image . text, each of length 1; about 0.2 to 0.35, and comparable for one prompt only

The published checkpoint has the names of open_clip; here they become transformers' own, so that open_clip is not needed.
The folder holds HPS_v2.1_compressed.pt of xswu/HPSv2, and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, from which it was
tuned, the small files config.json and tokenizer.json: the same network, the same words.

Two differences from the package hpsv2: it multiplies matrices in half precision, here all is float32; and it mends a
prompt's broken Unicode and HTML entities first, which this tokenizer takes as they are.
"""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPConfig, CLIPModel

from fastgrpo.rewards.networks.clip import CLIP_H, ClipScore
from fastgrpo.rewards.networks.network import TOKENIZER, load_network, rename_weights
from fastgrpo.rewards.networks.pixels import crop_and_normalize, shorter_side

CHECKPOINT = "HPS_v2.1_compressed.pt"
# In order: what is inside a layer, then where the layer is. logit_scale is called so in both.
RULES = (
    (r"ln_([12])\.", r"layer_norm\1."), (r"\.attn\.", ".self_attn."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."), (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)  # fmt: skip


class HPSv2(ClipScore):
    """The cosine of image and prompt, with open_clip's weights and image transform."""

    name = "hpsv2"
    needs: ClassVar[dict[str, str]] = {CHECKPOINT: "xswu/HPSv2", "config.json": CLIP_H, TOKENIZER: CLIP_H}

    def load(self, folder: Path) -> CLIPModel:
        weights = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        return load_network(CLIPModel, self.device, folder / CHECKPOINT, config=config, state_dict=from_open_clip(weights))

    def pixels(self, images: Tensor) -> Tensor:
        """hpsv2 turns an image into floats before it resizes, so nothing is rounded to whole levels or cut at 0 and 255."""
        size = self.network.config.vision_config.image_size
        pixels = images.to(self.device).float() / 255
        pixels = interpolate(pixels, shorter_side(pixels.shape[-2], pixels.shape[-1], size), mode="bicubic", antialias=True)
        return crop_and_normalize(pixels, size)


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's weights by transformers' names. open_clip keeps query, key and value in one, and multiplies by its
    projections from the right."""
    names: dict[str, Tensor] = {}
    for name, tensor in rename_weights(weights, RULES).items():
        if ".in_proj_" in name:
            before, kind = name.split("in_proj_")
            names |= {f"{before}{part}_proj.{kind}": piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            names[name] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
    return {name: tensor.contiguous() for name, tensor in names.items()}
