"""`phaul top` on a terminal of its own, while something moves."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import struct
import termios
from pathlib import Path

import pytest

from tests.node.test_daemons import Victim
from tests.nodes import PROGRAMS, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]


async def test_it_shows_what_moves_and_ends_with_ctrl_c(daemons: Nodes, tmp_path: Path) -> None:
    await Victim.start(daemons.a, tmp_path, "victim", 64)
    await daemons.a.limit_bandwidth(16 << 20)
    await daemons.a.phaul("migrate", "victim", "--to", daemons.b.address, "--detach", check=True)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    enter = ["nsenter", "--target", str(daemons.a.pid), "--pid", "--mount", "--net", "--uts", "--ipc", "--"]
    process = await asyncio.create_subprocess_exec(
        *(*enter, str(PROGRAMS / "phaul"), "top", "--interval", "100ms"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    screen = bytearray()

    def shows(word: bytes) -> bool:
        with contextlib.suppress(OSError):
            screen.extend(os.read(ours, 1 << 16))
        return word in screen

    try:
        await until(lambda: shows(b"freezing"), 30)
        infos = [(await node.phaul("info", "--json", check=True)).json() for node in (daemons.a, daemons.b)]
        assert [str(each).count("'outgoing': 1,") for each in infos] == [1, 0]
        assert [str(each).count("'incoming': 1,") for each in infos] == [0, 1]
        await until(lambda: shows(b"moved"), 60)
        os.write(ours, b"\x03")
        await asyncio.wait_for(process.wait(), 10)
        assert process.returncode in (-signal.SIGINT, 130)  # nsenter's, or phaul's that it passes on
        shows(b"")
        assert b"Traceback" not in screen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


async def test_once_is_for_scripts(daemons: Nodes) -> None:
    await daemons.a.phaul("run", "--name", "clock", "--", "sleep", "1000", check=True)
    await daemons.a.phaul("migrate", "clock", "--to", daemons.b.address, check=True)
    shown = (await daemons.a.phaul("top", "--once", "--json", check=True)).json()
    assert [each["outcome"] for each in shown["migrations"]] == ["moved"]
    text = (await daemons.a.phaul("top", check=True)).stdout  # no terminal: once
    assert text.startswith("a: 0 of 16 moving away, 0 of 16 arriving")
    assert "clock" in text
