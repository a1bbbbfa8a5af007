"""What phauld says to systemd, on a real socket; and what it puts before a command for a scope."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from phauld import scope
from phauld.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield listening


def notifier(systemd: socket.socket, **environment: str) -> Notifier:
    return Notifier.from_environment({"NOTIFY_SOCKET": systemd.getsockname(), **environment}, pid=7)


def heard(systemd: socket.socket) -> list[str]:
    return systemd.recv(4096).decode().split("\n")


def test_ready_and_stopping_come_with_a_status_of_one_line(systemd: socket.socket) -> None:
    told = notifier(systemd)
    told.ready("serving\n127.0.0.1:7707")
    told.stopping("stopping")
    assert heard(systemd) == ["READY=1", "STATUS=serving 127.0.0.1:7707"]
    assert heard(systemd) == ["STOPPING=1", "STATUS=stopping"]


def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("")  # the kernel chooses an abstract name
        systemd.settimeout(10)
        address = "@" + systemd.getsockname()[1:].decode()
        Notifier.from_environment({"NOTIFY_SOCKET": address}).ready("here")
        assert heard(systemd) == ["READY=1", "STATUS=here"]


def test_nobody_listens_and_nobody_asked(tmp_path: Path) -> None:
    Notifier.from_environment({}).ready("to nobody")
    Notifier(str(tmp_path / "gone"), None).ready("to a systemd that is gone")


def test_a_full_queue_does_not_stop_us(systemd: socket.socket) -> None:
    told = notifier(systemd)
    for _ in range(10_000):
        told.ready("again")


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_whether_there_is_a_watchdog(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier.from_environment(environment, pid=7).watchdog_seconds == seconds


async def test_the_watchdog_is_fed_from_the_loop_with_what_is_done_now(systemd: socket.socket) -> None:
    words = iter(("first", "second", *["later"] * 100_000))
    feeding = asyncio.create_task(notifier(systemd, WATCHDOG_USEC="3000").feed_watchdog(lambda: next(words)))
    async with asyncio.timeout(30):
        assert await asyncio.to_thread(heard, systemd) == ["WATCHDOG=1", "STATUS=first"]
        assert await asyncio.to_thread(heard, systemd) == ["WATCHDOG=1", "STATUS=second"]
    feeding.cancel()


async def test_without_a_watchdog_nothing_feeds(systemd: socket.socket) -> None:
    await notifier(systemd).feed_watchdog(lambda: "never said")


def test_no_scope_where_systemd_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scope, "BOOTED", tmp_path / "none")
    assert scope.in_scope("tree", "web@1") == ()


def test_the_scope_has_the_name_of_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (program := tmp_path / "systemd-run").touch(mode=0o755)
    monkeypatch.setattr(scope, "BOOTED", tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = scope.in_scope("tree", "web@1")
    assert words[0] == str(program)
    assert words[-1] == "--"
    assert words[words.index("--unit") + 1] == "phaul-tree-web-1.scope"  # "@" would make it an instance
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert scope.in_scope("tree", "web@1") == ()
