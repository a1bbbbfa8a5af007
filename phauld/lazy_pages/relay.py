"""The process between criu's lazy pages and the other node: the parent of the criu whose page connection it carries.

One at each end of a post-copy migration, so that neither a restart nor the death of phauld ends the page connection
that the tree lives from. It is small (see `bare.py`) and knows no gRPC; phauld makes the connections to the other node
and hands them over. When one is cut, it waits for the next.

  serve   at the source (`relay_serve.py`): below it `criu swrk`, which dumps and then answers questions for pages
  fetch   at the destination (`relay_fetch.py`): below it, once told to, `criu lazy-pages`, which asks them

The invariants. No end of file ever reaches the serving criu, which would take it for the end of a transfer that
succeeded and kill the tree: criu itself holds the other end of its page socket, too, so that not even the death of this
process is one. And only questions for pages go from the other node to it, so that nobody there can end it.

phauld asks on a socket in DIRECTORY, one JSON message and its answer to a connection. Files there:
  relay.sock  as long as this process lives
  exit.json   {"status"} how criu ended
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time

from phauld.lazy_pages.relay_end import IGNORED_SIGNALS, RelayEnd, log
from phauld.lazy_pages.relay_fetch import Fetch
from phauld.lazy_pages.relay_serve import Serve
from phauld.whole_files import RETRY_SECONDS, write_json

MESSAGE_BYTES = 1 << 16


def answer(relay: RelayEnd, connection: socket.socket) -> None:
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


def obey(relay: RelayEnd, connection: socket.socket, message: object, descriptors: list[int]) -> None:
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
            return write_json(directory, "exit.json", {"status": status})
        except FileNotFoundError:  # the directory is gone: nobody will ask
            return None
        except OSError as exc:
            log(f"exit.json not written: {exc!r}")
            time.sleep(RETRY_SECONDS)


def run(relay: RelayEnd, listener: socket.socket) -> None:
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
