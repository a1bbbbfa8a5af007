"""Who goes first, and who does not: on our own threads and children."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from phaul_criu import urgency
from phaul_criu.urgency import Hurry, calm, calm_soon, hurry

_SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(_SLEEP, stdin=subprocess.PIPE) as child:
        yield child
        assert child.stdin is not None
        child.stdin.close()


@pytest.fixture(autouse=True)
def _may() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pytest.skip("no process may go first here (CAP_SYS_NICE)")
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_a_child_goes_first_and_no_longer(child: subprocess.Popen[bytes]) -> None:
    hurry(child.pid)
    assert os.sched_getscheduler(child.pid) == os.SCHED_RR
    calm(child.pid)
    assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER


def test_one_that_has_ended_is_nobodys_business(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    hurry(child.pid)
    calm(child.pid)


def test_ourselves_with_every_thread_until_the_last_one_leaves() -> None:
    ready, go, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.set()
        go.wait()
        seen.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    ours = Hurry()
    with ours():
        with ours():
            pass
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
        go.set()
        thread.join()
    assert seen == [os.SCHED_RR]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_is_started_in_a_hurry_has_none() -> None:
    """A workload that happens to be started while another one moves."""
    ask = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
    with Hurry()():
        answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert int(answer) == os.SCHED_OTHER


async def test_soon_is_after_the_first_pages(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urgency, "FIRST_PAGES_SECONDS", 0.01)
    hurry(child.pid)
    calm_soon(child.pid, 4194304)  # no PID is as large
    assert os.sched_getscheduler(child.pid) == os.SCHED_RR
    while os.sched_getscheduler(child.pid) != os.SCHED_OTHER:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
