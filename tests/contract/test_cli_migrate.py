"""`phaul migrate`, `status`, `cancel`, `resolve` as child processes against a scripted daemon."""

import asyncio
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.errors import PhaulError
from tests.contract.cli_daemon import Cli, ended, interrupt_when, scripted_daemon, snapshot, too_late

MIGRATE = ("migrate", "redis", "--to", "10.0.0.2")


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    async with scripted_daemon(tmp_path) as made:
        yield made


def moved() -> list[migrations_pb2.Migration]:
    pause = Duration(nanos=143_000_000)
    one = types_pb2.RoundStats(index=1, bytes_sent=1 << 20)
    return [
        snapshot("PREFLIGHT"),
        snapshot("ITERATING", rounds=[one], bytes_sent=1 << 20, bytes_total=4 << 20, rate_bytes_per_second=1 << 20),
        snapshot("FREEZING", rounds=[one], bytes_sent=2 << 20),
        snapshot("DONE", rounds=[one, one], bytes_sent=4 << 20, pause=pause, destination_pid=99),
    ]


async def test_a_move_for_people(cli: Cli) -> None:
    cli.script.snapshots = moved()
    done = await cli.run(*MIGRATE, "--downtime", "100ms", "--deadline", "5m", "--bandwidth", "1Gbit", "--mode", "auto")
    assert done.code == 0
    assert done.out.splitlines()[:2] == ["moved redis to 10.0.0.2:7707 as pid 99", "  pause     143 ms"]
    assert done.err.splitlines() == [
        "phaul: preflight",
        "phaul: iterating, 1 round, 1.0 MiB of 4.0 MiB, 1.0 MiB/s",
        "phaul: freezing, 1 round, 2.0 MiB",
        "phaul: done, 2 rounds, 4.0 MiB, pause 143 ms",
    ]
    (request,) = cli.script.of(migrations_pb2.StartMigrationRequest)
    assert (request.workload, request.destination) == ("redis", "10.0.0.2:7707")
    assert request.options.downtime_goal.ToMilliseconds() == 100
    assert request.options.deadline.ToSeconds() == 300
    assert request.options.bandwidth_limit_bytes_per_second == 125_000_000
    assert request.options.mode == types_pb2.MODE_AUTO
    assert not request.options.HasField("shell_job")


async def test_a_move_for_programs(cli: Cli) -> None:
    cli.script.snapshots = moved()
    done = await cli.run("migrate", "4242", "--to", "b", "--json", "--no-shell-job")
    assert (done.code, done.err) == (0, "")
    assert [each["event"] for each in done.lines] == ["progress"] * 5 + ["report"]
    report = done.lines[-1]
    assert (report["outcome"], report["pause_ms"], report["destination_pid"]) == ("moved", 143, 99)
    (request,) = cli.script.of(migrations_pb2.StartMigrationRequest)
    assert (request.pid, request.destination) == (4242, "b:7707")
    assert request.options.HasField("shell_job")
    quiet = await cli.run("--json", *MIGRATE, "-q")
    assert [each["event"] for each in quiet.lines] == ["report"]


async def test_detach(cli: Cli) -> None:
    done = await cli.run(*MIGRATE, "--detach")
    assert (done.code, done.out, done.err) == (0, "3f2a9c0187\n", "")
    assert cli.script.of(migrations_pb2.WatchMigrationRequest) == []


FAILURE = types_pb2.Failure(
    reason=types_pb2.ERROR_REASON_RESTORE_FAILED, message="no file /x", remedy="copy it", log_tail=["Error: /x"]
)
PROBLEM = types_pb2.Problem(code="tty", severity=types_pb2.SEVERITY_ERROR, message="a terminal", remedy="--shell-job")


@pytest.mark.parametrize(
    ("last", "code", "outcome", "error"),
    [
        (
            snapshot("ROLLED_BACK", error=FAILURE),
            4,
            "rolled-back",
            "no file /x\n  criu: Error: /x\n  remedy: copy it\n",
        ),
        (snapshot("REFUSED", problems=[PROBLEM]), 3, "refused", "a terminal\n  remedy: --shell-job\n"),
        (snapshot("CANCELLED"), 4, "cancelled", "cancelled on request\n"),
        (snapshot("HELD", in_doubt=True), 5, "in-doubt", "the destination does not answer: nobody knows whether"),
        (snapshot("FAILED", error=types_pb2.Failure(message="killed")), 1, "failed", "killed\n"),
    ],
)
async def test_other_endings(cli: Cli, last: migrations_pb2.Migration, code: int, outcome: str, error: str) -> None:
    cli.script.snapshots = [snapshot("ITERATING"), last]
    people, program = await asyncio.gather(cli.run(*MIGRATE, "-q"), cli.run(*MIGRATE, "--json"))
    assert (people.code, program.code) == (code, code)
    assert people.err.startswith(f"phaul: error: {error}")
    report = program.lines[-1]
    assert (report["event"], report["outcome"]) == ("report", outcome)
    assert error.startswith(report["error"]["message"][:20])
    assert program.err == ""


