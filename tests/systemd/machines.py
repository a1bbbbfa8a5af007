"""Machines with a real systemd as PID 1: Debian 13 trees booted in namespaces, with phaul's Debian package in them.

    with two_machines(directory) as (a, b):
        a.run("systemctl", "status", "phauld")

A machine is a throw-away copy of the tree `node` of scripts/debian-tree. Both are on a network of their own, and share
the directory /shared. Everything in a machine ends with its systemd, and that with the process that booted it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from tests.nodes import children

Found = TypeVar("Found")

ROOT: Final = Path(__file__).resolve().parents[2]
TREES: Final = ROOT / "scripts" / "debian-tree"
SHARED: Final = Path("/shared")
VICTIM: Final = SHARED / "heartbeat.py"
ADDRESSES: Final = {"a": "10.78.1.1", "b": "10.78.1.2"}
NETWORK: Final = "10.78.1.0/24"
LINK: Final = "node0"
NEWER: Final = "0.1.1~test"
BOOT_SECONDS: Final = 60.0
WAIT_SECONDS: Final = 30.0
NO_MIRROR: Final = 3  #: exit status of scripts/debian-tree
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


class Failed(Exception):
    """A command failed, or what was waited for did not come."""


def until(condition: Callable[[], Found], what: str, timeout_seconds: float = WAIT_SECONDS) -> Found:
    """Wait for something to be true; what was found then. Raises `Failed`."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise Failed(f"not in {timeout_seconds} s: {what}")


@functools.cache
def missing() -> str | None:
    """Why there can be no such machines here; `None` if there can."""
    if os.geteuid() != 0:
        return "needs root"
    tree = subprocess.run([TREES, "path", "node"], capture_output=True, text=True)
    if tree.returncode == NO_MIRROR:
        return tree.stderr.strip().splitlines()[0]
    if tree.returncode != 0:
        raise Failed(tree.stderr)
    return None


def newer_package(package: Path, directory: Path) -> Path:
    """The same package as a later version, which says so of itself."""
    tree = directory / "newer"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    installed = tree.glob("usr/lib/phaul/lib/python3*/site-packages/phaul-*.dist-info/METADATA")
    for file in (tree / "DEBIAN/control", *installed):
        lines = file.read_text().splitlines()
        file.write_text(
            "\n".join(f"Version: {NEWER}" if line.startswith("Version: ") else line for line in lines) + "\n"
        )
    target = directory / "newer.deb"
    subprocess.run(["dpkg-deb", "--build", tree, target], check=True, stdout=subprocess.DEVNULL)
    return target


