"""Lazy restore from two rounds with a real criu.

This machine need not track memory for it: a whole dump is taken apart into a round that has everything and a last one
that has a third of it and points to the other for the rest.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest

from phaul_criu.chains import framed, messages
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.install import find_binary
from phaul_criu.lazy import LazyPages, LazyPagesOptions
from phaul_criu.requests import DumpOptions, RestoreOptions
from phaul_criu.rpc import pagemap_pb2
from phauld.lazy_pages.lazy_chain import PageSource, has_parent, make_lazy
from tests.node.criu_victims import Victim

pytestmark = pytest.mark.criu

PARENT = 1


def take_apart(whole: Path, first: Path) -> None:
    """Every third run of pages stays in `whole`; all of them are in `first`, its parent now."""
    first.mkdir()
    for name in ("inventory.img", *(path.name for path in whole.glob("page*-*.img"))):
        shutil.copy(whole / name, first / name)
    (whole / "parent").symlink_to(os.path.relpath(first, whole))
    for path in whole.glob("pagemap-[0-9]*.img"):
        head, *entries = messages(path.read_bytes())
        pages = whole / f"pages-{pagemap_pb2.pagemap_head.FromString(head).pages_id}.img"
        memory, offset, kept, made = pages.read_bytes(), 0, b"", [path.read_bytes()[:8], framed(head)]
        for number, content in enumerate(entries):
            entry = pagemap_pb2.pagemap_entry.FromString(content)
            size = entry.nr_pages * 4096
            if number % 3:
                entry.flags = PARENT
            else:
                kept += memory[offset : offset + size]
            offset += size
            made.append(framed(entry.SerializeToString()))
        path.write_bytes(b"".join(made))
        pages.write_bytes(kept)


async def test_earlier_rounds_are_restored_lazily_too(tmp_path: Path, victim: Victim) -> None:
    criu, images = Criu(find_binary()), tmp_path / "1"
    images.mkdir()
    images_fd = os.open(images, os.O_RDONLY)
    try:
        await criu.dump(DumpOptions(images_dir_fd=images_fd, pid=victim.pid))
        victim.reaped()
        beats = victim.beats()
        take_apart(images, tmp_path / "0")
        assert has_parent(images)
        make_lazy(images)
        server = await PageSource.start()
        async with contextlib.aclosing(server):
            with server.serve(images) as source:
                options = LazyPagesOptions(images_dir_fd=images_fd, page_server_fd=source.fileno())
                lazy_pages = await LazyPages.start(criu.binary, options)
            async with lazy_pages:
                restore_options = RestoreOptions(images_dir_fd=images_fd, lazy_pages=True, log_level=4)
                victim.restored_as(await criu.restore(restore_options))
                await lazy_pages.wait(timeout_seconds=20)
                assert await server.wait() == 0
        assert victim.is_beating()
        assert victim.is_beating(0)
        assert victim.beats() > beats
        log = (images / "restore.log").read_text(errors="replace")
        assert (
            sum(int(pages) for pages in re.findall(r"Lazy restore skips (\d+) pages", log)) > 2 * 1024
        )  # the memory of both processes
    finally:
        os.close(images_fd)


async def test_a_round_that_is_missing_fails_the_restore(tmp_path: Path, victim: Victim) -> None:
    criu, images = Criu(find_binary()), tmp_path / "1"
    images.mkdir()
    images_fd = os.open(images, os.O_RDONLY)
    try:
        await criu.dump(DumpOptions(images_dir_fd=images_fd, pid=victim.pid, leave_running=True))
        take_apart(images, tmp_path / "0")
        make_lazy(images)
        shutil.rmtree(tmp_path / "0")
        assert not has_parent(images)
        with pytest.raises(CriuError):
            await criu.restore(RestoreOptions(images_dir_fd=images_fd))
    finally:
        os.close(images_fd)


async def test_whom_nobody_asks_ends_by_itself() -> None:
    server = await PageSource.start()
    await server.aclose(patience_seconds=20)
    assert await server.wait() == 0
