"""`Remote` over gRPC in this process, as far as it goes without criu: ids, tokens, leases, images, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul.v1 import remote_pb2, remote_pb2_grpc, types_pb2
from phaul_client.errors import PeerError, PeerRefused, PeerUnavailable
from phaul_client.remote import GrpcRemote
from phaul_client.stream import Preamble, StreamKind
from phaul_criu.criu import Criu, Features
from phaul_criu.version import Version
from phauld import convert
from phauld.destination import page_stream
from phauld.destination.admission import Terms
from phauld.destination.dataport import DataPort
from phauld.destination.incoming import Session
from phauld.destination.remote_service import RemoteService
from phauld.interceptor import ErrorInterceptor
from phauld.journal import IncomingEntry, Journal
from phauld.node import Node
from phauld.trees.restore_slot import RestoreSlot
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads
from tests.node.criu_victims import no_leaks
from tests.nodes import until

NOTHING_YET = "#!/bin/sh\nexec cat <&$2 >/dev/null\n"  #: in criu's place: waits until its connection ends


@dataclass
class Destination:
    """A destination, and what it keeps where."""

    directory: Path
    service: RemoteService
    address: str
    channel: grpc.aio.Channel
    data_port: DataPort
    journal: Journal

    @property
    def log_dir(self) -> Path:
        return self.directory / "log"

    @property
    def images(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "images").iterdir())

    @property
    def records(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "workloads").iterdir())

    def remote(self, migration_id: str = "move") -> GrpcRemote:
        return GrpcRemote(self.address, self.channel, migration_id)

    @property
    def stub(self) -> remote_pb2_grpc.RemoteAsyncStub:
        stub: remote_pb2_grpc.RemoteAsyncStub = remote_pb2_grpc.RemoteStub(self.channel)
        return stub

    def is_clean(self) -> bool:
        return not self.images and not self.records and not self.data_port._expected


@asynccontextmanager
async def destination(directory: Path, **terms: Any) -> AsyncIterator[Destination]:
    for name in ("images", "log", "workloads"):
        (directory / name).mkdir(exist_ok=True, parents=True)
    criu = directory / "criu"
    criu.write_text(NOTHING_YET)
    criu.chmod(0o755)
    journal = await Journal.open(directory / "journal.sqlite")
    node = Node(
        node_id=journal.node_id,
        name="node-b",
        criu=Criu(criu),
        criu_version=Version(4, 1, 1),
        features=Features(mem_track=False, lazy_pages=True, pidfd_store=True),
        images_dir=directory / "images",
        insecure=True,
        incoming_limit=2,
        outgoing_limit=2,
    )
    workloads = Workloads(directory / "workloads", directory / "log")
    data_port = DataPort()
    await data_port.start("127.0.0.1", 0)
    granted = {"memory_dir": None, "lease_seconds": 30.0, "max_incoming": 2, "clear_pages": True, **terms}
    granted |= {"images_dir": directory / "images", "log_dir": directory / "log"}
    service = RemoteService(node, Terms(**granted), workloads, data_port, journal)
    await service.recover()
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    remote_pb2_grpc.add_RemoteServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield Destination(directory, service, address, channel, data_port, journal)
    await server.stop(0.1)
    await service.close()
    await data_port.stop()
    await workloads.close()
    await journal.aclose()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Destination]:
    async with destination(tmp_path / "node-b") as there:
        yield there


def opening(migration_id: str = "move", **fields: Any) -> remote_pb2.OpenSessionRequest:
    return remote_pb2.OpenSessionRequest(migration_id=migration_id, **fields)


def piece(data: bytes = b"line\n", **fields: Any) -> remote_pb2.FilePiece:
    return remote_pb2.FilePiece(**{"size_bytes": len(data), "crc32": zlib.crc32(data), "data": data, **fields})


async def reason(call: Any) -> str:
    with pytest.raises(PeerRefused) as refused:
        await call
    return refused.value.reason


async def test_a_session_is_opened_connected_and_aborted_and_nothing_is_left(there: Destination) -> None:
    async with there.remote() as remote:
        answer = await remote.open_session(opening())
        assert answer.session.phase == types_pb2.SESSION_PHASE_OPEN
        assert answer.destination.node_id == remote.destination_node_id == there.journal.node_id
        assert remote.page_socket.getblocking()
        assert len(there.records) == 1
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_OPEN
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert there.is_clean()
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert there.service.active == 0


@pytest.mark.parametrize("migration_id", ["", "a" * 65, "../victim", "a/../../victim", "a b"])
async def test_no_call_takes_what_is_no_id(there: Destination, migration_id: str) -> None:
    """It becomes part of a path that is removed with all that is below it."""
    calls = (
        there.stub.Abort(remote_pb2.AbortRequest(migration_id=migration_id)),
        there.stub.GetSession(remote_pb2.GetSessionRequest(migration_id=migration_id)),
        there.stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id=migration_id)),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await there.journal.get_incoming(migration_id) is None


async def test_no_process_and_no_descriptor_is_left(tmp_path: Path) -> None:
    with no_leaks():
        async with destination(tmp_path / "node-b") as there, there.remote() as remote:
            await remote.open_session(opening())
            await remote.abort()


@pytest.mark.parametrize("method", ["start_iter", "restore", "commit", "get_session", "put_images", "renew"])
async def test_an_id_that_was_never_here(there: Destination, method: str) -> None:
    async with there.remote("stranger") as remote:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "start_iter": remote.start_iter,
            "restore": lambda: remote.restore(image_files=0, timeout_seconds=5),
            "commit": lambda: remote.commit(timeout_seconds=5),
            "get_session": remote.get_session,
            "put_images": lambda: remote.put_images([piece(image_name="core-1.img")]),
            "renew": lambda: remote._call(there.stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id="stranger"))),
        }
        assert await reason(calls[method]()) == "MIGRATION_NOT_FOUND"
    assert there.is_clean()


async def test_an_abort_of_an_unknown_id_is_for_ever(tmp_path: Path) -> None:
    async with destination(tmp_path / "node-b") as there, there.remote() as remote:
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert await reason(remote.open_session(opening())) == "WRONG_PHASE"
        assert there.is_clean()
    async with destination(tmp_path / "node-b") as there, there.remote() as remote:  # phauld was started anew
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert await reason(remote.open_session(opening())) == "WRONG_PHASE"


async def test_an_abort_that_overtakes_the_opening_leaves_nothing(
    there: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, aborted = asyncio.Event(), asyncio.Event()
    start = Workloads.restore_under_shim

    async def slowly(self: Workloads, spec: WorkloadSpec, criu: Path, **options: Any) -> RestoreSlot:
        slot = await start(self, spec, criu, **options)
        begun.set()
        await aborted.wait()
        return slot

    monkeypatch.setattr(Workloads, "restore_under_shim", slowly)
    async with there.remote() as remote:
        opened = asyncio.create_task(remote.open_session(opening()))
        await begun.wait()
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        aborted.set()
        assert await reason(opened) == "WRONG_PHASE"
        assert there.is_clean()
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED


async def test_a_restarted_phauld_aborts_what_was_open(tmp_path: Path) -> None:
    async with destination(tmp_path / "node-b") as there:
        async with there.remote() as remote:
            await remote.open_session(opening())
        await die(there.service._sessions._known.pop("move"))
        assert len(there.records) == 1
    async with destination(tmp_path / "node-b") as again, again.remote() as remote:
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert again.is_clean()


async def test_a_restarted_phauld_forgets_a_slot_of_which_its_journal_never_heard(tmp_path: Path) -> None:
    """The one before was killed between the two."""
    async with destination(tmp_path / "node-b") as there:
        spec = WorkloadSpec(name="web", argv=())
        workloads = there.service._sessions._host.workloads
        slot = await workloads.restore_under_shim(spec, there.directory / "criu", migration_id="move")
        async with asyncio.timeout(10):
            while not (slot.directory / "shim.json").exists():  # noqa: ASYNC110 (it is another process)
                await asyncio.sleep(0.01)
        slot.take_swrk().close()
        assert len(there.records) == 1
    async with destination(tmp_path / "node-b") as again:
        assert again.records == []


async def die(session: Session) -> None:
    """What is left of a session of a phauld that is killed: its files. The kernel closes what it had open."""
    assert session.course._lease is not None
    assert session._held.tree.slot is not None
    session.course._lease.cancel()
    session._held.tree.slot.take_swrk().close()
    await session._held.stream.aclose()
    assert session._held.tree.slot._child is not None
    await session._held.tree.slot._child.wait()


async def test_the_same_opening_twice_gives_a_new_token_and_the_same_session(there: Destination) -> None:
    first = await there.stub.OpenSession(opening())
    second = await there.stub.OpenSession(opening())
    assert first.data_token != second.data_token
    assert len(there.data_port._expected) == 1
    assert len(there.records) == 1
    assert len(there.records) == 1


async def test_the_same_opening_twice_at_once(there: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    look = there.journal.get_incoming

    async def slowly(migration_id: str) -> IncomingEntry | None:
        found = await look(migration_id)
        await asyncio.sleep(0.05)
        return found

    monkeypatch.setattr(there.journal, "get_incoming", slowly)
    answers = await asyncio.gather(*(there.stub.OpenSession(opening()) for _ in range(4)))
    assert {answer.session.phase for answer in answers} == {types_pb2.SESSION_PHASE_OPEN}
    assert len(there.data_port._expected) == 1
    assert len(there.records) == 1
    async with there.remote() as remote:
        await remote.abort()
    assert there.is_clean()


@pytest.mark.parametrize("migration_id", ["", "a/b", "../a", "a b", "a" * 65, "ä", "a\n"])
async def test_what_is_no_id_is_refused(there: Destination, migration_id: str) -> None:
    async with there.remote(migration_id) as remote:
        assert await reason(remote.open_session(opening(migration_id))) == "INVALID_ARGUMENT"
    assert there.is_clean()


async def test_another_node_is_not_this_one(there: Destination) -> None:
    async with there.remote() as remote:
        assert await reason(remote.open_session(opening(destination_node_id="other"))) == "NODE_MISMATCH"
        await remote.open_session(opening())
        remote._destination_node_id = "other"
        assert await reason(remote.get_session()) == "NODE_MISMATCH"
        assert await reason(remote.commit(timeout_seconds=5)) == "NODE_MISMATCH"


async def test_too_many(there: Destination) -> None:
    for migration_id in ("one", "two"):
        await there.stub.OpenSession(opening(migration_id))
    async with there.remote("three") as remote:
        assert await reason(remote.open_session(opening("three"))) == "TOO_MANY_MIGRATIONS"
    await there.stub.OpenSession(opening("two"))  # a repetition needs no room
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="one"))
    await there.stub.OpenSession(opening("three"))


async def test_a_name_that_is_taken(there: Destination) -> None:
    spec = types_pb2.WorkloadSpec(name="web", argv=["web"])
    await there.stub.OpenSession(opening("one", workload=spec))
    async with there.remote("two") as remote:
        assert await reason(remote.open_session(opening("two", workload=spec))) == "WORKLOAD_EXISTS"
        assert await reason(remote.get_session()) == "MIGRATION_NOT_FOUND"
    assert len(there.records) == 1


async def test_a_shim_that_does_not_start_leaves_nothing(there: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phauld.trees.shims._SHIM", ("/nonexistent",))
    async with there.remote() as remote:
        with pytest.raises(PeerRefused, match="nonexistent"):
            await remote.open_session(opening())
    assert there.is_clean()


# Leases


async def test_a_silent_source_loses_its_session(tmp_path: Path) -> None:
    async with destination(tmp_path / "node-b") as there:
        answer = await there.stub.OpenSession(opening(lease=convert.duration(0.001)))
        assert convert.seconds_of(answer.lease) == 1.0  # the shortest there is
        await until(lambda: there.service.active == 0)
        await until(there.is_clean)
        async with there.remote() as remote:
            assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
            with pytest.raises(grpc.aio.AioRpcError):
                await there.stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id="move"))
            assert await reason(remote.start_iter()) == "LEASE_EXPIRED"
            assert await reason(remote.restore(image_files=0, timeout_seconds=5)) == "LEASE_EXPIRED"
            assert await reason(remote.commit(timeout_seconds=5)) == "WRONG_PHASE"


async def test_a_source_that_lives_keeps_its_session(there: Destination) -> None:
    async with there.remote() as remote:
        await remote.open_session(opening(lease=convert.duration(2)))
        await asyncio.sleep(2.5)
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_OPEN
    await until(lambda: there.service.active == 0)  # it is gone now


async def test_a_lease_has_a_longest_and_a_default(there: Destination) -> None:
    assert convert.seconds_of((await there.stub.OpenSession(opening("a", lease=convert.duration(1e6)))).lease) == 3600
    assert convert.seconds_of((await there.stub.OpenSession(opening("b"))).lease) == 30


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
