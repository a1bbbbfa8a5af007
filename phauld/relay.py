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
import ctypes
import errno
import fcntl
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
from phaul_client.pacing import set_pace
from phaul_client.relay_frames import AnswerHead, Command, Flag, FrameReader, Question, Questions

CHUNK_BYTES = 1 << 20
PIPE_BYTES = 1 << 20
READY_SECONDS = 30.0
RETRY_SECONDS = 0.2
#: A peer that is silent for so long is taken for lost, and a new connection is asked for.
LINK_TIMEOUT_SECONDS = 8
TCP_USER_TIMEOUT = 18  # linux/tcp.h
MESSAGE_BYTES = 1 << 16
SYS_PIDFD_GETFD = 438  # the same on every architecture
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Raises EOFError at an end of file, also in the middle."""
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


class Link:
    """The connection to the other node, replaced whenever phauld brings a new one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None

    @property
    def is_up(self) -> bool:
        return self._socket is not None

    def replace(self, sock: socket.socket) -> None:
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
            (socket.IPPROTO_TCP, TCP_USER_TIMEOUT, LINK_TIMEOUT_SECONDS * 1000),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        ):
            with contextlib.suppress(OSError):  # not TCP
                sock.setsockopt(level, option, value)
        sock.setblocking(True)
        with self._changed:
            self._shut_down()
            self._socket = sock
            self._changed.notify_all()

    def wait(self) -> socket.socket:
        with self._changed:
            while self._socket is None:
                self._changed.wait()
            return self._socket

    def limit(self, bytes_per_second: int) -> None:
        """Of this connection; phauld limits the next ones before it hands them over."""
        with self._changed:
            if self._socket is not None:
                set_pace(self._socket, bytes_per_second)

    def is_current(self, sock: socket.socket) -> bool:
        return self._socket is sock

    def lose(self, sock: socket.socket | None = None) -> None:
        """This connection failed; with no argument: give up whichever there is."""
        with self._changed:
            if sock is None or self._socket is sock:
                self._shut_down()

    def _shut_down(self) -> None:
        # Not closed here: other threads may be in a system call on it. The last reference closes it.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket = None


class Pipe:
    """The pipe that splice needs between two sockets."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._read, self._write = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def fill(self, source: socket.socket, size: int) -> int:
        """Take at most `size` bytes. Raises EOFError, OSError."""
        count = os.splice(source.fileno(), self._write, size)
        if not count:
            raise EOFError
        return count

    def empty(self, target: socket.socket, size: int) -> None:
        """Give exactly `size` bytes on. Raises OSError; then `renew` it."""
        while size:
            size -= os.splice(self._read, target.fileno(), size)

    def renew(self) -> None:
        """Drop what is in it."""
        os.close(self._read)
        os.close(self._write)
        self._open()


class Relay:
    """What both ends have in common: criu below, the link, the counters, and phauld's questions."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.link = Link()
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.page_fd = self.theirs.fileno()  #: the number of criu's end there
        self.pipe = Pipe()
        self.criu_pid = 0
        self.criu_pidfd = -1
        self.sent_bytes = 0
        self.pages = 0
        self.wire_bytes = 0
        self.ended = False

    def start_criu(self, argv: list[str], keep: Sequence[int]) -> None:
        """Start it with these descriptors; its end of the page socket is then no longer ours."""
        for descriptor in keep:
            os.set_inheritable(descriptor, True)
        self.criu_pid = os.posix_spawn(argv[0], argv, os.environ, setsigdef=IGNORED_SIGNALS)
        self.criu_pidfd = os.pidfd_open(self.criu_pid)
        for descriptor in keep:
            os.set_inheritable(descriptor, False)
        self.theirs.close()

    def criu_ended(self, status: int) -> bool:
        """Whether nothing is left to do."""
        return True

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
                self.link.replace(socket.socket(fileno=descriptors.pop()))
            case _:
                return {"error": f"unknown command {message['do']}"}
        return self.status()

    def thread(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True, name=work.__name__).start()


