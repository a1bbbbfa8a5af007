"""Containers move by name, with their root, their volume and their network, and never run twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.containers.containers import ADDRESS, PORT, VICTIMS, Container, log_of
from tests.node.test_daemons import migrate
from tests.node.test_move_address import progress, verdict
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]


def told(report: dict[str, Any]) -> str:
    """Why it did not move."""
    return json.dumps([report.get("error"), report.get("problems"), report.get("stderr")], indent=1)


def whole(lines: list[str], at_least: int) -> bool:
    """Whether every beat is there once, in order."""
    return len(lines) >= at_least and lines == [str(number) for number in range(len(lines))]


@pytest.mark.parametrize("runtime", ["runc", "crun"])
async def test_there_and_back(nodes: Nodes, tmp_path: Path, runtime: str) -> None:
    a, b, client = nodes
    container = await Container.start(a, runtime, tmp_path / "volume")
    result = tmp_path / "client.json"
    words = [sys.executable, "-IS", str(VICTIMS / "tcp_client.py"), str(result), ADDRESS, str(PORT), "3"]
    process = await client.start(words)
    await progress(result)
    before = container.count
    status, report = await migrate(a, str(container), b, "--tcp", "keep")
    assert status == 0, told(report)
    await progress(result)
    assert await container.beats() > before
    assert await container.state(a) == {}
    state = await container.state(b)
    assert (state["status"], state["pid"]) == ("running", report["destination_pid"])
    assert whole(log_of(b, state), before)
    done = await b.run([runtime, *container.flags, "exec", container.name, "cat", "/proc/1/cmdline"])
    assert "in_container.py" in done.stdout
    status, report = await migrate(b, str(container), a, "--tcp", "keep")
    assert status == 0, told(report)
    await progress(result)
    state = await container.state(a)
    assert whole(log_of(a, state), await container.beats() - 20)
    assert await container.state(b) == {}
    seen = await verdict(process, result)
    print(f"pause {report['pause_ms']} ms, client {seen}")
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)
    await a.run([runtime, *container.flags, "kill", container.name, "KILL"])
    await a.run([runtime, *container.flags, "delete", "--force", container.name])
