"""What the service's OpenAPI page says is what it does, for requests that a generator of bad input makes of the page."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import load_all_checks
from support.reward_service import service, serving

TOKEN = {"Authorization": "Bearer secret"}
OPERATIONS = [("GET", "/health"), ("GET", "/metrics"), ("POST", "/score")]
# Any text is an octet stream for the page, but hardly any is a request: that the service takes none of them is no fault.
UNFIT = ["positive_data_acceptance"]
FEW = settings(
    max_examples=20, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_page_keeps_what_it_promises(method: str, path: str) -> None:
    """Statuses, kinds and forms of the answers, methods that are none, requests without a token, and no failure."""
    load_all_checks()
    unfit = [schemathesis.checks.CHECKS.get_one(name) for name in UNFIT]
    with serving(service(token="secret")) as url:
        page = schemathesis.openapi.from_url(f"{url}/openapi.json")
        assert {(one.ok().method.upper(), one.ok().path) for one in page.get_all_operations()} == set(OPERATIONS)

        @seed(0)
        @FEW
        @given(case=page[path][method].as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=TOKEN, excluded_checks=unfit)

        check()
