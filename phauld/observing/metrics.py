"""Prometheus metrics of this phauld. Counts begin at its start; gauges are read when they are asked for.

No label has a value that another node makes up: a peer cannot make the number of time series grow.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from google.protobuf.duration_pb2 import Duration
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.outcomes import outcome_of
from phaul_client.status import reason_of
from phauld import session
from phauld.destination.incoming import Session
from phauld.node import Node
from phauld.observer import Observer
from phauld.trees.workload_records import Workload

PAUSE_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
STEP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
DURATION_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)
ROUND_BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 31)
_PHASES: Final = tuple(types_pb2.MigrationPhase.keys())[1:]
_REASONS: Final = frozenset(types_pb2.ErrorReason.keys())
_RESTART_RESULTS: Final = ("started", "failed")
_WORKLOAD_STATES: Final = ("running", "arriving", "restarting", "exited", "moved", "lost")
OVER: Final = ("DONE", "REFUSED", "ROLLED_BACK", "CANCELLED")


class Metrics(Observer, Collector):
    """Counts what ends, and reads from the two services what goes on: see `watch`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._outgoing: Callable[[], Iterable[Migration]] = tuple
        self._incoming: Callable[[], Iterable[Session]] = tuple
        self._workloads: Callable[[], Iterable[Workload]] = tuple
        self._sent_bytes = 0  # by migrations that are over
        self._received_bytes = 0
        # One time series more for each counter, of which nobody makes use.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._pause = Histogram(
            "phaul_migration_pause_seconds",
            "How long the tree stood still, of migrations from here that moved.",
            ["mode"],
            buckets=PAUSE_BUCKETS,
            registry=self.registry,
        )
        self._duration = Histogram(
            "phaul_migration_duration_seconds",
            "From start to end, of migrations from here.",
            ["outcome"],
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self._rounds = Histogram(
            "phaul_migration_rounds",
            "Rounds with the last dump, of migrations from here that moved.",
            ["mode"],
            buckets=ROUND_BUCKETS,
            registry=self.registry,
        )
        self._phase = Histogram(
            "phaul_migration_phase_seconds",
            "How long migrations from here were in a phase.",
            ["phase"],
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self._step = Histogram(
            "phaul_freeze_step_seconds",
            "Steps of the freeze that this node did as a source.",
            ["step"],
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._ended = Counter(
            "phaul_migrations_ended",
            "Migrations from here that are over.",
            ["outcome", "reason"],
            registry=self.registry,
        )
        self._sessions_ended = Counter(
            "phaul_sessions_ended", "Migrations to here that are over.", ["outcome", "reason"], registry=self.registry
        )
        self._calls_refused = Counter(
            "phaul_calls_refused", "Calls to here that were refused or failed.", ["reason"], registry=self.registry
        )
        self._restarts = Counter(
            "phaul_workload_restarts",
            "Workloads that had ended and were started again here, as their policy says.",
            ["result"],
            registry=self.registry,
        )
        for result in _RESTART_RESULTS:
            self._restarts.labels(result)
        for reason in ("TOO_MANY_MIGRATIONS", "UNAUTHORIZED"):
            self._calls_refused.labels(reason)
        for outcome in ("moved", "rolled-back", "refused", "cancelled", "failed"):
            self._duration.labels(outcome)
        self._ended.labels("moved", "")
        self._sessions_ended.labels("running", "")
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def watch(
        self,
        outgoing: Callable[[], Iterable[Migration]],
        incoming: Callable[[], Iterable[Session]],
        workloads: Callable[[], Iterable[Workload]],
    ) -> None:
        """Where what goes on is read from, at every answer."""
        self._outgoing, self._incoming, self._workloads = outgoing, incoming, workloads

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def phase_left(self, migration: Migration, seconds: float) -> None:
        self._phase.labels(_phase(migration)).observe(seconds)

    def migration_ended(self, migration: Migration) -> None:
        outcome = str(outcome_of(migration) or "failed")
        reason = types_pb2.ErrorReason.Name(migration.error.reason) if migration.HasField("error") else ""
        self._ended.labels(outcome, reason.removeprefix("ERROR_REASON_")).inc()
        self._duration.labels(outcome).observe(_seconds(migration.total))
        self._sent_bytes += migration.bytes_sent
        if outcome == "moved":
            mode = types_pb2.Mode.Name(migration.mode).removeprefix("MODE_").lower().replace("_", "-")
            if migration.HasField("pause"):
                self._pause.labels(mode).observe(_seconds(migration.pause))
            self._rounds.labels(mode).observe(len(migration.rounds))
        for step in migration.timeline:
            if step.node_name == self._node.name and step.HasField("end"):
                self._step.labels(step.name).observe(_seconds(step.end) - _seconds(step.start))

    def session_ended(self, session: Session) -> None:
        reason = reason_of(session.failure) if session.failure is not None else ""
        self._sessions_ended.labels(session.phase.lower(), reason).inc()
        self._received_bytes += session.bytes_received

    def call_refused(self, reason: str) -> None:
        self._calls_refused.labels(reason if f"ERROR_REASON_{reason}" in _REASONS else "INTERNAL").inc()

    def workload_restarted(self, *, failed: bool) -> None:
        self._restarts.labels("failed" if failed else "started").inc()

    def describe(self) -> list[Metric]:
        return []  # what goes on cannot be read yet when this is registered

    def collect(self) -> Iterator[Metric]:
        info = self._node.info()
        yield InfoMetricFamily(
            "phaul_node",
            "This node.",
            {
                "node_name": info.node_name,
                "node_id": info.node_id,
                "version": info.version,
                "kernel": info.kernel_release,
                "architecture": info.architecture,
                "criu": info.criu.version_text,
            },
        )
        migrations, sessions = list(self._outgoing()), list(self._incoming())
        under_way = [each for each in migrations if not each.HasField("finished_at")]
        phases = Tally(map(_phase, under_way))
        gauge = GaugeMetricFamily("phaul_migrations", "Migrations from here that are not over.", labels=["phase"])
        for name in (each.removeprefix("MIGRATION_PHASE_") for each in _PHASES):
            if name not in OVER:
                gauge.add_metric([name], phases[name])
        yield gauge
        yield _gauge(
            "phaul_migrations_in_doubt", "Whose outcome is not known.", sum(each.in_doubt for each in under_way)
        )
        yield _gauge("phaul_migrations_held", "That wait for an operator or for their destination.", phases["HELD"])
        yield _gauge("phaul_migrations_limit", "Migrations from here at a time.", self._node.outgoing_limit)
        sent = self._sent_bytes + sum(each.bytes_sent for each in under_way)
        yield _counter("phaul_sent_bytes", "Pages and images that were sent.", sent)
        received = Tally(each.phase for each in sessions)
        gauge = GaugeMetricFamily("phaul_sessions", "Migrations to here that are not over.", labels=["phase"])
        for phase in session.Phase:
            if phase not in (session.Phase.ABSENT, session.Phase.ABORTED):
                gauge.add_metric([phase], received[phase])
        yield gauge
        yield _gauge("phaul_sessions_limit", "Migrations to here at a time.", self._node.incoming_limit)
        got = self._received_bytes + sum(each.bytes_received for each in sessions)
        yield _counter("phaul_received_bytes", "Pages and images that arrived in complete rounds.", got)
        states = Tally(each.shown_state for each in self._workloads())
        gauge = GaugeMetricFamily(
            "phaul_workloads", "Workloads of this node, as phaul ps shows them.", labels=["state"]
        )
        for state in _WORKLOAD_STATES:
            gauge.add_metric([state], states[state])
        yield gauge
        room = info.capacity
        yield _gauge("phaul_memory_available_bytes", "Memory for what comes.", room.memory_available_bytes)
        yield _gauge("phaul_images_free_bytes", "Room in images_dir.", room.images_free_bytes)


def _phase(migration: Migration) -> str:
    return types_pb2.MigrationPhase.Name(migration.phase).removeprefix("MIGRATION_PHASE_")


def _seconds(message: Duration) -> float:
    return message.ToNanoseconds() / 1e9


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)
