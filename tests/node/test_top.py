"""`phaul top` on a terminal of its own, while something moves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.node.test_daemons import Victim
from tests.nodes import PROGRAMS, Nodes
from tests.terminal import terminal

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]
TOP = (PROGRAMS / "phaul", "top", "--interval", "100ms")


async def test_it_shows_what_moves_and_ends_with_ctrl_c(daemons: Nodes, tmp_path: Path) -> None:
    await Victim.start(daemons.a, tmp_path, "victim", 64)
    await daemons.a.limit_bandwidth(2 << 20)  # half a minute, or until that is undone
    await daemons.a.phaul("migrate", "victim", "--to", daemons.b.address, "--detach", check=True)
    async with terminal(daemons.a, TOP, columns=140) as screen:
        await screen.until("freezing")
        async with terminal(daemons.a, TOP, columns=60) as narrow:
            seen = await narrow.until("freezing")
            assert "…" not in seen.split("WHAT")[1]
            narrow.type("\x03")
            await narrow.end()
        infos = [(await node.phaul("info", "--json", check=True)).json() for node in (daemons.a, daemons.b)]
        assert [str(each).count("'outgoing': 1,") for each in infos] == [1, 0]
        assert [str(each).count("'incoming': 1,") for each in infos] == [0, 1]
        await daemons.a.limit_bandwidth(None)
        await screen.until("moved", 60)
        screen.type("\x03")
        assert await screen.end() in (-signal.SIGINT, 130)  # nsenter's, or phaul's that it passes on
        assert b"Traceback" not in screen.written


async def test_once_is_for_scripts(daemons: Nodes) -> None:
    await daemons.a.phaul("run", "--name", "clock", "--", "sleep", "1000", check=True)
    await daemons.a.phaul("migrate", "clock", "--to", daemons.b.address, check=True)
    shown = (await daemons.a.phaul("top", "--once", "--json", check=True)).json()
    assert [each["outcome"] for each in shown["migrations"]] == ["moved"]
    text = (await daemons.a.phaul("top", check=True)).stdout  # no terminal: once
    assert text.startswith("a: 0 of 16 moving away, 0 of 16 arriving")
    assert "clock" in text