class Serve(Relay):
    """The source: questions from the link to criu, answers back."""

    def __init__(self, directory: str, swrk_fd: int, criu: str) -> None:
        super().__init__(directory)
        self._to_criu = threading.Lock()
        self._ended = False
        self._asked: queue.SimpleQueue[tuple[socket.socket, Question]] = queue.SimpleQueue()
        # criu gets both ends: see the invariant.
        self.start_criu([criu, "swrk", str(swrk_fd)], (swrk_fd, self.ours.fileno(), self.theirs.fileno()))
        os.close(swrk_fd)
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
                self.ours.sendall(frames.CriuMessage(command, 0, 0, 0).encode())
        self.link.lose()

    def take_questions(self) -> None:
        while not self._ended:
            sock = self.link.wait()
            reader = FrameReader()
            try:
                while True:
                    question = receive_frame(sock, reader)
                    if not isinstance(question, Question):
                        raise RemoteProtocolError("relay", "an answer where questions are expected")
                    self.pass_on(sock, question)
            except (OSError, EOFError, RemoteProtocolError) as exc:
                log(f"link lost: {exc!r}")
                self.link.lose(sock)

    def pass_on(self, sock: socket.socket, question: Question) -> None:
        """To criu, if it is a question for pages: anything else would end it."""
        if frames.decode_criu(question.message).command != Command.GET:
            raise RemoteProtocolError("relay", "the other node asks for something else than pages")
        with self._to_criu:
            if not self._ended:
                self._asked.put((sock, question))
                self.ours.sendall(question.message)

    def give_answers(self) -> None:
        try:
            while True:
                sock, question = self._asked.get()
                self.give_answer(sock, question, receive_exactly(self.ours, frames.CRIU_BYTES))
        except (EOFError, OSError, RemoteProtocolError) as exc:
            log(f"criu gives no more answers: {exc!r}")

    def give_answer(self, sock: socket.socket, question: Question, header: bytes) -> None:
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
        if not self.link.is_current(sock):
            self.drop(body_left)
            return
        try:
            start = head.encode() + header[skip:]
            sock.sendall(start, socket.MSG_MORE)
            self.wire_bytes += len(start)
        except OSError as exc:
            log(f"link lost: {exc!r}")
            self.link.lose(sock)
            self.drop(body_left)
            return
        self.stream(sock, body_left)

    def stream(self, sock: socket.socket, size: int) -> None:
        while size:
            count = self.pipe.fill(self.ours, min(size, CHUNK_BYTES))
            size -= count
            try:
                self.pipe.empty(sock, count)
            except OSError as exc:
                log(f"link lost: {exc!r}")
                self.link.lose(sock)
                self.pipe.renew()
                self.drop(size)
                return
            self.sent_bytes += count
            self.wire_bytes += count

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

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._questions = Questions()
        self._lock = threading.Lock()
        self.held: list[int] = []
        self._asking: socket.socket | None = None  # the link on which everything open has been asked

    def command(self, message: dict[str, object], descriptors: list[int]) -> dict[str, object]:
        match message["do"]:
            case "start":
                argv = message["argv"]
                assert isinstance(argv, list)
                self.start(argv)
            case "hold":
                self.held = userfaultfds(self.criu_pid, self.criu_pidfd)
            case _:
                return super().command(message, descriptors)
        return self.status()

    def criu_ended(self, status: int) -> bool:
        """Tasks that wait for a page go on waiting as long as somebody has their userfaultfd: after a failure, us."""
        if status == 0 or not self.held:
            return True
        self.link.lose()
        return False

    def start(self, argv: list[str]) -> None:
        """Start `criu lazy-pages` and wait until it listens."""
        if self.criu_pid:
            return
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
                message = receive_exactly(self.ours, frames.CRIU_BYTES)
                if frames.decode_criu(message).command == Command.GET:
                    self.ask(message)
                else:
                    self.ours.sendall(struct.pack("<i", 0))

    def ask(self, message: bytes) -> None:
        with self._lock:
            question = self._questions.ask(message)
            if self._asking is not None:
                try:
                    self._asking.sendall(question.encode())
                except OSError:
                    self._asking = None  # `again` on the next link will ask it

    def give_answers(self) -> None:
        while True:
            sock = self.link.wait()
            reader = FrameReader()
            try:
                with self._lock:
                    sock.sendall(b"".join(each.encode() for each in self._questions.again()))
                    self._asking = sock
                while True:
                    head = receive_frame(sock, reader)
                    if not isinstance(head, AnswerHead):
                        raise RemoteProtocolError("relay", "a question where answers are expected")
                    self.give_answer(sock, head)
            except (EOFError, OSError, RemoteProtocolError) as exc:
                log(f"link lost: {exc!r}")
                with self._lock:
                    self._asking = None
                self.link.lose(sock)

    def give_answer(self, sock: socket.socket, head: AnswerHead) -> None:
        with self._lock:
            self._questions.expect(head)
        left = head.size_bytes
        while left:
            count = self.pipe.fill(sock, min(left, CHUNK_BYTES))
            self.pipe.empty(self.ours, count)
            left -= count
            self.sent_bytes += count
            with self._lock:
                self._questions.delivered(count)
        if Flag.LAST in head.flags:
            with self._lock:
                total = self._questions.delivered_bytes
                self._questions.completed()
            self.pages += (total - frames.CRIU_BYTES) // frames.PAGE_BYTES


