"""A reward over HTTP: many clients, broken requests, servers that die, and runs that go on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch
from support.helpers import ROOT, environment
from support.reward_service import CPU, SLOW, example, fingerprint, remote, service, serving
from support.runs import ForkServer, command, rows, rows_so_far, start
from support.sockets import free_port

from fastgrpo.rewards import RewardUnavailable
from fastgrpo.rewards.serving.remote import Remote
from fastgrpo.rewards.serving.wire import pack


@pytest.mark.slow
def test_64_clients_at_once_lose_nothing_and_swap_nothing() -> None:
    """Requests of other sizes and shapes, several each; those that wait are scored together."""
    one = service()
    SLOW.set()
    try:
        with serving(one) as url:
            client = remote(url, max_images=4)

            def ask(seed: int) -> bool:
                asked = example(1 + seed % 7, seed, side=5 + seed % 2)
                return torch.equal(client(*asked), fingerprint(*asked))

            with ThreadPoolExecutor(64) as pool:
                assert all(pool.map(ask, range(64)))
            direct = [example(3, seed) for seed in range(64)]
            with ThreadPoolExecutor(64) as pool:  # and not through one client's own threads
                bodies = [pack(*asked) for asked in direct]
                answers = list(pool.map(lambda body: httpx2.post(f"{url}/score", content=body, timeout=60).json(), bodies))
            for asked, answer in zip(direct, answers, strict=True):
                assert torch.equal(torch.tensor(answer["scores"]), fingerprint(*asked))
            requests = sum(-(-(1 + seed % 7) // 4) for seed in range(64)) + 64
            assert one.counts["images"] == sum(1 + seed % 7 for seed in range(64)) + 192
            assert one.counts["batches"] < 0.8 * requests, "waiting requests are scored together"
            text = httpx2.get(f"{url}/metrics").text
            assert f"fastgrpo_reward_images_total {one.counts['images']}\n" in text
            assert f'fastgrpo_reward_requests_total{{status="200"}} {requests}\n' in text
    finally:
        SLOW.clear()


@pytest.mark.parametrize("form", ["raw", "png"])
def test_images_and_clips_in_either_format(form: str) -> None:
    with serving(service()) as url:
        for shape in ((5, 3, 4, 6), (5, 2, 3, 4, 6)):
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            asked = images, ["a"] * 5, [{"bonus": i} for i in range(5)]
            assert torch.equal(remote(url, form=form, max_images=2)(*asked), fingerprint(*asked))


def test_broken_requests_are_refused_and_the_server_lives() -> None:
    with serving(service(token="secret")) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        headers, body = {"Authorization": "Bearer secret"}, pack(*example(1, 0, side=3))
        broken = [body[:length] for length in range(len(body))]
        broken += [body[:i] + bytes([body[i] ^ 1 << i % 8]) + body[i + 1 :] for i in range(0, len(body), 2)]
        broken += [b"", os.urandom(500), body + b"\0"]
        for data in broken:
            answer = client.post("/score", content=data, headers=headers)
            assert answer.status_code == 400 and answer.json()["detail"]
        for data in (pack(*example(17, 0)), pack(*example(1, 0, side=200)), bytes(2 << 20)):
            assert client.post("/score", content=data, headers=headers).status_code == 413
        streamed = client.post("/score", content=iter([bytes(1 << 20)] * 3), headers=headers)
        assert streamed.status_code == 413, "a length that is not announced is counted"
        for wrong in ({}, {"Authorization": "Bearer secrets"}, {"Authorization": "secret"}, {"Authorization": b"\xff"}):
            assert client.post("/score", content=body, headers=wrong).status_code == 401
        assert client.get("/score").status_code == 405 and client.get("/nothing").status_code == 404
        assert client.post("/score", content=body, headers=headers).status_code == 200
        schema = client.get("/openapi.json").json()
        assert {"/score", "/health", "/metrics"} == schema["paths"].keys()
        assert all(method["description"] for path in schema["paths"].values() for method in path.values())


def test_who_sends_what_cannot_be_scored_hears_of_it_alone() -> None:
    """A NaN is told to its sender; those whose requests were scored with it get their scores."""
    SLOW.set()
    try:
        with serving(service()) as url:
            asked = [example(1, seed) for seed in range(12)]
            asked[5] = (asked[5][0], ["bad"], [{"bonus": 1e60}])  # infinite as float32
            asked[7] = (asked[7][0], ["crash"], [{"bonus": 0}])
            with ThreadPoolExecutor(12) as pool:
                answers = list(pool.map(lambda one: httpx2.post(f"{url}/score", content=pack(*one), timeout=60), asked))
            assert [answer.status_code for answer in answers] == [200] * 5 + [422, 200, 500] + [200] * 4
            assert "returned inf for the prompt 'bad'" in answers[5].json()["detail"]
            assert "RuntimeError: out of memory" in answers[7].json()["detail"]
            client = remote(url)
            with pytest.raises(ValueError, match="refused with 422: .* returned inf for the prompt 'bad'"):
                client(*asked[5])
            with pytest.raises(RewardUnavailable, match="in 2 rounds: .* answered 500: .* out of memory"):
                client(*asked[7])
    finally:
        SLOW.clear()


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    with serving(service(token="secret")) as url:
        asked = example(2, 0)
        assert torch.equal(remote(url, token_env="REWARD_TOKEN")(*asked), fingerprint(*asked))
        with pytest.raises(ValueError, match="refused with 401: .*wrong or missing token"):
            remote(url)(*asked)
    with pytest.raises(ValueError, match="token_env = 'NO_SUCH_TOKEN': this environment variable is not set"):
        remote(url, token_env="NO_SUCH_TOKEN")
    with pytest.raises(ValueError, match="urls = 'http://a': expected a list"):
        Remote(device=CPU, urls="http://a")


def test_another_server_takes_over_in_the_middle() -> None:
    """One of two servers dies while a batch of many requests is under way."""
    asked = example(60, 3)
    SLOW.set()
    try:
        with serving(service()) as living:
            with serving(service()) as dying:
                client = remote(dying, living, max_images=1)
                with ThreadPoolExecutor(1) as pool:
                    scores = pool.submit(client, *asked)
                    time.sleep(0.1)
            assert torch.equal(scores.result(), fingerprint(*asked))
            assert torch.equal(client(*asked), fingerprint(*asked)), "and with one of them gone from the start"
        with pytest.raises(RewardUnavailable, match="no reward server answered in 2 rounds: .* gave no answer"):
            client(*asked)
    finally:
        SLOW.clear()


def test_other_versions_are_refused() -> None:
    one, asked = service(), example(2, 0)
    with serving(one) as url, serving(replace(one, version="0123")) as other:
        with pytest.raises(ValueError, match="the servers differ in reward or version: .*0123"):
            remote(url, other)
        client = remote(url)
        client.urls = [other]
        with pytest.raises(RewardUnavailable, match=f"has version 0123, this run's scores are of version {one.version}"):
            client(*asked)
        client.urls = [other, url]
        assert torch.equal(client(*asked), fingerprint(*asked)), "the one of the right version is used"


def serve(port: int, wait: bool = True) -> subprocess.Popen:
    arguments = ["-m", "fastgrpo", "serve-reward", "--reward", "tiny_shapes_graded", "--port", str(port)]
    server = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment())
    while wait:
        assert server.poll() is None
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                break
        except httpx2.TransportError:
            time.sleep(0.1)
    return server


def stop(server: subprocess.Popen) -> None:
    server.send_signal(signal.SIGKILL)
    server.wait()


def served(port: int, retries: int) -> list[str]:
    """Settings of a run that is scored by the server at that port."""
    remote = json.dumps({"urls": [f"http://127.0.0.1:{port}"], "retries": retries, "pause": 0.2})
    return ["reward.train=remote", "reward.eval=remote", f"reward.settings={{remote: {remote}}}"]


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen) -> None:
    while not (folder / "metrics.jsonl").exists() or len(rows_so_far(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """The run with the reward in its own process."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    fork_server.train(folder, "reward.eval=tiny_shapes_graded")
    return folder


