"""Page server and lazy pages with a real criu."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phaul_criu import install
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuTimeout, DumpFailed, LazyPagesFailed, PageServerFailed
from phaul_criu.lazy import LazyPages, LazyPagesOptions
from phaul_criu.page_server import PageServer
from phaul_criu.requests import DumpOptions, PageServerOptions, RestoreOptions
from phaul_criu.stats import NO_DUMP_STATS
from phaul_criu.swrk import Notification
from tests.node.criu_victims import Victim, alive, children, no_leaks, opened, start_victim, subreaper, tcp_pair

pytestmark = pytest.mark.criu

SocketPair = Callable[[], tuple[socket.socket, socket.socket]]


@pytest.fixture
def criu() -> Criu:
    return Criu(install.find_binary())


@pytest.fixture
def directories(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Image directories of the source and of the destination."""
    with no_leaks(), opened(tmp_path / "source") as source_fd, opened(tmp_path / "destination") as destination_fd:
        yield source_fd, destination_fd


@pytest.fixture
def victim(tmp_path: Path, directories: tuple[int, int]) -> Iterator[Victim]:
    with subreaper():
        victim = start_victim(tmp_path, mebibytes=16)
        yield victim
        victim.kill()


def copy_missing_images(tmp_path: Path) -> None:
    """What does not come through the page server."""
    for image in (tmp_path / "source").glob("*.img"):
        if not (tmp_path / "destination" / image.name).exists():
            shutil.copy(image, tmp_path / "destination")


async def start_page_server(criu: Criu, images_fd: int, receiver: socket.socket) -> PageServer:
    with receiver:  # criu has its own copy
        return await criu.page_server(PageServerOptions(images_dir_fd=images_fd), receiver.fileno())


@pytest.mark.parametrize("make_pair", [socket.socketpair, tcp_pair])
async def test_pages_arrive_at_the_page_server(
    criu: Criu, victim: Victim, directories: tuple[int, int], tmp_path: Path, make_pair: SocketPair
) -> None:
    source_fd, destination_fd = directories
    sender, receiver = make_pair()
    async with await start_page_server(criu, destination_fd, receiver) as server:
        with sender:
            options = DumpOptions(images_dir_fd=source_fd, pid=victim.pid, page_server_fd=sender.fileno())
            stats = await criu.dump(options, timeout_seconds=20)
        await server.wait(timeout_seconds=20)
    victim.reaped()
    assert stats.pages_written >= 16 * 256
    assert not list((tmp_path / "source").glob("pages-*.img"))
    pages = (tmp_path / "destination").glob("pages-*.img")
    assert sum(image.stat().st_size for image in pages) == stats.pages_written * 4096
    copy_missing_images(tmp_path)
    victim.restored_as(await criu.restore(RestoreOptions(images_dir_fd=destination_fd), timeout_seconds=20))
    assert victim.is_beating()


async def test_a_page_stream_that_ends_in_the_middle_is_an_error(criu: Criu, directories: tuple[int, int]) -> None:
    sender, receiver = socket.socketpair()
    async with await start_page_server(criu, directories[1], receiver) as server:
        sender.sendall(b"\x04\0\0\0")  # the beginning of a header
        sender.close()
        with pytest.raises(PageServerFailed) as caught:
            await server.wait(timeout_seconds=20)
    assert caught.value.log_tail


async def test_a_page_server_that_is_left_early_is_gone(criu: Criu, directories: tuple[int, int]) -> None:
    sender, receiver = socket.socketpair()
    with sender:
        async with await start_page_server(criu, directories[1], receiver):
            assert len(children()) == 1
        assert sender.recv(1) == b""  # no one else holds the other end


@pytest.mark.parametrize("after_seconds", [0.0, 0.05])
async def test_cancelled_while_waiting_for_the_page_server(
    criu: Criu, directories: tuple[int, int], after_seconds: float
) -> None:
    sender, receiver = socket.socketpair()
    with sender:
        server = await start_page_server(criu, directories[1], receiver)
        waiting = asyncio.create_task(server.wait())
        await asyncio.sleep(after_seconds)
        started = time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert time.monotonic() - started < 20
        await server.aclose()


async def test_the_page_server_has_a_deadline(criu: Criu, directories: tuple[int, int]) -> None:
    sender, receiver = socket.socketpair()
    with sender:
        server = await start_page_server(criu, directories[1], receiver)
        with pytest.raises(CriuTimeout):
            await server.wait(timeout_seconds=0.1)


async def test_a_page_server_without_a_socket_fails(criu: Criu, directories: tuple[int, int]) -> None:
    with open("/dev/null", "rb") as null:  # noqa: ASYNC230
        server = await criu.page_server(PageServerOptions(images_dir_fd=directories[1]), null.fileno())
        with pytest.raises(PageServerFailed) as caught:
            await server.wait(timeout_seconds=20)
    assert caught.value.cause


