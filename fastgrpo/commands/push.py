"""A run's trained weights with a model card, as a folder, or in a repository on the Hugging Face Hub.

fastgrpo push runs/sd3_geneval --folder card                                  writes the folder, and sends nothing
fastgrpo push runs/sd3_geneval --repo me/sd3-geneval --base-model stabilityai/stable-diffusion-3.5-medium
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from fastgrpo.commands.arguments import path
from fastgrpo.commands.export import new_folder
from fastgrpo.commands.saved_model import saved_config
from fastgrpo.config.keys import Config
from fastgrpo.config.schema import ConfigError
from fastgrpo.files import write_atomically
from fastgrpo.models import model_class
from fastgrpo.reporting.card import model_card
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.reporting.saved_run import read_run
from fastgrpo.trained_files import faults_of_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("run", type=path, help="folder of the run")
    parser.add_argument("--repo", help="the repository to make or to write into, as OWNER/NAME")
    parser.add_argument("--folder", type=path, help="write what would be sent into this folder, which may not be there yet")
    parser.add_argument("--base-model", help="the base model's name on the Hub, for the card (default: its folder's name)")
    parser.add_argument("--private", action="store_true", help="if the repository is made, nobody else can see it")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder, sends it if a repository is named, and prints where it is."""
    if arguments.repo is None and arguments.folder is None:
        raise ConfigError("push: name a repository with --repo, or a folder to write with --folder")
    if arguments.repo is not None and constants.HF_HUB_OFFLINE and arguments.folder is None:
        raise ConfigError(f"--repo {arguments.repo}: HF_HUB_OFFLINE is set, so nothing is sent; --folder writes it here")
    config = saved_config(arguments.run, False)
    if faults := faults_of_trained(arguments.run, None):
        raise ConfigError(f"{arguments.run}: its trained weights are not whole ({faults[0]}); see fastgrpo verify")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.folder is not None:
            new_folder(arguments.folder)
        folder = arguments.folder or Path(temporary) / "push"
        write_folder(config, arguments.run, folder, repo=arguments.repo, base=arguments.base_model)
        if arguments.repo is None or constants.HF_HUB_OFFLINE:
            print(f"{folder}: written" + (", and not sent, as HF_HUB_OFFLINE is set" if arguments.repo else ""))
        else:
            print(_send(folder, arguments.repo, private=arguments.private))
    return 0


def write_folder(config: Config, run: Path, folder: Path, *, repo: str | None, base: str | None) -> None:
    """Write the trained weights and README.md into a new folder."""
    trained = RunFolder(run).trained
    folder.mkdir(parents=True)
    for place in trained.values():
        if place.is_dir():
            shutil.copytree(place, folder / place.name)
        else:
            shutil.copy(place, folder)
    family, name = model_class(config.model.name), repo or run.resolve().name
    source = "text" if not family.image_conditioned else "video" if "strength" in family.takes else "image"
    task = f"{source}-to-{'video' if 'num_frames' in family.takes else 'image'}"
    text = model_card(
        read_run(run), config, name=name, base=base, pipeline=family.pipeline_class, task=task, networks=list(trained)
    )
    write_atomically(folder / "README.md", text)


def _send(folder: Path, repo: str, *, private: bool) -> str:
    """Send the folder; returns where it is to be seen. ConfigError with what the Hub says against it."""
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Trained with fastgrpo")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--repo {repo}: {reason}; log in with `hf auth login`, or write it with --folder") from error
    return str(made)
