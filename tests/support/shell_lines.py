"""The lines that pages tell a reader to type, checked without running them: programs, options and files are there."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from unittest import mock

from support.helpers import ROOT
from support.pages import PAGES, blocks, text


class Parsed(Exception):
    """Its command's arguments are understood, so it need not go on."""


def commands() -> Iterator[str]:
    """The lines of all bash blocks, each once."""
    seen: dict[str, None] = {}
    for page in PAGES:
        for _, block in blocks(text(page), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                seen.setdefault(shlex.join(shlex.split(line, comments=True)))
    return (line for line in seen if line)


def check_command(line: str) -> None:
    """Refuse a command whose program, options, files or extras are not there."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    program, *arguments = words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif program == "pip":
        packaging = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[([\w,]+)\]", line):
            assert re.search(rf'^\s*"?{extra}"?\s*[:=]', packaging, flags=re.MULTILINE), line
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), line
    else:
        parse(program, arguments)


def parse(program: str, arguments: list[str]) -> None:
    """Let the program's own parser read the arguments, and stop there."""
    if "--config" in arguments:
        assert (ROOT / arguments[arguments.index("--config") + 1]).is_file(), arguments
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *given: object, **options: object) -> argparse.Namespace:
        original(parser, *given, **options)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        if program in ("deepspeed", "torchrun"):
            from torch.distributed.run import get_args_parser

            script = arguments.index("fastgrpo/train.py")
            assert program == "torchrun" or script == 0, f"options of the deepspeed launcher are not checked: {arguments}"
            get_args_parser().parse_known_args(arguments[: script + 1])
            main("fastgrpo.commands.train", arguments[script + 1 :])
        elif program == "fastgrpo":
            main("fastgrpo.commands.cli", arguments)
        elif program == "python" and arguments[0] == "-m" and arguments[1] == "pytest":
            assert all((ROOT / argument).exists() for argument in arguments[2:]), arguments
            raise Parsed
        elif program == "python" and (ROOT / arguments[0]).is_file():
            script = ROOT / arguments[0]
            with mock.patch.object(sys, "argv", [str(script), *arguments[1:]]):
                runpy.run_path(str(script), run_name="__main__")
        else:
            raise AssertionError(f"no check for {program} {arguments}")


def main(module: str, arguments: list[str]) -> None:
    importlib.import_module(module).main(arguments)
