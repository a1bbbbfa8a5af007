"""What a node with a good certificate can do by lying: messages, names, sizes, checksums, streams that stall."""

from __future__ import annotations

import asyncio
import contextlib
import random
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.status import from_rpc_error
from tests.attacks.conftest import Tried
from tests.attacks.target import Kind, Target, raw_call, remote
from tests.attacks.test_access_matrix import METHODS
from tests.nodes import until

pytestmark = pytest.mark.criu

CALL_SECONDS: Final = 20.0
#: What may be said to a message that is none, or that lies.
REFUSALS: Final = frozenset({"INVALID_ARGUMENT", "IMAGE_CORRUPT"})


@contextlib.asynccontextmanager
async def session(
    target: Target, migration_id: str, **fields: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, remote_pb2.OpenSessionResponse]]:
    """An open session of a node that then misbehaves; whatever it did, it can be aborted and leaves nothing."""
    async with target.channel(Kind.NODE) as channel:
        request = remote_pb2.OpenSessionRequest(migration_id=migration_id, **fields)
        yield channel, await remote(channel).OpenSession(request, timeout=CALL_SECONDS)
        answer = await remote(channel).Abort(remote_pb2.AbortRequest(migration_id=migration_id), timeout=CALL_SECONDS)
        assert answer.phase == types_pb2.SESSION_PHASE_ABORTED


async def reason(call: Any) -> str:
    """Why a call was refused; empty if it was not."""
    try:
        await call
    except grpc.aio.AioRpcError as exc:
        found = from_rpc_error("target", exc).reason
        return exc.code().name if found in ("INTERNAL", "PEER_UNREACHABLE") else found
    return ""


async def put(channel: grpc.aio.Channel, migration_id: str, pieces: Iterable[remote_pb2.FilePiece]) -> str:
    async def stream() -> AsyncIterator[remote_pb2.PutImagesRequest]:
        yield remote_pb2.PutImagesRequest(migration_id=migration_id, pieces=pieces)

    return await reason(remote(channel).PutImages(stream(), timeout=CALL_SECONDS))


def piece(data: bytes = b"x", **fields: Any) -> remote_pb2.FilePiece:
    return remote_pb2.FilePiece(**{"size_bytes": len(data), "crc32": zlib.crc32(data), "data": data, **fields})


async def test_bytes_that_are_no_message(target: Target, tried: Tried) -> None:
    """To every call, also to those that this certificate may not make."""
    generator = random.Random(2)
    outcomes = set()
    async with target.channel(Kind.NODE) as channel:
        for path, method in METHODS.items():
            for data in (b"\xff" * 50, generator.randbytes(2000), b"\x0a\xff\xff\xff\xff\x0f"):
                call, _ = await raw_call(channel, path, method, [data], CALL_SECONDS)
                outcomes.add((await call.code()).name)
    assert "OK" not in outcomes, outcomes
    assert target.log.count("\n") < 1000
    tried("bytes that are no message, to every call", "an error; nothing is done")


async def test_oversized(target: Target, tried: Tried) -> None:
    async with session(target, "oversized") as (channel, _):
        big = piece(bytes(9 << 20), image_name="core-1.img")
        assert await put(channel, "oversized", [big]) == "RESOURCE_EXHAUSTED"
        tried("a message of 9 MiB", "RESOURCE_EXHAUSTED: 8 MiB is the limit")
        request = remote_pb2.GetSessionRequest(migration_id="oversized")
        for size in (100_000, 1_000_000):
            call = remote(channel).GetSession(request, metadata=(("x", "y" * size),), timeout=CALL_SECONDS)
            assert await reason(call) in ("RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE")
        tried("100 KB of metadata", "an error of gRPC: 16 KiB is its limit")
        many = remote_pb2.CheckTreeRequest(tree=types_pb2.TreeFacts(directories=["/" * 3000] * 2000))
        assert await reason(remote(channel).CheckTree(many, timeout=CALL_SECONDS)) in ("", "INVALID_ARGUMENT")
        assert await reason(remote(channel).GetSession(request, timeout=CALL_SECONDS)) == ""


NAMES: Final = (
    *("../core-1.img", "/etc/core-1.img", "a/b.img", "..", ".", "", "core-1.img/", "core\0-1.img", "core-1.img\n"),
    *("pages-1.img", "pagemap-1.img", ".core-1.img.part", "-core.img", "a" * 300 + ".img", "core-1.img\\x", "coré.img"),
)
PATHS: Final = (
    "/etc/passwd",
    "{log}/../state/journal.sqlite",
    "{log}",
    "{log}/.",
    "{log}/..",
    "",
    "x.log",
    "{log}/a\0b",
)


