"""What both ends of a relay (`relay.py`) have in common: criu below it, the link, the counters, phauld's questions."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from phaul_client import relay_frames as frames
from phaul_client.relay_frames import AnswerHead, FrameReader, Question
from phauld.lazy_pages.relay_links import Connection, Link, connect, receive_exactly

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


class RelayEnd:
    """See above."""

    is_server = False  #: of TLS: the end that was connected to

    def __init__(self, directory: str, message_bytes: int = frames.CRIU_BYTES) -> None:
        self.directory = directory
        self.message_bytes = message_bytes  #: of this criu
        self.link = Link()
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.page_fd = self.theirs.fileno()  #: the number of criu's end there
        self.criu_pid = 0
        self.criu_pidfd = -1
        self.sent_bytes = 0
        self.pages = 0
        self.wire_bytes = 0

    def start_criu(self, argv: list[str], keep: Sequence[int]) -> None:
        """Start it with these descriptors; its end of the page socket is then no longer ours."""
        for descriptor in keep:
            os.set_inheritable(descriptor, True)
        self.criu_pid = os.posix_spawn(argv[0], argv, os.environ, setsigdef=IGNORED_SIGNALS)
        self.criu_pidfd = os.pidfd_open(self.criu_pid)
        for descriptor in keep:
            os.set_inheritable(descriptor, False)
        self.theirs.close()

    def receive_message(self) -> bytes:
        """The next of criu's messages, as the relays have them."""
        return frames.from_criu(receive_exactly(self.ours, self.message_bytes))

    def give_message(self, message: bytes) -> None:
        self.ours.sendall(frames.to_criu(message, self.message_bytes))

    def status(self) -> dict[str, object]:
        return {
            "criu_pid": self.criu_pid,
            "page_fd": self.page_fd,
            "linked": self.link.is_up,
            "bytes": self.sent_bytes,
            "wire_bytes": self.wire_bytes,
            "pages": self.pages,
        }

    def command(self, message: dict[str, object], descriptors: list[int]) -> dict[str, object]:
        """Do what phauld asks."""
        match message["do"]:
            case "status":
                pass
            case "link":
                secured, packing = message["tls"], message["packing"]
                assert secured is None or isinstance(secured, dict)
                assert packing is None or isinstance(packing, dict)
                sock = socket.socket(fileno=descriptors.pop())
                self.link.replace(connect(sock, secured, packing, server_side=self.is_server))
            case _:
                return {"error": f"unknown command {message['do']}"}
        return self.status()

    def thread(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True, name=work.__name__).start()


def receive_frame(link: Connection, reader: FrameReader) -> Question | AnswerHead:
    """Raises EOFError, OSError, RemoteProtocolError."""
    while (event := reader.next_event()) is None:
        reader.receive_data(link.receive_exactly(reader.missing_bytes))
    return event


def log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the thread that says so
        sys.stderr.write(f"{time.time():.3f} {text}\n")
        sys.stderr.flush()
