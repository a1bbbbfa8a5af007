"""`Remote` over gRPC in this process: page streams and tokens, images and carried files, calls that do not fit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.errors import PeerError, PeerUnavailable
from phaul_client.remote import GrpcRemote
from phaul_client.stream import Preamble, StreamKind
from phauld.destination import page_stream
from tests.contract.remote_destination import Destination, opening, piece, reason
from tests.nodes import until

# Calls that do not fit


async def test_a_session_with_a_pipe_that_is_opened_twice(there: Destination) -> None:
    request = opening()
    request.page_pipe.SetInParent()
    first = await there.stub.OpenSession(request)
    async with there.remote() as remote:
        second = await remote.open_session(request)
        assert second.page_pipe == first.page_pipe
        assert second.data_token != first.data_token
        await remote.abort()
    await until(lambda: not pipes() and there.is_clean(), 10)


async def test_a_session_whose_pipe_is_never_connected_leaves_nothing(there: Destination) -> None:
    request = opening()
    request.page_pipe.SetInParent()
    await there.stub.OpenSession(request)
    assert pipes() != []
    async with there.remote() as remote:
        await remote.abort()
    await until(lambda: not pipes() and there.is_clean(), 10)


@pytest.mark.parametrize("wanted", ["tls", "kernel_tls"])
async def test_tls_of_pages_where_there_is_none(there: Destination, wanted: str) -> None:
    request = opening()
    setattr(request.page_pipe, wanted, True)
    async with there.remote() as remote:
        assert await reason(remote.open_session(request)) == "PEER_INCOMPATIBLE"
    assert there.is_clean()
    assert pipes() == []


def pipes() -> list[int]:
    """The page pipes of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"pipe_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_calls_out_of_order_change_nothing(there: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_stream, "STREAM_SECONDS", 0.2)
    await there.stub.OpenSession(opening())
    async with there.remote() as remote:
        assert await reason(remote.restore(image_files=0, timeout_seconds=5)) == "WRONG_PHASE"
        assert await reason(remote.commit(timeout_seconds=5)) == "WRONG_PHASE"
        assert await reason(remote.start_iter()) == "DEADLINE_EXCEEDED"  # no stream has come
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_OPEN


async def test_an_unknown_option_is_refused(there: Destination) -> None:
    async with there.remote() as remote:
        request = opening(options=types_pb2.Options(tcp_policy=99))  # type: ignore[arg-type]
        assert await reason(remote.open_session(request)) == "INVALID_ARGUMENT"
    assert there.is_clean()


# The page stream


async def test_an_old_token_is_no_good(there: Destination) -> None:
    first = await there.stub.OpenSession(opening())
    await there.stub.OpenSession(opening())
    async with there.remote() as remote:
        with pytest.raises(PeerError, match="refused the token"):
            await remote._connect("127.0.0.1", first.data_port, Preamble(StreamKind.PAGES, first.data_token))


async def test_a_data_port_that_is_shut_is_told_with_a_remedy(there: Destination) -> None:
    async with there.remote() as remote:
        with pytest.raises(PeerUnavailable, match="the data port is not reachable") as unavailable:
            await remote._connect("127.0.0.1", 1, Preamble(StreamKind.PAGES, bytes(32)))
    assert "open this port" in unavailable.value.remedy


async def test_a_destination_that_is_not_there(tmp_path: Path) -> None:
    async with (
        grpc.aio.insecure_channel("127.0.0.1:1") as channel,
        GrpcRemote("127.0.0.1:1", channel, "move") as remote,
    ):
        with pytest.raises(PeerUnavailable, match="not reachable"):
            await remote.open_session(opening())


# Images and carried files