async def test_names(target: Target, tried: Tried) -> None:
    before = everything(target.directory)
    async with session(target, "names") as (channel, opened):
        token = opened.data_token
        sock = target.connect(to_data=True)
        with sock:
            sock.sendall(b"PHAULPG\x01\x00\x01\x00\x01\x00\x00\x00\x00" + token)
            assert await asyncio.to_thread(sock.recv, 1) == b"\0"
            start = remote_pb2.StartIterRequest(migration_id="names", index=1)
            await remote(channel).StartIter(start, timeout=CALL_SECONDS)
            for name in NAMES:
                assert await put(channel, "names", [piece(image_name=name)]) == "INVALID_ARGUMENT", name
            for path in PATHS:
                named = path.format(log=target.directory / "log")
                assert await put(channel, "names", [piece(carried_path=named)]) == "INVALID_ARGUMENT", path
            assert await put(channel, "names", [piece()]) == "INVALID_ARGUMENT"
            assert await put(channel, "names", [piece(image_name="core-1.img")]) == ""
        for path in PATHS:
            named = path.format(log=target.directory / "log")
            carried = [types_pb2.CarriedFile(path=named)]
            request = remote_pb2.OpenSessionRequest(migration_id="carries", carried_files=carried)
            assert await reason(remote(channel).OpenSession(request, timeout=CALL_SECONDS)) == "INVALID_ARGUMENT", path
        for migration_id in ("../names", "a/b", "", ".", "a\0b", "x" * 65, "a\n"):
            request = remote_pb2.OpenSessionRequest(migration_id=migration_id)
            assert await reason(remote(channel).OpenSession(request, timeout=CALL_SECONDS)) == "INVALID_ARGUMENT"
        for name in ("../w", "/w", "a\0b", "a/b", "..", "x" * 300):
            spec = types_pb2.WorkloadSpec(name=name)
            request = remote_pb2.OpenSessionRequest(migration_id="workload", workload=spec)
            assert await reason(remote(channel).OpenSession(request, timeout=CALL_SECONDS)) == "INVALID_ARGUMENT", name
    await until(lambda: everything(target.directory) == before)
    tried("../, absolute, empty, too long names, NUL, of criu's page files: for an image", "INVALID_ARGUMENT")
    tried("the same for a carried file, a migration id and a workload", "INVALID_ARGUMENT")


async def test_links(target: Target, tried: Tried) -> None:
    """In log_dir, where a carried file goes, something else has its name."""
    logs = target.directory / "log"
    victim = target.directory / "victim"
    victim.write_text("unharmed")
    (logs / "link.log").symlink_to(victim)
    (logs / "to-be.log").symlink_to(target.directory / "not-there")
    (logs / "directory.log").mkdir()
    for name in ("link.log", "to-be.log", "directory.log"):
        path = str(logs / name)
        migration_id = name.replace(".", "-")
        async with session(target, migration_id, carried_files=[{"path": path}]) as (channel, _):
            assert await put(channel, migration_id, [piece(carried_path=path)]) != "", name
    assert victim.read_text() == "unharmed"
    assert not (target.directory / "not-there").exists()
    for name in ("link.log", "to-be.log"):
        (logs / name).unlink()
    (logs / "directory.log").rmdir()
    victim.unlink()
    tried("a symbolic link or a directory where a carried file goes", "an error; what it leads to is unharmed")


async def test_sizes(target: Target, tried: Tried) -> None:
    path = target.directory / "log" / "sizes.log"
    async with session(target, "sizes", carried_files=[{"path": str(path)}]) as (channel, _):
        lies: tuple[dict[str, Any], ...] = (
            {"size_bytes": 2**64 - 1},  # and then nothing more
            {"size_bytes": 0},
            {"offset_bytes": 2**64 - 1, "size_bytes": 2**64 - 1},
            {"offset_bytes": 2**63, "size_bytes": 2**63 + 1},
            {"crc32": 1},
        )
        for lie in lies:
            assert await put(channel, "sizes", [piece(carried_path=str(path), **lie)]) in REFUSALS, lie
        first = piece(carried_path=str(path), size_bytes=3)
        lies = ({"size_bytes": 2, "offset_bytes": 1}, {"offset_bytes": 2}, {"offset_bytes": 0})
        for lie in lies:
            second = piece(**{"carried_path": str(path), "size_bytes": 3, **lie})
            assert await put(channel, "sizes", [first, second]) == "IMAGE_CORRUPT", lie
    assert not path.exists()
    tried("pieces with a wrong size, offset, checksum, gap or overlap", "IMAGE_CORRUPT or INVALID_ARGUMENT")
    async with target.channel(Kind.NODE) as channel:
        request = remote_pb2.OpenSessionRequest(migration_id="huge", expected_bytes=2**64 - 1)
        assert await reason(remote(channel).OpenSession(request, timeout=CALL_SECONDS)) in ("NO_SPACE", "NO_MEMORY")
        for number, (seconds, nanos) in enumerate(((-1, 0), (2**63 - 1, 0), (1, 2**31 - 1), (-(2**63), -1))):
            request = remote_pb2.OpenSessionRequest(migration_id=f"lease-{number}")
            request.lease.seconds, request.lease.nanos = seconds, nanos
            assert await reason(remote(channel).OpenSession(request, timeout=CALL_SECONDS)) in ("", "INVALID_ARGUMENT")
            abort = remote_pb2.AbortRequest(migration_id=request.migration_id)
            await remote(channel).Abort(abort, timeout=CALL_SECONDS)
        request = remote_pb2.OpenSessionRequest(migration_id="durations")
        request.options.downtime_goal.seconds = request.options.deadline.seconds = 2**63 - 1
        assert await reason(remote(channel).OpenSession(request, timeout=CALL_SECONDS)) in ("", "INVALID_ARGUMENT")
        await remote(channel).Abort(remote_pb2.AbortRequest(migration_id="durations"), timeout=CALL_SECONDS)
    tried(
        "2^64-1 bytes to be expected; times out of any range",
        "NO_SPACE; INVALID_ARGUMENT, or the nearest that is allowed",
    )


