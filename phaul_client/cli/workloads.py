"""`phaul run`, `ps`, `wait`, `stop`, `rm`, `logs`: programs that can be moved."""

import codecs
import os
import re
import sys
import time
from collections.abc import Container
from typing import Final

import click
import grpc

from phaul.v1 import node_pb2
from phaul.v1.node_pb2 import Workload
from phaul.v1.types_pb2 import CgroupLimits, RestartPolicy, WorkloadSpec
from phaul_client.cli import parameters, render
from phaul_client.cli.connection import CALL_SECONDS, LONG_CALL_SECONDS, Daemon, persistently, translate
from phaul_client.cli.json_output import to_json, to_line
from phaul_client.cli.outcomes import ExitCode
from phaul_client.cli.requests import to_duration
from phaul_client.cli.session import Session, command
from phaul_client.cli.visible import visible

#: What a program finds of the caller's environment; everything else only by --env.
PASSED_ENVIRONMENT: Final = ("PATH", "HOME", "LANG", "TZ", "USER", "LOGNAME")
NAME_LENGTH: Final = 63
ATTEMPTS: Final = 5
_RUNNING: Final = (
    node_pb2.WORKLOAD_STATE_RUNNING,
    node_pb2.WORKLOAD_STATE_FROZEN,
    node_pb2.WORKLOAD_STATE_RESTARTING,
    node_pb2.WORKLOAD_STATE_ARRIVING,
)


def free_name(program: str, taken: Container[str]) -> str:
    """A name for a workload after its program: "redis-server", "redis-server-2" …"""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(program)).lstrip("._-")[: NAME_LENGTH - 5] or "workload"
    number = 1
    while (name := base if number == 1 else f"{base}-{number}") in taken:
        number += 1
    return name


def build_spec(
    argv: tuple[str, ...],
    *,
    name: str,
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    pid_namespace: bool,
    ipc_namespace: bool = True,
    user: str = "",
    limits: tuple[tuple[str, int], ...] = (),
    restart: RestartPolicy | None = None,
    cgroup_limits: CgroupLimits | None = None,
) -> WorkloadSpec:
    """What to run. A program by relative path is meant from here, wherever it will run."""
    program = argv[0]
    if "/" in program and cwd is None:
        program = os.path.abspath(program)
    passed = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
    return WorkloadSpec(
        name=name,
        argv=[program, *argv[1:]],
        env={**passed, **dict(env)},
        working_directory=os.path.abspath(cwd) if cwd is not None else "/",
        own_pid_namespace=pid_namespace,
        own_ipc_namespace=ipc_namespace,
        user=user,
        limits=dict(limits),
        restart=restart,
        cgroup_limits=cgroup_limits,
    )


