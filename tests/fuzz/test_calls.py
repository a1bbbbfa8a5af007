"""A running phauld is asked with messages of all kinds; and it asks a destination that answers what it likes.

A call may be refused, but never by an error that nobody thought of; the daemon's log must have no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import strategies as st

from phaul.v1 import migrations_pb2, node_pb2, remote_pb2
from phaul_client.errors import PeerError
from phaul_client.remote import GrpcRemote
from phaul_client.status import from_rpc_error
from phaul_client.stream import StreamKind
from tests.attacks.target import Kind, Target, raw_call, remote
from tests.fuzz.engine import Fuzzer
from tests.fuzz.made import damaged, messages

REMOTE: Final = remote_pb2.DESCRIPTOR.services_by_name["Remote"]
MIGRATIONS: Final = migrations_pb2.DESCRIPTOR.services_by_name["Migrations"]
NODE: Final = node_pb2.DESCRIPTOR.services_by_name["Node"]
#: These start programs or move processes of this machine, if they are asked well enough.
NOT_TRIED: Final = frozenset({"RunWorkload", "StartMigration", "Preflight", "Doctor"})
#: Streams of files, which the transfer itself reads, and what the lease asks.
NOT_ASKED: Final = frozenset({"RenewLease", "PutFiles", "SyncFiles"})
KNOWN_IDS: Final = ("one", "two", "three")


def requests(method: Any) -> st.SearchStrategy[list[bytes]]:
    """Messages for one call, perhaps about a session that is there. Addresses of this machine are left alone."""

    def encode(message: Message, migration_id: str) -> bytes:
        known: Any = message
        if method.name == "StartIter":
            known.migration_id += "-"  # none that is open: it would wait for the page stream
        elif migration_id and "migration_id" in message.DESCRIPTOR.fields_by_name:
            known.migration_id = migration_id
        if method.name == "OpenSession":
            known.options.ClearField("move_addresses")
        return message.SerializeToString()

    right = st.builds(encode, messages(method.input_type), st.sampled_from(["", *KNOWN_IDS]))
    data = right if method.name in ("OpenSession", "StartIter") else st.one_of(right, right, damaged(right))
    return st.lists(data, min_size=1, max_size=3 if method.client_streaming else 1)


class Caller:
    """Makes calls with raw bytes from synchronous code."""

    def __init__(self, runner: asyncio.Runner, channel: grpc.aio.Channel) -> None:
        self._runner = runner
        self._channel = channel

    def call(self, service: Any, method: Any, sent: list[bytes]) -> grpc.StatusCode:
        return self._runner.run(self._call(f"/{service.full_name}/{method.name}", method, sent))

    async def _call(self, path: str, method: Any, sent: list[bytes]) -> grpc.StatusCode:
        call, _ = await raw_call(self._channel, path, method, sent, 20)
        code: grpc.StatusCode = await call.code()
        if await call.details() == "Internal error from Core":  # our own: we still sent when the answer came
            return grpc.StatusCode.CANCELLED
        return code


@pytest.mark.criu
@pytest.mark.parametrize(
    ("service", "kind", "examples"),
    [(REMOTE, Kind.NODE, 60), (MIGRATIONS, Kind.ADMIN, 40), (NODE, Kind.ADMIN, 40)],
    ids=["Remote", "Migrations", "Node"],
)
def test_calls(fuzzer: Fuzzer, target: Target, service: Any, kind: Kind, examples: int) -> None:
    with asyncio.Runner() as runner:
        channel = runner.run(_made(target, kind))
        caller = Caller(runner, channel)
        methods = [each for each in service.methods if each.name not in NOT_TRIED]
        share = Fuzzer(fuzzer.seconds / len(methods), fuzzer.counts)

        def check_with(method: Any) -> Any:
            def check(sent: list[bytes]) -> None:
                said = len(target.log)
                code = caller.call(service, method, sent)
                assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE), code
                assert "Traceback" not in (new := target.log[said:]), new
                assert code is not grpc.StatusCode.INTERNAL, new
                if method.name == "OpenSession" and code is grpc.StatusCode.OK:
                    asked = remote_pb2.OpenSessionRequest.FromString(sent[0])
                    if asked.migration_id not in KNOWN_IDS:
                        abort = remote_pb2.AbortRequest(migration_id=asked.migration_id)
                        runner.run(_awaited(remote(channel).Abort(abort)))

            return check

        try:
            for method in methods:
                share.run(f"{service.name}.{method.name}", requests(method), check_with(method), examples)
        finally:
            for each in KNOWN_IDS if service is REMOTE else ():
                runner.run(_awaited(remote(channel).Abort(remote_pb2.AbortRequest(migration_id=each))))
            runner.run(channel.close())


async def _made(target: Target, kind: Kind) -> grpc.aio.Channel:
    return target.channel(kind)


async def _awaited(call: Any) -> Any:
    return await call


class Liar(grpc.GenericRpcHandler):
    """Answers every call with the bytes, or the error, that it was given."""

    answer: bytes | tuple[int, str, tuple[tuple[str, str | bytes], ...]] = b""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        async def behave(_: Any, context: Any) -> Any:
            if isinstance(self.answer, bytes):
                return self.answer
            code, details, metadata = self.answer
            codes = {each.value[0]: each for each in grpc.StatusCode if each is not grpc.StatusCode.OK}
            await context.abort(codes[code], details, metadata)
            return b""

        if handler_call_details.method.endswith("/PutImages"):

            async def many(requests: AsyncIterator[Any], context: Any) -> Any:
                async for _ in requests:
                    pass
                return await behave(None, context)

            return grpc.stream_unary_rpc_method_handler(many)
        return grpc.unary_unary_rpc_method_handler(behave)


def errors() -> st.SearchStrategy[tuple[int, str, tuple[tuple[str, str | bytes], ...]]]:
    """Errors with details that fit, that do not fit, and that are no details."""
    code = st.integers(1, 16)
    text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=60)
    info = st.builds(
        error_details_pb2.ErrorInfo,
        reason=st.sampled_from(["WRONG_PHASE", "", "NO_SUCH_REASON", "x" * 500]),
        domain=st.sampled_from(["phaul.v1", ""]),
        metadata=st.dictionaries(st.sampled_from(["remedy", "log_tail", "x"]), text, max_size=3),
    )

    def status(code: int, message: str, info: error_details_pb2.ErrorInfo) -> bytes:
        made = status_pb2.Status(code=code, message=message)
        made.details.add().Pack(info)
        data: bytes = made.SerializeToString()
        return data

    right = st.tuples(code, text, info).map(
        lambda each: (each[0], each[1], (("grpc-status-details-bin", status(*each)),))
    )
    raw = st.builds(
        lambda code, text, data: (code, text, (("grpc-status-details-bin", data),)),
        code,
        text,
        damaged(st.builds(status, code, text, info)),
    )
    return st.one_of(right, raw, st.tuples(code, text, st.just(())))


def outcomes(method: Any) -> st.SearchStrategy[Any]:
    right = messages(method.output_type).map(lambda message: message.SerializeToString())
    return st.one_of(right, damaged(right), errors())


def calls_of(remote: GrpcRemote) -> dict[str, Any]:
    """What a source asks."""
    return {
        "CheckTree": lambda: remote.check_tree(remote_pb2.CheckTreeRequest()),
        "OpenSession": lambda: remote.open_session(remote_pb2.OpenSessionRequest()),
        "OpenStream": lambda: remote.open_stream(StreamKind.LAZY_PAGES),
        "StartIter": remote.start_iter,
        "StopIter": remote.stop_iter,
        "PutImages": lambda: remote.put_images([]),
        "Restore": lambda: remote.restore(image_files=0, timeout_seconds=20),
        "Commit": lambda: remote.commit(timeout_seconds=20),
        "Abort": remote.abort,
        "GetSession": remote.get_session,
    }


def test_a_destination_that_lies(fuzzer: Fuzzer) -> None:
    """A source gets an answer, or an error that says whose fault it is: nothing else may come out of a call."""
    liar = Liar()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((liar,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    async def ask(address: str, channel: grpc.aio.Channel, name: str) -> None:
        async with GrpcRemote(address, channel, "move") as remote:
            remote._receiving = True  # or stop_iter asks nothing
            with contextlib.suppress(PeerError):
                answer = await calls_of(remote)[name]()
                if name == "OpenStream":
                    answer.close()

    async def channel_to(port: int) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    with asyncio.Runner() as runner:
        server, port = runner.run(start())
        channel = runner.run(channel_to(port))
        names = list(calls_of(GrpcRemote("", channel, "")))
        share = Fuzzer(fuzzer.seconds / len(names), fuzzer.counts)
        try:
            assert set(names) | NOT_ASKED == set(REMOTE.methods_by_name)
            for name in names:

                def check(answer: Any, name: str = name) -> None:
                    liar.answer = answer
                    runner.run(ask(f"127.0.0.1:{port}", channel, name))

                share.run(f"answers to {name}", outcomes(REMOTE.methods_by_name[name]), check, 60)
        finally:
            runner.run(channel.close())
            runner.run(server.stop(0))


def test_errors_of_a_peer(fuzzer: Fuzzer) -> None:
    """Whatever details an error comes with, it becomes one of ours."""

    def check(answer: tuple[int, str, Iterable[tuple[str, str | bytes]]]) -> None:
        code, details, metadata = answer
        found = next(each for each in grpc.StatusCode if each.value[0] == code)
        error = grpc.aio.AioRpcError(found, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)
        assert isinstance(from_rpc_error("peer", error), PeerError)

    fuzzer.run("errors of a peer", errors(), check, 500)
