"""A podman that stands still holds up whoever asked for a container of its, and nobody else."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.nodes import PROGRAMS, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]
#: It stops before it has looked, as one does that waits for a lock; then it knows no such container.
PODMAN: Final = """#!/bin/sh
[ "$2" = inspect ] || exit 0
echo $$ >>{stands}
kill -STOP $$
echo 'Error: inspecting object: no such container web' >&2
exit 125
"""


async def test_others_are_answered_meanwhile(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    stands, program = tmp_path / "stands", tmp_path / "bin/podman"
    program.parent.mkdir()
    program.write_text(PODMAN.format(stands=stands))
    program.chmod(0o755)
    phauld = tmp_path / "phauld"
    phauld.write_text(f'#!/bin/sh\nPATH="{program.parent}:$PATH" exec {PROGRAMS / "phauld"} "$@"\n')
    phauld.chmod(0o755)
    await a.daemon.start(phauld)
    await b.start_phauld()
    asked = asyncio.create_task(a.phaul("preflight", "podman:web", "--to", b.address, "--json"))
    await until(lambda: stands.exists() and stands.read_text().strip())
    await a.phaul("ps", check=True)
    state = a.root / "proc" / stands.read_text().strip() / "stat"
    await until(lambda: state.read_text().split()[2] == "T")
    assert not asked.done()
    await a.phaul("status", check=True)
    await a.run(["kill", f"-{signal.SIGCONT}", stands.read_text().strip()])
    assert "podman:web" in (await asked).json()["error"]["message"]
