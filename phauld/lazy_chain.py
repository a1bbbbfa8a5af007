"""A lazy restore from a chain of rounds: its last images made fit for it, and the process that serves the others."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import Final

from phaul_criu.chains import lazy_pagemap, stack_page
from phaul_criu.child import Child, spawn
from phauld import page_source

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


async def serve_chain(images: Path) -> tuple[Child, socket.socket]:
    """Start a process that serves the pages; the socket is for `criu lazy-pages`. It ends when criu does."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            child = await spawn([*_PAGE_SOURCE, str(theirs.fileno()), os.fspath(images)], pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
    return child, ours
