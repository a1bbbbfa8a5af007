"""A destination whose phauld has fewer capabilities: what could only fail after the commit is refused beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.node.test_daemons import REFUSED, Victim
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]


async def test_refused_before_anything_froze(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    await a.start_phauld()
    victim = await Victim.start(a, tmp_path)
    limited = tmp_path / "phauld"
    for lacks, why in (("setpcap", "criu needs"), ("sys_chroot", "criu needs"), ("mknod", "the tree has")):
        limits = f"--bounding-set -{lacks} --inh-caps -{lacks}"
        limited.write_text(f'#!/bin/sh\nexec setpriv {limits} "{b.programs}/phauld" "$@"\n')
        limited.chmod(0o755)
        await b.daemon.start(limited)
        done = await a.phaul("migrate", "victim", "--to", b.address)
        assert done.returncode == REFUSED, done.stdout + done.stderr
        assert f"CAP_{lacks.upper()}: {why}" in done.stderr
        await victim.beats()
        await b.kill_phauld(15)
    await b.start_phauld()
    await a.phaul("migrate", "victim", "--to", b.address, check=True)
    await victim.beats()