@dataclass
class Machine:
    """One booted system. `pid` is our PID of its systemd."""

    name: str
    booted: subprocess.Popen[bytes]
    pid: int
    shared: Path

    @property
    def address(self) -> str:
        return ADDRESSES[self.name]

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.pid}/root")

    def run(self, *argv: str | Path, check: bool = True, timeout_seconds: float = 60.0) -> str:
        """A command in the machine; what it wrote. Raises `Failed` if `check` and it fails."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", "--", *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
            env=_ENVIRONMENT,
        )
        if check and done.returncode != 0:
            raise Failed(f"{self.name}: {argv} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def start(self, *argv: str | Path) -> subprocess.Popen[str]:
        """A command in the machine that goes on."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid), "--all", "--", *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_ENVIRONMENT,
        )

    def json(self, *arguments: str) -> Any:
        """What `phaul --json` answers."""
        return json.loads(self.run("phaul", "--json", *arguments))

    def show(self, *properties: str, unit: str = "phauld") -> dict[str, str]:
        """Properties of a unit."""
        lines = self.run("systemctl", "show", unit, *(f"--property={name}" for name in properties)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def main_pid(self) -> int:
        """The machine's own PID of phauld; 0 if there is none."""
        return int(self.show("MainPID")["MainPID"])

    def until_serving(self, not_pid: int = 0) -> None:
        """Wait for a phauld that says that it serves, other than `not_pid`."""

        def serves() -> bool:
            seen = self.show("ActiveState", "MainPID", "StatusText")
            is_new = int(seen["MainPID"]) not in (0, not_pid)
            return is_new and seen["ActiveState"] == "active" and seen["StatusText"].startswith("serving")

        until(serves, f"phauld of {self.name} serves: {self.run('systemctl', 'status', 'phauld', check=False)}")

    def running(self) -> dict[str, int]:
        """The workloads that run here, with their PIDs."""
        found = self.json("ps", "--all")["workloads"]
        return {each["name"]: each["pid"] for each in found if each["state"] == "running"}

    def install(self, package: Path) -> str:
        """Install a package that lies in the shared directory."""
        shutil.copy(package, self.shared / package.name)
        return self.run("apt-get", "install", "--yes", "--no-install-recommends", SHARED / package.name)

    def start_workload(self, name: str, *arguments: str) -> None:
        """Start a heart that beats."""
        self.run("phaul", "run", "--name", name, "--", "/usr/bin/python3", VICTIM, SHARED / name, *arguments)

    @contextlib.contextmanager
    def slow_link(self, mib_per_second: int) -> Iterator[None]:
        """Within the block, no more than this goes out to the other machine."""
        shape = ["tbf", "rate", f"{mib_per_second << 20}bps", "burst", "1m", "latency", "50ms"]
        self.run("tc", "qdisc", "add", "dev", LINK, "root", *shape)
        try:
            yield
        finally:
            self.run("tc", "qdisc", "delete", "dev", LINK, "root")

    @contextlib.contextmanager
    def drop_in(self, text: str) -> Iterator[None]:
        """Within the block, phauld runs with these settings over those of its unit."""
        directory = self.root / "run/systemd/system/phauld.service.d"
        directory.mkdir(parents=True)
        file = directory / "test.conf"
        file.write_text(text)
        try:
            self.restart()
            yield
        finally:
            file.unlink()
            directory.rmdir()
            self.restart()

    def restart(self) -> None:
        """Restart phauld with its unit read anew."""
        phauld = self.main_pid
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "restart", "phauld")
        self.until_serving(not_pid=phauld)

    def until_phase(self, phase: str, name: str) -> None:
        """Wait for the migration of this workload from here to be in a phase."""

        def is_there() -> bool:
            found = self.json("top", "--once")["migrations"]
            return any(each["workload"] == name and each["phase"] == phase for each in found)

        until(is_there, f"{name} of {self.name} is {phase}")

    def end(self) -> None:
        """Kill it with everything in it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.booted.wait()


def wait_for_init(booted: subprocess.Popen[bytes], command: bytes) -> int:
    """Our PID of what a tree that is being started has as its init. Raises `Failed`."""

    def init() -> int:
        assert booted.poll() is None, "the tree did not start"
        for pid in children(booted.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(command):
                    return pid
        return 0

    return until(init, "the tree starts", BOOT_SECONDS)


def boot(name: str, shared: Path) -> Machine:
    """Boot one; `end` it. What is in `shared` it has below /shared."""
    booted = subprocess.Popen(
        [TREES, "boot", "node", "--bind", f"{shared}:{SHARED}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    machine = Machine(name, booted, wait_for_init(booted, b"/lib/systemd/systemd"), shared)
    states = ("running", "degraded")  # degraded: it may not load kernel modules
    until(lambda: machine.run("systemctl", "is-system-running", check=False).strip() in states, "boot", BOOT_SECONDS)
    return machine


def _connect(a: Machine, b: Machine) -> None:
    link = f"link add {LINK} type veth peer name {LINK} netns {b.pid}"
    subprocess.run(["nsenter", "--target", str(a.pid), "--net", "ip", *link.split()], check=True)
    for machine in (a, b):
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", LINK)
        machine.run("ip", "link", "set", LINK, "up")


@contextlib.contextmanager
def two_machines(directory: Path, package: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with the package installed, each phauld on the network that only they share."""
    shared = directory / "shared"
    shared.mkdir(parents=True)
    shutil.copy(ROOT / "tests/victims/heartbeat.py", shared)
    with contextlib.ExitStack() as stack:
        machines = []
        for name in ADDRESSES:
            machine = boot(name, shared)
            stack.callback(machine.end)
            machines.append(machine)
        a, b = machines
        _connect(a, b)
        for machine in machines:
            machine.install(package)
            settings = f'listen = "{machine.address}:7707"\ninsecure = true\nnode_name = "{machine.name}"\n'
            (machine.root / "etc/phaul/phauld.toml").write_text(settings)
            machine.run("systemctl", "restart", "phauld")
        yield a, b
