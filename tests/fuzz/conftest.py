"""How many inputs the properties are tried on: a few, always the same, in every run of the tests; with a profile many.

    python -m pytest tests/fuzz --hypothesis-profile=long

`long` tries 20,000 inputs and more, other ones each time, and prints for each property how many worked and how many were
refused. What fails is made as small as it can be, and belongs as a plain test beside what it broke.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from support.fuzzing import OUTCOMES

# A time limit for an input would fail on a busy machine; what hangs is ended in `support.fuzzing`.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=800, print_blob=True, **COMMON)
settings.load_profile("short")  # hypothesis loads what --hypothesis-profile names afterwards


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if settings.get_current_profile_name() == "long":
        for test, outcomes in OUTCOMES.items():
            terminalreporter.write_line(f"{test}: {', '.join(f'{n} {what}' for what, n in outcomes.most_common())}")
        terminalreporter.write_line(f"{sum(outcomes.total() for outcomes in OUTCOMES.values())} outcomes in all")
