"""Pages that are the same in many images travel once (pure).

What processes share since a fork is in the image of each of them: of 50 Python programs 97 % of the pages that cannot
be left behind are another one's, too. Each page has the number of its first appearance in a call of PutImages; a piece
says the numbers of its pages, and brings those that were not there before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from phaul_client.errors import ImageCorrupt

PAGE_BYTES: Final = 4096
MOST_PAGES: Final = 8192  #: so many are remembered at either end
PIECE_PAGES: Final = 256  #: at most, whatever it says: a number is small, and its page is not


class PageWriter:
    """At the source, for one call."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def encode(self, data: bytes) -> tuple[list[int], bytes]:
        """The numbers of its pages, and those that the other end does not have; `data` is whole pages."""
        known, numbers, new = self._numbers, [], []
        for position in range(0, len(data), PAGE_BYTES):
            page = data[position : position + PAGE_BYTES]
            number = known.get(page)
            if number is None:
                number = len(known)
                new.append(page)
                if number < MOST_PAGES:
                    known[page] = number
            numbers.append(number)
        return numbers, b"".join(new)


class PageReader:
    """At the destination, for one call."""

    def __init__(self) -> None:
        self._pages: list[bytes] = []

    def decode(self, numbers: Sequence[int], new: bytes) -> bytes:
        """The content of a piece. Raises `ImageCorrupt`."""
        if len(numbers) > PIECE_PAGES:
            raise ImageCorrupt(f"a piece of {len(numbers)} pages")
        pages, found, position = self._pages, [], 0
        for number in numbers:
            if number < len(pages):
                found.append(pages[number])
                continue
            page = new[position : position + PAGE_BYTES]
            if number > len(pages) or len(page) != PAGE_BYTES:
                raise ImageCorrupt(f"page {number} has not come before")
            position += PAGE_BYTES
            found.append(page)
            if number < MOST_PAGES:
                pages.append(page)
        if position != len(new):
            raise ImageCorrupt("a piece has more pages than it says")
        return b"".join(found)
