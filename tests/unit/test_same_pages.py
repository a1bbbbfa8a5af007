"""Pages that are the same travel once, and come out as what they were."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.v1 import remote_pb2
from phaul_client import same_pages
from phaul_client.errors import ImageCorrupt
from phaul_client.same_pages import PAGE_BYTES, PageReader, PageWriter
from phauld.destination.images import ImageWriter

IMAGES = st.lists(st.lists(st.integers(0, 12), max_size=20), max_size=8)


def image(kinds: list[int]) -> bytes:
    return b"".join(bytes([kind]) * PAGE_BYTES for kind in kinds)


@given(IMAGES, st.integers(0, 6))
def test_what_is_written_is_read(images: list[list[int]], most_pages: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_pages, "MOST_PAGES", most_pages)
        writer, reader = PageWriter(), PageReader()
        for kinds in images:
            assert reader.decode(*writer.encode(image(kinds))) == image(kinds)


def test_a_page_travels_once() -> None:
    writer = PageWriter()
    assert writer.encode(image([1, 2, 1])) == ([0, 1, 0], image([1, 2]))
    assert writer.encode(image([2, 3])) == ([1, 2], image([3]))


@pytest.mark.parametrize(
    ("numbers", "new"),
    [
        ([1], image([1])),
        ([0, 0], image([1, 2])),
        ([0], b""),
        ([0], b"short"),
        ([0, 1], image([1])),
        ([0] * 257, image([1])),
    ],
    ids=["never came", "more than is said", "nothing came", "half a page", "one is missing", "a bomb"],
)
def test_what_cannot_be_is_refused(numbers: list[int], new: bytes) -> None:
    with pytest.raises(ImageCorrupt):
        PageReader().decode(numbers, new)


def test_an_image_is_written_of_pages_that_came_before(tmp_path: Path) -> None:
    content = [image([1, 2, 3]), image([2, 4, 3, 3])]
    writer = PageWriter()
    with ImageWriter(None, (), lambda: tmp_path) as images:
        for number, each in enumerate(content):
            numbers, new = writer.encode(each)
            images.write(
                remote_pb2.FilePiece(
                    image_name=f"pages-{number}.img",
                    size_bytes=len(each),
                    crc32=zlib.crc32(new),
                    data=new,
                    pages=numbers,
                )
            )
    assert [(tmp_path / f"pages-{number}.img").read_bytes() for number in range(2)] == content
    assert images.bytes == sum(map(len, content))


def test_no_more_are_remembered_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_pages, "MOST_PAGES", 2)
    writer, reader = PageWriter(), PageReader()
    kinds = random.Random(1).sample(range(200), 50)
    assert reader.decode(*writer.encode(image(kinds))) == image(kinds)
    assert writer.encode(image(kinds[:3])) == ([0, 1, 2], image(kinds[2:3]))
