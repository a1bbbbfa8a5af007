"""Between plain values and messages; and destinations as people write them."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.v1 import types_pb2
from phaul_client import commit
from phaul_client.client import RoundEnded
from phaul_client.errors import InvalidRequest, PeerRefused
from phaul_client.policy import DowntimePolicy, Finish, Iterate, IterStats, Limits
from phauld import convert, session
from phauld.source.migrations_service import with_port
from phauld.trees.restart_policy import Restart, When
from phauld.trees.workload_spec import CgroupLimits, WorkloadSpec


@given(st.floats(0, 1e9))
def test_durations_and_times_are_kept_to_the_microsecond(seconds: float) -> None:
    assert convert.seconds_of(convert.duration(seconds)) == pytest.approx(seconds, abs=1e-6)
    assert convert.timestamp(seconds).ToMicroseconds() == round(seconds * 1e6)


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan, 1e300])
def test_what_has_no_end_is_the_longest_duration(seconds: float) -> None:
    assert abs(convert.seconds_of(convert.duration(seconds))) == convert.MAX_DURATION_SECONDS


@pytest.mark.parametrize("phase", commit.Phase)
def test_every_phase_of_a_migration_has_a_value(phase: commit.Phase) -> None:
    assert types_pb2.MigrationPhase.Name(convert.migration_phase(phase)) == f"MIGRATION_PHASE_{phase}"


@pytest.mark.parametrize("phase", [phase for phase in session.Phase if phase is not session.Phase.ABSENT])
def test_every_phase_of_a_session_has_a_value(phase: session.Phase) -> None:
    assert types_pb2.SessionPhase.Name(convert.session_phase(phase)) == f"SESSION_PHASE_{phase}"


def test_an_absent_session_is_never_told() -> None:
    with pytest.raises(ValueError, match="ABSENT"):
        convert.session_phase(session.Phase.ABSENT)


def test_a_failure_has_the_end_of_the_log_line_by_line() -> None:
    error = PeerRefused("b:1", "no", reason="NO_SPACE", remedy="rm", log_tail="\n".join(map(str, range(100))))
    failure = convert.failure(error)
    assert (failure.reason, failure.message, failure.remedy) == (types_pb2.ERROR_REASON_NO_SPACE, "b:1: no", "rm")
    assert list(failure.log_tail) == [str(number) for number in range(80, 100)]


NUMBERS = st.integers(0, 1 << 40)
TIMES = st.floats(0, 1e6) | st.just(0.0)
STATS = st.builds(
    IterStats,
    started_at_seconds=TIMES,
    duration_seconds=TIMES,
    frozen_seconds=TIMES,
    pages_scanned=NUMBERS,
    pages_written=NUMBERS,
    pages_skipped_parent=NUMBERS,
    bytes_sent=NUMBERS,
    transfer_seconds=TIMES,
)


@given(st.lists(STATS, min_size=1, max_size=5))
def test_any_round_can_be_told(history: list[IterStats]) -> None:
    verdict = DowntimePolicy().decide(tuple(history), Limits())
    forecast = verdict.forecast
    bandwidth = forecast.bandwidth_bytes_per_second if forecast else 0.0
    message = convert.round_message(len(history), RoundEnded(history[-1], verdict), bandwidth)
    assert message.index == len(history)
    assert message.pages_written == history[-1].pages_written
    assert bool(convert.rounds_reason(verdict)) is isinstance(verdict, Finish)


def test_a_round_without_a_forecast_can_be_told() -> None:
    stats = IterStats(
        started_at_seconds=1,
        duration_seconds=2,
        frozen_seconds=0.25,
        pages_scanned=3,
        pages_written=4,
        pages_skipped_parent=5,
        bytes_sent=6,
        transfer_seconds=7,
    )
    verdict = Iterate(forecast=None) if "forecast" in {f.name for f in dataclasses.fields(Iterate)} else Iterate()
    message = convert.round_message(1, RoundEnded(stats, verdict), 0.0)
    assert convert.seconds_of(message.frozen) == 0.25
    assert not message.HasField("expected_pause")


@pytest.mark.parametrize(
    "spec",
    [
        WorkloadSpec(name="web", argv=("sleep", "1")),
        WorkloadSpec(
            name="a.b-c_d", argv=("sh", "-c", "x y"), env={"A": "1", "B": ""}, cwd="/tmp", log_path="/l/a.log"
        ),
        WorkloadSpec(name="moved-1", argv=(), new_pid_namespace=False),
        WorkloadSpec(name="shared", argv=("db",), new_ipc_namespace=True),
        WorkloadSpec(name="db", argv=("db",), user="postgres:ssl", limits={"nofile": 100, "core": 0}),
        WorkloadSpec(name="web", argv=("web",), restart=Restart(when=When.ON_FAILURE, most=5)),
        WorkloadSpec(name="web", argv=("web",), restart=Restart(when=When.ALWAYS)),
        WorkloadSpec(name="web", argv=("web",), cgroup=CgroupLimits(memory_bytes=1 << 40, cpu_millis=1500, pids=7)),
    ],
)
def test_a_workload_keeps_all_that_it_is(spec: WorkloadSpec) -> None:
    message = types_pb2.WorkloadSpec.FromString(convert.workload_message(spec).SerializeToString())
    assert convert.workload_spec(message) == spec
    assert WorkloadSpec.from_json(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize(
    ("restart", "match"),
    [
        (types_pb2.RestartPolicy(mode=99), "restart mode 99 is unknown"),  # type: ignore[arg-type]
        (types_pb2.RestartPolicy(mode=types_pb2.RESTART_MODE_ALWAYS, max_restarts=3), "for on-failure only"),
        (types_pb2.RestartPolicy(max_restarts=3), "for on-failure only"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(restart: types_pb2.RestartPolicy, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        convert.workload_spec(types_pb2.WorkloadSpec(name="web", argv=["web"], restart=restart))


def test_a_record_of_an_older_phauld_is_read() -> None:
    old = {"name": "web", "argv": ["web"], "env": {}, "cwd": "/", "log_path": "", "new_pid_namespace": True}
    assert WorkloadSpec.from_json(old) == WorkloadSpec(name="web", argv=("web",))


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "../a", "a b", "a\n", "a" * 64, "ä"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a name"):
        convert.workload_spec(types_pb2.WorkloadSpec(name=name, argv=["true"]))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("node-b", "node-b:7707"),
        ("node-b:1", "node-b:1"),
        ("10.0.0.2", "10.0.0.2:7707"),
        ("10.0.0.2:65535", "10.0.0.2:65535"),
        ("::1", "[::1]:7707"),
        ("fe80::1%eth0", "[fe80::1%eth0]:7707"),
        ("[::1]", "[::1]:7707"),
        ("[::1]:7", "[::1]:7"),
        ("node-b.example.org", "node-b.example.org:7707"),
    ],
)
def test_a_destination_may_go_without_its_port(written: str, meant: str) -> None:
    assert with_port(written) == meant
    assert with_port(meant) == meant


@pytest.mark.parametrize(
    "written",
    [
        *("", ":", ":7707", "node-b:", "node-b:port", "node-b:0", "node-b:65536", "node-b:-1", "node-b:1.5"),
        *("node b", "user@node-b", "http://node-b:7707", "unix:/run/x.sock", "[::1", "::1]", "[::1]x:7", "a:b:c"),
        *("[node-b]:7", "node-b:٣", "node-b/x", "node-b\n"),
    ],
)
def test_what_is_no_destination_is_refused(written: str) -> None:
    with pytest.raises(InvalidRequest, match="is not HOST or HOST:PORT"):
        with_port(written)