@command(
    "run",
    "phaul run -- redis-server --port 7000",
    "phaul run --name web --env PORT=8080 --cwd /srv/web -- python3 server.py",
    "phaul run --restart always -- nginx -g 'daemon off;'     started again whenever it ends, until phaul stop",
    "phaul run --restart on-failure:5 --limit nofile=4096 -- ./worker",
    interspersed=False,
)
@click.option("--name", metavar="NAME", help="Its name on this node; default: the program's, with a number if taken.")
@click.option(
    "--env",
    metavar="NAME[=VALUE]",
    multiple=True,
    type=parameters.VARIABLE,
    help=f"A variable of its environment, which otherwise has only {', '.join(PASSED_ENVIRONMENT)}; may be repeated.",
)
@click.option(
    "--user", metavar="USER[:GROUP]", default="", help="Who it runs as: names or numbers; default: as phauld."
)
@click.option(
    "--limit",
    "limits",
    metavar="NAME=N",
    multiple=True,
    type=parameters.LIMIT,
    help="A resource limit, soft and hard: nofile=1024, core=unlimited; may be repeated. It moves along.",
)
@click.option(
    "--memory", metavar="SIZE", type=parameters.MEMORY, help="Memory of all of it together: 512M; beyond, it is killed."
)
@click.option("--cpus", metavar="N", type=parameters.CPUS, help="Processors for all of it together: 0.5, 2.")
@click.option(
    "--pids",
    metavar="N",
    type=click.IntRange(1, 2**22),
    help="Processes and threads of all of it together. These three need cgroup2 on each node that it runs on; one that "
    "cannot enforce them refuses it.",
)
@click.option(
    "--restart",
    metavar="WHEN",
    type=parameters.RESTART,
    help="Start it again when it has ended: no (the default), on-failure, on-failure:N (N times in all), always. After "
    "100 ms, and twice as long each time, up to a minute; from the beginning after 10 s of running. It moves along.",
)
@click.option("--cwd", metavar="DIR", help="Its working directory, which the destination needs too; default /.")
@click.option("--no-pid-namespace", is_flag=True, help="Share this node's PIDs, which may be taken at the destination.")
@click.option(
    "--ipc",
    type=click.Choice(["private", "node"]),
    default="private",
    show_default=True,
    help="Whose System V shared memory, semaphores and message queues: its own, which move along, or this node's.",
)
@click.argument("argv", metavar="[--] CMD ARG...", nargs=-1, required=True, type=click.UNPROCESSED)
async def run(
    session: Session,
    name: str | None,
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    no_pid_namespace: bool,
    ipc: str,
    user: str,
    limits: tuple[tuple[str, int], ...],
    restart: RestartPolicy | None,
    memory: int | None,
    cpus: int | None,
    pids: int | None,
    argv: tuple[str, ...],
) -> None:
    """Start a program so that it can be moved.

    It gets a PID namespace with a reaping init, an IPC namespace, a session without a terminal, and a log file. It runs
    on whatever happens to phauld. Prints its name and PID.
    """
    spec = build_spec(
        argv,
        name=name or "",
        env=env,
        cwd=cwd,
        pid_namespace=not no_pid_namespace,
        ipc_namespace=ipc == "private",
        user=user,
        limits=limits,
        restart=restart,
        cgroup_limits=_cgroup_limits(memory, cpus, pids),
    )
    async with session.connect() as daemon:
        workload = await (_start(daemon, spec) if name else _start_under_free_name(daemon, spec))
    session.show(to_json(workload), f"{workload.name} {workload.pid}")


def _cgroup_limits(memory: int | None, cpus: int | None, pids: int | None) -> CgroupLimits | None:
    """`None`, if there are none."""
    if memory is None and cpus is None and pids is None:
        return None
    return CgroupLimits(memory_bytes=memory or 0, cpu_millis=cpus or 0, pids=pids or 0)


async def _start(daemon: Daemon, spec: WorkloadSpec) -> Workload:
    answer = await daemon.node.RunWorkload(node_pb2.RunWorkloadRequest(spec=spec), timeout=LONG_CALL_SECONDS)
    return answer.workload


async def _start_under_free_name(daemon: Daemon, spec: WorkloadSpec) -> Workload:
    """Another caller may take the name meanwhile: then another one is tried."""
    attempt = 0
    while True:
        attempt += 1
        listed = await daemon.node.ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=CALL_SECONDS)
        spec.name = free_name(spec.argv[0], {each.name for each in listed.workloads})
        try:
            return await _start(daemon, spec)
        except grpc.aio.AioRpcError as exc:
            if attempt == ATTEMPTS or translate(daemon.address, exc).reason != "WORKLOAD_EXISTS":
                raise


@command("ps", "phaul ps", "phaul ps --all", "phaul ps --json")
@click.option("--all", "every", is_flag=True, help="Also those that ended here or moved away.")
async def ps(session: Session, every: bool) -> None:
    """List the workloads of this node."""
    states = () if every else _RUNNING
    async with session.connect() as daemon:
        answer = await daemon.node.ListWorkloads(node_pb2.ListWorkloadsRequest(states=states), timeout=CALL_SECONDS)
    shown = {"workloads": [to_json(each) for each in answer.workloads]}
    session.show(shown, render.workload_table(answer.workloads, time.time()))


