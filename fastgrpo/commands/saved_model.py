"""The arguments, the configuration and the model of a saved run, or of any LoRA, which several commands share.

fastgrpo eval runs/tiny_shapes
fastgrpo eval --lora FILE_OR_FOLDER --config configs/sd3_geneval.yaml
fastgrpo eval --lora FILE_OR_FOLDER --model sd3 --path stable-diffusion-3.5-medium --prompts a.txt --reward ocr
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgrpo.commands.arguments import add_set, of_type, path
from fastgrpo.config.keys import Guidance, StepCount
from fastgrpo.config.sizes import named_sizes
from fastgrpo.measure import DEVICE
from fastgrpo.models import MODELS, configured_model
from fastgrpo.policy import Model, check_sizes
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.validation import Config, ConfigError, config_of, load_config


def add_run_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """example: of a key that the command reads, for the help of --set."""
    parser.add_argument("run", type=path, nargs="?", help="folder of the run")
    parser.add_argument("--base", action="store_true", help="take the model that the run started from, or without --lora")
    parser.add_argument("--steps", type=of_type(StepCount), help="number of ODE steps (default: the run's own)")
    parser.add_argument("--guidance", type=of_type(Guidance), help="guidance scale (default: the run's own)")
    other = parser.add_argument_group("in place of a run")
    other.add_argument("--lora", type=path, help="a LoRA that was trained anywhere: its file, or a folder that holds it")
    other.add_argument("--config", type=path, help="the configuration that says which model the LoRA is of, and the rest")
    other.add_argument("--model", choices=sorted(MODELS), help="or the family of the model, with --path")
    other.add_argument("--path", type=path, help="and its folder")
    add_set(parser, example)


def asked_config(arguments: argparse.Namespace, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run, or the one to run a LoRA with; ConfigError where the arguments name neither or both."""
    about_lora = [f"--{name}" for name in ("lora", "config", "model", "path") if getattr(arguments, name) is not None]
    if arguments.run is not None:
        if about_lora:
            raise ConfigError(f"{about_lora[0]}: goes in place of the run {arguments.run}; leave one of them out")
        return saved_config(arguments.run, arguments.base, overrides)
    if arguments.lora is None:
        raise ConfigError("name a run's folder, or a LoRA with --lora")
    lora = (
        [] if arguments.base else [f"model.lora={{path: {json.dumps(str(arguments.lora.absolute()))}}}", "model.train=lora"]
    )
    if about_lora == ["--lora", "--config"]:
        return load_config(arguments.config, [*lora, *overrides])
    if about_lora != ["--lora", "--model", "--path"]:
        raise ConfigError("--lora: say which model it is of, with --config, or with --model and --path")
    # What it was trained with, no command reads that takes a LoRA in place of a run.
    unread, reward = {"train": "unread.txt", "eval": "unread.txt"}, dict.fromkeys(("train", "eval"), "jpeg_compressibility")
    model = {"name": arguments.model, "path": str(arguments.path.absolute())}
    return config_of({"model": model, "prompts": unread, "reward": reward, "output": "unread"}, [*lora, *overrides])


def saved_config(run: Path, base: bool, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run whose weights are there, those it started from where `base`."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run}: not the folder of a run: it holds no {folder.config.name}")
    if not base and not folder.trained:
        raise ConfigError(
            f"{run}: holds no trained weights, as the run has saved no checkpoint yet; take --base for the model that it "
            "started from"
        )
    # Where it is now: it may have been moved.
    return replace(load_config(folder.config, overrides), output=run.absolute())


def saved_model(config: Config, arguments: argparse.Namespace) -> Model:
    """The model on this machine's device: the trained one, or the one that the run started from, or that with the LoRA."""
    model = configured_model(config.model, DEVICE)
    check_sizes(model, named_sizes(config))
    trained = config.model.lora.path if arguments.base or arguments.run is None else arguments.run
    if trained is not None:
        model.load_trained(trained)
    return model
