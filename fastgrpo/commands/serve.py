"""A reward behind HTTP, for runs on other machines.

    fastgrpo serve-reward --reward tiny_shapes --port 8000

See `fastgrpo.rewards.serving.service` for the protocol.
"""

import argparse
import os

import torch

from fastgrpo.config.schema import apply_override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--reward", required=True, help="a reward by name, module:function or module:Class")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: %(default)s); 0.0.0.0 means all addresses of the machine",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token that clients must send")
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings that the reward is made with"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=64,
        help="most images of a request, and of requests that are scored together (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes", type=int, default=1 << 28, help="most bytes of a request's pixels (default: %(default)s)"
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
    token = os.environ.get(arguments.token_env) if arguments.token_env else None
    if arguments.token_env and not token:
        raise ValueError(f"--token-env {arguments.token_env}: this environment variable is not set")
    service = make_service(
        arguments.reward, device="cuda" if torch.cuda.is_available() else "cpu", settings=settings, token=token,
        max_images=arguments.max_images, max_bytes=arguments.max_bytes,
    )  # fmt: skip
    serve(service, arguments.host, arguments.port)
    return 0
