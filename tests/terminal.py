"""A terminal for a program in a node, as a person would see it: what it writes is read as a terminal reads it.

async with terminal(node, [PROGRAMS / "phaul", "top"], columns=80) as screen:
    await screen.until("freezing")
    print(screen.text)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import html
import os
import pty
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import pyte

from tests.namespaces import NAMESPACES
from tests.nodes import Node

_SECONDS: Final = 30.0
_COLOURS: Final = {
    "black": "#6b7684",
    "red": "#f87171",
    "green": "#4ade80",
    "brown": "#facc15",
    "blue": "#6aa2ff",
    "magenta": "#e879f9",
    "cyan": "#67e8f9",
    "white": "#e3e8ef",
    "default": "#e3e8ef",
}
_PAGE: Final = (
    '<!doctype html><meta charset="utf-8"><style>'
    "body { margin: 0; padding: 12px; background: #10151c; width: max-content }"
    " pre { margin: 0; font: 14px/1.3 'DejaVu Sans Mono', monospace; color: #e3e8ef }</style><pre>"
)


class Terminal:
    """A pseudo-terminal and the screen that what is written to it makes."""

    def __init__(self, columns: int, lines: int, descriptor: int, process: asyncio.subprocess.Process) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._descriptor = descriptor
        self.process = process
        self.written = bytearray()

    @property
    def text(self) -> str:
        """What is on the screen now."""
        with contextlib.suppress(OSError):  # nothing more, or nobody writes any more
            while some := os.read(self._descriptor, 1 << 16):
                self.written += some
                self._stream.feed(some)
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    async def until(self, word: str, seconds: float = _SECONDS) -> str:
        """Wait for a word to be on the screen; the screen then. Raises TimeoutError, with the screen."""
        try:
            async with asyncio.timeout(seconds):
                while word not in (seen := self.text):  # noqa: ASYNC110 - it is another program that writes
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise TimeoutError(f"no {word!r} in:\n{self.text}") from None
        return seen

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._descriptor, keys.encode())

    async def end(self) -> int:
        """Wait for the program's end; its status. What it wrote at last is read."""
        async with asyncio.timeout(_SECONDS):
            while self.process.returncode is None:
                _ = self.text
                await asyncio.sleep(0.02)
        _ = self.text
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def page(self) -> str:
        """The screen as a page of HTML, with its colours."""
        _ = self.text
        rows = []
        last = max((row for row, line in enumerate(self._screen.display) if line.strip()), default=0)
        for row in range(last + 1):
            cells = []
            for column in range(self._screen.columns):
                cell = self._screen.buffer[row][column]
                weight = ";font-weight:bold" if cell.bold else ""
                colour = _COLOURS.get(cell.fg, f"#{cell.fg}")
                cells.append(f'<span style="color:{colour}{weight}">{html.escape(cell.data)}</span>')
            rows.append("".join(cells))
        return _PAGE + "\n".join(rows) + "</pre>"


@contextlib.asynccontextmanager
async def terminal(
    node: Node, argv: Sequence[str | Path], *, columns: int = 120, lines: int = 24
) -> AsyncIterator[Terminal]:
    """Start a program on a terminal of this size; it ends with the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *("nsenter", "--target", str(node.pid), *NAMESPACES, "--", *map(str, argv)),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "", "LC_ALL": "C.UTF-8"},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        yield Terminal(columns, lines, ours, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
