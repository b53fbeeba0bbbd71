"""A reward behind HTTP, for runs on other machines.

    fastgrpo serve-reward --reward tiny_shapes --port 8000

See `fastgrpo.rewards.serving.service` for the protocol.
"""

import argparse
import typing
from pathlib import Path
from typing import Annotated

import torch

from fastgrpo.commands.arguments import of_type
from fastgrpo.config.bounds import AtLeast, AtMost
from fastgrpo.config.schema import absolute_paths, apply_override
from fastgrpo.rewards.serving.limits import Limits

LIMITS = {  # of `Limits`, which has their types and defaults
    "max_images": "most images of a request, and of requests that are scored together",
    "max_bytes": "most bytes of their pixels",
    "max_waiting": "most requests that are read, wait or are scored at a time; others get 503",
    "max_waiting_bytes": "most bytes that these take together",
    "max_connections": "most connections at a time; others are closed",
    "body_seconds": "seconds for a client to send the body of a request",
    "shutdown_seconds": "seconds after SIGTERM to answer what waits",
}


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
    token = parser.add_mutually_exclusive_group()
    token.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable with the token that clients must send; needed where other machines can reach the service",
    )
    token.add_argument("--no-token", action="store_true", help="let everyone in who can reach the service")
    parser.add_argument("--tls-certificate", metavar="FILE", help="certificate chain (PEM), to serve https")
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's private key (PEM, without a password)")
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings that the reward is made with"
    )
    hints = typing.get_type_hints(Limits, include_extras=True)
    for name, meaning in LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=of_type(hints[name]),
            default=getattr(Limits, name),
            help=f"{meaning} (default: %(default)s)",
        )


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is ended."""
    try:
        from fastgrpo.rewards.client import is_loopback, token_from
        from fastgrpo.rewards.serving.server import check_tls, serve
        from fastgrpo.rewards.serving.service import make_service
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'fastgrpo[serve]'") from None

    token = token_from(arguments.token_env, "--token-env") if arguments.token_env else None
    if not token and not arguments.no_token and not is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host}: other machines can reach the service, and everyone on them could use it; name an "
            "environment variable with a token by --token-env, or say --no-token"
        )
    files = [arguments.tls_certificate, arguments.tls_key]
    if any(files) and not all(files):
        raise ValueError("--tls-certificate and --tls-key: https needs both; name the other one too")
    tls = check_tls(*files) if all(files) else None
    limits = Limits(**{name: getattr(arguments, name) for name in LIMITS})
    settings: dict = {}
    for setting in arguments.settings:
        apply_override(settings, setting, "--settings")
    settings = absolute_paths(settings, Path.cwd())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    service = make_service(arguments.reward, device=device, settings=settings, token=token, limits=limits)
    serve(service, arguments.host, arguments.port, tls)
    return 0
