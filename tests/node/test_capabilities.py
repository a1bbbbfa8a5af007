"""A destination whose phauld has fewer capabilities: what could only fail after the commit is refused beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon import BINARY
from tests.node.test_daemons import REFUSED, Victim
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]


@pytest.mark.parametrize(("lacks", "why"), [("setpcap", "criu needs"), ("mknod", "the tree has")])
async def test_refused_before_anything_froze(nodes: Nodes, tmp_path: Path, lacks: str, why: str) -> None:
    await nodes.a.start_phauld()
    victim = await Victim.start(nodes.a, tmp_path)
    limited = tmp_path / "phauld"
    limited.write_text(f'#!/bin/sh\nexec setpriv --bounding-set -{lacks} --inh-caps -{lacks} "{BINARY}" "$@"\n')
    limited.chmod(0o755)
    await nodes.b.daemon.start(limited)
    done = await nodes.a.phaul("migrate", "victim", "--to", nodes.b.address)
    assert done.returncode == REFUSED, done.stdout + done.stderr
    assert f"CAP_{lacks.upper()}: {why}" in done.stderr
    await victim.beats()
    await nodes.b.kill_phauld(15)
    await nodes.b.start_phauld()
    await nodes.a.phaul("migrate", "victim", "--to", nodes.b.address, check=True)
    await victim.beats()
