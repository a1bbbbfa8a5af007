"""Which part of the matrix runs: every sixth point, in turn, or with `--all` each of them."""

from __future__ import annotations

import datetime
import subprocess
import zlib
from typing import Final

import pytest

from tests.nodes import ROOT, missing_programs

PARTS: Final = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--count", type=int, metavar="N", help="faults: migrations with random faults, of a new seed")
    parser.addoption("--seed", type=int, help="faults: repeat the random faults of this seed")


def part_of_today() -> int:
    """Turns with the day and with the commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (zlib.crc32(commit.encode()) + datetime.date.today().toordinal()) % PARTS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    points = [item for item in items if "outcomes" in getattr(item, "fixturenames", ())]
    if (
        not points
        or config.getoption("--all")
        or config.getoption("-k")
        or any("::" in argument for argument in config.args)
    ):
        return
    part = part_of_today()
    chosen = set(points[part::PARTS])
    left = [item for item in points if item not in chosen]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
    config.stash[_PART] = f"faults: part {part + 1} of {PARTS}, {len(chosen)} of {len(points)} points (--all runs each)"


_PART: Final = pytest.StashKey[str]()


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    return config.stash.get(_PART, "")


@pytest.fixture(scope="session", autouse=True)
def _programs() -> None:
    if missing := missing_programs():
        pytest.skip(f"needs {', '.join(missing)}")
