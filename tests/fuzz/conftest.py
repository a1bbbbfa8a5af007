"""The fuzzer of the run, and the daemon of `tests/attacks`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.attacks.conftest import certificates, target
from tests.fuzz.engine import Fuzzer

__all__ = ["certificates", "target"]
COUNTS: Final = pytest.StashKey[dict[str, int]]()


@pytest.fixture
def fuzzer(request: pytest.FixtureRequest, json_report: dict[str, Any]) -> Iterator[Fuzzer]:
    """The minutes of the command line are shared by all tests."""
    config = request.config
    fuzzed = sum("fuzzer" in getattr(item, "fixturenames", ()) for item in request.session.items)
    minutes = float(config.getoption("--minutes"))
    made = Fuzzer(minutes * 60 / fuzzed)
    yield made
    config.stash.setdefault(COUNTS, {}).update(made.counts)
    json_report["fuzz"] = config.stash[COUNTS]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Who asks for hours shall have them."""
    if config.getoption("--minutes"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many examples each parser was given."""
    counts = config.stash.get(COUNTS, {})
    if counts:
        terminalreporter.section("fuzzed")
        for name, number in counts.items():
            terminalreporter.write_line(f"{number:12,}  {name}")
        terminalreporter.write_line(f"{sum(counts.values()):12,}  in all")
