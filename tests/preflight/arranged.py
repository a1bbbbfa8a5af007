"""What is arranged around a program of the corpus, at its source or its destination, before and while it moves."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phaul_client.preflight import read_node
from tests.preflight.truth import NotStarted, Stage


@contextmanager
def pipe_to_us(stage: Stage) -> Iterator[None]:
    """Its standard output is a pipe that we read."""
    reader, writer = os.pipe()
    stage.start["stdout"] = writer
    try:
        yield
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def stream_to_us(stage: Stage) -> Iterator[None]:
    """It inherits one end of a socket pair."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stage.start["pass_fds"] = (theirs.fileno(),)
        yield


@contextmanager
def datagrams_to_us(stage: Stage) -> Iterator[None]:
    """It inherits one end of a pair of nameless datagram sockets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        stage.start["pass_fds"] = (theirs.fileno(),)
        yield


@contextmanager
def stream_server(stage: Stage) -> Iterator[None]:
    """A unix server that the program connects to."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(stage.file("server")))
        server.listen()
        yield


@contextmanager
def tcp_server(stage: Stage) -> Iterator[None]:
    """A TCP server that the program connects to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stage.file("port").write_text(str(server.getsockname()[1]))
        yield


@contextmanager
def datagram_server(stage: Stage) -> Iterator[None]:
    """A unix socket that the program sends to, as /dev/log."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(stage.file("server")))
        yield


@contextmanager
def terminal_of_ours(stage: Stage) -> Iterator[None]:
    """Its standard streams are a terminal that we hold."""
    master, slave = pty.openpty()
    stage.start |= {"stdin": slave, "stdout": slave, "stderr": slave}
    stage.arguments = [os.ttyname(slave)]
    try:
        yield
    finally:
        os.close(master)
        os.close(slave)


@contextmanager
def client_of_ours(stage: Stage) -> Iterator[None]:
    """We connect to the program's unix server as soon as it is there."""
    client = socket.socket(socket.AF_UNIX)

    def connect() -> None:
        while True:
            try:
                client.connect(str(stage.file("server")))
            except OSError:
                time.sleep(0.01)
            else:
                stage.file("connected").touch()
                return

    thread = threading.Thread(target=connect)
    thread.start()
    with client:
        yield
        thread.join()


