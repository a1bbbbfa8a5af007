"""A relay's end at the source: questions for pages from the link to criu, the answers back.

The invariants are those of `relay.py`: no end of file reaches criu, and nothing but questions for pages.
"""

import os
import queue
import threading
from collections.abc import Sequence

from phaul_client import relay_frames as frames
from phaul_client.errors import RemoteProtocolError
from phaul_client.relay_frames import AnswerHead, Command, Flag, FrameReader, Question
from phauld.lazy_pages.relay_end import RelayEnd, log, receive_frame
from phauld.lazy_pages.relay_links import CHUNK_BYTES, Connection


class Serve(RelayEnd):
    """The source: questions from the link to criu, answers back."""

    def __init__(
        self, directory: str, message_bytes: int, swrk_fd: int, criu: str, kept_fds: Sequence[int] = ()
    ) -> None:
        super().__init__(directory, message_bytes)
        self._to_criu = threading.Lock()
        self._ended = False
        self._asked: queue.SimpleQueue[tuple[Connection, Question]] = queue.SimpleQueue()
        # criu gets both ends: see the invariant.
        self.start_criu([criu, "swrk", str(swrk_fd)], (swrk_fd, self.ours.fileno(), self.theirs.fileno(), *kept_fds))
        for descriptor in (swrk_fd, *kept_fds):
            os.close(descriptor)
        self.thread(self.take_questions)
        self.thread(self.give_answers)

    def command(self, message: dict[str, object], descriptors: list[int]) -> dict[str, object]:
        match message["do"]:
            case "finish":
                self.end(Command.FORCE_CLOSE)
            case "abort":
                self.end(Command.ABORT)
            case "limit":
                self.link.limit(int(str(message["bytes_per_second"])))
            case _:
                return super().command(message, descriptors)
        return self.status()

    def end(self, command: Command) -> None:
        """Tell criu that everything has arrived, which kills the tree, or that nothing shall, which lets it run on."""
        with self._to_criu:
            if not self._ended:
                self._ended = True
                self.give_message(frames.CriuMessage(command, 0, 0, 0).encode())
        self.link.lose()

    def take_questions(self) -> None:
        while not self._ended:
            link = self.link.wait()
            reader = FrameReader()
            try:
                while True:
                    question = receive_frame(link, reader)
                    if not isinstance(question, Question):
                        raise RemoteProtocolError("relay", "an answer where questions are expected")
                    self.pass_on(link, question)
            except (OSError, EOFError, RemoteProtocolError) as exc:
                log(f"link lost: {exc!r}")
                self.link.lose(link)

    def pass_on(self, link: Connection, question: Question) -> None:
        """To criu, if it is a question for pages: anything else would end it."""
        if frames.decode_criu(question.message).command != Command.GET:
            raise RemoteProtocolError("relay", "the other node asks for something else than pages")
        message = frames.to_criu(question.message, self.message_bytes)
        with self._to_criu:
            if not self._ended:
                self._asked.put((link, question))
                self.ours.sendall(message)

    def give_answers(self) -> None:
        try:
            while True:
                link, question = self._asked.get()
                self.give_answer(link, question, self.receive_message())
        except (EOFError, OSError, RemoteProtocolError) as exc:
            log(f"criu gives no more answers: {exc!r}")

    def give_answer(self, link: Connection, question: Question, header: bytes) -> None:
        total = frames.answer_bytes(header)
        skip = min(question.skip_bytes, total - 1)
        body_left = total - len(header)
        self.pages += 0 if skip else body_left // frames.PAGE_BYTES
        body_left -= self.drop(max(0, skip - len(header)))
        head = AnswerHead(
            sequence=question.sequence,
            offset_bytes=skip,
            length_bytes=total - skip,
            size_bytes=total - skip,
            flags=Flag.LAST,
        )
        if not self.link.is_current(link):
            self.drop(body_left)
            return
        try:
            self.wire_bytes += link.send(head.encode() + header[skip:], more=True)
        except OSError as exc:
            log(f"link lost: {exc!r}")
            self.link.lose(link)
            self.drop(body_left)
            return
        self.stream(link, body_left)

    def stream(self, link: Connection, size: int) -> None:
        while size:
            count = link.take(self.ours, size)
            size -= count
            try:
                self.wire_bytes += link.pass_on(count)
            except OSError as exc:
                log(f"link lost: {exc!r}")
                self.link.lose(link)
                self.drop(size)
                return
            self.sent_bytes += count

    def drop(self, size: int) -> int:
        """Take from criu what nobody waits for any more."""
        left = size
        while left:
            chunk = self.ours.recv(min(left, CHUNK_BYTES))
            if not chunk:
                raise EOFError
            left -= len(chunk)
        return size
