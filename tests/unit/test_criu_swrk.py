"""The conversation with criu, held with a scripted criu at the other end of the socket."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from phaul_criu import requests
from phaul_criu.errors import CriuDied, CriuMissing, CriuTimeout
from phaul_criu.requests import CriuRequest, CriuResponse, DumpOptions
from phaul_criu.rpc import rpc_pb2
from phaul_criu.swrk import Notification, Swrk, operation

DUMP = requests.dump_request(DumpOptions(images_dir_fd=0, pid=1))


class ScriptedCriu:
    """criu's end of the socket: what it hears, and what it says."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.answers: list[bool] = []

    async def hear(self) -> CriuRequest:
        message = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        return rpc_pb2.criu_req.FromString(message) if message else None

    async def say(self, response: CriuResponse) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, response.SerializeToString())

    async def notify(self, name: str, pid: int | None = None) -> bool:
        notify = rpc_pb2.criu_notify(script=name) if pid is None else rpc_pb2.criu_notify(script=name, pid=pid)
        await self.say(rpc_pb2.criu_resp(type=rpc_pb2.NOTIFY, success=True, notify=notify))
        answer = await self.hear()
        assert answer.type == rpc_pb2.NOTIFY
        self.answers.append(answer.notify_success)
        return bool(answer.notify_success)


Script = Callable[[ScriptedCriu], Coroutine[Any, Any, None]]


@asynccontextmanager
async def connected(script: Script) -> AsyncIterator[tuple[Swrk, ScriptedCriu]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        criu = ScriptedCriu(theirs)
        async with asyncio.timeout(10), Swrk.attach(ours) as swrk, asyncio.TaskGroup() as tasks:
            tasks.create_task(script(criu))
            yield swrk, criu


async def dump_script(criu: ScriptedCriu) -> None:
    assert (await criu.hear()).type == rpc_pb2.DUMP
    success = await criu.notify("pre-dump") and await criu.notify("post-dump", 42)
    if not success:
        await criu.notify("network-unlock")
    await criu.say(rpc_pb2.criu_resp(type=rpc_pb2.DUMP, success=success))


async def test_notifications_reach_the_callback_in_order() -> None:
    seen: list[Notification] = []

    async def note(notification: Notification) -> None:
        seen.append(notification)

    async with connected(dump_script) as (swrk, criu):
        response = await swrk.request(DUMP, on_notify=note)
    assert response.success
    assert seen == [Notification("pre-dump"), Notification("post-dump", 42)]
    assert criu.answers == [True, True]


async def test_without_a_callback_every_notification_is_accepted() -> None:
    async with connected(dump_script) as (swrk, criu):
        assert (await swrk.request(DUMP)).success
    assert criu.answers == [True, True]


async def test_an_exception_of_the_callback_refuses_once_and_is_raised_after_the_answer() -> None:
    seen: list[str] = []

    async def refuse(notification: Notification) -> None:
        seen.append(notification.name)
        if notification.name == "post-dump":
            raise ValueError("no")

    async with connected(dump_script) as (swrk, criu):
        with pytest.raises(ValueError, match="no"):
            await swrk.request(DUMP, on_notify=refuse)
    assert criu.answers == [True, False, True]  # the unwinding is not refused
    assert seen == ["pre-dump", "post-dump"]


async def test_the_callbacks_own_timeout_error_is_not_ours() -> None:
    async def late(_notification: Notification) -> None:
        raise TimeoutError("mine")

    async with connected(dump_script) as (swrk, _criu):
        with pytest.raises(TimeoutError, match="mine"):
            await swrk.request(DUMP, on_notify=late, timeout_seconds=5)


async def test_criu_that_dies_after_a_refusal_does_not_hide_the_reason() -> None:
    async def die(criu: ScriptedCriu) -> None:
        await criu.hear()
        await criu.notify("pre-dump")
        criu.sock.close()

    async def refuse(_notification: Notification) -> None:
        raise ValueError("no")

    async with connected(die) as (swrk, _criu):
        with pytest.raises(ValueError, match="no"):
            await swrk.request(DUMP, on_notify=refuse)


async def test_the_deadline_covers_the_callback() -> None:
    async def stall(_notification: Notification) -> None:
        await asyncio.sleep(100)

    async def patient(criu: ScriptedCriu) -> None:
        await criu.hear()
        await criu.say(
            rpc_pb2.criu_resp(type=rpc_pb2.NOTIFY, success=True, notify=rpc_pb2.criu_notify(script="post-dump"))
        )

    async with connected(patient) as (swrk, _criu):
        with pytest.raises(CriuTimeout) as caught:
            await swrk.request(DUMP, on_notify=stall, timeout_seconds=0.05)
    assert caught.value.op == "dump"


async def test_cancellation_closes_the_socket_without_an_answer() -> None:
    heard: list[CriuRequest] = []
    reached = asyncio.Event()

    async def hold(_notification: Notification) -> None:
        reached.set()
        await asyncio.sleep(100)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    criu = ScriptedCriu(theirs)

    async def operate() -> None:
        async with Swrk.attach(ours) as swrk:
            await swrk.request(DUMP, on_notify=hold)

    with theirs:
        task = asyncio.create_task(operate())
        await criu.hear()
        notify = rpc_pb2.criu_notify(script="post-dump")
        await criu.say(rpc_pb2.criu_resp(type=rpc_pb2.NOTIFY, success=True, notify=notify))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        heard.append(await criu.hear())
    assert heard == [None]
    assert ours.fileno() == -1


async def test_an_end_of_file_is_a_death() -> None:
    async def die(criu: ScriptedCriu) -> None:
        criu.sock.close()

    async with connected(die) as (swrk, _criu):
        with pytest.raises(CriuDied) as caught:
            await swrk.request(DUMP)
    assert (caught.value.exit_code, caught.value.signal) == (None, None)


async def test_a_program_that_is_no_criu_died_with_its_status_and_its_words(tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.write_text("#!/bin/sh\necho unknown option >&2\nexit 9\n")
    program.chmod(0o755)
    async with await Swrk.open(program) as swrk:
        with pytest.raises(CriuDied) as caught:
            await swrk.request(DUMP, timeout_seconds=10)
    assert caught.value.exit_code == 9
    assert caught.value.log_tail == "unknown option"


async def test_a_missing_program_is_criu_missing() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CriuMissing):
        await Swrk.open("/nonexistent/criu")
    assert os.listdir("/proc/self/fd") == before


async def test_death_is_seen_though_a_descendant_holds_the_socket(tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.write_text(
        f"#!{sys.executable}\nimport os, signal, time\n"
        "if os.fork():\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)\n"
    )
    program.chmod(0o755)
    async with await Swrk.open(program) as swrk:
        with pytest.raises(CriuDied) as caught:
            await swrk.request(DUMP, timeout_seconds=30)
    assert caught.value.signal == 9


async def test_a_criu_that_does_not_unwind_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.write_text("#!/bin/sh\nsleep 100\n")
    program.chmod(0o755)
    swrk = await Swrk.open(program)
    pid = swrk.pid
    await swrk.aclose(patience_seconds=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid or 0, 0)


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (DUMP, "dump"),
        (requests.pre_dump_request(DumpOptions(images_dir_fd=0, pid=1)), "pre-dump"),
        (requests.wait_pid_request(1), "wait-pid"),
        (requests.version_request(), "version"),
    ],
)
def test_operations_have_names(request_: CriuRequest, name: str) -> None:
    assert operation(request_) == name