def userfaultfds(pid: int, pidfd: int) -> list[int]:
    """Our own descriptors of the userfaultfds that a process has."""
    library = ctypes.CDLL(None, use_errno=True)
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "userfaultfd" in os.readlink(f"/proc/{pid}/fd/{name}"):
                descriptor = library.syscall(SYS_PIDFD_GETFD, pidfd, int(name), 0)
                if descriptor < 0:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd")
                found.append(descriptor)
    return found


def receive_frame(sock: socket.socket, reader: FrameReader) -> Question | AnswerHead:
    """Raises EOFError, OSError, RemoteProtocolError."""
    while (event := reader.next_event()) is None:
        reader.receive_data(receive_exactly(sock, reader.missing_bytes))
    return event


def log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the thread that says so
        sys.stderr.write(f"{time.time():.3f} {text}\n")
        sys.stderr.flush()


def answer(relay: Relay, connection: socket.socket) -> None:
    """One command of phauld's."""
    connection.settimeout(5.0)
    descriptors: list[int] = []
    try:
        data, ancillary, _, _ = connection.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(16))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                descriptors += found
        reply = relay.command(json.loads(data), descriptors) if data else {}
    except (OSError, ValueError, LookupError) as exc:
        reply = {"error": str(exc) or type(exc).__name__}
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(OSError):
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
        waits_for_criu = relay.criu_pidfd >= 0 and not relay.ended
        waited = [listener.fileno()] + ([relay.criu_pidfd] if waits_for_criu else [])
        readable, _, _ = select.select(waited, [], [])
        if listener.fileno() in readable:
            connection, _ = listener.accept()
            with connection:
                answer(relay, connection)
        if relay.criu_pidfd in readable:
            _, status = os.waitpid(relay.criu_pid, 0)
            relay.ended = True
            insist_exit(relay.directory, os.waitstatus_to_exitcode(status))
            if relay.criu_ended(status):
                return


def main() -> None:
    """relay serve DIRECTORY LISTENER_FD SWRK_FD CRIU | relay fetch DIRECTORY LISTENER_FD"""
    mode, directory, listener_fd = sys.argv[2], sys.argv[3], int(sys.argv[4])
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(listener_fd, False)
    listener = socket.socket(fileno=listener_fd)
    relay = Serve(directory, int(sys.argv[5]), sys.argv[6]) if mode == "serve" else Fetch(directory)
    run(relay, listener)
    os._exit(0)
