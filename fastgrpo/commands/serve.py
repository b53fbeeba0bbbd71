"""A reward behind HTTP, for runs on other machines.

    fastgrpo serve-reward --reward tiny_shapes --port 8000

See `fastgrpo.rewards.serving.service` for the protocol.
"""

import argparse
import os
from pathlib import Path
from typing import Annotated

import torch

from fastgrpo.commands.arguments import of_type
from fastgrpo.config.bounds import AtLeast, AtMost
from fastgrpo.config.keys import ImageCount
from fastgrpo.config.schema import absolute_paths, apply_override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--reward", required=True, help="a reward by name, module:function or module:Class")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: %(default)s); 0.0.0.0 means all addresses of the machine",
    )
    parser.add_argument(
        "--port",
        type=of_type(Annotated[int, AtLeast(0), AtMost(65_535)]),
        default=8000,
        help="port to listen at (default: %(default)s)",
    )
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token that clients must send")
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings that the reward is made with"
    )
    parser.add_argument(
        "--max-images",
        type=of_type(ImageCount),
        default=64,
        help="most images of a request, and of requests that are scored together (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=of_type(Annotated[int, AtLeast(1), AtMost(1 << 40)]),
        default=1 << 28,
        help="most bytes of a request's pixels (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is ended."""
    try:
        from fastgrpo.rewards.serving.service import make_service, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'fastgrpo[serve]'") from None

    settings: dict = {}
    for setting in arguments.settings:
        apply_override(settings, setting, "--settings")
    settings = absolute_paths(settings, Path.cwd())
    token = os.environ.get(arguments.token_env) if arguments.token_env else None
    if arguments.token_env and not token:
        raise ValueError(f"--token-env {arguments.token_env}: this environment variable is not set")
    service = make_service(
        arguments.reward, device="cuda" if torch.cuda.is_available() else "cpu", settings=settings, token=token,
        max_images=arguments.max_images, max_bytes=arguments.max_bytes,
    )  # fmt: skip
    serve(service, arguments.host, arguments.port)
    return 0
