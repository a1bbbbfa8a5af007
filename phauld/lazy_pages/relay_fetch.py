"""A relay's end at the destination: questions of `criu lazy-pages` to the link, the answers back.

What has been asked and not answered when a link is cut is asked again on the next one.
"""

import contextlib
import errno
import select
import socket
import struct
import threading
import time

from phaul_client import relay_frames as frames
from phaul_client.errors import RemoteProtocolError
from phaul_client.relay_courtesy import GAP_SECONDS, Courtesy
from phaul_client.relay_frames import AnswerHead, Command, Flag, FrameReader, Questions
from phauld.lazy_pages.relay_end import RelayEnd, log, receive_frame
from phauld.lazy_pages.relay_links import Connection

READY_SECONDS = 30.0


class Fetch(RelayEnd):
    """The destination: criu's questions to the link, answers back."""

    is_server = True

    def __init__(self, directory: str, message_bytes: int) -> None:
        super().__init__(directory, message_bytes)
        self._questions = Questions()
        self._lock = threading.Lock()
        self._courtesy = Courtesy(0)
        self._asking: Connection | None = None  # the link on which everything open has been asked

    def command(self, message: dict[str, object], descriptors: list[int]) -> dict[str, object]:
        match message["do"]:
            case "start":
                argv = message["argv"]
                assert isinstance(argv, list)
                self.start(argv, int(str(message.get("pages", 0))))
            case _:
                return super().command(message, descriptors)
        return self.status()

    def start(self, argv: list[str], pages: int) -> None:
        """Start `criu lazy-pages`, which is to bring so many pages, and wait until it listens."""
        if self.criu_pid:
            return
        self._courtesy = Courtesy(pages)
        ready, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self.theirs.fileno())
        extra = ["--status-fd", str(descriptors[0]), "--page-server", "--ps-socket", str(descriptors[1])]
        self.start_criu([*argv, *extra], descriptors)
        theirs.close()
        ready.settimeout(READY_SECONDS)
        with ready:
            if not ready.recv(1):
                raise OSError(errno.ECHILD, "criu lazy-pages did not start")
        self.thread(self.take_questions)
        self.thread(self.give_answers)

    def status(self) -> dict[str, object]:
        return {**super().status(), "open": self._questions.open}

    def take_questions(self) -> None:
        """criu closes the conversation when it ends, well or not: that is for its exit status to say, not for this."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                message = self.receive_message()
                asked = frames.decode_criu(message)
                if asked.command == Command.GET:
                    if self._courtesy.gives_way(asked.pages, self.pages, time.monotonic()):
                        select.select([self.ours], [], [], GAP_SECONDS)
                    self.ask(message)
                else:
                    self.ours.sendall(struct.pack("<i", 0))

    def ask(self, message: bytes) -> None:
        with self._lock:
            question = self._questions.ask(message)
            if self._asking is not None:
                try:
                    self._asking.send(question.encode())
                except OSError:
                    self._asking = None  # `again` on the next link will ask it

    def give_answers(self) -> None:
        while True:
            link = self.link.wait()
            reader = FrameReader()
            try:
                with self._lock:
                    link.send(b"".join(each.encode() for each in self._questions.again()))
                    self._asking = link
                while True:
                    head = receive_frame(link, reader)
                    if not isinstance(head, AnswerHead):
                        raise RemoteProtocolError("relay", "a question where answers are expected")
                    self.give_answer(link, head)
            except (EOFError, OSError, RemoteProtocolError) as exc:
                log(f"link lost: {exc!r}")
                with self._lock:
                    self._asking = None
                self.link.lose(link)

    def give_answer(self, link: Connection, head: AnswerHead) -> None:
        with self._lock:
            self._questions.expect(head)
        left = head.size_bytes
        if self.message_bytes != frames.CRIU_BYTES and head.offset_bytes == 0:
            left -= self.give_header(link, left)
        while left:
            count = link.receive(left)
            link.deliver(self.ours, count)
            left -= count
            self.sent_bytes += count
            with self._lock:
                self._questions.delivered(count)
        if Flag.LAST in head.flags:
            with self._lock:
                total = self._questions.delivered_bytes
                self._questions.completed()
            self.pages += (total - frames.CRIU_BYTES) // frames.PAGE_BYTES

    def give_header(self, link: Connection, size: int) -> int:
        """The message that an answer begins with, in this criu's form: whole, so that no cut falls inside of it."""
        if size < frames.CRIU_BYTES:
            raise RemoteProtocolError("relay", f"an answer that begins with {size} bytes")
        self.give_message(link.receive_exactly(frames.CRIU_BYTES))
        with self._lock:
            self._questions.delivered(frames.CRIU_BYTES)
        return frames.CRIU_BYTES
