"""Runs one parser on made-up input: a fixed number of examples, the same each time, or new ones for minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

Made = TypeVar("Made")
BURST: Final = 500  #: examples between two looks at the clock


@dataclass
class Fuzzer:
    """How long, and how many examples there were. `seconds` is 0 for the fixed number."""

    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, made: SearchStrategy[Made], check: Callable[[Made], object], examples: int) -> None:
        """`check` raises for what must not be. hypothesis then shrinks the example and prints it."""
        self.counts[name] = 0

        def body(example: Made) -> None:
            self.counts[name] += 1
            check(example)

        if not self.seconds:
            _test(made, body, examples, derandomize=True)()
            return
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            _test(made, body, BURST, derandomize=False)()


def _test(
    made: SearchStrategy[Made], body: Callable[[Made], None], examples: int, *, derandomize: bool
) -> Callable[[], None]:
    with_settings = settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        print_blob=not derandomize,
        suppress_health_check=list(HealthCheck),
        phases=[each for each in hypothesis.Phase if each is not hypothesis.Phase.explain],
    )
    found: Callable[[], None] = with_settings(given(made)(body))
    return found
