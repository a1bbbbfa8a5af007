"""`phaul preflight`, `doctor`, `info`, and daemons that do not answer."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from phaul.v1 import node_pb2, types_pb2
from phaul_client.cli.connection import DaemonUnreachable, connect
from phaul_client.errors import PhaulError
from tests.contract.cli_daemon import REPOSITORY, Cli, scripted_daemon

NOBODY: Final = 65534


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    async with scripted_daemon(tmp_path) as made:
        yield made


async def test_preflight(cli: Cli) -> None:
    problem = types_pb2.Problem(code="tty", severity=types_pb2.SEVERITY_ERROR, message="a terminal", remedy="r")
    cli.script.preflight = node_pb2.PreflightResponse(problems=[problem], mode=types_pb2.MODE_STOP_COPY)
    people = await cli.run("preflight", "4242", "--to", "b", "--tcp", "keep")
    assert people.code == 3
    assert people.out.splitlines() == [
        "4242 cannot move to b:7707",
        "  mode      stop-copy",
        "ERROR   tty: a terminal",
        "          remedy: r",
    ]
    (request,) = cli.script.of(node_pb2.PreflightRequest)
    assert (request.pid, request.destination, request.options.tcp_policy) == (4242, "b:7707", types_pb2.TCP_POLICY_KEEP)
    cli.script.preflight = node_pb2.PreflightResponse(ok=True)
    program = await cli.run("preflight", "redis", "--to", "b", "--json")
    assert (program.code, program.lines[0]["ok"], program.lines[0]["mode"]) == (0, True, None)


async def test_doctor_asks_the_daemon(cli: Cli) -> None:
    cli.script.checks = [node_pb2.Check(code="pipe", severity=types_pb2.SEVERITY_WARNING, message="small", remedy="r")]
    fit = await cli.run("doctor", "--json")
    assert (fit.code, fit.lines[0]["ok"]) == (0, True)
    assert fit.lines[0]["checks"] == [
        {"code": "pipe", "ok": False, "severity": "warning", "message": "small", "remedy": "r"}
    ]
    cli.script.checks = [node_pb2.Check(code="criu", severity=types_pb2.SEVERITY_ERROR, message="none")]
    unfit = await cli.run("doctor")
    assert (unfit.code, unfit.out.split()) == (1, ["ERROR", "criu", "none"])


async def test_doctor_without_a_daemon_looks_for_itself(cli: Cli) -> None:
    done = await cli.run("doctor", "--json", daemon="")
    checks = {each["code"]: each for each in done.lines[0]["checks"]}
    assert done.lines[0]["ok"] is (done.code == 0)
    assert checks["kernel"]["ok"] is True
    if "phauld" in checks:  # there may be a real one on this machine, which answers for itself
        assert checks["phauld"]["severity"] == "warning"
        assert "systemctl start phauld" in checks["phauld"]["remedy"]


async def test_a_daemon_that_was_named_must_answer(cli: Cli) -> None:
    assert (await cli.run("doctor", daemon="unix:/nowhere")).code == 6


async def test_info(cli: Cli) -> None:
    people, program = await asyncio.gather(cli.run("info"), cli.run("info", "--json"))
    assert people.out.startswith("node-a\n")
    assert program.lines[0]["node_name"] == "node-a"


async def test_the_option_counts_more_than_the_environment(cli: Cli) -> None:
    for arguments in (("--daemon", cli.address, "info"), ("info", "--daemon", cli.address.removeprefix("unix:"))):
        assert (await cli.run(*arguments, daemon="unix:/nowhere")).code == 0


async def test_no_daemon(cli: Cli) -> None:
    people, program = await asyncio.gather(
        cli.run("ps", daemon="unix:/nowhere"), cli.run("ps", "--json", daemon="unix:/nowhere")
    )
    assert (people.code, program.code) == (6, 6)
    cause, remedy = people.err.splitlines()
    assert cause == "phaul: error: no phauld at unix:/nowhere: not reachable (No such file or directory)"
    assert remedy.startswith("  remedy: start it")
    assert program.lines[0]["error"]["reason"] == "PEER_UNREACHABLE"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_a_socket_of_somebody_else(cli: Cli) -> None:
    os.chmod(cli.address.removeprefix("unix:"), 0o600)
    os.seteuid(NOBODY)
    try:
        error = await ask_as_we_are(cli.address)
    finally:
        os.seteuid(0)
    assert error.message == f"no permission to use {cli.address}"
    assert "socket_group" in error.remedy


async def ask_as_we_are(address: str) -> PhaulError:
    with pytest.raises(DaemonUnreachable) as caught:
        async with connect(address) as daemon:
            await daemon.node.GetInfo(node_pb2.GetInfoRequest(), timeout=5)
    return caught.value


async def test_a_daemon_that_takes_connections_and_says_nothing(cli: Cli) -> None:
    commands = (("ps",), ("wait", "x"), ("logs", "-f", "x"), ("migrate", "x", "--to", "b"))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        ended = await asyncio.gather(*(cli.run(*command, daemon=address) for command in commands))
    for done in ended:
        assert done.code == 6
        assert done.err.startswith(f"phaul: error: no phauld at {address}: ")
        assert "remedy: start it" in done.err


async def test_what_a_terminal_needs_is_not_imported_without_one() -> None:
    check = "import sys, phaul_client.cli; sys.exit('rich' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", check, cwd=REPOSITORY)
    assert await process.wait() == 0
