"""A lazy restore from a chain of rounds: its last images made fit for it, and the process that serves the others."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import Final, Self

from phaul_criu.chains import lazy_pagemap, stack_page
from phaul_criu.child import Child, spawn
from phaul_criu.urgency import calm, hurry
from phauld.lazy_pages import page_source

_PAGEMAP: Final = re.compile(r"pagemap-(\d+)\.img")
_PAGE_SOURCE: Final = (sys.executable, "-I", "-S", page_source.__file__)


def has_parent(images: Path) -> bool:
    """Whether these are the images of a round that has one before it."""
    return (images / "parent").is_dir()


def make_lazy(images: Path) -> None:
    """Mark in the last images what may be restored lazily of the rounds before. Raises OSError, ValueError."""
    stacks = (stack_page(core.read_bytes()) for core in images.glob("core-*.img"))
    eager_pages = frozenset(page for page in stacks if page is not None)
    for path in images.iterdir():
        if found := _PAGEMAP.fullmatch(path.name):
            mm = (images / f"mm-{found[1]}.img").read_bytes()
            made = path.with_name(f".{path.name}.lazy")
            made.write_bytes(lazy_pagemap(path.read_bytes(), mm, eager_pages))
            made.rename(path)


class PageSource:
    """A process that serves the pages. It is started before the freeze, for a Python takes its time to start."""

    def __init__(self, child: Child, sock: socket.socket) -> None:
        self._child = child
        self._sock = sock

    @classmethod
    async def start(cls) -> Self:
        """One that waits for `serve`, and ends with this process until then. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = await spawn([*_PAGE_SOURCE, str(theirs.fileno())], pass_fds=(theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        return cls(child, ours)

    def serve(self, images: Path) -> socket.socket:
        """From now on these images' pages; the socket is for `criu lazy-pages`, with whom it ends. Raises OSError."""
        self._sock.sendall(os.fsencode(images) + page_source.END_OF_NAME)
        hurry(self._child.pid)
        return self._sock

    def calm(self) -> None:
        """The tree is about to run."""
        calm(self._child.pid)

    async def wait(self) -> int:
        """Wait for its end; the exit status."""
        return await self._child.wait()

    async def aclose(self, *, patience_seconds: float = 0) -> None:
        """End it, or let it end by itself for so long."""
        self._sock.close()
        await self._child.aclose(patience_seconds=patience_seconds)