def descriptors_of(path: Path) -> list[str]:
    """The open descriptors of a file."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{number}") == str(path):
                found.append(number)
    return found


async def put(there: Destination, pieces: Iterable[remote_pb2.FilePiece]) -> remote_pb2.PutImagesResponse:
    async with there.remote() as remote:
        return await remote.put_images(pieces)


async def test_a_carried_file_arrives_and_goes_with_an_abort(there: Destination) -> None:
    log = there.log_dir / "web.log"
    await there.stub.OpenSession(opening(carried_files=[types_pb2.CarriedFile(path=str(log))]))
    answer = await put(there, [piece(carried_path=str(log), mode=0o640)])
    assert (answer.files, answer.bytes) == (1, 5)
    assert log.read_bytes() == b"line\n"
    assert log.stat().st_mode & 0o777 == 0o640
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="move"))
    assert list(there.log_dir.iterdir()) == []


@pytest.mark.parametrize("path", ["/etc/passwd", "{}/../x", "{}/a/b.log", "{}", "web.log", "{}/..", ""])
async def test_a_file_outside_of_the_logs_cannot_be_carried(there: Destination, path: str) -> None:
    carried = types_pb2.CarriedFile(path=path.format(there.log_dir))
    async with there.remote() as remote:
        assert await reason(remote.open_session(opening(carried_files=[carried]))) == "INVALID_ARGUMENT"
    assert there.is_clean()


BAD_PIECES = {
    "corrupt": (piece(carried_path="LOG", crc32=1), "IMAGE_CORRUPT"),
    "a gap": (piece(carried_path="LOG", offset_bytes=3, size_bytes=5, data=b""), "IMAGE_CORRUPT"),
    "too long": (piece(carried_path="LOG", size_bytes=2), "IMAGE_CORRUPT"),
    "not announced": (piece(carried_path="/etc/passwd"), "INVALID_ARGUMENT"),
    "no round yet": (piece(image_name="core-1.img"), "INVALID_ARGUMENT"),
    "no name": (piece(), "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize(("bad", "why"), BAD_PIECES.values(), ids=BAD_PIECES.keys())
async def test_a_bad_piece_is_refused_and_leaves_no_descriptor(
    there: Destination, bad: remote_pb2.FilePiece, why: str
) -> None:
    log = there.log_dir / "web.log"
    bad.carried_path = bad.carried_path.replace("LOG", str(log)) if bad.carried_path else ""
    if not bad.carried_path:
        bad.ClearField("carried_path")
    if why == "INVALID_ARGUMENT" and not bad.carried_path:
        bad.image_name = "core-1.img"
    await there.stub.OpenSession(opening(carried_files=[types_pb2.CarriedFile(path=str(log))]))
    for _ in range(3):
        assert await reason(put(there, [piece(carried_path=str(log), data=b"li", size_bytes=5), bad])) in (
            why,
            "IMAGE_CORRUPT",
        )
    assert not descriptors_of(log)
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="move"))
    assert list(there.log_dir.iterdir()) == []


async def test_an_empty_stream_of_images_is_refused(there: Destination) -> None:
    await there.stub.OpenSession(opening())
    assert await reason(put(there, [])) == "INVALID_ARGUMENT"


async def test_images_for_a_session_that_has_ended_are_refused(there: Destination) -> None:
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="move"))
    assert await reason(put(there, [piece(image_name="core-1.img")])) == "WRONG_PHASE"


async def test_a_stream_of_images_that_breaks_off_leaves_no_descriptor(there: Destination) -> None:
    log = there.log_dir / "web.log"
    await there.stub.OpenSession(opening(carried_files=[types_pb2.CarriedFile(path=str(log))]))

    async def endless() -> AsyncIterator[remote_pb2.PutImagesRequest]:
        first = piece(carried_path=str(log), data=b"x" * 10, size_bytes=100)
        yield remote_pb2.PutImagesRequest(migration_id="move", pieces=[first])
        await asyncio.Event().wait()

    call = there.stub.PutImages(endless())
    await until(lambda: log.exists() and log.stat().st_size == 10)
    assert descriptors_of(log)
    call.cancel()
    await until(lambda: not descriptors_of(log))
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="move"))
    assert list(there.log_dir.iterdir()) == []


async def test_an_abort_in_the_middle_of_images_leaves_no_file(there: Destination) -> None:
    log = there.log_dir / "web.log"
    await there.stub.OpenSession(opening(carried_files=[types_pb2.CarriedFile(path=str(log))]))
    aborted = asyncio.Event()

    async def two_halves() -> AsyncIterator[remote_pb2.PutImagesRequest]:
        halves = [piece(carried_path=str(log), size_bytes=10, offset_bytes=offset) for offset in (0, 5)]
        yield remote_pb2.PutImagesRequest(migration_id="move", pieces=halves[:1])
        await aborted.wait()
        yield remote_pb2.PutImagesRequest(pieces=[halves[1], piece(carried_path=str(log))])

    call = there.stub.PutImages(two_halves())
    await until(lambda: log.exists() and log.stat().st_size)
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="move"))
    aborted.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    assert list(there.log_dir.iterdir()) == []


async def test_an_aborted_migration_does_not_take_a_log_that_was_here_before(there: Destination) -> None:
    log = there.log_dir / "web.log"
    log.write_bytes(b"of an earlier stay\n")
    await there.stub.OpenSession(opening(carried_files=[types_pb2.CarriedFile(path=str(log))]))
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="move"))
    assert log.exists()
