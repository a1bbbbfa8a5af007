"""Outcomes, JSON and text: every ending, every kind of field."""

import json
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import render, render_node
from phaul_client.cli.app import phaul
from phaul_client.cli.errors import error_lines
from phaul_client.cli.json_output import migration_json, progress_json, report_json, to_json, to_line
from phaul_client.cli.outcomes import (
    MEANINGS,
    ExitCode,
    Outcome,
    exit_code_of,
    exit_code_of_error,
    failure_of,
    outcome_of,
)
from phaul_client.cli.text import table
from phaul_client.errors import PhaulError

REPORT_KEYS = {
    *("event", "migration_id", "outcome", "mode", "mode_reason", "restore_mode", "pause_ms", "total_ms", "bytes"),
    *("rounds", "expected_pause_ms", "source_pid", "destination_pid", "destination", "error", "timeline"),
}


def ms(milliseconds: int) -> Duration:
    made = Duration()
    made.FromMilliseconds(milliseconds)
    return made


def moved() -> Migration:
    return Migration(
        migration_id="3f2a9c01",
        phase=types_pb2.MIGRATION_PHASE_DONE,
        pid=4242,
        workload="redis",
        destination_address="10.0.0.2:7707",
        destination=types_pb2.NodeInfo(node_name="node-b"),
        destination_pid=977,
        mode=types_pb2.MODE_PRE_COPY,
        mode_reason="this kernel tracks memory",
        restore_mode=types_pb2.RESTORE_MODE_LAZY,
        rounds=[types_pb2.RoundStats(index=1, bytes_sent=1 << 20, duration=ms(90), expected_pause=ms(200))],
        bytes_sent=3 << 20,
        pause=ms(143),
        expected_pause=ms(150),
        total=ms(2300),
        timeline=[types_pb2.TimelineStep(name="dump", node_name="node-a", start=ms(-2), end=ms(60))],
    )


@pytest.mark.parametrize(
    ("phase", "outcome", "exit_code"),
    [
        ("DONE", Outcome.MOVED, 0),
        ("REFUSED", Outcome.REFUSED, 3),
        ("ROLLED_BACK", Outcome.ROLLED_BACK, 4),
        ("CANCELLED", Outcome.CANCELLED, 4),
        ("HELD", Outcome.IN_DOUBT, 5),
        ("FAILED", Outcome.FAILED, 1),
        *((name, None, 0) for name in ("PREFLIGHT", "ITERATING", "FREEZING", "COMMITTED", "FILLING", "ROLLING_BACK")),
    ],
)
def test_endings(phase: str, outcome: Outcome | None, exit_code: int) -> None:
    migration = Migration(phase=types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}"))
    assert outcome_of(migration) is outcome
    assert exit_code_of(migration) == exit_code
    assert migration_json(migration)["outcome"] == outcome


def test_an_unreachable_destination_is_told_apart_from_a_refusal() -> None:
    unreachable = types_pb2.Failure(reason=types_pb2.ERROR_REASON_PEER_UNREACHABLE)
    assert exit_code_of(Migration(phase=types_pb2.MIGRATION_PHASE_REFUSED, error=unreachable)) == 6
    assert exit_code_of(Migration(phase=types_pb2.MIGRATION_PHASE_ROLLED_BACK, error=unreachable)) == 4


@pytest.mark.parametrize(
    ("reason", "exit_code"),
    [
        ("INVALID_ARGUMENT", 2),
        ("PID_NOT_FOUND", 3),
        ("KERNEL_THREAD", 3),
        ("PREFLIGHT_FAILED", 3),
        ("WORKLOAD_NOT_FOUND", 3),
        ("TOO_MANY_MIGRATIONS", 3),
        ("OUTCOME_UNKNOWN", 5),
        ("PEER_UNREACHABLE", 6),
        ("WRONG_PHASE", 1),
        ("INTERNAL", 1),
        ("SOMETHING_NEW", 1),
    ],
)
def test_exit_codes_of_errors(reason: str, exit_code: int) -> None:
    assert exit_code_of_error(PhaulError("", reason=reason)) == exit_code


