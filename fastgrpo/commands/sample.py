"""Images of a saved run for given prompts, as one picture.

fastgrpo sample runs/tiny_shapes --prompt "two red circles" --output circles.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from fastgrpo.commands.arguments import check_file, check_set, of_type, path
from fastgrpo.commands.saved_model import add_run_arguments, asked_config, saved_model
from fastgrpo.config.keys import ImageCount, Seed
from fastgrpo.config.sizes import evaluation_size
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import IMAGE_FIELD, ImagePrompt, PromptSet, check_input_images, check_not_empty, given_prompts
from fastgrpo.models import model_class
from fastgrpo.parts import check_guidance
from fastgrpo.policy import Policy, sized
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.reporting.pictures import as_pictures, save_grid
from fastgrpo.sampling.generate import generate

READ = ("model", "evaluation")  # the keys that --set may change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    add_run_arguments(parser, "evaluation.height=512")
    parser.add_argument("--prompt", action="append", required=True, help="a prompt to draw; may be given more than once")
    parser.add_argument(
        "--images", type=of_type(ImageCount), default=4, help="number of images for each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--input", type=path, action="append", default=[],
        help="the input image, for models that read one; given more than once, for those that read several",
    )  # fmt: skip
    parser.add_argument("--seed", type=of_type(Seed), default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument(
        "--output", type=path, default=Path("samples.png"), help="the picture to write (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draws the images and writes the picture."""
    check_set(arguments.set, READ, "sample")
    check_picture("--output", arguments.output)
    config = asked_config(arguments, arguments.set)
    settings = config.evaluation
    _check_input(arguments.input, config.model.name)
    given = given_prompts(arguments.prompt)
    if model_class(config.model.name).empty_is_no_prompt:
        check_not_empty(given, config.model.name)
    model = saved_model(config, arguments)
    texts = [text for text in given.prompts for _ in range(arguments.images)]
    prompts = [ImagePrompt(text, tuple(arguments.input)) if model.image_conditioned else text for text in texts]
    guidance_scale = settings.guidance_scale if arguments.guidance is None else arguments.guidance
    check_guidance(model, "guidance", guidance_scale)
    address = noise_address(SAMPLE, arguments.seed, 0, torch.arange(len(prompts), device=model.device))
    num_steps = arguments.steps or settings.num_steps
    with sized(model, evaluation_size(config)):
        prompted = Embeddings(model, negative_prompt=config.model.negative_prompt).prompted(prompts, guidance_scale)
        images = generate(model, Policy(model), prompted, address, num_steps=num_steps, guidance_scale=guidance_scale)
    save_grid(arguments.output, as_pictures(images).permute(0, 2, 3, 1).cpu().numpy())
    print(arguments.output)
    return 0


def check_picture(option: str, file: Path) -> None:
    """Refuse a file that could not be written, or whose suffix is of no kind of picture."""
    check_file(option, file)
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{option} {file}: {file.suffix or 'no suffix'} is no kind of picture; take .png")


def _check_input(images: Sequence[Path], family: str) -> None:
    """Refuse input images where the model reads none, a lack of one where it does, and another number than it reads."""
    if not model_class(family).image_conditioned:
        if images:
            raise ValueError(f"--input {images[0]}: {family} reads no image; leave it out")
        return
    if not images:
        raise ValueError(f"{family} reads an input image: give one with --input")
    for image in images:
        if not image.is_file():
            raise ValueError(f"--input {image}: no such file")
    record = {"prompt": "", IMAGE_FIELD: [str(image) for image in images]}
    check_input_images(PromptSet([""], [record], ["--input"]), model_class(family).input_images, family)
