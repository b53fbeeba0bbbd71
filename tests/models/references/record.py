"""Records what the stock pipelines made of prompts with the libraries that the published weights were used with first.

    python -m venv old && old/bin/pip install transformers==4.51.3 diffusers==0.37.0 torch "numpy<2.4" safetensors pillow
    PYTHONPATH=tests old/bin/python tests/models/references/record.py

It writes a folder for each kind of prompt reader: its parts with their configs and tokenizers as those libraries save them,
the names and shapes of their weights in place of the weights, whose values `support.formula` gives, and what the pipeline's
own `encode_prompt` returned. `test_references.py` reads these folders with the libraries of today.
"""

import json
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from support.formula import formula_weights
from support.reference_prompts import PROMPTS, edited_image
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing

HERE = Path(__file__).parent
LETTERS = string.ascii_letters + string.digits + string.punctuation
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = (
    "{% for message in messages if message['role'] == 'user' %}<|im_start|>"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)


def byte_pairs(kind: Any, tokens: list[str], **options: Any) -> Any:
    """A tokenizer of single letters, from the files in which the old ones were published."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return kind(str(vocabulary), str(merges), **options)


def clip_tokenizer() -> Any:
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return byte_pairs(transformers.CLIPTokenizer, tokens, model_max_length=77)


def qwen_tokenizer(template: str = CHAT, special: tuple[str, ...] = ()) -> Any:
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer = byte_pairs(transformers.Qwen2TokenizerFast, tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    tokenizer.chat_template = template
    return tokenizer


def t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    tokenizer = Tokenizer(Unigram([(piece, 0.0 if i < 3 else -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def clip_encoder(kind: Any, vocabulary: int) -> Any:
    return kind(transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    ))  # fmt: skip


def t5_encoder(kind: str, vocabulary: int) -> Any:
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    ))  # fmt: skip


def qwen3(kind: str, vocabulary: int, layers: int, width: int) -> Any:
    return getattr(transformers, kind)(transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    ))  # fmt: skip


def qwen25_vl(tokenizer: Any) -> Any:
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    ))  # fmt: skip


def mistral3(vocabulary: int) -> Any:
    text = transformers.MistralConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=31, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        head_dim=8,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=vocabulary - 1)
    )


def sd3() -> tuple[dict, Callable]:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    projected = transformers.CLIPTextModelWithProjection
    parts = {
        "text_encoder": clip_encoder(projected, len(clip)), "tokenizer": clip,
        "text_encoder_2": clip_encoder(projected, len(clip)), "tokenizer_2": clip,
        "text_encoder_3": t5_encoder("T5", len(t5)), "tokenizer_3": t5,
    }  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **parts)

    def encode(prompt: str) -> dict:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [prompt], None, None, do_classifier_free_guidance=False, max_sequence_length=24, device="cpu"
        )
        return {"embeds": embeds, "pooled": pooled}

    return parts, encode


def flux() -> tuple[dict, Callable]:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    parts = {
        "text_encoder": clip_encoder(transformers.CLIPTextModel, len(clip)), "tokenizer": clip,
        "text_encoder_2": t5_encoder("T5", len(t5)), "tokenizer_2": t5,
    }  # fmt: skip
    pipeline = diffusers.FluxPipeline(transformer=None, scheduler=None, vae=None, **parts)

    def encode(prompt: str) -> dict:
        embeds, pooled, _ = pipeline.encode_prompt([prompt], None, max_sequence_length=24, device="cpu")
        return {"embeds": embeds, "pooled": pooled}

    return parts, encode


def wan() -> tuple[dict, Callable]:
    t5 = t5_tokenizer()
    parts = {"text_encoder": t5_encoder("UMT5", len(t5)), "tokenizer": t5}
    pipeline = diffusers.WanPipeline(scheduler=None, vae=None, **parts)

    def encode(prompt: str) -> dict:
        embeds, _ = pipeline.encode_prompt(
            [prompt], do_classifier_free_guidance=False, max_sequence_length=24, device=torch.device("cpu")
        )
        return {"embeds": embeds}

    return parts, encode


def qwen_image() -> tuple[dict, Callable]:
    tokenizer = qwen_tokenizer(special=VISION)
    parts = {"text_encoder": qwen25_vl(tokenizer), "tokenizer": tokenizer}
    pipeline = diffusers.QwenImagePipeline(scheduler=None, vae=None, transformer=None, **parts)
    return parts, lambda prompt: {"embeds": pipeline.encode_prompt([prompt], device="cpu", max_sequence_length=192)[0]}


def qwen_image_edit() -> tuple[dict, Callable]:
    tokenizer = qwen_tokenizer(special=VISION)
    pixels = transformers.Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1 << 20
    )
    parts = {"text_encoder": qwen25_vl(tokenizer), "tokenizer": tokenizer}
    processor = ImagesAndTexts(pixels, tokenizer)
    pipeline = diffusers.QwenImageEditPipeline(scheduler=None, vae=None, transformer=None, processor=processor, **parts)
    image: Image.Image = edited_image()

    def encode(prompt: str) -> dict:
        embeds, _ = pipeline.encode_prompt([prompt], image=image, device="cpu", max_sequence_length=320)
        return {"embeds": embeds}

    return {**parts, "processor": processor}, encode


class ImagesAndTexts(transformers.Qwen2VLProcessor):
    """The processor without its part for videos; saved and read as the whole one."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)