def test_every_exit_code_is_in_the_help() -> None:
    assert set(MEANINGS) == set(ExitCode)
    assert phaul.epilog is not None
    for code, meaning in MEANINGS.items():
        assert f"{code:3d}  {meaning}" in phaul.epilog


def test_every_exit_code_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    for code, meaning in MEANINGS.items():
        assert f"| {code} | {meaning} |" in text
    for name in phaul.commands:
        assert f"`phaul {name}" in text


def test_every_command_has_examples_that_name_it() -> None:
    for name, command in phaul.commands.items():
        assert command.epilog is not None
        assert f"{name}" in command.epilog.partition("Examples:")[2], name
        assert {"--json", "--daemon"} <= {option for parameter in command.params for option in parameter.opts}, name


def test_failures() -> None:
    problem = types_pb2.Problem(severity=types_pb2.SEVERITY_ERROR, message="a terminal", remedy="--shell-job")
    refused = failure_of(Migration(phase=types_pb2.MIGRATION_PHASE_REFUSED, problems=[problem]))
    assert refused is not None
    assert (refused.message, refused.remedy) == ("a terminal", "--shell-job")
    held = failure_of(Migration(phase=types_pb2.MIGRATION_PHASE_HELD, migration_id="3f2a"))
    assert held is not None
    assert "phaul resolve" in held.remedy
    assert failure_of(Migration(phase=types_pb2.MIGRATION_PHASE_CANCELLED)) is not None
    assert failure_of(moved()) is None
    assert failure_of(Migration(phase=types_pb2.MIGRATION_PHASE_ITERATING)) is None


def test_report_has_what_was_promised() -> None:
    report = json.loads(to_line(report_json(moved())))
    assert report.keys() >= REPORT_KEYS
    assert (report["event"], report["outcome"], report["mode"], report["restore_mode"]) == (
        "report",
        "moved",
        "pre-copy",
        "lazy",
    )
    assert (report["pause_ms"], report["expected_pause_ms"], report["total_ms"]) == (143, 150, 2300)
    assert (report["bytes"], report["source_pid"], report["destination_pid"]) == (3 << 20, 4242, 977)
    assert (report["destination"], report["error"]) == ("10.0.0.2:7707", None)
    assert report["rounds"][0]["duration_ms"] == 90
    assert report["timeline"] == [{"name": "dump", "node_name": "node-a", "start_ms": -2, "end_ms": 60}]


def test_what_is_not_known_is_null() -> None:
    empty = report_json(Migration())
    for key in ("outcome", "mode", "restore_mode", "pause_ms", "expected_pause_ms", "destination_pid", "error"):
        assert empty[key] is None, key
    assert progress_json(Migration())["pause_ms"] is None


def test_error_of_a_report() -> None:
    failure = types_pb2.Failure(reason=types_pb2.ERROR_REASON_RESTORE_FAILED, message="m", remedy="r", log_tail=["l"])
    report = report_json(Migration(phase=types_pb2.MIGRATION_PHASE_ROLLED_BACK, error=failure))
    assert report["error"] == {"reason": "RESTORE_FAILED", "message": "m", "remedy": "r", "log_tail": ["l"]}


