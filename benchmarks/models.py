"""The models that benchmarks run: the embedded tiny one, and Stable Diffusion 3.5 Medium at full size with random weights.

Speed does not depend on what the weights say, so no checkpoint is needed.
"""

import torch
from common import DEVICE, ROOT
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from fastgrpo.models import load_model
from fastgrpo.models.sd3 import SD3, Conditioning

TEXT_TOKENS = 77 + 256  # of CLIP and of T5, as the published training has it


def load(name: str, resolution: int) -> SD3:
    if name == "tiny":
        weights = ROOT / "fastgrpo" / "tiny" / "weights"
        return load_model("sd3", path=weights, dtype=torch.float32, device=DEVICE, max_text_tokens=1)
    return sd35_medium(resolution)


def sd35_medium(resolution: int, dtype: torch.dtype = torch.bfloat16) -> SD3:
    """The published architecture, 2.2 billion parameters in the transformer, no text encoders."""
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype)
        transformer = SD3Transformer2DModel(
            sample_size=resolution // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
            attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=2,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        torch.set_default_dtype(torch.float32)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return SD3(pipeline, dtype=dtype, device=DEVICE, max_text_tokens=256)


def conditioning(model: SD3, batch: int) -> Conditioning:
    """Random embeddings of the right shapes."""
    config = model.transformer.config
    tokens = TEXT_TOKENS if not model.text_encoders else model.encode(["a red circle"]).embeds.shape[1]
    torch.manual_seed(0)
    return Conditioning(
        torch.randn(batch, tokens, config.joint_attention_dim, device=DEVICE, dtype=model.dtype),
        torch.randn(batch, config.pooled_projection_dim, device=DEVICE, dtype=model.dtype),
    )