async def test_refused_at_once(cli: Cli) -> None:
    cli.script.start_error = PhaulError("no process 999999", reason="PID_NOT_FOUND", remedy="ps -e lists them")
    people = await cli.run("migrate", "999999", "--to", "b")
    assert people.code == 3
    assert people.out == "refused: nothing was touched\n"
    assert people.err == "phaul: error: no process 999999\n  remedy: ps -e lists them\n"
    program = await cli.run("migrate", "999999", "--to", "b", "--json", "--detach")
    (report,) = program.lines
    assert (program.code, report["event"], report["outcome"], report["source_pid"]) == (3, "report", "refused", 999999)
    assert report["error"]["reason"] == "PID_NOT_FOUND"


async def test_a_daemon_that_restarts_meanwhile(cli: Cli) -> None:
    cli.script.snapshots = moved()
    cli.script.break_off_after = 2
    done = await cli.run(*MIGRATE)
    assert done.code == 0
    assert "phaul: phauld is away; trying again" in done.err.splitlines()
    assert len(cli.script.of(migrations_pb2.WatchMigrationRequest)) == 2


async def test_ctrl_c_cancels_and_waits(cli: Cli) -> None:
    cli.script.snapshots, cli.script.hang = [snapshot("ITERATING")], True
    process = await cli.start(*MIGRATE)
    await interrupt_when(process, "iterating")
    done = await ended(process)
    assert done.code == 4
    assert done.err.startswith("phaul: cancelling, and waiting for how it ends; Ctrl-C again leaves")
    assert done.out.startswith("cancelled: redis runs on here")
    (request,) = cli.script.of(migrations_pb2.CancelMigrationRequest)
    assert (request.migration_id, request.reason) == ("3f2a9c0187", "Ctrl-C")


async def test_a_second_ctrl_c_leaves_it_running(cli: Cli) -> None:
    cli.script.snapshots, cli.script.hang, cli.script.cancel_error = [snapshot("COMMITTED")], True, too_late()
    process = await cli.start(*MIGRATE)
    await interrupt_when(process, "committed")
    await interrupt_when(process, "not cancelled: it is too late")
    done = await ended(process)
    assert (done.code, done.out) == (130, "left running: phaul status 3f2a9c0187\n")