def test_json_of_every_kind_of_field() -> None:
    workload = node_pb2.Workload(
        name="w",
        state=node_pb2.WORKLOAD_STATE_EXITED,
        spec=types_pb2.WorkloadSpec(argv=["a", "b"], env={"B": "2", "A": "1"}),
        exit_status=node_pb2.ExitStatus(exit_code=0),
    )
    workload.started_at.FromSeconds(0)
    made = to_json(workload)
    assert (made["name"], made["state"], made["started_at"]) == ("w", "exited", "1970-01-01T00:00:00Z")
    assert (made["spec"]["argv"], made["spec"]["env"]) == (["a", "b"], {"A": "1", "B": "2"})
    assert (made["spec"]["own_pid_namespace"], made["exit_status"]["exit_code"]) == (None, 0)
    assert made["exit_status"]["signal"] is None
    assert to_json(types_pb2.FileFacts(build_id=b"\xab"))["build_id"] == "ab"
    assert to_json(types_pb2.Failure(reason=types_pb2.ERROR_REASON_NO_SPACE))["reason"] == "NO_SPACE"
    later = Migration.FromString(Migration(mode=types_pb2.MODE_AUTO).SerializeToString().replace(b"\x05", b"\x63"))
    assert to_json(later)["mode"] == "99"


def test_every_message_of_the_api_has_a_json() -> None:
    for file in (types_pb2, node_pb2, migrations_pb2):
        for name in file.DESCRIPTOR.message_types_by_name:
            assert json.loads(to_line(to_json(getattr(file, name)()))) is not None


# Text


def test_table_is_as_wide_as_it_must_be() -> None:
    assert table(("A", "LONG"), [("xxx", "1"), ("y", "")]) == "A    LONG\nxxx  1\ny"


def test_summary_of_a_move() -> None:
    assert render.summary(moved()).splitlines() == [
        "moved redis to node-b as pid 977",
        "  pause     143 ms (expected 150 ms)",
        "  total     2.30 s, 3.0 MiB in 1 round",
        "  mode      pre-copy: this kernel tracks memory",
        "  restore   lazy",
        "  id        3f2a9c01",
    ]


@pytest.mark.parametrize(
    ("phase", "headline"),
    [
        ("ROLLED_BACK", "rolled back: process 7 (sh) runs on here"),
        ("REFUSED", "refused: nothing was touched"),
        ("CANCELLED", "cancelled: process 7 (sh) runs on here"),
        ("HELD", "in doubt: process 7 (sh) is stopped here until it is known whether it runs at b:7707"),
        ("FAILED", "failed: process 7 (sh) runs nowhere"),
        ("ITERATING", "moving process 7 (sh) to b:7707: iterating"),
    ],
)
def test_summary_of_every_ending(phase: str, headline: str) -> None:
    number = types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")
    text = render.summary(Migration(phase=number, pid=7, process_name="sh", destination_address="b:7707"))
    assert text.splitlines()[0] == headline


def test_progress_line() -> None:
    migration = Migration(
        phase=types_pb2.MIGRATION_PHASE_ITERATING,
        rounds=[types_pb2.RoundStats(), types_pb2.RoundStats()],
        bytes_sent=12 << 20,
        bytes_total=90 << 20,
        rate_bytes_per_second=1 << 30,
        expected_pause=ms(210),
    )
    assert render.progress_line(migration) == (
        "iterating, 2 rounds, 12.0 MiB of 90.0 MiB, 1.0 GiB/s, expected pause 210 ms"
    )
    migration.pause.CopyFrom(ms(143))
    assert render.progress_line(migration).endswith("pause 143 ms")
    assert render.progress_line(Migration()) == "-"


def test_details_name_everything() -> None:
    migration = moved()
    migration.problems.add(
        code="tcp-established", severity=types_pb2.SEVERITY_WARNING, message="m", remedy="--tcp keep"
    )
    text = render.migration_details(migration)
    for part in ("ROUND", "STEP", "dump", "-2.0 ms", "60 ms", "warning tcp-established: m", "remedy: --tcp keep"):
        assert part in text


def test_short_ids_tell_each_other_apart() -> None:
    assert render.short_ids(["0123456789", "0123456780", "x"]) == ["0123456789", "0123456780", "x"]
    assert render.short_ids(["aaaaaaaaaaaa", "bbbbbbbbbbbb"]) == ["aaaaaaaa", "bbbbbbbb"]
    assert render.short_ids(["job-1", "job-1", "job-12"]) == ["job-1", "job-1", "job-12"]


