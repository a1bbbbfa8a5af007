"""Every connection of a process is locked at once, in both families, and the lock ends with whoever holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_NAMESPACE = """
import os, socket, subprocess, sys
from phaul_criu.connection_lock import ConnectionLock

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
pairs = []
for family, address, count in ((socket.AF_INET, "127.0.0.1", 1200), (socket.AF_INET6, "::1", 1200)):
    listener = socket.create_server((address, 0), family=family, backlog=2048)
    for _ in range(count):
        asked = socket.create_connection(listener.getsockname()[:2])
        pairs.append((asked, listener.accept()[0]))
both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
mapped = socket.create_connection(("127.0.0.1", both.getsockname()[1]))
pairs.append((mapped, both.accept()[0]))
unconnected = socket.socket()

def arrives(sender, receiver):
    sender.send(b"x")
    receiver.settimeout(0.3)
    try:
        return receiver.recv(1) == b"x"
    except TimeoutError:
        return False

def tables():
    return subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout.split()

some = (pairs[0], pairs[1199], pairs[1200], pairs[2399], pairs[2400])
lock = ConnectionLock.open("phaul_lock_1")
if sys.argv[1] == "others":  # what only a process outside of the tree holds
    assert lock.lock([os.getppid()]) == 0 and all(arrives(*pair) for pair in some)
elif sys.argv[1] == "all":
    lock.foresee([os.getpid()])
    assert all(arrives(*pair) for pair in some)
    gone, _ = pairs.pop(7)
    gone.close()
    pairs.append((socket.create_connection(listener.getsockname()[:2]), listener.accept()[0]))
    some = (*some, pairs[-1])
    assert lock.lock([os.getpid()]) == 2 * 2401 + 1
    assert not any(arrives(*pair) or arrives(*reversed(pair)) for pair in some)
    late = socket.create_connection(listener.getsockname()[:2])
    assert arrives(late, listener.accept()[0])
    flushed = subprocess.run(["nft", "flush", "ruleset"])
    assert not arrives(*some[0])  # nobody else removes it
    lock.release()
    assert tables() == []
    for pair in some:
        pair[1].settimeout(20)  # the kernel sends again
        assert pair[1].recv(1) == b"x"
else:
    lock.lock([os.getpid()])
    child = subprocess.Popen(["sleep", "1000"], pass_fds=(lock.fileno(),))
    lock.close()
    assert not arrives(*some[0]) and tables() == ["table", "inet", "phaul_lock_1"]
    child.kill()
    child.wait()
    assert tables() == []
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("what", ["all", "others", "until its holder ends"])
def test_a_lock(what: str) -> None:
    script = 'ulimit -n 8192 && exec "$@"'
    argv = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, "-c", IN_NAMESPACE, what]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
