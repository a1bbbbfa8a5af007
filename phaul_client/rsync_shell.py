"""What rsync starts to reach its other half: hands its standard input and output to phauld, and stays until the end.

    python -I -S rsync_shell.py DESCRIPTOR HOST PROGRAM ARGUMENT…

Started by rsync, with a connection to phauld as DESCRIPTOR. It needs nothing of phaul, so that it starts quickly.
"""

import os
import socket
import sys


def main() -> int:
    """The status of the other half, as phauld tells it; 12, an error in rsync's stream, if phauld is gone."""
    with socket.socket(fileno=int(sys.argv[1])) as phauld:
        socket.send_fds(phauld, [b"\0".join(map(os.fsencode, sys.argv[4:]))], [0, 1])
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        status = phauld.recv(1)
        return status[0] if status else 12


if __name__ == "__main__":
    sys.exit(main())
