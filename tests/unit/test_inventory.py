"""What is left behind in a node is told so that it can be found."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.inventory import Inventory, descriptors


def seen() -> Inventory:
    """This process as if it were a node's phauld."""
    pidfds: Counter[str] = Counter()
    found = Counter(descriptors(os.getpid(), pidfds))
    nothing: Counter[str] = Counter()
    return Inventory(
        processes=nothing,
        descriptors=found,
        mounts=nothing,
        network_rules=nothing,
        files=nothing,
        daemon_memory_bytes=0,
        pidfds=pidfds,
    )


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.001)  # within execve it has no words
        yield process
        process.kill()


def test_a_descriptor_left_open_is_told_by_its_kind_and_that_of_a_process_by_its_process(
    child: subprocess.Popen[bytes],
) -> None:
    before = seen()
    opened = [os.pidfd_open(child.pid), os.eventfd(0)]
    try:
        more = seen().more_than(before)
    finally:
        for each in opened:
            os.close(each)
    assert more == {"descriptors": ["anon_inode:[eventfd]", "anon_inode:[pidfd]", "anon_inode:[pidfd] of sleep 1000"]}


def test_whose_process_is_gone_or_not_reaped_is_told(child: subprocess.Popen[bytes]) -> None:
    before = seen()
    opened = os.pidfd_open(child.pid)
    try:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert seen().more_than(before)["descriptors"][-1] == "anon_inode:[pidfd] of zombie sleep"
        child.wait()
        assert seen().more_than(before)["descriptors"][-1] == "anon_inode:[pidfd] of gone"
    finally:
        os.close(opened)


def test_the_same_number_of_descriptors_of_other_processes_is_no_leak(child: subprocess.Popen[bytes]) -> None:
    opened = os.pidfd_open(os.getpid())
    before = seen()
    os.dup2(replaced := os.pidfd_open(child.pid), opened)
    os.close(replaced)
    after = seen()
    os.close(opened)
    assert after.pidfds != before.pidfds
    assert after.more_than(before) == {}
