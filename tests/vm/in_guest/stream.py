"""Measure the network: `stream.py receive PORT` prints bytes and seconds; `stream.py send ADDRESS PORT SECONDS`."""

import socket
import sys
import time

BUFFER_BYTES = 1 << 20


def receive(port: int) -> None:
    """Take one connection and read it to its end."""
    with socket.create_server(("", port)) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
    total_bytes, buffer, began = 0, bytearray(BUFFER_BYTES), time.monotonic()
    with connection:
        while size := connection.recv_into(buffer):
            total_bytes += size
    print(total_bytes, time.monotonic() - began, flush=True)


def send(address: str, port: int, seconds: float) -> None:
    """Send for so long."""
    block, end = bytes(BUFFER_BYTES), time.monotonic() + seconds
    with socket.create_connection((address, port)) as connection:
        while time.monotonic() < end:
            connection.sendall(block)


if sys.argv[1] == "receive":
    receive(int(sys.argv[2]))
else:
    send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