def z_image() -> tuple[dict, Callable]:
    tokenizer = qwen_tokenizer()
    parts = {"text_encoder": qwen3("Qwen3Model", len(tokenizer), layers=3, width=32), "tokenizer": tokenizer}
    pipeline = diffusers.ZImagePipeline(scheduler=None, vae=None, transformer=None, **parts)

    def encode(prompt: str) -> dict:
        (embeds,), _ = pipeline.encode_prompt([prompt], "cpu", do_classifier_free_guidance=False, max_sequence_length=64)
        return {"embeds": embeds[None]}

    return parts, encode


def flux2() -> tuple[dict, Callable]:
    tokenizer = qwen_tokenizer(USER, special=("[IMG]",))
    parts = {"text_encoder": mistral3(len(tokenizer)), "tokenizer": tokenizer}
    pipeline = diffusers.Flux2Pipeline(scheduler=None, vae=None, transformer=None, **parts)
    return parts, lambda prompt: {"embeds": pipeline.encode_prompt([prompt], "cpu", max_sequence_length=64)[0]}


def flux2_klein() -> tuple[dict, Callable]:
    tokenizer = qwen_tokenizer()
    parts = {"text_encoder": qwen3("Qwen3ForCausalLM", len(tokenizer), layers=31, width=16), "tokenizer": tokenizer}
    pipeline = diffusers.Flux2KleinPipeline(scheduler=None, vae=None, transformer=None, **parts)
    return parts, lambda prompt: {"embeds": pipeline.encode_prompt([prompt], "cpu", max_sequence_length=64)[0]}


def record(name: str, parts: dict, encode: Callable) -> None:
    folder, shapes = HERE / name, {}
    shutil.rmtree(folder, ignore_errors=True)
    for part, value in parts.items():
        if isinstance(value, torch.nn.Module):
            # As `save_pretrained` would write them: tied weights once.
            tied = set(value._tied_weights_keys or ()) if value.config.tie_word_embeddings else set()
            shapes[part] = {key: list(tensor.shape) for key, tensor in value.state_dict().items() if key not in tied}
            weights = {key: torch.from_numpy(array) for key, array in formula_weights(shapes[part]).items()}
            value.load_state_dict(weights, strict=False)
            value.tie_weights()
            value.eval().config.save_pretrained(folder / part)
        else:
            value.save_pretrained(folder / part)
    (folder / "weights.json").write_text(json.dumps(shapes, separators=(",", ":")) + "\n", encoding="utf-8")
    with torch.no_grad():
        outputs = {f"{i}.{key}": tensor for i, prompt in enumerate(PROMPTS) for key, tensor in encode(prompt).items()}
    versions = {"transformers": transformers.__version__, "diffusers": diffusers.__version__}
    save_file(
        {key: tensor.float().contiguous() for key, tensor in outputs.items()}, folder / "outputs.safetensors", versions
    )
    print(name, {key: tuple(tensor.shape) for key, tensor in outputs.items()})


if __name__ == "__main__":
    for family in (sd3, flux, wan, qwen_image, qwen_image_edit, z_image, flux2, flux2_klein):
        record(family.__name__, *family())
