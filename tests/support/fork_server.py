"""Runs programs as a console would, each in a fork of a process that has imported what takes seconds to import.

Reads lines of JSON and answers each by one:

    {"program": "fastgrpo.commands.cli:main", "arguments": ["train", ...], "ranks": 0}
    {"status": 0, "output": "what it printed"}

With ranks there are so many processes, which find each other by the variables that a launcher sets.
"""

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
from typing import IO, NoReturn

from fastgrpo.engine.ranks import load_deepspeed

SLOW_TO_IMPORT = ("fastgrpo.trainer", "fastgrpo.models.sd3", "deepspeed.runtime.zero.muon.original_muon")
TIMEOUT = 400


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def child(program: str, arguments: list[str], variables: dict[str, str], output: IO[bytes]) -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    signal.alarm(TIMEOUT)  # whose signal ends a process
    os.environ.update(variables)
    module, _, function = program.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)(arguments))


def run(program: str, arguments: list[str], ranks: int) -> dict[str, int | str]:
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]
    with tempfile.TemporaryFile() as output:
        running, status = set(), 0
        for variables in places:
            pid = os.fork()
            if pid == 0:
                child(program, arguments, variables, output)
            running.add(pid)
        while running:
            pid, ended = os.wait()
            running.remove(pid)
            if ended and not status:
                status = os.waitstatus_to_exitcode(ended)
        output.seek(0)
        return {"status": status, "output": output.read().decode()}


if __name__ == "__main__":
    load_deepspeed()
    for module in SLOW_TO_IMPORT:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
