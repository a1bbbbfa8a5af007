"""A server that sends back what it gets, with a pattern of its own from port + 1, to as many as come.

tcp_echo.py ADDRESS PORT
"""

import selectors
import socket
import sys

BLOCK = bytes(range(256)) * 256  #: what a download repeats


def main() -> None:
    address, port = sys.argv[1], int(sys.argv[2])
    poll = selectors.DefaultSelector()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for number in (port, port + 1):
        listener = socket.create_server((address, number), family=family, backlog=2048)
        listener.setblocking(False)
        poll.register(listener, selectors.EVENT_READ, "listener")
    owed: dict[socket.socket, bytes | None] = {}  # None: a download
    sent: dict[socket.socket, int] = {}
    while True:
        for key, _ in poll.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if key.data == "listener":
                accepted, _peer = sock.accept()
                accepted.setblocking(False)
                is_download = sock.getsockname()[1] == port + 1
                owed[accepted], sent[accepted] = None if is_download else b"", 0
                poll.register(accepted, selectors.EVENT_WRITE if is_download else selectors.EVENT_READ, "stream")
                continue
            try:
                waiting = owed[sock]
                if waiting is None:
                    sent[sock] += sock.send(BLOCK[sent[sock] % len(BLOCK) :])
                elif waiting:
                    owed[sock] = waiting[sock.send(waiting) :]
                elif data := sock.recv(65536):
                    owed[sock] = data
                else:
                    raise ConnectionError
            except BlockingIOError:
                continue
            except ConnectionError:
                poll.unregister(sock)
                sock.close()
                del owed[sock]
                continue
            if owed[sock] is not None:
                poll.modify(sock, selectors.EVENT_WRITE if owed[sock] else selectors.EVENT_READ, "stream")


main()
