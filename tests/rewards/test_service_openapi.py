"""What the service's OpenAPI page says is what it does: statuses, kinds and forms of its answers, and who is let in.

schemathesis makes the requests from the page, such as the page allows and such as it forbids.
"""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from support.reward_service import example, service, serving

from fastgrpo.rewards.serving.wire import pack

TOKEN = {"Authorization": "Bearer secret"}
# The page cannot tell a request from any other bytes: that hardly any bytes are taken is no fault.
UNFIT = ["positive_data_acceptance"]
FEW = settings(
    max_examples=20, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
IMAGES, PROMPTS, RECORDS = example(2, 0)
REQUESTS = {
    pack(IMAGES, PROMPTS, RECORDS): 200,
    pack(IMAGES, PROMPTS, RECORDS, "png"): 200,
    pack(IMAGES, PROMPTS, [{"bonus": 1e60}] * 2): 422,  # whose score float32 cannot hold
    pack(*example(17, 0)): 413,  # one image too many
    pack(*example(1, 0, side=200)): 413,
}


def page_of(url: str) -> schemathesis.BaseSchema:
    load_all_checks()
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def check(case: schemathesis.Case) -> int:
    """The status of the answer, in which the page is held to its word."""
    return case.call_and_validate(headers=TOKEN, excluded_checks=[CHECKS.get_one(name) for name in UNFIT]).status_code


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_what_can_be_read_is_as_the_page_says(path: str) -> None:
    with serving(service(token="secret")) as url:

        @seed(0)
        @FEW
        @given(case=page_of(url)[path]["GET"].as_strategy())
        def ask(case: schemathesis.Case) -> None:
            assert check(case) == 200

        ask()


def test_requests_for_scores_are_answered_as_the_page_says() -> None:
    statuses: Counter[int] = Counter()
    with serving(service(token="secret")) as url:
        score = page_of(url)["/score"]["POST"]

        @seed(0)
        @FEW
        @given(
            case=score.as_strategy() | score.as_strategy(GenerationMode.NEGATIVE),
            body=st.none() | st.sampled_from(list(REQUESTS)),
        )
        def ask(case: schemathesis.Case, body: bytes | None) -> None:
            case.body = case.body if body is None else body
            statuses[check(case)] += 1

        ask()
        for body, status in REQUESTS.items():
            assert check(score.Case(body=body, media_type="application/octet-stream")) == status
    assert statuses.keys() <= {200, 400, 401, 413, 422} and 400 in statuses
