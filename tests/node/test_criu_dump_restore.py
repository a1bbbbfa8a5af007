"""Dump and restore with a real criu: what runs afterwards, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phaul_criu import features, install
from phaul_criu.criu import Criu, read_restore_stats
from phaul_criu.errors import CriuDied, CriuTimeout, DumpFailed, PreDumpFailed, RestoreFailed
from phaul_criu.inventory import lock_table_name
from phaul_criu.network_lock import remove_network_lock
from phaul_criu.requests import DumpOptions, NetworkLock, RestoreOptions
from phaul_criu.swrk import Notification, OnNotify, Swrk
from tests.node.criu_victims import Victim, alive, no_leaks, opened, start_victim, subreaper

pytestmark = pytest.mark.criu

DUMP_STEPS = ["pre-dump", "query-ext-files", "post-dump"]
#: before the point of no return
HELD_RESTORE_STEPS = ["pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore"]


@dataclass
class Bench:
    """A victim and a directory for its images."""

    criu: Criu
    victim: Victim
    images_fd: int
    images: Path

    def dump_options(self) -> DumpOptions:
        return DumpOptions(images_dir_fd=self.images_fd, pid=self.victim.pid)

    def restore_options(self) -> RestoreOptions:
        return RestoreOptions(images_dir_fd=self.images_fd)

    async def dump(self) -> None:
        await self.criu.dump(self.dump_options(), timeout_seconds=20)
        self.victim.reaped()


@pytest.fixture
def criu() -> Criu:
    return Criu(install.find_binary())


@pytest.fixture
def make_bench(criu: Criu, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    with subreaper(), no_leaks(), opened(tmp_path / "images") as images_fd:

        def make(**kinds: object) -> Bench:
            victim = start_victim(tmp_path, **kinds)  # type: ignore[arg-type]
            benches.append(Bench(criu, victim, images_fd, tmp_path / "images"))
            return benches[-1]

        yield make
        for bench in benches:
            bench.victim.kill()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def at(step: str, action: Callable[[Notification], None]) -> OnNotify:
    async def on_notify(notification: Notification) -> None:
        if notification.name == step:
            action(notification)

    return on_notify


def refuse(_notification: Notification) -> None:
    raise ValueError("refused")


async def test_a_tree_is_dumped_and_restored_and_beats_on(bench: Bench) -> None:
    seen: list[Notification] = []

    async def note(notification: Notification) -> None:
        seen.append(notification)

    stats = await bench.criu.dump(bench.dump_options(), on_notify=note, timeout_seconds=20)
    bench.victim.reaped()
    assert bench.victim.is_silent()
    assert [notification.name for notification in seen] == DUMP_STEPS
    assert stats.pages_written >= 4 * 256
    assert 0 < stats.frozen_microseconds < 20_000_000

    seen.clear()
    before = bench.victim.beats()
    pid = await bench.criu.restore(bench.restore_options(), on_notify=note, timeout_seconds=20)
    bench.victim.restored_as(pid)
    assert bench.victim.is_beating()
    assert bench.victim.beats() > before
    assert [notification.name for notification in seen] == [*HELD_RESTORE_STEPS, "pre-resume", "post-resume"]
    assert [notification.pid for notification in seen if notification.pid] == [pid, pid]
    assert read_restore_stats(bench.restore_options()).restore_microseconds > 0


async def test_the_tree_stands_still_while_post_dump_is_held(bench: Bench) -> None:
    silent: list[bool] = []
    on_notify = at("post-dump", lambda _notification: silent.append(bench.victim.is_silent()))
    await bench.criu.dump(bench.dump_options(), on_notify=on_notify)
    assert silent == [True]


@pytest.mark.parametrize("step", DUMP_STEPS)
async def test_a_refused_dump_lets_the_tree_run_on(bench: Bench, step: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        await bench.criu.dump(bench.dump_options(), on_notify=at(step, refuse), timeout_seconds=20)
    assert bench.victim.is_beating()


@pytest.mark.parametrize("step", DUMP_STEPS)
async def test_a_dump_that_is_cancelled_lets_the_tree_run_on(bench: Bench, step: str) -> None:
    await cancel_at(step, lambda on_notify: bench.criu.dump(bench.dump_options(), on_notify=on_notify))
    assert bench.victim.is_beating()


async def test_a_dump_past_its_deadline_lets_the_tree_run_on(bench: Bench) -> None:
    async def hold(notification: Notification) -> None:
        await asyncio.sleep(100 if notification.name == "post-dump" else 0)

    with pytest.raises(CriuTimeout):
        await bench.criu.dump(bench.dump_options(), on_notify=hold, timeout_seconds=0.5)
    assert bench.victim.is_beating()


async def test_criu_killed_while_the_dump_is_held(bench: Bench) -> None:
    swrk = await bench.criu.prestart()
    kill = at("post-dump", lambda _notification: os.kill(swrk.pid or 0, signal.SIGKILL))
    with pytest.raises(CriuDied) as caught:
        await bench.criu.dump(bench.dump_options(), on_notify=kill, timeout_seconds=20, swrk=swrk)
    assert caught.value.signal == signal.SIGKILL
    assert caught.value.log_tail
    assert bench.victim.is_beating()


@pytest.mark.parametrize("step", HELD_RESTORE_STEPS)
async def test_a_refused_restore_leaves_nothing(bench: Bench, step: str) -> None:
    await bench.dump()
    with pytest.raises(ValueError, match="refused"):
        await bench.criu.restore(bench.restore_options(), on_notify=at(step, refuse), timeout_seconds=20)
    assert bench.victim.is_silent()


@pytest.mark.parametrize("step", HELD_RESTORE_STEPS)
async def test_a_restore_that_is_cancelled_leaves_nothing(bench: Bench, step: str) -> None:
    await bench.dump()
    await cancel_at(step, lambda on_notify: bench.criu.restore(bench.restore_options(), on_notify=on_notify))
    assert bench.victim.is_silent()


async def test_no_instruction_runs_while_post_restore_is_held(bench: Bench) -> None:
    await bench.dump()
    silent: list[bool] = []
    on_notify = at("post-restore", lambda _notification: silent.append(bench.victim.is_silent()))
    bench.victim.restored_as(await bench.criu.restore(bench.restore_options(), on_notify=on_notify))
    assert silent == [True]
    assert bench.victim.is_beating()


@pytest.mark.parametrize("own_pid_namespace", [True, False])
async def test_criu_killed_while_the_restore_is_held_leaves_nothing(
    make_bench: Callable[..., Bench], own_pid_namespace: bool
) -> None:
    bench = make_bench(workers=2, own_pid_namespace=own_pid_namespace)
    await bench.dump()
    swrk = await bench.criu.prestart()
    roots: list[int] = []

    def kill(notification: Notification) -> None:
        roots.append(notification.pid or 0)
        os.kill(swrk.pid or 0, signal.SIGKILL)

    with pytest.raises(CriuDied) as caught:
        await bench.criu.restore(
            bench.restore_options(), on_notify=at("post-restore", kill), timeout_seconds=20, swrk=swrk
        )
    assert caught.value.signal == signal.SIGKILL
    await gone(roots[0])  # and the fixture looks for the workers
    assert bench.victim.is_silent()


async def test_a_tree_of_several_processes_comes_back_whole(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(workers=2)
    await bench.dump()
    bench.victim.restored_as(await bench.criu.restore(bench.restore_options()))
    assert all(bench.victim.is_beating(worker) for worker in (None, 0, 1))


async def test_a_refusal_after_the_point_of_no_return_is_raised_but_the_tree_runs(bench: Bench) -> None:
    await bench.dump()
    noted: list[int] = []

    async def late(notification: Notification) -> None:
        if notification.pid is not None:
            noted.append(notification.pid)
        if notification.name == "pre-resume":
            raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        await bench.criu.restore(bench.restore_options(), on_notify=late)
    bench.victim.restored_as(noted[0])
    assert bench.victim.is_beating()


async def test_an_operation_takes_a_criu_that_was_started_before(bench: Bench) -> None:
    swrk = await bench.criu.prestart()
    await asyncio.sleep(0.1)
    await bench.criu.dump(bench.dump_options(), swrk=swrk)
    bench.victim.reaped()
    assert not alive(swrk.pid or 0)


async def test_a_criu_that_is_another_ones_child_restores(bench: Bench) -> None:
    await bench.dump()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    shell = f"{bench.criu.binary} swrk {theirs.fileno()} & wait; sleep 100"
    with theirs:
        parent = await asyncio.to_thread(
            subprocess.Popen, ["sh", "-c", shell], pass_fds=(theirs.fileno(),), start_new_session=True
        )
    try:
        pid = await bench.criu.restore(bench.restore_options(), swrk=Swrk.attach(ours), timeout_seconds=20)
        bench.victim.restored_as(pid)
        assert bench.victim.is_beating()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


async def test_a_pid_that_does_not_exist_is_named(bench: Bench) -> None:
    pid = 2**22 - 7
    with pytest.raises(DumpFailed, match=str(pid)) as caught:
        await bench.criu.dump(DumpOptions(images_dir_fd=bench.images_fd, pid=pid))
    assert caught.value.code == "no-such-process"
    assert caught.value.remedy


async def test_a_traced_process_is_refused(bench: Bench) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ptrace_seize, ptrace_detach = 0x4206, 17
    assert libc.ptrace(ptrace_seize, bench.victim.pid, None, None) == 0
    try:
        with pytest.raises(DumpFailed) as caught:
            await bench.criu.dump(bench.dump_options())
    finally:
        libc.ptrace(ptrace_detach, bench.victim.pid, None, None)
    assert caught.value.code == "not-permitted"
    assert bench.victim.is_beating()


@pytest.mark.parametrize(
    ("obstacle", "code", "allowed"),
    [
        ("tcp", "tcp-connected", {"tcp_established": True}),
        ("tcp-in-flight", "tcp-in-flight", {"tcp_established": True, "tcp_skip_in_flight": True}),
        ("lock", "file-lock", {"file_locks": True}),
        ("ghost", "ghost-file-too-big", {"ghost_limit_bytes": 8 << 20}),
    ],
)
async def test_what_stands_in_the_way_is_named_and_can_be_allowed(
    make_bench: Callable[..., Bench], obstacle: str, code: str, allowed: dict[str, int]
) -> None:
    bench = make_bench(obstacle=obstacle)
    with pytest.raises(DumpFailed) as caught:
        await bench.criu.dump(bench.dump_options())
    assert bench.victim.is_beating()
    if obstacle.startswith("tcp") and not await inet_sockets_work():
        assert caught.value.code in (code, "kernel-too-new")
        return
    assert caught.value.code == code
    options = DumpOptions(images_dir_fd=bench.images_fd, pid=bench.victim.pid, leave_running=True, **allowed)  # type: ignore[arg-type]
    await bench.criu.dump(options)
    assert bench.victim.is_beating()


async def test_the_network_lock_of_a_dump_can_be_removed(bench: Bench) -> None:
    options = DumpOptions(images_dir_fd=bench.images_fd, pid=bench.victim.pid, network_lock=NetworkLock.NFTABLES)
    await bench.criu.dump(options, timeout_seconds=20)
    name = lock_table_name((bench.images / "inventory.img").read_bytes())
    assert f"table inet {name}" in nftables()
    assert remove_network_lock(bench.images_fd)
    assert f"table inet {name}" not in nftables()
    assert not remove_network_lock(bench.images_fd)


async def test_a_pid_that_is_taken_is_named(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(own_pid_namespace=False)
    options = DumpOptions(images_dir_fd=bench.images_fd, pid=bench.victim.pid, leave_running=True)
    await bench.criu.dump(options)
    os.kill(bench.victim.pid, signal.SIGSTOP)  # the size of its file must not matter
    with pytest.raises(RestoreFailed, match=f"Can't fork for {bench.victim.pid}: File exists") as caught:
        await bench.criu.restore(bench.restore_options())
    assert caught.value.code == "pid-taken"


async def test_a_file_that_differs_is_named(bench: Bench) -> None:
    await bench.dump()
    with bench.victim.beats_file.open("ab") as file:
        file.write(b"more")
    with pytest.raises(RestoreFailed, match="beats") as caught:
        await bench.criu.restore(bench.restore_options())
    assert caught.value.code == "file-differs"


async def test_images_that_are_not_there(bench: Bench) -> None:
    with pytest.raises(RestoreFailed) as caught:
        await bench.criu.restore(bench.restore_options())
    assert caught.value.cause


async def test_bad_options_are_an_error_with_a_cause(bench: Bench) -> None:
    with pytest.raises(DumpFailed) as caught:
        await bench.criu.dump(DumpOptions(images_dir_fd=99999, pid=bench.victim.pid))
    assert caught.value.cause
    assert bench.victim.is_beating()


async def test_pre_dump_works_or_says_why_not(bench: Bench) -> None:
    options = DumpOptions(images_dir_fd=bench.images_fd, pid=bench.victim.pid, track_mem=True)
    if (await bench.criu.features()).mem_track:
        stats = await bench.criu.pre_dump(options, timeout_seconds=20)
        assert stats.pages_written >= 4 * 256
    else:
        with pytest.raises(PreDumpFailed) as caught:
            await bench.criu.pre_dump(options, timeout_seconds=20)
        assert caught.value.code == "no-memory-tracking"
    assert bench.victim.is_beating()


async def cancel_at(step: str, operation: Callable[[OnNotify], Coroutine[Any, Any, object]]) -> None:
    """Cancel an operation while its callback holds `step`; it must be over within a few seconds."""
    reached = asyncio.Event()

    async def hold(notification: Notification) -> None:
        if notification.name == step:
            reached.set()
            await asyncio.sleep(100)

    task = asyncio.create_task(operation(hold))
    async with asyncio.timeout(20):
        await reached.wait()
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 30


def nftables() -> set[str]:
    """The tables in our network namespace."""
    return set(
        subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout.splitlines()
    )


async def inet_sockets_work() -> bool:
    return next(finding.ok for finding in await features.findings() if finding.name == "inet-sockets")


async def gone(pid: int) -> None:
    async with asyncio.timeout(30):
        while alive(pid):  # noqa: ASYNC110 - not our child
            await asyncio.sleep(0.01)


async def test_dumps_from_one_working_directory_begin_one_after_another(criu: Criu, tmp_path: Path) -> None:
    """At once they would make the same directory for their proc file systems."""
    with subreaper(), no_leaks():
        victims = []
        for number in range(4):
            (tmp_path / f"{number}").mkdir()
            victims.append(start_victim(tmp_path / f"{number}"))
        (Path("/proc") / str(victims[0].pid) / "cwd/proc.crtools").mkdir()  # left there by a criu that was killed

        async def dump(number: int) -> None:
            with opened(tmp_path / f"{number}/images") as images_fd:
                await criu.dump(DumpOptions(images_dir_fd=images_fd, pid=victims[number].pid), timeout_seconds=20)

        await asyncio.gather(*map(dump, range(4)))
        for victim in victims:
            victim.reaped()
        assert "proc.crtools" not in os.listdir("/")
