"""The library as go-criu's users use `phaul`: `Client`, `Server`, an own `Local`; nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path

import pytest

from phaul_client import Client, Config, Local, Remote
from phaul_criu.criu import Criu
from phaul_criu.errors import PageServerFailed, RestoreFailed
from phaul_criu.install import find_binary
from phauld import Server
from tests.node.criu_victims import Victim
from tests.seed_api import Halves, OwnLocal, both_halves

pytestmark = pytest.mark.criu


def runs_on(victim: Victim) -> bool:
    return victim.is_beating() and victim.is_beating(0)


def test_the_seed_and_its_parts_fit_the_protocols(tmp_path: Path) -> None:
    server = Server(Config(pid=1, memfd=0, wdir=tmp_path))
    local: Local = OwnLocal(server, tmp_path)
    remote: Remote = server  # as in the original's test
    assert Client(local, remote, Config(pid=1, memfd=0, wdir=tmp_path))
    assert server.last_images_dir is None
    assert server.criu.binary == find_binary()


async def test_a_process_moves_in_one_process_over_a_socket_pair(
    tmp_path: Path, victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tracks = (await Criu(find_binary()).features()).mem_track
    beats, old_pid = victim.beats(), victim.pid
    with both_halves(tmp_path / "image", victim.pid) as halves:
        history = await halves.migrate()
    victim.reaped()
    victim.restored_as(halves.local.restored_pid)

    assert victim.pid != old_pid
    assert runs_on(victim)
    assert victim.beats() > beats
    assert bool(history) is tracks
    assert halves.remote.calls == ["start", "stop"] * (len(history) + 1)
    assert (halves.local.parent is not None) is tracks
    assert ("does not track written memory" in caplog.text) is not tracks
    server_dirs = sorted(path.name for path in (tmp_path / "image/remote").iterdir())
    assert server_dirs == [str(number) for number in range(len(history) + 1)]


async def test_without_notes_the_server_itself_is_the_remote(tmp_path: Path, victim: Victim) -> None:
    with both_halves(tmp_path / "image", victim.pid) as halves:
        server = halves.remote.server
        halves.client = Client(halves.local, server, halves.config)
        await halves.migrate()
    victim.reaped()
    victim.restored_as(halves.local.restored_pid)
    assert runs_on(victim)


class Refusal(Exception):
    """The user's code does not want to."""


async def refuse() -> None:
    raise Refusal("not today")


@pytest.mark.parametrize("step", ["before_dump", "before_restore"])
async def test_a_failing_local_leaves_the_process_running(tmp_path: Path, victim: Victim, step: str) -> None:
    with both_halves(tmp_path / "image", victim.pid, **{step: refuse}) as halves:  # type: ignore[arg-type]
        with pytest.raises(Refusal):
            await halves.migrate(8)
        assert runs_on(victim)
        assert_paired(halves)


@pytest.mark.parametrize("step", ["before_dump", "before_restore"])
async def test_a_cancelled_local_leaves_the_process_running(tmp_path: Path, victim: Victim, step: str) -> None:
    reached = asyncio.Event()

    async def wait() -> None:
        reached.set()
        await asyncio.Event().wait()

    with both_halves(tmp_path / "image", victim.pid, **{step: wait}) as halves:  # type: ignore[arg-type]
        task = asyncio.create_task(halves.migrate())
        async with asyncio.timeout(20):
            await reached.wait()
        assert victim.is_silent() is (step == "before_restore")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert runs_on(victim)
        assert_paired(halves)


async def test_a_restore_that_fails_leaves_the_process_running(tmp_path: Path, victim: Victim) -> None:
    async def spoil() -> None:
        for image in (tmp_path / "image/test").glob("core-*.img"):
            image.write_bytes(b"garbage")

    with both_halves(tmp_path / "image", victim.pid, before_restore=spoil) as halves:
        with pytest.raises(RestoreFailed):
            await halves.migrate(8)
        assert runs_on(victim)
        assert_paired(halves)


async def test_a_round_that_does_not_start_is_not_stopped(tmp_path: Path, victim: Victim) -> None:
    with both_halves(tmp_path / "image", victim.pid) as halves:
        halves.remote.start_fails = True
        with pytest.raises(ConnectionError):
            await halves.migrate(8)
        assert halves.remote.calls == ["start"]
        assert runs_on(victim)


async def test_a_process_that_has_moved_has_moved_whatever_stop_iter_says(
    tmp_path: Path, victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    if (await Criu(find_binary()).features()).mem_track:
        pytest.skip("here it would be a round before the last one that fails")
    with both_halves(tmp_path / "image", victim.pid) as halves:
        halves.remote.stop_fails = True
        await halves.migrate(8)
    victim.reaped()
    victim.restored_as(halves.local.restored_pid)
    assert runs_on(victim)
    assert "the tree has moved" in caplog.text


async def test_a_server_that_loses_its_source_says_so_and_leaves_nothing(tmp_path: Path, victim: Victim) -> None:
    with both_halves(tmp_path / "image", victim.pid) as halves:
        server = halves.remote.server
        await server.start_iter()
        with socket.socket(fileno=os.dup(halves.config.memfd)) as stream:
            stream.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PageServerFailed):
            await server.stop_iter()
        await server.start_iter()
        await server.aclose()
        assert runs_on(victim)


async def test_a_server_that_is_closed_ends_the_wait_for_its_pages(tmp_path: Path, victim: Victim) -> None:
    with both_halves(tmp_path / "image", victim.pid) as halves:
        server = halves.remote.server
        await server.start_iter()
        waiting = asyncio.create_task(server.stop_iter())
        await asyncio.sleep(0.05)
        await server.aclose()
        async with asyncio.timeout(30):
            with pytest.raises(PageServerFailed):
                await waiting


def assert_paired(halves: Halves) -> None:
    assert halves.remote.calls == ["start", "stop"] * (len(halves.remote.calls) // 2)
