"""A clean Debian: the smallest there is, without what phaul needs and without systemd, in namespaces of its own.

    with clean_debian(directory) as machine:
        machine.install(package)         # fetches what it depends on
        cut_off(machine)                 # from here on it has a network of its own

Everything in it is gone with the block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.nodes import children
from tests.packages.builds import TREES, run
from tests.systemd.machines import SHARED, Failed, Machine, until, wait_for_init

#: bash reaps whatever is left to it
_INIT: Final = ("bash", "-c", "sleep infinity & while :; do wait; done")


@contextlib.contextmanager
def clean_debian(shared: Path) -> Iterator[Machine]:
    """One, on the network of this machine; `shared` is its /shared."""
    run(TREES, "path", "base", timeout_seconds=500)  # builds it if need be
    booted = subprocess.Popen(
        [TREES, "run", "base", "--bind", f"{shared}:{SHARED}", "--", *_INIT], stdin=subprocess.DEVNULL
    )
    try:
        yield Machine("clean", booted, wait_for_init(booted, b"bash\0-c\0sleep"), shared)
    finally:
        for pid in children(booted.pid):
            os.kill(pid, 9)
        booted.wait()


@contextlib.contextmanager
def cut_off(machine: Machine) -> Iterator[Machine]:
    """The same machine, with a network of its own, where there is but a loopback."""
    holder = subprocess.Popen(
        ["nsenter", "--target", str(machine.pid), "--all", "--", "unshare", "--net", "sleep", "infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:

        def inside() -> int:
            ours = os.readlink(f"/proc/{machine.pid}/ns/net")
            for pid in children(holder.pid):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/ns/net") != ours:
                        return pid
            return 0

        pid = until(inside, "a network of its own")
        subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", "link", "set", "lo", "up"], check=True)
        yield dataclasses.replace(machine, pid=pid)
    finally:
        for pid in children(holder.pid):
            os.kill(pid, 9)
        holder.wait()


def background(machine: Machine, *argv: str) -> None:
    """Start a command whose output goes to /shared/COMMAND.log; it ends with the machine."""
    words = ["setsid", "--fork", "sh", "-c", f'exec "$@" </dev/null >>{SHARED}/{argv[0]}.log 2>&1', "sh", *argv]
    machine.run(*words)


def files(machine: Machine) -> set[str]:
    """Every file there is, but those of the kernel and of this machine."""
    own = ("/proc", "/sys", "/dev/pts", str(SHARED))
    skip = " -o ".join(f"-path {each}" for each in own)
    return set(machine.run("sh", "-c", f"find / \\( {skip} \\) -prune -o -print 2>/dev/null; true").splitlines())


def typed(machine: Machine, keys: str, expected: str, timeout_seconds: float = 20.0) -> str:
    """What an interactive bash with bash-completion shows of these keys. Raises Failed if `expected` does not come."""
    ours, theirs = pty.openpty()
    bash = ". /usr/share/bash-completion/bash_completion; PS1=''; bind 'set enable-bracketed-paste off'"
    shell = subprocess.Popen(
        ["nsenter", "--target", str(machine.pid), "--all", "--", "bash", "--norc", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "dumb", "HOME": "/root", "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        os.write(ours, f"{bash}; echo read''y\n".encode())
        _read_until(ours, "ready", timeout_seconds)
        os.write(ours, keys.encode())
        return _read_until(ours, expected, timeout_seconds)
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def _read_until(descriptor: int, expected: str, timeout_seconds: float) -> str:
    seen, end = "", time.monotonic() + timeout_seconds
    while expected not in seen:
        if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
            raise Failed(f"bash shows no {expected!r}: {seen!r}")
        seen += os.read(descriptor, 4096).decode(errors="replace")
    return seen