@pytest.mark.parametrize("way", ["deadline", "cancel"])
async def test_a_dump_into_a_connection_that_nobody_reads_can_be_ended(
    criu: Criu, victim: Victim, directories: tuple[int, int], way: str
) -> None:
    sender, receiver = socket.socketpair()
    options = DumpOptions(images_dir_fd=directories[0], pid=victim.pid, page_server_fd=sender.fileno())
    with sender, receiver:
        started = time.monotonic()
        if way == "deadline":
            with pytest.raises(CriuTimeout):
                await criu.dump(options, timeout_seconds=0.5)
        else:
            dumping = asyncio.create_task(criu.dump(options))
            await asyncio.sleep(0.5)
            dumping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dumping
        assert time.monotonic() - started < 20
        assert victim.is_beating()


async def test_a_page_connection_that_breaks_lets_the_tree_run_on(
    criu: Criu, victim: Victim, directories: tuple[int, int]
) -> None:
    sender, receiver = tcp_pair()
    receiver.close()
    with sender:
        options = DumpOptions(images_dir_fd=directories[0], pid=victim.pid, page_server_fd=sender.fileno())
        with pytest.raises(DumpFailed) as caught:
            await criu.dump(options, timeout_seconds=20)
    assert caught.value.code == "page-connection"
    assert victim.is_beating()


async def test_lazy_restore_from_local_images(criu: Criu, victim: Victim, directories: tuple[int, int]) -> None:
    images_fd = directories[0]
    await criu.dump(DumpOptions(images_dir_fd=images_fd, pid=victim.pid), timeout_seconds=20)
    victim.reaped()
    lazy_options = LazyPagesOptions(images_dir_fd=images_fd, work_dir_fd=directories[1])
    restore_options = RestoreOptions(images_dir_fd=images_fd, work_dir_fd=directories[1], lazy_pages=True)
    async with await LazyPages.start(criu.binary, lazy_options) as lazy_pages:
        victim.restored_as(await criu.restore(restore_options, timeout_seconds=20))
        assert victim.is_beating()
        await lazy_pages.wait(timeout_seconds=20)
    assert victim.is_beating()


async def test_post_copy_from_the_tree_itself(criu: Criu, victim: Victim, directories: tuple[int, int]) -> None:
    """The dump serves the pages on a socket; the destination's lazy-pages child fetches them."""
    if not enough_pipe():
        pytest.skip("fs.pipe-max-size is below 4 MiB and we are bound by it")
    source_fd, work_fd = directories
    page_socket, served = socket.socketpair()
    serving = asyncio.Event()

    async def on_notify(notification: Notification) -> None:
        if notification.name == "status-ready":
            serving.set()

    dump_options = DumpOptions(images_dir_fd=source_fd, pid=victim.pid, lazy_pages_fd=served.fileno())
    swrk = await criu.prestart(dump_options.passed_fds)
    served.close()
    dumping = asyncio.create_task(criu.dump(dump_options, on_notify=on_notify, timeout_seconds=30, swrk=swrk))
    await asyncio.wait_for(serving.wait(), 20)
    with page_socket:
        lazy_options = LazyPagesOptions(
            images_dir_fd=source_fd, work_dir_fd=work_fd, page_server_fd=page_socket.fileno()
        )
        lazy_pages = await LazyPages.start(criu.binary, lazy_options)
    async with lazy_pages:
        restore_options = RestoreOptions(images_dir_fd=source_fd, work_dir_fd=work_fd, lazy_pages=True)
        pid = await criu.restore(restore_options, timeout_seconds=20)
        await lazy_pages.wait(timeout_seconds=20)
    assert await dumping == NO_DUMP_STATS
    victim.reaped()
    victim.restored_as(pid)
    assert victim.is_beating()


async def test_lazy_pages_without_images_fail(criu: Criu, directories: tuple[int, int]) -> None:
    with pytest.raises(LazyPagesFailed) as caught:
        await LazyPages.start(criu.binary, LazyPagesOptions(images_dir_fd=directories[0]))
    assert caught.value.cause


async def test_lazy_pages_left_early_are_gone(criu: Criu, victim: Victim, directories: tuple[int, int]) -> None:
    await criu.dump(DumpOptions(images_dir_fd=directories[0], pid=victim.pid), timeout_seconds=20)
    victim.reaped()
    for _time in range(2):  # the socket that the first one left does not hinder the second
        lazy_pages = await LazyPages.start(criu.binary, LazyPagesOptions(images_dir_fd=directories[0]))
        await lazy_pages.aclose()
        assert not alive(lazy_pages.pid)


async def test_lazy_pages_that_are_killed_fail(criu: Criu, victim: Victim, directories: tuple[int, int]) -> None:
    await criu.dump(DumpOptions(images_dir_fd=directories[0], pid=victim.pid), timeout_seconds=20)
    victim.reaped()
    async with await LazyPages.start(criu.binary, LazyPagesOptions(images_dir_fd=directories[0])) as lazy_pages:
        os.kill(lazy_pages.pid, signal.SIGKILL)
        with pytest.raises(LazyPagesFailed, match="-9"):
            await lazy_pages.wait(timeout_seconds=5)


def enough_pipe() -> bool:
    return int(Path("/proc/sys/fs/pipe-max-size").read_text()) >= 4 << 20
