"""`serve-reward`: who may ask a service, and what it is given of what was typed."""

from collections.abc import Iterator

import pytest

from fastgrpo.commands.cli import main
from fastgrpo.rewards.serving import server
from fastgrpo.rewards.serving.limits import Limits

COMMAND = ("serve-reward", "--reward", "tiny_shapes")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """What `serve-reward` would serve, and where."""
    calls: list[tuple] = []
    monkeypatch.setattr(server, "serve", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("REWARD_TOKEN", "not-to-be-seen")
    yield calls


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: other machines can reach the service"),
        (("--host", "10.0.0.2"), "say --no-token"),
        (("--host", "::"), "name an environment variable with a token by --token-env"),
        (("--token-env", "NO_SUCH"), "--token-env = 'NO_SUCH': this environment variable is not set"),
        (("--token-env", "REWARD_TOKEN", "--no-token"), "not allowed with argument"),
        (("--tls-key", "key.pem"), "https needs both"),
        (("--tls-key", "no.pem", "--tls-certificate", "no.pem"), "No such file or directory; name the PEM files"),
        (("--max-waiting-bytes", "1"), "max_waiting_bytes = 1: a request of max_bytes = 268435456 can take"),
    ],
)
def test_a_service_that_all_could_use_or_nobody_is_refused(
    options: tuple, fault: str, served: list[tuple], capsys: pytest.CaptureFixture
) -> None:
    try:
        status: object = main((*COMMAND, *options))
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and fault in capsys.readouterr().err and not served


@pytest.mark.parametrize(
    "options", [(), ("--host", "127.0.0.1"), ("--host", "localhost"), ("--host", "0.0.0.0", "--no-token")]
)
def test_this_machine_alone_needs_no_token(options: tuple, served: list[tuple]) -> None:
    assert main((*COMMAND, *options)) == 0 and served[0][0].token is None


def test_a_token_and_the_limits_reach_the_service(served: list[tuple]) -> None:
    options = ("--host", "0.0.0.0", "--token-env", "REWARD_TOKEN", "--max-waiting", "7", "--body-seconds", "0.5")
    assert main((*COMMAND, *options)) == 0
    one, host, port, tls = served[0]
    assert one.token == "not-to-be-seen" and "not-to-be-seen" not in repr(one)
    assert (host, port, tls) == ("0.0.0.0", 8000, None)
    assert one.limits == Limits(max_waiting=7, body_seconds=0.5)