async def test_a_stream_that_stalls(target: Target, tried: Tried) -> None:
    """It holds a file that is half written; the lease ends it, and the file."""
    path = target.directory / "log" / "stalls.log"
    fields: dict[str, Any] = {"carried_files": [{"path": str(path)}], "lease": {"seconds": 1}}
    before = target.descriptors()
    go_on = asyncio.Event()

    async def stream() -> AsyncIterator[remote_pb2.PutImagesRequest]:
        yield remote_pb2.PutImagesRequest(migration_id="stalls", pieces=[piece(carried_path=str(path), size_bytes=2)])
        await go_on.wait()

    async with session(target, "stalls", **fields) as (channel, _):
        call = remote(channel).PutImages(stream(), timeout=60)
        sending = asyncio.create_task(reason(call))
        await until(path.exists, CALL_SECONDS)
        await until(lambda: not path.exists(), CALL_SECONDS)  # it was made for this session
        get = remote_pb2.GetSessionRequest(migration_id="stalls")
        assert (await remote(channel).GetSession(get)).session.phase == types_pb2.SESSION_PHASE_ABORTED
        go_on.set()
        assert await sending in (*REFUSALS, "WRONG_PHASE")
    with contextlib.suppress(TimeoutError):
        await until(lambda: target.descriptors() <= before + 2, CALL_SECONDS)
    assert target.descriptors() <= before + 2, target.open_files()
    tried("a stream of files that stops in the middle of one", "the lease ends the session; the half file goes")


async def test_many_streams_at_once(target: Target, tried: Tried) -> None:
    """500 calls that wait, on one connection."""
    before = target.memory_bytes()
    go_on = asyncio.Event()

    async def stream() -> AsyncIterator[remote_pb2.PutImagesRequest]:
        await go_on.wait()
        yield remote_pb2.PutImagesRequest(migration_id="../")

    async with target.channel(Kind.NODE) as channel:
        calls = [asyncio.create_task(reason(remote(channel).PutImages(stream(), timeout=60))) for _ in range(500)]
        async with target.channel(Kind.NODE) as other:
            await reason(remote(other).GetSession(remote_pb2.GetSessionRequest(migration_id="x"), timeout=CALL_SECONDS))
        grown = target.memory_bytes() - before
        go_on.set()
        outcomes = Counter(await asyncio.gather(*calls))
        assert set(outcomes) <= {"INVALID_ARGUMENT", "UNAVAILABLE", "INTERNAL"}  # reset before they were looked at
        assert outcomes["INVALID_ARGUMENT"] >= 200
    assert grown < 32 << 20
    tried(
        "500 calls at once on a connection, none of which goes on",
        "256 are served at a time; other connections are not kept out",
    )


async def test_sessions_are_bounded(target: Target, tried: Tried) -> None:
    """As many as max_incoming; what was aborted before it was ever seen is kept in the journal, not in memory."""
    async with target.channel(Kind.NODE) as channel:
        ids = [f"{number}-bounded" for number in range(20)]
        opened = [
            await reason(remote(channel).OpenSession(remote_pb2.OpenSessionRequest(migration_id=each))) for each in ids
        ]
        assert opened == [""] * 16 + ["TOO_MANY_MIGRATIONS"] * 4
        for each in ids[:16]:
            await remote(channel).Abort(remote_pb2.AbortRequest(migration_id=each))
        for number in range(200):
            await remote(channel).Abort(remote_pb2.AbortRequest(migration_id=f"warm-{number}"))
        before = target.memory_bytes()
        for number in range(1000):
            await remote(channel).Abort(remote_pb2.AbortRequest(migration_id=f"unseen-{number}"))
        grown = target.memory_bytes() - before
    tried("20 sessions at once", "TOO_MANY_MIGRATIONS from the 17th on")
    assert grown < 2 << 20, f"{grown} bytes for 1000 aborts"
    tried("1000 aborts of ids that were never seen", "recorded in the journal; no memory is kept")


def everything(directory: Path) -> set[str]:
    """All files but those that change by themselves."""
    found = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    return {name for name in found if not name.startswith(("state/journal", "state/workloads/"))}
