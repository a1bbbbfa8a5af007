"""A client of tcp_echo.py that checks every byte of an upload and of a download, beside connections that idle.

    tcp_client.py RESULT ADDRESS PORT IDLE     until SIGTERM; then every idle connection is tried

RESULT holds JSON, written over and over: bytes that came back right, wrong ones, resets, and the longest stall.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

BLOCK = bytes(range(256)) * 256
IN_FLIGHT_BYTES = 1 << 18
SHOW_SECONDS = 0.05


def main() -> None:
    result, address, port, idle = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    seen = {
        "up": 0,
        "down": 0,
        "wrong": 0,
        "resets": 0,
        "idle": 0,
        "idle_alive": -1,
        "up_stall_ms": 0,
        "down_stall_ms": 0,
    }
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))

    def show() -> None:
        text = result.with_suffix(".new")
        text.write_text(json.dumps(seen))
        os.replace(text, result)

    idlers = [socket.create_connection((address, port)) for _ in range(idle)]
    seen["idle"] = idle
    up, down = socket.create_connection((address, port)), socket.create_connection((address, port + 1))
    poll = selectors.DefaultSelector()
    for stream, mask in ((up, selectors.EVENT_READ | selectors.EVENT_WRITE), (down, selectors.EVENT_READ)):
        stream.setblocking(False)
        poll.register(stream, mask)
    written, shown = 0, 0.0
    last = {"up": time.monotonic(), "down": time.monotonic()}
    try:
        while not stopped:
            room = written - seen["up"] < IN_FLIGHT_BYTES
            poll.modify(up, selectors.EVENT_READ | (selectors.EVENT_WRITE if room else 0))
            for key, ready in poll.select(SHOW_SECONDS):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                name = "up" if sock is up else "down"
                if ready & selectors.EVENT_READ:
                    data = sock.recv(65536)
                    if not data:
                        raise ConnectionError
                    start = seen[name] % len(BLOCK)
                    seen["wrong"] += data != (BLOCK + BLOCK)[start : start + len(data)]
                    seen[name] += len(data)
                    now = time.monotonic()
                    seen[f"{name}_stall_ms"] = max(seen[f"{name}_stall_ms"], round((now - last[name]) * 1000))
                    last[name] = now
                if ready & selectors.EVENT_WRITE:
                    with contextlib.suppress(BlockingIOError):
                        written += sock.send(BLOCK[written % len(BLOCK) :][:16384])
            if time.monotonic() > shown + SHOW_SECONDS:
                shown = time.monotonic()
                show()
    except ConnectionError:
        seen["resets"] += 1
    alive = 0
    for number, idler in enumerate(idlers):
        word = b"%06d" % number
        idler.settimeout(10)
        with contextlib.suppress(OSError):
            idler.sendall(word)
            alive += idler.recv(64) == word
    seen["idle_alive"] = alive
    show()


main()
