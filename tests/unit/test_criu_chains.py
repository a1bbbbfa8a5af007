"""What may be restored lazily of earlier rounds, and the server of their pages."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path
from typing import Final

import pytest

from phaul_criu.chains import lazy_pagemap, stack_page
from phaul_criu.rpc import core_pb2, mm_pb2, pagemap_pb2
from phauld.lazy_pages import page_source

PAGE: Final = 4096
PARENT, LAZY, PRESENT = 1, 2, 4
HEAP, FILE, STACK = 0x10000, 0x40000, 0x80000
ANONYMOUS, PRIVATE = 0x20, 0x02
Entry = tuple[int, int, int]


def image(*messages: bytes) -> bytes:
    return bytes(8) + b"".join(struct.pack("<I", len(each)) + each for each in messages)


def pagemap(*entries: Entry, pages_id: int = 1) -> bytes:
    made = [pagemap_pb2.pagemap_head(pages_id=pages_id).SerializeToString()]
    for vaddr, pages, flags in entries:
        entry = pagemap_pb2.pagemap_entry(vaddr=vaddr, flags=flags, nr_pages=pages)
        if "compat_nr_pages" in entry.DESCRIPTOR.fields_by_name:
            entry.compat_nr_pages = 0
        made.append(entry.SerializeToString())
    return image(*made)


def entries(content: bytes) -> list[Entry]:
    found, position = [], 8
    while position < len(content):
        (size,) = struct.unpack_from("<I", content, position)
        found.append(content[position + 4 : position + 4 + size])
        position += 4 + size
    parsed = [pagemap_pb2.pagemap_entry.FromString(each) for each in found[1:]]
    return [(each.vaddr, each.nr_pages, each.flags) for each in parsed]


def mm(*mappings: tuple[int, int, int]) -> bytes:
    entry = mm_pb2.mm_entry()
    for start, end, flags in mappings:
        entry.vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=3, flags=flags, status=1, fd=-1)
    return image(entry.SerializePartialToString())


MAPPINGS: Final = mm(
    (HEAP, HEAP + 8 * PAGE, ANONYMOUS | PRIVATE),
    (FILE, FILE + 8 * PAGE, PRIVATE),
    (STACK, STACK + 8 * PAGE, ANONYMOUS | PRIVATE | 0x100),
)


def test_what_parents_hold_of_anonymous_memory_becomes_lazy() -> None:
    before = pagemap(
        (HEAP, 4, PARENT), (HEAP + 4 * PAGE, 2, PRESENT | LAZY), (FILE, 3, PARENT), (FILE + 3 * PAGE, 1, PRESENT)
    )
    assert entries(lazy_pagemap(before, MAPPINGS, frozenset())) == [
        (HEAP, 4, LAZY),
        (HEAP + 4 * PAGE, 2, PRESENT | LAZY),
        (FILE, 3, PARENT),
        (FILE + 3 * PAGE, 1, PRESENT),
    ]


def test_the_page_of_a_stack_pointer_stays_eager() -> None:
    made = lazy_pagemap(pagemap((STACK, 8, PARENT)), MAPPINGS, frozenset({STACK + 5 * PAGE}))
    assert entries(made) == [(STACK, 5, LAZY), (STACK + 5 * PAGE, 1, PARENT), (STACK + 6 * PAGE, 2, LAZY)]


def test_an_entry_over_two_mappings_is_split() -> None:
    two = mm((HEAP, HEAP + PAGE, ANONYMOUS | PRIVATE), (HEAP + PAGE, HEAP + 2 * PAGE, PRIVATE))
    made = lazy_pagemap(pagemap((HEAP, 2, PARENT)), two, frozenset())
    assert entries(made) == [(HEAP, 1, LAZY), (HEAP + PAGE, 1, PARENT)]


@pytest.mark.parametrize("flags", [PRIVATE, ANONYMOUS, ANONYMOUS | PRIVATE | 0x2000, ANONYMOUS | PRIVATE | 0x40000])
def test_what_criu_would_not_dump_lazily_stays(flags: int) -> None:
    before = pagemap((HEAP, 2, PARENT))
    assert entries(lazy_pagemap(before, mm((HEAP, HEAP + 8 * PAGE, flags)), frozenset())) == [(HEAP, 2, PARENT)]


def test_a_cut_image_is_told() -> None:
    whole = pagemap((HEAP, 2, PARENT))
    for size in range(9, len(whole)):
        if size not in (8, 8 + 4 + struct.unpack_from("<I", whole, 8)[0]):
            with pytest.raises(ValueError, match="cut"):
                lazy_pagemap(whole[:size], MAPPINGS, frozenset())


def test_the_stack_page_of_a_task() -> None:
    core = core_pb2.core_entry()
    core.thread_info.gpregs.sp = STACK + 5 * PAGE + 24
    assert stack_page(image(core.SerializePartialToString())) == STACK + 5 * PAGE
    assert stack_page(image(core_pb2.core_entry().SerializePartialToString())) is None


def pages(*numbers: int) -> bytes:
    return b"".join(bytes([number]) * PAGE for number in numbers)


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """Three rounds of process 7: of its six pages, the last round has page 1 and the second has 1, 2 and 3."""
    layers = [
        (pagemap((HEAP, 6, PRESENT)), pages(10, 11, 12, 13, 14, 15)),
        (pagemap((HEAP, 1, PARENT), (HEAP + PAGE, 3, PRESENT), (HEAP + 4 * PAGE, 2, PARENT)), pages(21, 22, 23)),
        (pagemap((HEAP, 1, LAZY), (HEAP + PAGE, 1, PRESENT | LAZY), (HEAP + 2 * PAGE, 4, LAZY)), pages(31)),
    ]
    for number, (content, memory) in enumerate(layers):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "pagemap-7.img").write_bytes(content)
        (directory / "pages-1.img").write_bytes(memory)
        if number:
            (directory / "parent").symlink_to(f"../{number - 1}")
    return tmp_path / "2"


@pytest.mark.parametrize(
    ("form", "noise"), [(page_source.MESSAGE, 0), (page_source.MESSAGE, 0x5A5A), (page_source.MESSAGE_UP_TO_4_1, 0)]
)
def test_every_page_comes_from_the_newest_round_that_has_it(rounds: Path, form: struct.Struct, noise: int) -> None:
    ours, theirs = socket.socketpair()
    last = page_source.chain(str(rounds), 7)
    assert last is not None
    server = threading.Thread(target=page_source.serve, args=(theirs, {7: last}))
    server.start()
    got, address = b"", HEAP
    while address < HEAP + 6 * PAGE:
        wanted = (HEAP + 6 * PAGE - address) // PAGE
        question = bytearray(form.pack(page_source.GET, wanted, address, 7))
        if noise:
            question[4:6] = noise.to_bytes(2, "little")  # criu does not clear the padding
        ours.sendall(question)
        command, number, at, process = form.unpack(page_source.receive(ours, form.size))
        assert (command, at, process) == (PRESENT << 16 | page_source.ADD_F, address, 7)
        got += page_source.receive(ours, number * PAGE)
        address += number * PAGE
    ours.sendall(form.pack(page_source.FORCE_CLOSE, 0, 0, 0))
    assert page_source.receive(ours, 4) == bytes(4)
    server.join(5)
    ours.close()
    theirs.close()
    assert got == pages(10, 31, 22, 23, 14, 15)


def test_a_page_that_no_round_has_is_an_error(rounds: Path) -> None:
    last = page_source.chain(str(rounds), 7)
    assert last is not None
    with pytest.raises(LookupError):
        last.find(HEAP + 6 * PAGE, HEAP + 7 * PAGE)
    assert page_source.chain(str(rounds), 8) is None
