"""Serves the pages of a chain of rounds to `criu lazy-pages`, which does not look into parents by itself.

    python -I -S page_source.py FD

A process of its own, run as a script: it must outlive phauld as criu does. FD is the socket whose other end criu gets
as its page server; before, phauld writes there the directory that holds the images of the last round, with criu's links
to the rounds before, and a zero byte. It ends when criu has every page, or when criu ends. Its own images are opened at
the start: they may be removed once criu has ended.

criu's page server protocol (criu/page-xfer.c): a question is a struct page_server_iov, the answer another one and then
the pages, perhaps fewer than were asked for. The struct grew with criu 4.2, when the number of pages became 64 bits.
"""

import bisect
import os
import re
import socket
import struct
import sys

PAGE_BYTES = 4096
#: command, pages, address, image
MESSAGE_UP_TO_4_1 = struct.Struct("<IIQQ")
MESSAGE = struct.Struct("<I4xQQQ")
SIZE = struct.Struct("<I")
MAGICS_BYTES = 8
ADD_F, GET, CLOSE, FORCE_CLOSE = 6, 7, 0x1023, 0x1024
COMMAND_BITS = 16
END_OF_NAME = b"\0"
LEAST_ADDRESS = 1 << 16  #: of a mapping; the kernel's mmap_min_addr. criu never asks for as many pages
PE_PRESENT = 1 << 2


def fields(content: bytes) -> dict[int, int]:
    """The varint fields of a protobuf message, by number; pagemaps have no others."""
    found: dict[int, int] = {}
    position = 0
    while position < len(content):
        key, position = varint(content, position)
        found[key >> 3], position = varint(content, position)
    return found


def varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


class Round:
    """The pages of one process in one round; `parent` is the round before."""

    def __init__(self, directory: str, image: int, parent: "Round | None") -> None:
        self.parent = parent
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.offsets: list[int | None] = []  # None: in a round before
        with open(os.path.join(directory, f"pagemap-{image}.img"), "rb") as file:
            content = file.read()
        position, offset = MAGICS_BYTES, 0
        head: dict[int, int] = {}
        while position < len(content):
            (size,) = SIZE.unpack_from(content, position)
            position += SIZE.size
            entry = fields(content[position : position + size])
            position += size
            if not head:
                head = entry
                continue
            length = (entry.get(5) or entry.get(2, 0)) * PAGE_BYTES
            present = entry.get(4, 0) & PE_PRESENT
            self.starts.append(entry[1])
            self.ends.append(entry[1] + length)
            self.offsets.append(offset if present else None)
            offset += length if present else 0
        self.file = os.open(os.path.join(directory, f"pages-{head[1]}.img"), os.O_RDONLY)

    def find(self, start: int, end: int) -> tuple[int, int, int]:
        """(file, offset, bytes) of the pages from `start` on, as far as they lie together, at most to `end`."""
        index = bisect.bisect_right(self.starts, start) - 1
        if index < 0 or self.ends[index] <= start:
            raise LookupError(f"no round has the page at {start:#x}")
        end = min(end, self.ends[index])
        offset = self.offsets[index]
        if offset is None:
            if self.parent is None:
                raise LookupError(f"the page at {start:#x} is in a round that is missing")
            return self.parent.find(start, end)
        return self.file, offset + start - self.starts[index], end - start


def chain(directory: str, image: int) -> Round | None:
    """The rounds of one process, the last of them; None if it has no pages there."""
    if not os.path.exists(os.path.join(directory, f"pagemap-{image}.img")):
        return None
    parent = os.path.join(directory, "parent")
    return Round(directory, image, chain(parent, image) if os.path.isdir(parent) else None)


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; fewer only at the end of the stream."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            break
        data += more
    return data


def receive_name(connection: socket.socket) -> str | None:
    """The directory; None if nobody wants the pages. Byte by byte: what follows is criu's."""
    name = b""
    while not name.endswith(END_OF_NAME):
        byte = connection.recv(1)
        if not byte:
            return None
        name += byte
    return os.fsdecode(name.removesuffix(END_OF_NAME))


def form_of(beginning: bytes) -> struct.Struct:
    """The form of criu's messages, from the first 16 bytes of one: does an address follow, or a number of pages?

    What is between the command and the number of pages in the new form is not zeroed, so that it says nothing.
    """
    (second,) = struct.unpack_from("<Q", beginning, 8)
    return MESSAGE_UP_TO_4_1 if second >= LEAST_ADDRESS else MESSAGE


def serve(connection: socket.socket, rounds: dict[int, Round]) -> None:
    beginning = connection.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
    if len(beginning) < 16:
        return
    form = form_of(beginning)
    while len(message := receive(connection, form.size)) == form.size:
        command, pages, address, image = form.unpack(message)
        if command == GET:
            file, offset, size = rounds[image].find(address, address + pages * PAGE_BYTES)
            connection.sendall(form.pack(PE_PRESENT << COMMAND_BITS | ADD_F, size // PAGE_BYTES, address, image))
            while size:
                sent = os.sendfile(connection.fileno(), file, offset, size)
                offset, size = offset + sent, size - sent
        elif command in (CLOSE, FORCE_CLOSE):
            connection.sendall(bytes(4))  # status 0
            return
        else:
            raise ValueError(f"criu asks for {command}")


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    directory = receive_name(connection)
    if directory is None:
        return
    images = [int(found[1]) for name in os.listdir(directory) if (found := re.fullmatch(r"pagemap-(\d+)\.img", name))]
    serve(connection, {image: last for image in images if (last := chain(directory, image)) is not None})


if __name__ == "__main__":
    main()
