"""Makes the tiny Stable Diffusion 3 pipeline of a tiny world, from nothing, on a CPU.

An autoencoder for the world's images; then, on captioned images encoded once, a flow-matching transformer with its two text
encoders, trained together. What is saved is an ordinary diffusers folder, read by
`StableDiffusion3Pipeline.from_pretrained`. Captions are right at first, so that words get their meaning, and then partly
wrong on purpose (a recipe's stages): like a model trained on captions from the web, the result draws clean images, but not
always of what was asked, which is what reinforcement learning then has to mend. Captions kept for evaluation never occur.

    python -m fastgrpo.tiny.pretrain --world shapes

Seeded; a run that is stopped goes on from its last checkpoint in `--work`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from fastgrpo.files import atomic_file
from fastgrpo.tiny import recipe as shapes
from fastgrpo.tiny.recipe import Recipe
from fastgrpo.tiny.text import recipe as text

WORLDS = {"shapes": shapes, "text": text}
WIDTH = 64  # of each text encoder
SHIFT = 3.0  # of the noise schedule, as in Stable Diffusion 3
LOG_EVERY = 100  # steps
CAPTION_DROP = 0.1  # share of captions left empty, for classifier-free guidance


def make_dataset(recipe: Recipe, size: int, seed: int, stage: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, H, W) uint8, the index of each one's caption (N,), and the captions."""
    rng = np.random.default_rng([seed, stage + 1])
    train, _ = recipe.split_prompts()
    share, correct = recipe.tag_share, recipe.stages[stage].correct
    by_tag = {tag: [i for i, record in enumerate(train) if record["tag"] == tag] for tag in share}
    images, captions = np.empty((size, *recipe.image_size, 3), np.uint8), np.empty(size, np.int64)
    tags = rng.choice(list(share), size, p=list(share.values()))
    for n, tag in enumerate(tqdm(tags, desc="images", mininterval=5)):
        captions[n] = rng.choice(by_tag[tag])
        record = train[captions[n]]
        if rng.random() > correct[tag]:
            record = recipe.mislabel(record, rng)
        images[n] = recipe.draw(record, rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(captions), [r["prompt"] for r in train]


def make_tokenizer(recipe: Recipe) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs merge each word of the world into one token."""
    words = recipe.words()
    alphabet = sorted({character for word in words for character in word})
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply(merges, [*word[:-1], word[-1] + "</w>"])
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=recipe.max_tokens)


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    for left, right in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == (left, right):
                pieces[i : i + 2] = [left + right]
            i += 1
    return pieces


def make_vae(recipe: Recipe) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=max(recipe.image_size),
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def make_pipeline(recipe: Recipe, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    tokenizer, largest = make_tokenizer(recipe), max(recipe.image_size)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=recipe.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = SD3Transformer2DModel(
        sample_size=largest // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=recipe.heads,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32 * recipe.heads,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=largest // 8,
        qk_norm="rms_norm",
    )
    zero_init_modulation(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=make_tokenizer(recipe),
        text_encoder_3=make_silent_t5(),
        tokenizer_3=make_silent_tokenizer(recipe.max_tokens),
    )


def make_silent_t5() -> T5EncoderModel:
    """A T5 whose last norm is zero, so that it says of every token what diffusers says in place of a missing T5: zeros.

    The world needs no third text encoder, but `StableDiffusion3Pipeline.from_pretrained` asks for one.
    """
    config = T5Config(vocab_size=2, d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


def make_silent_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Reads every prompt as its end alone: one token, so that nothing is ever cut off."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    tokenizer.normalizer = Replace(Regex("(.|\\n)+"), "")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="</s>", model_max_length=max_tokens
    )


def zero_init_modulation(transformer: SD3Transformer2DModel) -> None:
    """Start every block as the identity and the output at zero (adaLN-Zero, arXiv 2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (name.endswith(".linear") and "norm" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def train_vae(
    recipe: Recipe, images: Tensor, steps: int, batch: int = 32, lr: float = 2e-3, kl_weight: float = 2e-4
) -> AutoencoderKL:
    """Squared error plus a little KL, then the latents' mean and scale measured for the pipeline's normalisation."""
    vae = make_vae(recipe).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="autoencoder", mininterval=5)
    for _ in bar:
        x = to_unit(images[torch.randint(len(images), (batch,))])
        posterior = vae.encode(x).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, x)
        loss = error + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(error=f"{error.item():.5f}", refresh=False)
    vae.eval()
    latents = encode_images(vae, images[:4096])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch: int = 512) -> Tensor:
    """Latent means (N, 4, H / 4, W / 4), not yet normalised."""
    chunks = tqdm(images.split(batch), desc="latents", mininterval=5)
    return torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in chunks])


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels to the autoencoder's range, [-1, 1]."""
    return images.float() / 127.5 - 1


