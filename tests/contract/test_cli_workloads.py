"""`phaul run`, `ps`, `wait`, `stop`, `rm`, `logs` as child processes against a scripted daemon."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phaul.v1 import node_pb2
from tests.contract.cli_daemon import Cli, scripted_daemon, snapshot


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    async with scripted_daemon(tmp_path) as made:
        yield made


def add(cli: Cli, name: str, state: str = "RUNNING", **fields: object) -> node_pb2.Workload:
    number = node_pb2.WorkloadState.Value(f"WORKLOAD_STATE_{state}")
    made = node_pb2.Workload(name=name, state=number, **fields)  # type: ignore[arg-type]
    cli.script.workloads[name] = made
    return made


async def test_run_makes_a_name_up(cli: Cli) -> None:
    add(cli, "sleep", "EXITED")
    done = await cli.run("run", "--env", "A=b", "--no-pid-namespace", "--", "sleep", "--json", "9")
    assert (done.code, done.out, done.err) == (0, "sleep-2 77\n", "")
    (request,) = cli.script.of(node_pb2.RunWorkloadRequest)
    assert list(request.spec.argv) == ["sleep", "--json", "9"]
    assert request.spec.env["A"] == "b"
    assert request.spec.env["PATH"] == os.environ["PATH"]
    assert (request.spec.own_pid_namespace, request.spec.working_directory) == (False, "/")
    assert request.spec.own_ipc_namespace


async def test_run_in_the_nodes_ipc_namespace(cli: Cli) -> None:
    assert (await cli.run("run", "--ipc", "node", "--", "sleep", "9")).code == 0
    (request,) = cli.script.of(node_pb2.RunWorkloadRequest)
    assert (request.spec.HasField("own_ipc_namespace"), request.spec.own_ipc_namespace) == (True, False)


async def test_run_needs_no_dashes(cli: Cli) -> None:
    done = await cli.run("--json", "run", "--name", "n", "sh", "-c", "true")
    assert (done.lines[0]["name"], done.lines[0]["pid"], done.lines[0]["spec"]["argv"]) == (
        "n",
        77,
        ["sh", "-c", "true"],
    )


async def test_run_tries_another_name_after_a_race(cli: Cli) -> None:
    done = await cli.run("run", "taken-in-a-race")
    assert done.code == 3  # the name is refused for ever, so it gives up
    assert len(cli.script.of(node_pb2.RunWorkloadRequest)) == 5
    assert done.err == "phaul: error: taken\n  remedy: choose another name\n"


async def test_run_nothing(cli: Cli) -> None:
    done = await cli.run("run", "nothing")
    assert done.code == 2
    assert done.err == "phaul: error: 'nothing' is no program on this node\n  remedy: searched in /bin\n"
    as_json = await cli.run("run", "--json", "nothing")
    assert as_json.lines == [
        {
            "error": {
                "reason": "INVALID_ARGUMENT",
                "message": "'nothing' is no program on this node",
                "remedy": "searched in /bin",
            }
        }
    ]
    assert as_json.err == ""


async def test_ps(cli: Cli) -> None:
    add(cli, "web", pid=7)
    add(cli, "old", "EXITED")
    few, every = await asyncio.gather(cli.run("ps"), cli.run("ps", "--all", "--json"))
    assert few.out.splitlines()[1].split()[:3] == ["web", "7", "running"]
    assert "old" not in few.out
    assert [each["name"] for each in every.lines[0]["workloads"]] == ["web", "old"]


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        ("EXITED", node_pb2.ExitStatus(exit_code=0), 0),
        ("EXITED", node_pb2.ExitStatus(exit_code=42), 42),
        ("EXITED", node_pb2.ExitStatus(signal=9), 137),
    ],
)
async def test_wait_ends_as_it_ended(cli: Cli, state: str, status: node_pb2.ExitStatus, code: int) -> None:
    add(cli, "web", state, exit_status=status)
    done = await cli.run("wait", "web")
    assert (done.code, done.out, done.err) == (code, "", "")


async def test_wait_for_what_moved_away(cli: Cli) -> None:
    add(cli, "web", "MOVED", moved_to="node-b:7707")
    done = await cli.run("wait", "web")
    assert (done.code, done.err) == (1, "phaul: web moved to node-b:7707\n")


async def test_wait_survives_a_restart_of_the_daemon(cli: Cli) -> None:
    add(cli, "web", "EXITED", exit_status=node_pb2.ExitStatus(exit_code=5))
    cli.script.break_off_after = 0
    done = await cli.run("wait", "web")
    assert (done.code, done.err) == (5, "phaul: phauld is away; trying again\n")
    assert len(cli.script.of(node_pb2.WaitWorkloadRequest)) == 2


async def test_unknown_workload(cli: Cli) -> None:
    for command in (("wait", "x"), ("logs", "x")):
        done = await cli.run(*command)
        assert done.code == 3
        assert done.err == "phaul: error: no workload 'x' on this node\n  remedy: phaul ps lists them\n"


async def test_stop_and_rm(cli: Cli) -> None:
    add(cli, "web", "EXITED", exit_status=node_pb2.ExitStatus(signal=2))
    done = await cli.run("stop", "web", "--signal", "INT", "--grace", "1.5")
    assert (done.code, done.out) == (0, "web exited (signal 2)\n")
    (request,) = cli.script.of(node_pb2.StopWorkloadRequest)
    assert (request.signal, request.grace.ToMilliseconds()) == (2, 1500)
    assert (await cli.run("stop", "web")).code == 0
    default = cli.script.of(node_pb2.StopWorkloadRequest)[1]
    assert (default.signal, default.grace.ToSeconds()) == (15, 10)
    gone = await cli.run("rm", "web")
    assert (gone.code, gone.out) == (0, "")


async def test_logs_are_bytes_as_they_are(cli: Cli) -> None:
    add(cli, "web")
    cli.script.log = "ünïcode\n".encode() + b"\xff\n"
    process = await cli.start("logs", "web")
    out, _ = await process.communicate()
    assert out == cli.script.log


async def test_logs_go_on_where_they_broke_off(cli: Cli) -> None:
    add(cli, "web", "MOVED", moved_to="node-b:7707")
    cli.script.log = b"0123456789"
    cli.script.break_off_after = 0
    done = await cli.run("logs", "-f", "-n", "3", "web")
    assert done.out == "0123456789"
    assert done.err == "phaul: phauld is away; trying again\nphaul: web moved to node-b:7707\n"
    first, second = cli.script.of(node_pb2.ReadWorkloadLogRequest)
    assert (first.tail_lines, first.HasField("offset_bytes"), first.follow) == (3, False, True)
    assert (second.tail_lines, second.offset_bytes) == (0, 4)


async def test_logs_as_json(cli: Cli) -> None:
    add(cli, "web")
    cli.script.log = "abcü".encode()  # cut inside a character
    done = await cli.run("logs", "web", "--json")
    assert "".join(each["text"] for each in done.lines) == "abcü"
    assert done.lines[-1]["next_offset_bytes"] == 5


async def test_completion_of_names(cli: Cli) -> None:
    add(cli, "web")
    add(cli, "redis")
    process = await complete(cli, "phaul logs w", cli.address)
    out, err = await process.communicate()
    assert (out.decode().split(), err) == (["plain,web"], b"")


@pytest.mark.parametrize("words", ["status", "report", "cancel", "resolve"])
async def test_completion_of_migrations(cli: Cli, words: str) -> None:
    cli.script.history = [snapshot("HELD", "abc"), snapshot("DONE", "bcd")]
    process = await complete(cli, f"phaul {words} a", cli.address)
    out, err = await process.communicate()
    assert (out.decode().split(), err) == (["plain,abc"], b"")


async def test_completion_never_hangs(cli: Cli) -> None:
    cli.script.hang = True
    for address in (cli.address, "unix:/nowhere", "10.255.255.1:1", "not an address"):
        async with asyncio.timeout(3):
            out, err = await (await complete(cli, "phaul logs w", address)).communicate()
        assert (out.strip(), err) == (b"", b""), address


async def complete(cli: Cli, line: str, daemon: str) -> asyncio.subprocess.Process:
    os.environ.update({"_PHAUL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": "2"})
    try:
        return await cli.start(daemon=daemon)
    finally:
        for name in ("_PHAUL_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            del os.environ[name]