@command("wait", "phaul wait redis-server; echo $?")
@parameters.name_argument
async def wait(session: Session, name: str) -> int:
    """Wait for a workload's end.

    One after which it is started again is none. Exits with its exit status, or 128 + N after signal N. If it moved
    away, says where to, and exits with 1.
    """
    async with session.connect() as daemon:
        await daemon.node.GetWorkload(node_pb2.GetWorkloadRequest(name=name), timeout=CALL_SECONDS)

        async def attempt() -> Workload:
            return (await daemon.node.WaitWorkload(node_pb2.WaitWorkloadRequest(name=name))).workload

        workload = await persistently(attempt, _tell)
    session.show(to_json(workload), "")
    if workload.state == node_pb2.WORKLOAD_STATE_EXITED:
        status = workload.exit_status
        return 128 + status.signal if status.WhichOneof("how") == "signal" else status.exit_code
    _tell_where(workload)
    return ExitCode.FAILED


@command("stop", "phaul stop web", "phaul stop web --signal INT --grace 30")
@parameters.name_argument
@click.option(
    "--signal", "number", type=parameters.SIGNAL, default="TERM", show_default=True, help="What it is asked with."
)
@click.option("--grace", type=parameters.GRACE, default="10", show_default=True, help="Time until all of it is killed.")
async def stop(session: Session, name: str, number: int, grace: float) -> None:
    """Stop a workload.

    It is asked with a signal; if it has not ended in time, its whole tree is killed. It is not started again, whatever
    `phaul run --restart` said."""
    request = node_pb2.StopWorkloadRequest(name=name, signal=number, grace=to_duration(grace))
    async with session.connect() as daemon:
        workload = (await daemon.node.StopWorkload(request, timeout=grace + LONG_CALL_SECONDS)).workload
    session.show(to_json(workload), f"{workload.name} {render.workload_state(workload)}")


@command("rm", "phaul rm web")
@parameters.name_argument
async def rm(session: Session, name: str) -> None:
    """Forget a workload that no longer runs here.

    Its log goes with it, if phauld made the log.
    """
    async with session.connect() as daemon:
        await daemon.node.RemoveWorkload(node_pb2.RemoveWorkloadRequest(name=name), timeout=CALL_SECONDS)
    session.show({"name": name}, "")


@command("logs", "phaul logs web", "phaul logs -n 20 -f web")
@parameters.name_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written later, until it no longer runs here.")
@click.option("-n", "--lines", metavar="LINES", type=click.IntRange(min=1), help="Only the last so many lines.")
async def logs(session: Session, name: str, follow: bool, lines: int | None) -> None:
    """Show a workload's output. With --json: lines of {"text", "next_offset_bytes"}."""
    request = node_pb2.ReadWorkloadLogRequest(name=name, follow=follow, tail_lines=lines or 0)
    async with session.connect() as daemon:
        found = node_pb2.GetWorkloadRequest(name=name)
        await daemon.node.GetWorkload(found, timeout=CALL_SECONDS)
        await persistently(lambda: _copy_log(daemon, request, session.json), _tell)
        if follow:
            _tell_where((await daemon.node.GetWorkload(found, timeout=CALL_SECONDS)).workload)


async def _copy_log(daemon: Daemon, request: node_pb2.ReadWorkloadLogRequest, as_json: bool) -> None:
    """The log from where `request` begins; it is moved on, so that a repetition goes on where this one broke off."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    async for piece in daemon.node.ReadWorkloadLog(request):
        request.tail_lines = 0
        request.offset_bytes = piece.next_offset_bytes
        if as_json:
            text = decoder.decode(piece.data)
            click.echo(to_line({"text": text, "next_offset_bytes": piece.next_offset_bytes}))
        else:
            sys.stdout.buffer.write(piece.data)
            sys.stdout.buffer.flush()


def _tell(message: str) -> None:
    click.echo(visible(f"phaul: {message}"), err=True)


def _tell_where(workload: Workload) -> None:
    if workload.state == node_pb2.WORKLOAD_STATE_MOVED:
        _tell(f"{workload.name} moved to {workload.moved_to}")
    elif workload.state == node_pb2.WORKLOAD_STATE_LOST:
        _tell(f"{workload.name} is lost: nobody saw how it ended")
