"""What a process has for itself alone goes with its images: real processes, and images as criu makes them of them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest

from phaul.v1 import remote_pb2
from phaul_client import own_pages
from phaul_client.early_images import EarlyImages
from phaul_client.own_pages import OwnPages
from phaul_criu.pagemaps import PAGE_BYTES, lazy_pages, left_behind, pages_image, with_pages
from phaul_criu.rpc import pagemap_pb2
from phauld.destination.images import ImageWriter

LAZY: Final = 2
PRESENT: Final = 4
COUNT: Final = 8
WRITTEN: Final = (2, 5, 6)  #: by the child, after the fork
PROGRAM: Final = textwrap.dedent(
    f"""
    import ctypes, mmap, os, time
    memory = mmap.mmap(-1, {COUNT * PAGE_BYTES}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for number in range({COUNT}):
        memory[number * {PAGE_BYTES}] = 100 + number
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if os.fork() == 0:
        for number in {WRITTEN}:
            memory[number * {PAGE_BYTES}] = 200 + number
        print(address, os.getpid(), flush=True)
    time.sleep(1000)
    """
)


def pagemap(pages_id: int, *entries: tuple[int, int, int]) -> bytes:
    """As criu writes it: address, pages and flags of each."""
    messages = [pagemap_pb2.pagemap_head(pages_id=pages_id)]
    for address, count, flags in entries:
        entry = pagemap_pb2.pagemap_entry(vaddr=address, nr_pages=count, flags=flags)
        if "compat_nr_pages" in entry.DESCRIPTOR.fields_by_name:
            entry.compat_nr_pages = count
        messages.append(entry)
    framed = [struct.pack("<I", len(each)) + each for each in (message.SerializeToString() for message in messages)]
    return b"\x18\x12\x05\x56\x42\x15\x05\x54" + b"".join(framed)


@pytest.fixture
def family() -> Iterator[tuple[int, int, int]]:
    """Parent, child, and where their memory is."""
    with subprocess.Popen([sys.executable, "-ISc", PROGRAM], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        address, child = map(int, parent.stdout.readline().split())
        yield parent.pid, child, address
        for pid in (child, parent.pid):
            os.kill(pid, signal.SIGKILL)


def dumped(directory: Path, family: tuple[int, int, int]) -> bytes:
    """What criu has left of the child: all its memory but the first page. The image of pages before."""
    _, child, address = family
    before = os.urandom(PAGE_BYTES)
    entries = ((address, 1, PRESENT), (address + PAGE_BYTES, COUNT - 1, LAZY))
    (directory / f"pagemap-{child}.img").write_bytes(pagemap(1, *entries))
    (directory / "pages-1.img").write_bytes(before)
    return before


def page(number: int) -> bytes:
    return bytes([200 + number]).ljust(PAGE_BYTES, b"\0")


def test_pages_that_nobody_shares_are_brought(tmp_path: Path, family: tuple[int, int, int]) -> None:
    before = dumped(tmp_path, family)
    parent, child, address = family
    assert OwnPages(parent, tmp_path).take("pages-1.img") == before + b"".join(map(page, WRITTEN))
    content = (tmp_path / f"pagemap-{child}.img").read_bytes()
    shared = sorted({*range(1, COUNT)} - {*WRITTEN})
    left = [start + offset * PAGE_BYTES for start, count in left_behind(content) for offset in range(count)]
    assert left == [address + number * PAGE_BYTES for number in shared]
    assert lazy_pages(content) == len(shared)
    assert pages_image(content) == "pages-1.img"


@pytest.mark.parametrize("most", ["MOST_PAGES", "MOST_OF_ALL_PAGES"])
def test_a_process_with_much_for_itself_is_left_alone(
    tmp_path: Path, family: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    dumped(tmp_path, family)
    before = (tmp_path / f"pagemap-{family[1]}.img").read_bytes()
    monkeypatch.setattr(own_pages, most, len(WRITTEN) - 1)
    assert OwnPages(family[0], tmp_path).take("pages-1.img") == b""
    assert (tmp_path / f"pagemap-{family[1]}.img").read_bytes() == before


def test_an_image_that_is_nobodys_stays_as_it_is(tmp_path: Path, family: tuple[int, int, int]) -> None:
    dumped(tmp_path, family)
    assert OwnPages(family[0], tmp_path).take("pages-7.img") == b""


def test_every_page_keeps_its_place() -> None:
    """Whatever is wanted of what was left: what was there before is there, and nothing is there twice."""
    draw = random.Random(1)
    for _ in range(200):
        address, entries = PAGE_BYTES, []
        for _ in range(draw.randrange(1, 8)):
            count = draw.randrange(1, 6)
            entries.append((address, count, draw.choice((LAZY, PRESENT, LAZY | PRESENT, 1))))
            address += (count + draw.randrange(3)) * PAGE_BYTES
        wanted = {entry[0]: [draw.random() < 0.5 for _ in range(entry[1])] for entry in entries}
        made = with_pages(pagemap(3, *entries), lambda start, count, wanted=wanted: wanted[start])  # type: ignore[misc]
        brought = [each for each in made.pages if each.is_left]
        assert sum(each.count for each in brought) == sum(sum(wanted[a]) for a, _, flags in entries if flags == LAZY)
        assert sum(each.count for each in made.pages if not each.is_left) == sum(
            count for _, count, flags in entries if flags & PRESENT
        )
        assert [each.address for each in made.pages] == sorted(each.address for each in made.pages)
        left = lazy_pages(made.content)
        assert left + sum(each.count for each in brought) == sum(count for _, count, flags in entries if flags == LAZY)


class _Remote:
    """A destination that writes what comes."""

    image_index = 0
    migration_id = "m"

    def __init__(self, place: Path, *, takes_same_pages: bool = True) -> None:
        self.takes_same_pages = takes_same_pages
        self._place = place

    async def put_images_as_made(
        self, requests: AsyncIterator[remote_pb2.PutImagesRequest]
    ) -> remote_pb2.PutImagesResponse:
        with ImageWriter(None, (), lambda: self._place) as writer:
            async for request in requests:
                for piece in request.pieces:
                    writer.write(piece)
        return remote_pb2.PutImagesResponse(files=writer.files, bytes=writer.bytes)


async def test_images_leave_as_they_are_complete(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for each in (here, there):
        each.mkdir()
    early = EarlyImages(_Remote(there))  # type: ignore[arg-type]
    early.begin(os.getpid(), here, brings_own_pages=False)
    content = {f"pages-{number}.img": os.urandom(2 * PAGE_BYTES) + b"\0" * PAGE_BYTES for number in (1, 2, 3)}
    for name in ("pages-1.img", "pages-2.img"):
        (here / name).write_bytes(content[name])
    async with asyncio.timeout(30):
        while not (there / "pages-1.img").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not (there / "pages-2.img").exists()  # criu may still write to it
    (here / "pages-3.img").write_bytes(content["pages-3.img"])
    (here / "core-1.img").write_bytes(b"core")
    await early.finish()
    assert {path.name: path.read_bytes() for path in there.iterdir()} == content
    assert early.names == set(content)
    assert early.bytes == (2 * len(content) + 1) * PAGE_BYTES


async def test_an_older_destination_gets_them_at_the_end(tmp_path: Path) -> None:
    early = EarlyImages(_Remote(tmp_path, takes_same_pages=False))  # type: ignore[arg-type]
    early.begin(os.getpid(), tmp_path, brings_own_pages=True)
    await early.finish()
    assert early.names == set()


async def test_a_dump_that_fails_leaves_nothing_on_its_way(tmp_path: Path) -> None:
    early = EarlyImages(_Remote(tmp_path))  # type: ignore[arg-type]
    early.begin(os.getpid(), tmp_path, brings_own_pages=True)
    before = asyncio.all_tasks()
    await asyncio.sleep(0)
    await early.aclose()
    assert not [task for task in before if task.get_name() == "early-images" and not task.done()]