def check_same(folder: Path, undisturbed: Path) -> None:
    assert rows(folder) == rows(undisturbed)
    assert rows(folder, "evaluations.jsonl") == rows(undisturbed, "evaluations.jsonl")


@pytest.mark.processes
def test_a_server_killed_and_restarted_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "served"
    server = serve(port)
    process = start(command(folder, *served(port, retries=8)))
    try:
        wait_for_rows(folder, 1, process)
        stop(server)
        server = serve(port, wait=False)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    finally:
        stop(server)
        process.kill()
    check_same(folder, undisturbed)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [0, 2])
def test_without_servers_a_run_saves_stops_and_goes_on_later(
    undisturbed: Path, tmp_path: Path, fork_server: ForkServer, ranks: int
) -> None:
    """Killed after the first iteration, before its checkpoint was due: the stop writes one, and no rank hangs."""
    port, folder = free_port(), tmp_path / "stopped"
    server = serve(port)
    process = start(command(folder, *served(port, retries=2), ranks=ranks))
    try:
        wait_for_rows(folder, 1, process)
    finally:
        stop(server)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and (ranks or process.returncode == 75), output
    assert "stopped: " in output and "no reward server answered in 3 rounds" in output
    done = len(rows_so_far(folder))
    assert f"the state after iteration {done} is saved" in output and (folder / "checkpoints" / f"{done:05d}").is_dir()
    assert done < 4 and not (folder / "summary.json").exists()
    if ranks:
        return  # going on from a checkpoint of two ranks is like going on from any
    server = serve(port)
    try:
        fork_server.train(folder, *served(port, retries=2))
    finally:
        stop(server)
    check_same(folder, undisturbed)
