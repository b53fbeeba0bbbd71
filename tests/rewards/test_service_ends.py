"""Processes end when they are told to: services answer what waits first, and nobody waits for a call that hangs."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from support.helpers import ROOT, environment
from support.sockets import free_port, raw_server

from fastgrpo.rewards.serving.wire import pack

pytestmark = pytest.mark.processes
IMAGE = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


def listening_at(server: subprocess.Popen, port: int) -> httpx2.Client:
    """A client of a service, once it is there."""
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
    while True:
        assert server.poll() is None, server.communicate()
        try:
            client.get("/health").raise_for_status()
            return client
        except httpx2.TransportError:
            time.sleep(0.1)


@pytest.mark.parametrize(("hangs", "told", "status"), [(False, signal.SIGTERM, -signal.SIGTERM), (True, signal.SIGINT, 0)])
def test_a_service_that_is_told_to_end_answers_what_waits_and_ends(hangs: bool, told: signal.Signals, status: int) -> None:
    port = free_port()
    options = ("--reward", "support.slow_reward:seconds", "--port", str(port), "--shutdown-seconds", "2" if hangs else "30")
    command = [sys.executable, "-m", "fastgrpo", "serve-reward", *options]
    server = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **PIPES)
    try:
        client = listening_at(server, port)
        with ThreadPoolExecutor(2) as pool:
            answers = []
            for count, seconds in enumerate(["1000" if hangs else "3", "0"], 1):  # the second waits for the first
                answers.append(pool.submit(client.post, "/score", content=pack(IMAGE, [seconds], [{}])))
                while f"fastgrpo_reward_waiting {count}\n" not in client.get("/metrics").text:
                    assert not any(answer.done() for answer in answers)
                    time.sleep(0.02)
            server.send_signal(told)
            with pytest.raises(httpx2.ConnectError):  # soon; until then it may be asked
                while True:
                    httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False)
            assert [answer.result().status_code for answer in answers] == ([503, 503] if hangs else [200, 200])
        assert not hangs or "the service ends" in answers[0].result().json()["detail"]
        _, said = server.communicate(timeout=60)
        assert server.returncode == status and "Traceback" not in said, said
    finally:
        server.kill()


HANGING = """
import sys, threading, torch
from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.rewards.judge import VLMJudge
judge = VLMJudge(torch.device("cpu"), url=sys.argv[1], model="a", concurrency=2)
DaemonPool(1, "reward").submit(judge, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a", "b"], [{}, {}])
sys.stdin.readline()
print("the end")
"""


def test_a_process_ends_although_a_server_has_not_answered() -> None:
    asked = []

    def talk(connection: socket.socket) -> None:
        asked.append(connection.recv(10))
        time.sleep(100)

    with raw_server(talk) as url:
        with subprocess.Popen([sys.executable, "-c", HANGING, url], env=environment(), text=True, **PIPES) as process:
            while len(asked) < 2:
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            assert process.communicate("\n", timeout=60) == ("the end\n", "")
            assert process.returncode == 0
