"""One clock of the day for both guests, as near as the network allows.

    clock.py serve PORT          answer with the time, and set it
    clock.py follow HOST PORT    set the clock there to the one here; prints by how much it was off, in seconds

The offset is taken from the quickest of many questions, and so is off by half of what the two ways differ.
"""

import socket
import sys
import time

QUESTIONS = 40


def serve(port: int) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("", port))
    while True:
        question, asker = server.recvfrom(64)
        if question != b"now":
            time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + int(question))
        server.sendto(str(time.time_ns()).encode(), asker)


def ask(client: socket.socket, address: tuple[str, int], question: bytes) -> tuple[int, int]:
    """(round trip, offset of the other clock), in nanoseconds."""
    sent = time.time_ns()
    client.sendto(question, address)
    there = int(client.recv(64))
    back = time.time_ns()
    return back - sent, there - (sent + back) // 2


def follow(host: str, port: int) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(5)
    address = (socket.gethostbyname(host), port)
    offset = min(ask(client, address, b"now") for _ in range(QUESTIONS))[1]
    ask(client, address, str(-offset).encode())
    print(min(ask(client, address, b"now") for _ in range(QUESTIONS))[1] / 1e9)


if __name__ == "__main__":
    serve(int(sys.argv[2])) if sys.argv[1] == "serve" else follow(sys.argv[2], int(sys.argv[3]))
