"""Two nodes with daemons, whether all modes are to be tried, and the table of what was seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.conftest import daemons, nodes
from tests.nodes import until
from tests.started import Process
from tests.workloads.titles import PAGE, has_cell

__all__ = ["daemons", "nodes"]

START_SECONDS: Final = 60.0
MODES: Final = {
    "eager": ("--mode", "stop-copy", "--restore", "eager"),
    "lazy": ("--mode", "stop-copy", "--restore", "lazy"),
    "post-copy": ("--mode", "post-copy"),
}
Row = dict[str, Any]


@pytest.fixture(scope="session")
def every(pytestconfig: pytest.Config) -> bool:
    """Whether `--all` was given."""
    return bool(pytestconfig.getoption("--all"))


@pytest.fixture(scope="module")
def table(json_report: dict[str, Any]) -> Iterator[list[Row]]:
    """What was measured; printed at the end, and in the report of `--json`."""
    rows: list[Row] = json_report.setdefault("workloads", [])
    before = len(rows)
    yield rows
    if sys.__stdout__ is not None:
        sys.__stdout__.write("\n" + "".join(_line(row) for row in rows[before:]))


def _line(row: Row) -> str:
    return (
        f"{row['workload']:10} {row['mode']:10} client saw {row['client_gap_ms']:8.1f} ms, "
        f"phaul says {row['pause_ms']:8.1f} ms, {row['answers']} answers verified\n"
    )


def record(table: list[Row], workload: str, mode: str, report: Row, seen: Row) -> None:
    """What its client saw of it in a mode; docs/workloads.md has a value for that."""
    table.append(
        {
            "workload": workload,
            "mode": mode,
            "client_gap_ms": seen["longest_gap_ms"],
            "pause_ms": report["pause_ms"],
            "total_ms": report["total_ms"],
            "bytes": report["bytes"],
            "answers": seen["answers"],
            "read_back": seen.get("read_back", 0),
        }
    )
    assert has_cell(PAGE.read_text(), "workloads", workload, mode), "scripts/workloads-table writes it"


class Outside:
    """A client of its own, on the client's node."""

    def __init__(self, result: Path, process: Process) -> None:
        self.result = result
        self.process = process

    def seen(self) -> Row:
        found: Row = json.loads(self.result.read_text()) if self.result.exists() else {"answers": 0, "failure": ""}
        assert not found["failure"], found
        return found

    async def progress(self) -> None:
        """Wait for fifty more answers."""
        count = self.seen()["answers"]
        await until(lambda: self.seen()["answers"] > count + 50, START_SECONDS)

    async def end(self) -> Row:
        """Stop it, and let it read back what it wrote."""
        await self.process.stop()
        return self.seen()
