"""OpenTelemetry traces of migrations, over both daemons: one trace a migration, W3C traceparent in gRPC's metadata.

It is imported only if `otlp_endpoint` is set. The spans: the migration, its phases, the steps of its freeze, the calls
to the destination, and there each call with its steps. A collector that is away costs spans, and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import grpc

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.errors import InvalidRequest
from phauld.node import Node
from phauld.observer import Observer
from phauld.version import phaul_version

try:
    from opentelemetry import propagate, trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
except ImportError as exc:
    raise InvalidRequest(
        f"otlp_endpoint is set, but {exc.name} is not installed", remedy="pip install 'phaul[otel]'"
    ) from exc

FLUSH_SECONDS: Final = 3.0
EXPORT_SECONDS: Final = 2
_NOT_TOLD: Final = ("RenewLease",)  # again and again, and about nothing


class Tracing(Observer):
    """Traces of one phauld, until `close`."""

    def __init__(self, node: Node, endpoint: str) -> None:
        resource = Resource.create(
            {
                "service.name": "phauld",
                "service.version": phaul_version(),
                "service.instance.id": node.node_id,
                "host.name": node.name,
            }
        )
        self._node = node
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        insecure = None if endpoint.startswith("https:") else True
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("phauld")
        self._spans: dict[str, trace.Span] = {}
        self._frozen_at: dict[str, int] = {}  # nanoseconds of Unix time

    async def close(self) -> None:
        """Send what is left, but do not wait long for a collector that does not answer."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, FLUSH_SECONDS)

    def migration_started(self, migration: Migration) -> None:
        attributes: dict[str, str | int] = {
            "phaul.migration_id": migration.migration_id,
            "phaul.workload": migration.workload,
            "phaul.destination": migration.destination_address,
            "process.pid": migration.pid,
        }
        self._spans[migration.migration_id] = self._tracer.start_span("migration", attributes=attributes)

    def phase_left(self, migration: Migration, seconds: float) -> None:
        span = self._spans.get(migration.migration_id)
        if span is None:
            return
        name = types_pb2.MigrationPhase.Name(migration.phase).removeprefix("MIGRATION_PHASE_").lower()
        end = time.time_ns()
        start = end - round(seconds * 1e9)
        if name == "freezing":
            self._frozen_at[migration.migration_id] = start
        self._child(span, name.replace("_", "-"), start, end)

    def migration_ended(self, migration: Migration) -> None:
        span = self._spans.pop(migration.migration_id, None)
        frozen_at = self._frozen_at.pop(migration.migration_id, None)
        if span is None:
            return
        own = [step for step in migration.timeline if step.node_name == self._node.name]
        if frozen_at is not None:
            self._add_steps(span, own, frozen_at)
        span.set_attribute("phaul.mode", types_pb2.Mode.Name(migration.mode))
        span.set_attribute("phaul.rounds", len(migration.rounds))
        span.set_attribute("phaul.bytes", migration.bytes_sent)
        span.set_attribute("phaul.pause_ms", migration.pause.ToNanoseconds() / 1e6)
        if migration.HasField("error"):
            span.set_attribute("error.type", types_pb2.ErrorReason.Name(migration.error.reason))
            span.set_status(trace.StatusCode.ERROR, migration.error.message)
        span.end()

    def client_interceptors(self, migration_id: str) -> Sequence[grpc.aio.ClientInterceptor]:
        return _OneCalls(self, migration_id), _StreamCalls(self, migration_id)

    def server_interceptors(self) -> Sequence[grpc.aio.ServerInterceptor]:
        return (_Served(self),)

    def _child(self, parent: trace.Span, name: str, start: int, end: int) -> None:
        self._tracer.start_span(name, trace.set_span_in_context(parent), start_time=start).end(end)

    def _add_steps(self, parent: trace.Span, steps: Iterable[types_pb2.TimelineStep], origin: int) -> None:
        for step in steps:
            if step.HasField("end"):
                begin, end = step.start.ToNanoseconds(), step.end.ToNanoseconds()
                self._child(parent, step.name, origin + begin, origin + end)

    async def call(self, migration_id: str, go_on: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        """Make a call of a migration, with its span, and tell the other side of it."""
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        parent = self._spans.get(migration_id)
        if parent is None or method.endswith(_NOT_TOLD):
            return await go_on(details, request)
        with self._tracer.start_as_current_span(
            method.lstrip("/"), trace.set_span_in_context(parent), kind=trace.SpanKind.CLIENT
        ) as span:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            metadata = grpc.aio.Metadata(*(details.metadata or ()), *carrier.items())
            call = await go_on(details._replace(metadata=metadata), request)
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                span.set_status(trace.StatusCode.ERROR, code.name)
        return call

    async def serve(self, method: str, headers: dict[str, str], behaviour: Callable[[], Awaitable[Any]]) -> Any:
        """Answer a call that came with a trace; what is begun in it belongs to that trace."""
        with self._tracer.start_as_current_span(
            method.lstrip("/"), propagate.extract(headers), kind=trace.SpanKind.SERVER
        ) as span:
            arrival = time.time_ns()
            answer = await behaviour()
            self._add_steps(span, getattr(answer, "timeline", ()), arrival)
        return answer


class _Calls:
    """Of one migration."""

    def __init__(self, tracing: Tracing, migration_id: str) -> None:
        self._tracing = tracing
        self._migration_id = migration_id


class _OneCalls(_Calls, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._tracing.call(self._migration_id, continuation, client_call_details, request)


class _StreamCalls(_Calls, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._tracing.call(self._migration_id, continuation, client_call_details, request_iterator)


class _Served(grpc.aio.ServerInterceptor):
    """Calls that come without a trace are answered as if there were no tracing."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        headers = {
            key: value for key, value in handler_call_details.invocation_metadata or () if key.startswith("trace")
        }
        method = handler_call_details.method
        if handler is None or "traceparent" not in headers or not method.startswith("/phaul."):
            return handler

        def traced(behaviour: Any) -> Any:
            async def answer(request: Any, context: Any) -> Any:
                return await self._tracing.serve(method, headers, lambda: behaviour(request, context))

            return answer

        made = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(traced(handler.unary_unary), *made)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(traced(handler.stream_unary), *made)
        return handler