def test_workload_states() -> None:
    exited = node_pb2.Workload(
        state=node_pb2.WORKLOAD_STATE_EXITED, exit_status=node_pb2.ExitStatus(signal=9), name="a", started_at=None
    )
    gone = node_pb2.Workload(state=node_pb2.WORKLOAD_STATE_MOVED, moved_to="b:1", name="b")
    running = node_pb2.Workload(state=node_pb2.WORKLOAD_STATE_RUNNING, pid=7, name="c")
    running.started_at.FromSeconds(1000)
    running.spec.argv.extend(["sh", "-c", "x y"])
    lines = render.workload_table([exited, gone, running], 1061.0).splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "PID", "STATE", "SINCE", "COMMAND"],
        ["a", "-", "exited", "(signal", "9)", "-"],
        ["b", "-", "moved", "to", "b:1", "-"],
        ["c", "7", "running", "61s", "sh", "-c", "'x", "y'"],
    ]


def test_restarts_are_counted_where_there_may_be_some() -> None:
    restart = types_pb2.RestartPolicy(mode=types_pb2.RESTART_MODE_ALWAYS)
    waits = node_pb2.Workload(
        state=node_pb2.WORKLOAD_STATE_RESTARTING,
        exit_status=node_pb2.ExitStatus(exit_code=3),
        name="a",
        restarts=4,
        spec=types_pb2.WorkloadSpec(argv=["web"], restart=restart),
    )
    waits.restart_at.FromSeconds(1073)
    failed = node_pb2.Workload(
        state=node_pb2.WORKLOAD_STATE_EXITED,
        exit_status=node_pb2.ExitStatus(exit_code=127),
        start_error="'web' is gone",
        name="b",
    )
    running = node_pb2.Workload(state=node_pb2.WORKLOAD_STATE_RUNNING, pid=7, name="c")
    lines = render.workload_table([waits, failed, running], 1061.0).splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "PID", "STATE", "SINCE", "RESTARTS", "COMMAND"],
        ["a", "-", "restarting", "in", "12s", "(status", "3)", "-", "4", "web"],
        ["b", "-", "exited", "(status", "127:", "'web'", "is", "gone)", "-", "0"],
        ["c", "7", "running", "-", "0"],
    ]


def test_preflight_and_checks() -> None:
    problem = types_pb2.Problem(
        code="tty",
        severity=types_pb2.SEVERITY_ERROR,
        subject="/dev/pts/0",
        message="a terminal",
        remedy="r",
        node_name="a",
    )
    answer = node_pb2.PreflightResponse(problems=[problem], destination=types_pb2.NodeInfo(node_name="node-b"))
    assert render_node.preflight(answer, "4242", "b:7707").splitlines() == [
        "4242 cannot move to node-b",
        "ERROR   tty [a]: /dev/pts/0: a terminal",
        "          remedy: r",
    ]
    checks = [
        node_pb2.Check(code="criu", ok=True, message="4.1.1"),
        node_pb2.Check(code="pipe", severity=types_pb2.SEVERITY_WARNING, message="small", remedy="sysctl"),
    ]
    lines = render_node.checks(checks).splitlines()
    assert [line.split() for line in lines] == [
        ["ok", "criu", "4.1.1"],
        ["warning", "pipe", "small"],
        ["remedy:", "sysctl"],
    ]


def test_node_info_without_criu_says_what_to_do() -> None:
    text = render_node.node_info(types_pb2.NodeInfo(node_name="node-a", version="0.1.0", insecure=True))
    assert text.startswith("node-a\n")
    assert "0.1.0 (without TLS)" in text
    assert "none: run phaul doctor" in text


def test_errors_are_one_line_each() -> None:
    assert error_lines("a\n b", "do\nthis", "1\n2\n3\n4\n5\n6") == [
        "phaul: error: a b",
        *(f"  criu: {number}" for number in range(2, 7)),
        "  remedy: do this",
    ]
    assert error_lines("a", "", "") == ["phaul: error: a"]
