"""The trained weights of a run for other programs: as a LoRA in their format, or merged into the base's own files.

Of a model of two experts each that was trained has its own file, as those programs read them.

fastgrpo export runs/sd3_geneval --format comfyui --output exported
fastgrpo export runs/sd3_geneval --format merged --output merged --set model.path=/models/stable-diffusion-3.5-medium
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

from fastgrpo.commands.arguments import add_set, check_set, path
from fastgrpo.commands.saved_model import saved_config
from fastgrpo.config.keys import Config
from fastgrpo.config.schema import ConfigError
from fastgrpo.files import move_into_place, writing_to
from fastgrpo.models import base_of, model_class
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.lora_file import NOISE, read_lora, write_lora
from fastgrpo.models.lora_formats import FORMATS
from fastgrpo.models.merged import write_merged
from fastgrpo.reporting.run_folder import RunFolder

MERGED = "merged"
READ = ("model.path", "model.transformer", "model.variant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("run", type=path, help="folder of the run")
    parser.add_argument(
        "--format", required=True, choices=[*FORMATS, MERGED],
        help="whose program is to read it; merged: the base's files with the trained weights in them",
    )  # fmt: skip
    parser.add_argument("--output", type=path, required=True, help="the folder to write, which may not be there yet")
    add_set(parser, "model.path=...")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and prints its name."""
    check_set(arguments.set, READ, "export")
    config = saved_config(arguments.run, False, arguments.set)
    new_folder(arguments.output)
    export(config, arguments.run, arguments.format, arguments.output)
    print(arguments.output)
    return 0


def new_folder(output: Path) -> None:
    """Refuse a folder to write that is there already: ConfigError."""
    if output.exists():
        raise ConfigError(f"--output {output}: is there already; name a new folder")


def export(config: Config, run: Path, form: str, output: Path) -> None:
    """Write a run's trained weights in a format into a new folder, which is there whole or not at all."""
    if config.model.random_weights:
        raise ConfigError(f"{run}: model.random_weights: it trained random numbers, which nothing else could run on")
    trained = RunFolder(run).trained
    if form != MERGED and any(place.is_dir() for place in trained.values()):
        raise ConfigError(f"--format {form}: {run} trained every weight and has no LoRA; take {MERGED}")
    family, base = model_class(config.model.name), config.model.path
    family.check_files(base, **base_of(config.model))
    aside = output.with_name(f"{output.name}.partial")
    try:
        with writing_to(output):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if form == MERGED:
                write_merged(family, base, trained, aside, **base_of(config.model))
            else:
                write_loras(family, base, trained, form, aside, run.resolve().name)
            move_into_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_loras(family: type[Adapter], base: Path, trained: Mapping[str, Path], form: str, folder: Path, name: str) -> None:
    """Write the LoRA of each network in a format. name: of files that no reader looks for by name.

    Of two experts diffusers' files keep their names, PEFT's lie in a folder each, and others say the noise in their names.
    """
    several = (base / "transformer_2").is_dir()
    for network, file in trained.items():
        skeleton, place, title = family.skeleton(base, network), folder, name
        if several:
            title = f"{name}_{NOISE[network]}"
            place = folder / network if form == "peft" else folder
            place.mkdir(exist_ok=True)
        write_lora(place, form, read_lora(file, skeleton), skeleton, name=title, weight_name=file.name)