async def test_sigterm_leaves_it_running(cli: Cli) -> None:
    cli.script.snapshots, cli.script.hang = [snapshot("ITERATING")], True
    process = await cli.start(*MIGRATE)
    assert process.stderr is not None
    while b"iterating" not in await process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert (await ended(process)).code == -signal.SIGTERM
    assert cli.script.of(migrations_pb2.CancelMigrationRequest) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("migrate", "redis"), "Missing option '--to'"),
        (("migrate", "redis", "--to", "b:x"), "is not HOST"),
        (("migrate", "1", "--to", "b"), "no PID that can be moved"),
        ((*MIGRATE, "--mode", "teleport"), "'teleport' is not one of"),
        ((*MIGRATE, "--downtime", "300"), "did you mean 300s or 300ms?"),
        ((*MIGRATE, "--bandwidth", "fast"), "is no rate"),
        ((*MIGRATE, "--max-rounds", "0"), "0 is not in the range"),
        ((*MIGRATE, "--nonsense"), "No such option"),
        (("resolve", "3f2a"), "say --kill or --resume"),
        (("resolve", "3f2a", "--kill", "--resume"), "both --kill and --resume were given"),
        (("migrate", "web", "--to", "b", "--move-address", "foo"), "'foo' is not ADDRESS[/LENGTH][@INTERFACE]"),
        (("nonsense",), "No such command"),
    ],
)
async def test_usage_errors(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    people, program = await asyncio.gather(cli.run(*arguments), cli.run("--json", *arguments))
    assert (people.code, program.code) == (2, 2)
    assert people.err.startswith("phaul: error: ")
    assert says in people.err
    assert "--help" in people.err.splitlines()[1]
    assert says in program.lines[0]["error"]["message"]
    assert cli.script.asked == []


# status, cancel, resolve


async def test_status(cli: Cli) -> None:
    cli.script.history = [snapshot("ITERATING", "3f2a9c0187"), snapshot("DONE", "77aa01", mode=types_pb2.MODE_HYBRID)]
    people, program = await asyncio.gather(cli.run("status"), cli.run("status", "--json"))
    assert [line.split()[:5] for line in people.out.splitlines()] == [
        ["ID", "PHASE", "WHAT", "TO", "MODE"],
        ["3f2a9c01", "iterating", "redis", "10.0.0.2:7707", "-"],
        ["77aa01", "done", "redis", "10.0.0.2:7707", "hybrid"],
    ]
    assert [each["outcome"] for each in program.lines[0]["migrations"]] == [None, "moved"]


async def test_status_of_one_by_the_beginning_of_its_id(cli: Cli) -> None:
    cli.script.history = [snapshot("DONE", f"{number}abc") for number in range(5)]
    done = await cli.run("status", "4a", "--json")
    assert done.lines[0]["migration_id"] == "4abc"
    assert len(cli.script.of(migrations_pb2.ListMigrationsRequest)) == 3  # pages of two
    text = await cli.run("status", "4abc")
    assert text.out.startswith("moved redis")
    assert text.code == 0


async def test_a_workload_stands_for_its_last_migration_but_not_to_resolve(cli: Cli) -> None:
    cli.script.history = [
        snapshot("ITERATING", "3f2a", workload="db"),
        snapshot("DONE", "77aa", workload="db"),
        snapshot("DONE", "bd01", workload="77"),
    ]
    newest, an_id, none = await asyncio.gather(
        *(cli.run("status", word, "--json") for word in ("db", "77", "d")),
    )
    assert (newest.lines[0]["migration_id"], an_id.lines[0]["migration_id"]) == ("3f2a", "77aa")
    assert none.code == 1
    await cli.run("cancel", "db")
    (request,) = cli.script.of(migrations_pb2.CancelMigrationRequest)
    assert request.migration_id == "3f2a"
    assert (await cli.run("resolve", "db", "--kill")).code == 1
    assert cli.script.of(migrations_pb2.ResolveRequest) == []


async def test_status_of_none_or_several(cli: Cli) -> None:
    cli.script.history = [snapshot("DONE", "abc"), snapshot("DONE", "abd")]
    none, several = await asyncio.gather(cli.run("status", "x"), cli.run("status", "ab"))
    assert (none.code, none.err) == (1, "phaul: error: no migration x\n  remedy: phaul status lists them\n")
    assert several.code == 2
    assert several.err == "phaul: error: 'ab' is the beginning of 2 migrations\n  remedy: say more of abc, abd\n"


async def test_status_of_a_failed_one_says_why(cli: Cli) -> None:
    cli.script.history = [snapshot("ROLLED_BACK", "abc", error=FAILURE)]
    done = await cli.run("status", "abc")
    assert done.code == 0
    assert done.err.startswith("phaul: error: no file /x\n")


async def test_cancel(cli: Cli) -> None:
    cli.script.history = [snapshot("ITERATING", "abc")]
    done = await cli.run("cancel", "ab", "--reason", "wrong node")
    assert (done.code, done.out.splitlines()[0]) == (0, "cancelled: redis runs on here")
    (request,) = cli.script.of(migrations_pb2.CancelMigrationRequest)
    assert (request.migration_id, request.reason) == ("abc", "wrong node")
    cli.script.cancel_error = too_late()
    late = await cli.run("cancel", "ab", "--json")
    assert (late.code, late.lines[0]["error"]["reason"]) == (1, "WRONG_PHASE")


async def test_cancel_what_has_moved_meanwhile(cli: Cli) -> None:
    cli.script.history = [snapshot("ITERATING", "abc")]
    cli.script.cancel_answer = snapshot("DONE", "abc")
    done = await cli.run("cancel", "abc")
    assert (done.code, done.err) == (1, "phaul: error: too late to cancel: moved redis to 10.0.0.2:7707\n")


@pytest.mark.parametrize(("flag", "resolution", "outcome"), [("--kill", 1, "moved"), ("--resume", 2, "rolled-back")])
async def test_resolve(cli: Cli, flag: str, resolution: int, outcome: str) -> None:
    cli.script.history = [snapshot("HELD", "abc", in_doubt=True)]
    done = await cli.run("resolve", "abc", flag, "--reason", "burnt down", "--json")
    assert (done.code, done.lines[0]["outcome"]) == (0, outcome)
    (request,) = cli.script.of(migrations_pb2.ResolveRequest)
    assert (request.resolution, request.reason) == (resolution, "burnt down")


async def test_live_progress_on_a_terminal(cli: Cli) -> None:
    cli.script.snapshots = moved()
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "phaul_client.cli", "--daemon", cli.address, *MIGRATE),
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    out, _ = await process.communicate()
    os.set_blocking(ours, False)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.returncode == 0
    assert out.startswith(b"moved redis")
    assert "redis → 10.0.0.2:7707" in drawn
    assert "\x1b[" in drawn
