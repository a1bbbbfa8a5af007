"""One trace over both daemons, as a collector receives it by OTLP; and a collector that is away changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.nodes import Nodes

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: phaul[otel]")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from phaul.v1 import migrations_pb2, migrations_pb2_grpc

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps each span with the name of the node that it is of."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            values = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(values["host.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector(nodes: Nodes, tmp_path: Path) -> AsyncIterator[Collector]:
    """It collects from both nodes, where phauld and a workload run."""
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    endpoint = f"unix:{tmp_path / 'otlp'}"
    server.add_insecure_port(endpoint)
    await server.start()
    try:
        await start_all(nodes, endpoint)
        yield collector
    finally:
        await server.stop(1)


async def start_all(nodes: Nodes, endpoint: str) -> None:
    """A phauld at each node, which sends to that collector, and something that can move."""
    for node in (nodes.a, nodes.b):
        await node.start_phauld(otlp_endpoint=endpoint)
    await nodes.a.phaul("run", "--name", "clock", "--", "sleep", "1000", check=True)


async def test_a_migration_is_one_trace_over_both_nodes(nodes: Nodes, collector: Collector) -> None:
    await nodes.a.phaul("migrate", "clock", "--to", nodes.b.address, check=True)
    for node in (nodes.a, nodes.b):
        assert await node.kill_phauld(15) == 0  # what is left is sent
    by_node = {name: [span for node, span in collector.spans if node == name] for name in ("a", "b")}
    (root,) = [span for span in by_node["a"] if span.name == "migration"]
    assert {span.trace_id for _, span in collector.spans} == {root.trace_id}
    at_a, at_b = ({span.name for span in spans} for spans in by_node.values())
    assert {"preflight", "freezing", "freeze and dump", "phaul.v1.Remote/Restore", "phaul.v1.Remote/PutImages"} <= at_a
    assert {"phaul.v1.Remote/Restore", "criu builds the tree", "phaul.v1.Remote/Commit"} <= at_b
    calls = {span.span_id for span in by_node["a"] if span.name == "phaul.v1.Remote/Restore"}
    (restore,) = [span for span in by_node["b"] if span.name == "phaul.v1.Remote/Restore"]
    assert restore.parent_span_id in calls
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > 0 for _, span in collector.spans)


async def test_a_trace_that_an_orchestrator_began_goes_on_and_a_failure_is_told(
    nodes: Nodes, collector: Collector
) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with nodes.a.daemon.channel() as channel:
        stub = migrations_pb2_grpc.MigrationsStub(channel)
        request = migrations_pb2.StartMigrationRequest(
            migration_id="traced", workload="clock", destination=nodes.b.address
        )
        request.options.deadline.FromMilliseconds(1)
        await stub.StartMigration(request, metadata=(("traceparent", f"00-{trace}-{caller}-01"),))
        async for _ in stub.WatchMigration(migrations_pb2.WatchMigrationRequest(migration_id="traced")):
            pass  # until it is over
    assert await nodes.a.kill_phauld(15) == 0
    spans = {span.name: span for _, span in collector.spans}
    assert {span.trace_id.hex() for _, span in collector.spans} == {trace}
    assert spans["phaul.v1.Migrations/StartMigration"].parent_span_id.hex() == caller
    root = spans["migration"]
    assert root.parent_span_id == spans["phaul.v1.Migrations/StartMigration"].span_id
    assert root.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    attributes = {each.key: each.value.string_value for each in root.attributes}
    assert attributes["phaul.migration_id"] == "traced"
    assert attributes["error.type"] == "ERROR_REASON_DEADLINE_EXCEEDED"


async def test_a_collector_that_is_away_holds_up_nothing(nodes: Nodes, tmp_path: Path) -> None:
    await start_all(nodes, f"unix:{tmp_path / 'nobody'}")
    await nodes.a.phaul("migrate", "clock", "--to", nodes.b.address, check=True)
    # It gives up after 3 seconds; kill_phauld waits no longer than END_SECONDS.
    assert tuple(await asyncio.gather(nodes.a.kill_phauld(15), nodes.b.kill_phauld(15))) == (0, 0)
