"""The ear of tests/faults/criu_wrapper.py in a guest: stops a criu at a named step until the test lets it go on.

    gate.py DIRECTORY PORT

DIRECTORY/criu is the wrapper that phauld is given. A file DIRECTORY/hold/STEP#N holds the N-th criu that comes to the
step ("restore:post-restore:notify"); it becomes DIRECTORY/held/STEP#N when that is there, and is removed to let it go
on. Whoever connects to PORT is told the names in held, as JSON.
"""

import collections
import json
import os
import shutil
import socket
import sys
import threading
import time

WRAPPER = "/phaul/tests/faults/criu_wrapper.py"
LARGEST_BYTES = 1 << 16
POLL_SECONDS = 0.02


def make_wrapper(directory: str) -> None:
    path = os.path.join(directory, "criu")
    with open(WRAPPER, encoding="utf-8") as source, open(path, "w", encoding="utf-8") as file:
        file.write(f"#!{sys.executable} -IS\n{source.read()}")
    os.chmod(path, 0o755)
    with open(os.path.join(directory, "criu.json"), "w", encoding="utf-8") as file:
        json.dump({"criu": shutil.which("criu"), "socket": os.path.join(directory, "criu.sock")}, file)


class Gate:
    """The steps that were reached, how often."""

    def __init__(self, directory: str) -> None:
        self._hold, self.held = os.path.join(directory, "hold"), os.path.join(directory, "held")
        self._seen: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def serve(self, connection: socket.socket) -> None:
        """One criu, from its start to its end."""
        try:
            while message := connection.recv(LARGEST_BYTES):
                told = json.loads(message)
                self._reach(f"{told['operation']}:{told['step']}")
                connection.send(b"g")
        except ConnectionError:
            pass

    def _reach(self, step: str) -> None:
        with self._lock:
            self._seen[step] += 1
            name = f"{step}#{self._seen[step]}"
        path = os.path.join(self.held, name)
        try:
            os.rename(os.path.join(self._hold, name), path)
        except FileNotFoundError:
            return
        while os.path.exists(path):
            time.sleep(POLL_SECONDS)


def tell(gate: Gate, port: int) -> None:
    """For ever."""
    with socket.create_server(("", port)) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(json.dumps(os.listdir(gate.held)).encode())


def main() -> None:
    directory, port = sys.argv[1], int(sys.argv[2])
    shutil.rmtree(directory, ignore_errors=True)
    for name in ("hold", "held"):
        os.makedirs(os.path.join(directory, name))
    gate = Gate(directory)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.path.join(directory, "criu.sock"))
    listener.listen(64)
    threading.Thread(target=tell, args=(gate, port), daemon=True).start()
    make_wrapper(directory)  # the last: whoever sees it can use it
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=gate.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
