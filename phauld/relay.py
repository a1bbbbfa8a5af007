"""The process between criu's lazy pages and the other node: the parent of the criu whose page connection it carries.

One at each end of a post-copy migration, so that neither a restart nor the death of phauld ends the page connection
that the tree lives from. It is small, knows no gRPC, and is run with the standard library (and `phaul_client`'s frames)
alone; phauld makes the connections to the other node and hands them over. When one is cut, it waits for the next.

  serve   at the source: below it `criu swrk`, which dumps and then answers questions for pages
  fetch   at the destination: below it, once told to, `criu lazy-pages`, which asks them

The invariants. No end of file ever reaches the serving criu, which would take it for the end of a transfer that
succeeded and kill the tree: criu itself holds the other end of its page socket, too, so that not even the death of this
process is one. And only questions for pages go from the other node to it, so that nobody there can end it.

phauld asks on a socket in DIRECTORY, one JSON message and its answer to a connection (`COMMANDS`). Files there:
  relay.sock  as long as this process lives
  exit.json   {"status"} how criu ended
"""

import array
import contextlib
import errno
import json
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

from phaul_client import relay_frames as frames
from phaul_client.errors import RemoteProtocolError
from phaul_client.relay_courtesy import GAP_SECONDS, Courtesy
from phaul_client.relay_frames import AnswerHead, Command, Flag, FrameReader, Question, Questions
from phauld.relay_links import CHUNK_BYTES, Connection, Link, connect, receive_exactly

READY_SECONDS = 30.0
RETRY_SECONDS = 0.2
MESSAGE_BYTES = 1 << 16
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


class Relay:
    """What both ends have in common: criu below, the link, the counters, and phauld's questions."""

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


class Serve(Relay):
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


class Fetch(Relay):
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


def receive_frame(link: Connection, reader: FrameReader) -> Question | AnswerHead:
    """Raises EOFError, OSError, RemoteProtocolError."""
    while (event := reader.next_event()) is None:
        reader.receive_data(link.receive_exactly(reader.missing_bytes))
    return event


def log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the thread that says so
        sys.stderr.write(f"{time.time():.3f} {text}\n")
        sys.stderr.flush()


def answer(relay: Relay, connection: socket.socket) -> None:
    """One command of phauld's. The connection is closed; a handshake with the other node keeps no others waiting."""
    connection.settimeout(5.0)
    descriptors: list[int] = []
    message: object = None
    try:
        data, ancillary, _, _ = connection.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(16))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                descriptors += found
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # criu has no business with the link
        message = json.loads(data) if data else None
    except (OSError, ValueError) as exc:
        message = {"do": "", "error": str(exc)}
    if isinstance(message, dict) and message.get("tls"):
        threading.Thread(target=obey, args=(relay, connection, message, descriptors), daemon=True).start()
    else:
        obey(relay, connection, message, descriptors)


def obey(relay: Relay, connection: socket.socket, message: object, descriptors: list[int]) -> None:
    """Do it and say so."""
    reply: dict[str, object] = {}
    try:
        if isinstance(message, dict):
            reply = relay.command(message, descriptors)
    except (OSError, ValueError, LookupError) as exc:
        reply = {"error": str(exc) or type(exc).__name__}
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(OSError), connection:
        connection.send(json.dumps(reply).encode())


def insist_exit(directory: str, status: int) -> None:
    """phauld kills a tree whose relay ended without it: while the disk is full, again and again."""
    while True:
        try:
            return write_exit(directory, status)
        except FileNotFoundError:  # the directory is gone: nobody will ask
            return None
        except OSError as exc:
            log(f"exit.json not written: {exc!r}")
            time.sleep(RETRY_SECONDS)


def write_exit(directory: str, status: int) -> None:
    temporary = os.path.join(directory, f".exit.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"status": status}, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, os.path.join(directory, "exit.json"))


def run(relay: Relay, listener: socket.socket) -> None:
    """Answer phauld until criu has ended."""
    while True:
        waited = [listener.fileno()] + ([relay.criu_pidfd] if relay.criu_pidfd >= 0 else [])
        readable, _, _ = select.select(waited, [], [])
        if listener.fileno() in readable:
            connection, _ = listener.accept()
            answer(relay, connection)
        if relay.criu_pidfd in readable:
            _, status = os.waitpid(relay.criu_pid, 0)
            return insist_exit(relay.directory, os.waitstatus_to_exitcode(status))


def main() -> None:
    """What phauld starts.

    relay serve DIRECTORY LISTENER_FD MESSAGE_BYTES SWRK_FD CRIU [FD_FOR_CRIU]...
    relay fetch DIRECTORY LISTENER_FD MESSAGE_BYTES
    """
    mode, directory, listener_fd, message_bytes = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(listener_fd, False)
    listener = socket.socket(fileno=listener_fd)
    if mode == "serve":
        kept_fds = tuple(map(int, sys.argv[8:]))
        run(Serve(directory, message_bytes, int(sys.argv[6]), sys.argv[7], kept_fds), listener)
    else:
        run(Fetch(directory, message_bytes), listener)
    os._exit(0)
