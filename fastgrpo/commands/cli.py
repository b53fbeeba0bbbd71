"""The console script.

fastgrpo train --config configs/tiny_shapes.yaml                     train a model in one process
fastgrpo resume runs/tiny_shapes                                     go on with a run that was stopped
fastgrpo verify runs/tiny_shapes                                     whether all in its folder is what was written
fastgrpo plan --config configs/sd3_compressibility.yaml              what a run will need, before a machine is rented
fastgrpo bench --config configs/sd3_compressibility.yaml --random-weights     what this machine does with it
fastgrpo eval runs/tiny_shapes                                       the trained model on the held-out prompts
fastgrpo eval runs/tiny_shapes --base                                the model it started from
fastgrpo eval runs/tiny_shapes --prompts a.txt --reward tiny_shapes --reward jpeg_compressibility --table
fastgrpo sample runs/tiny_shapes --prompt "two red circles" --output circles.png
fastgrpo export runs/tiny_shapes --format comfyui --output lora      the trained weights for other programs
fastgrpo push runs/tiny_shapes --folder card                         a model card with the trained weights
fastgrpo report runs/tiny_shapes                                     write report.html anew
fastgrpo serve-reward --reward tiny_shapes --port 8000               score images for runs on other machines
fastgrpo make-prompts geneval --exclude eval.jsonl --count 50000 --output train.jsonl    training prompts
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastgrpo.commands import print_anything
from fastgrpo.commands.errors import shown

# Name -> the module in this folder and what the command does. A module is imported only when its command is given, because
# most of them import torch.
COMMANDS = {
    "train": ("train", "train a model"),
    "resume": ("resume", "go on with a run that was stopped, wherever its folder is"),
    "verify": ("verify", "whether all in a run's folder is what was written"),
    "plan": ("plan", "parameters, memory, FLOPs and expected speed of a run"),
    "bench": ("bench", "images a second, MFU and memory on this machine, measured"),
    "eval": ("evaluate", "accuracy of a run on its held-out prompts"),
    "sample": ("sample", "draw images"),
    "export": ("export", "write the trained weights for other programs"),
    "push": ("push", "a model card with the trained weights, written or sent to the Hugging Face Hub"),
    "report": ("report", "write a run's report.html anew"),
    "serve-reward": ("serve", "score images for runs on other machines"),
    "make-prompts": ("make_prompts", "write training prompts for the rewards geneval and ocr"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="fastgrpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, (module, summary) in COMMANDS.items():
        command_parser = commands.add_parser(name, help=summary)
        if argv[:1] == [name]:
            command = importlib.import_module(f"fastgrpo.commands.{module}")
            command.add_arguments(command_parser)
    arguments = parser.parse_args(argv)
    print_anything()
    return shown(command.run, arguments)