@contextmanager
def fifo_of_ours(stage: Stage) -> Iterator[None]:
    """A fifo that we read."""
    os.mkfifo(stage.file("fifo"))
    reader = os.open(stage.file("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield
    finally:
        os.close(reader)


@contextmanager
def copied_program(stage: Stage) -> Iterator[None]:
    """A program of its own, which can be taken away."""
    shutil.copy("/bin/sleep", stage.file("program"))
    stage.file("ready").touch()
    yield


@contextmanager
def file_from_another_mount_namespace(stage: Stage) -> Iterator[None]:
    """A descriptor of a tmpfs that only another process has mounted."""
    script = 'mount -t tmpfs none "$1" && echo hidden >"$1/file" && echo ready && exec sleep 60 <"$1/file"'
    mounted = stage.file("mounted")
    mounted.mkdir()
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", str(mounted)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        descriptor = os.open(f"/proc/{other.pid}/root{mounted}/file", os.O_RDONLY)
        stage.start["pass_fds"] = (descriptor,)
        try:
            yield
        finally:
            os.close(descriptor)
            other.kill()


@contextmanager
def covered(stage: Stage) -> Iterator[None]:
    """A directory that is covered by a mount once the program has opened a file in it."""
    stage.file("data").mkdir()
    yield
    subprocess.run(["umount", "--lazy", stage.file("data")], check=False, stderr=subprocess.DEVNULL)


@contextmanager
def added_address(_stage: Stage) -> Iterator[None]:
    """An address of the documentation's range on the loopback interface."""
    try:
        subprocess.run(["ip", "address", "add", "198.51.100.7/32", "dev", "lo"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise NotStarted(f"cannot add an address: {exc}") from exc
    try:
        yield
    finally:
        subprocess.run(["ip", "address", "delete", "198.51.100.7/32", "dev", "lo"], check=False, capture_output=True)


@contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    setting = Path("/proc/sys", name)
    before = setting.read_text()
    setting.write_text(value)
    try:
        yield
    finally:
        setting.write_text(before)


@contextmanager
def may_ping(_stage: Stage) -> Iterator[None]:
    """Every group may make ICMP sockets."""
    with _setting("net/ipv4/ping_group_range", "0 2147483647"):
        yield


@contextmanager
def may_not_ping(_stage: Stage) -> Iterator[None]:
    """None may."""
    with _setting("net/ipv4/ping_group_range", "1 0"):
        yield


@contextmanager
def few_inotifies(_stage: Stage) -> Iterator[None]:
    """Fewer than the tree has, and enough for everybody else."""
    with _setting("fs/inotify/max_user_instances", "400"):
        yield


@contextmanager
def lower_limit(_stage: Stage) -> Iterator[None]:
    """One of our hard limits is lower than the tree's, and stays so where we may not raise it."""
    before = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    lower = before[1] - 4096 if before[1] != resource.RLIM_INFINITY else 819200
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (lower, lower))
    yield
    if read_node().sys_resource:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, before)


@contextmanager
def few_watches(_stage: Stage) -> Iterator[None]:
    """Fewer than the tree has, and enough for everybody else."""
    with _setting("fs/inotify/max_user_watches", "1000"):
        yield


@contextmanager
def without_address(_stage: Stage) -> Iterator[None]:
    subprocess.run(["ip", "address", "delete", "198.51.100.7/32", "dev", "lo"], check=True)
    yield


@contextmanager
def renamed(stage: Stage, name: str) -> Iterator[None]:
    os.rename(stage.file(name), stage.file("elsewhere"))
    yield
    os.rename(stage.file("elsewhere"), stage.file(name))


@contextmanager
def program_gone(stage: Stage) -> Iterator[None]:
    with renamed(stage, "program"):
        yield


@contextmanager
def data_gone(stage: Stage) -> Iterator[None]:
    with renamed(stage, "data"):
        yield


@contextmanager
def data_longer(stage: Stage) -> Iterator[None]:
    with stage.file("data").open("ab") as file:
        file.write(b"more")
    yield


@contextmanager
def data_with_another_mode(stage: Stage) -> Iterator[None]:
    stage.file("data").chmod(0o600)
    yield


@contextmanager
def another_program(stage: Stage) -> Iterator[None]:
    """Another build of the same size: the same bytes but for the build-id."""
    path = stage.file("program")
    data = bytearray(path.read_bytes())
    at = data.index(b"GNU\0", data.index(b"\x04\0\0\0\x14\0\0\0\x03\0\0\0")) + 4
    data[at] ^= 0xFF
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o755)
    yield


@contextmanager
def pid_taken(stage: Stage) -> Iterator[None]:
    """Another process gets the PID that the tree had."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(stage.pid - 1))
    with subprocess.Popen(["sleep", "60"]) as other:
        yield
        other.kill()


@contextmanager
def terminal_taken(_stage: Stage) -> Iterator[None]:
    """Others have opened the lowest number that was free, which the tree had."""
    master, slave = pty.openpty()
    try:
        yield
    finally:
        os.close(master)
        os.close(slave)


@contextmanager
def port_taken(stage: Stage) -> Iterator[None]:
    """Another process listens on the port."""
    with socket.create_server(("127.0.0.1", int(stage.file("port").read_text()))):
        yield


def ended(stage: Stage) -> int:
    """A process that has ended and is not reaped."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def absent(_stage: Stage) -> int:
    """The id of a process that was reaped."""
    with subprocess.Popen(["true"]) as process:
        return process.pid
