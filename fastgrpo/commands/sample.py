"""Images of a saved run for given prompts, as one picture.

fastgrpo sample runs/tiny_shapes --prompt "two red circles" --output circles.png
"""

import argparse
from pathlib import Path

import torch

from fastgrpo.commands.saved_model import add_run_arguments, load_run
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt, given_prompts
from fastgrpo.policy import Policy
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.reporting.pictures import as_pictures, save_grid
from fastgrpo.sampling.generate import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    add_run_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="a prompt to draw; may be given more than once")
    parser.add_argument("--images", type=int, default=4, help="number of images for each prompt (default: %(default)s)")
    parser.add_argument("--input", type=Path, help="the image to edit, for models that edit images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help="the picture to write (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draws the images and writes the picture."""
    config, model = load_run(arguments.run, arguments.base)
    settings = config.evaluation
    if model.image_conditioned and arguments.input is None:
        raise ValueError(f"{config.model.name} edits images: give one with --input")
    texts = [text for text in given_prompts(arguments.prompt).prompts for _ in range(arguments.images)]
    prompts = [ImagePrompt(text, arguments.input) if model.image_conditioned else text for text in texts]
    guidance_scale = settings.guidance_scale if arguments.guidance is None else arguments.guidance
    address = noise_address(SAMPLE, arguments.seed, 0, torch.arange(len(prompts), device=model.device))
    prompted = Embeddings(model).prompted(prompts, guidance_scale)
    num_steps = arguments.steps or settings.num_steps
    images = generate(model, Policy(model), prompted, address, num_steps=num_steps, guidance_scale=guidance_scale)
    save_grid(arguments.output, as_pictures(images).permute(0, 2, 3, 1).cpu().numpy())
    print(arguments.output)
    return 0