def encode_captions(pipeline: StableDiffusion3Pipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` returns at max_sequence_length=1, the T5's token being zeros."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (B, L, 2 WIDTH)
    return F.pad(embeds, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


def flow_loss(pipeline: StableDiffusion3Pipeline, latents: Tensor, tokens: Tensor) -> Tensor:
    """Squared error of the velocity, v = noise - data, at shifted uniform noise levels."""
    unique, inverse = tokens.unique(dim=0, return_inverse=True)
    embeds, pooled = encode_captions(pipeline, unique)
    u = torch.rand(len(latents), 1, 1, 1)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn_like(latents)
    velocity = pipeline.transformer(
        hidden_states=(1 - sigma) * latents + sigma * noise,
        timestep=sigma.flatten() * 1000,
        encoder_hidden_states=embeds[inverse],
        pooled_projections=pooled[inverse],
    ).sample
    return F.mse_loss(velocity, noise - latents)


def train_transformer(pipeline: StableDiffusion3Pipeline, recipe: Recipe, stage: int, args: argparse.Namespace) -> None:
    """One-cycle AdamW with an exponential average, which is what the pipeline holds at the end."""
    plan = recipe.stages[stage]
    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    parameters = [p for module in modules for p in module.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, total_steps=plan.steps, pct_start=0.05)
    checkpoint, start = args.work / f"stage{stage}.pt", 0
    if checkpoint.exists():
        start = restore(checkpoint, parameters, average, optimizer, schedule)
    if start < plan.steps:
        images, captions, prompts = make_dataset(recipe, args.images, args.seed, stage)
        vae = pipeline.vae
        latents = (encode_images(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor
        tokenized = pipeline.tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    bar = tqdm(range(start, plan.steps), desc=f"stage {stage}", initial=start, total=plan.steps, mininterval=5)
    began, running = time.time(), 0.0
    for step in bar:
        # The step alone decides its batch, so a resumed run is the same.
        torch.manual_seed((args.seed * len(recipe.stages) + stage) * 1_000_003 + step)
        index = torch.randint(len(latents), (recipe.batch,))
        dropped = torch.rand(recipe.batch) < CAPTION_DROP
        tokens = tokenized[torch.where(dropped, len(prompts), captions[index])]
        loss = flow_loss(pipeline, latents[index], tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        running += loss.item()
        if (step + 1) % LOG_EVERY == 0:
            row = {"stage": stage, "step": step + 1, "loss": round(running / LOG_EVERY, 5)}
            row["seconds"] = round(time.time() - began, 1)
            with (args.work / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=row["loss"], refresh=False)
            running = 0.0
        if (step + 1) % args.save_every == 0 or step + 1 == plan.steps:
            save(checkpoint, step + 1, parameters, average, optimizer, schedule)
            export(pipeline, parameters, average, args.output)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def save(path: Path, step: int, parameters: list[Tensor], average: list[Tensor], optimizer, schedule) -> None:
    state = {"step": step, "parameters": parameters, "average": average}
    state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    with atomic_file(path) as partial:
        torch.save(state, partial)


def restore(path: Path, parameters: list[Tensor], average: list[Tensor], optimizer, schedule) -> int:
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, state["parameters"])
        torch._foreach_copy_(average, state["average"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def export(pipeline: StableDiffusion3Pipeline, parameters: list[Tensor], average: list[Tensor], output: Path) -> None:
    """Save the pipeline with the averaged weights; training goes on with its own."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
        pipeline.save_pretrained(output)
        torch._foreach_copy_(parameters, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the pipeline of a tiny world.")
    parser.add_argument("--world", choices=WORLDS, default="shapes")
    parser.add_argument("--output", type=Path, help="diffusers folder to write; the world's own if left out")
    parser.add_argument("--work", type=Path, help="checkpoints and log; runs/tiny_pretrain_WORLD if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=120_000)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--save-every", type=int, default=1000)
    args = parser.parse_args()
    world, recipe = WORLDS[args.world], WORLDS[args.world].RECIPE
    args.output = args.output or Path(world.__file__).parent / "weights"
    args.work = args.work or Path("runs") / f"tiny_pretrain_{args.world}"
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    vae = load_vae(recipe, args)
    torch.manual_seed(args.seed)
    pipeline = make_pipeline(recipe, vae)
    for stage in range(len(recipe.stages)):
        train_transformer(pipeline, recipe, stage, args)


def load_vae(recipe: Recipe, args: argparse.Namespace) -> AutoencoderKL:
    """The autoencoder of `--work`, trained first if there is none."""
    path = args.work / "vae.pt"
    if not path.exists():
        images, _, _ = make_dataset(recipe, args.images, args.seed, 0)
        vae = train_vae(recipe, images, args.vae_steps)
        scale = {key: vae.config[key] for key in ("shift_factor", "scaling_factor")}
        torch.save({"weights": vae.state_dict(), "scale": scale}, path)
    saved = torch.load(path, weights_only=True)
    vae = make_vae(recipe).eval()
    vae.load_state_dict(saved["weights"])
    vae.register_to_config(**saved["scale"])
    return vae


if __name__ == "__main__":
    main()
