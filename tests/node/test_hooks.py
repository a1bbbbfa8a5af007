"""Hooks are called on both nodes in each phase; they can prevent a migration, but neither hold up nor undo a commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from phaul.v1 import hooks_pb2, hooks_pb2_grpc
from tests.inventory import processes
from tests.node.test_daemons import REFUSED, Victim, migrate
from tests.nodes import Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

#: Writes down what it is told, then does what the file `.PHASE-SIDE` beside it says.
HOOK: Final = r"""#!/bin/sh
directory=${0%/*}
told=$(env | sed -n 's/^PHAUL_//p' | tr '\n' '\t')
printf '%s\n' "$told" >>"$directory/.${0##*/}.log"
case $(cat "$directory/.$PHAUL_PHASE-$PHAUL_SIDE" 2>/dev/null) in
fail) echo "no such route" >&2 && exit 1 ;;
hang) sleep 4242 ;;
esac
"""


class Script:
    """A hook of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(HOOK)
        path.chmod(0o755)

    def order(self, phase_and_side: str, what: str) -> None:
        self.path.with_name(f".{phase_and_side}").write_text(what)

    @property
    def calls(self) -> list[dict[str, str]]:
        log = self.path.with_name(f".{self.path.name}.log")
        lines = log.read_text().splitlines() if log.exists() else []
        told = [dict(word.split("=", 1) for word in line.split("\t") if word) for line in lines]
        return [{name.lower(): value for name, value in each.items()} for each in told]

    @property
    def phases(self) -> list[str]:
        return [f"{each['phase']}-{each['side']}" for each in self.calls]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path / "hooks/hook")
    yield made
    print(*made.calls, sep="\n")


async def both(nodes: Nodes, **config: object) -> Nodes:
    await nodes.a.start_phauld(**config)
    await nodes.b.start_phauld(**config)
    return nodes


async def test_a_script_is_told_on_both_nodes(nodes: Nodes, script: Script, tmp_path: Path) -> None:
    a, b, _ = await both(nodes)
    victim = await Victim.start(a, tmp_path)
    (pid,) = [each["pid"] for each in (await a.phaul("ps", "--json")).json()["workloads"]]
    status, report = await migrate(a, "victim", b, "--hook", str(script.path))
    assert status == 0, report
    await victim.beats()
    assert script.phases == ["prepare-source", "prepare-destination", "commit-source", "commit-destination"]
    first, *_, last = script.calls
    assert first["migration_id"] == last["migration_id"] == report["migration_id"]
    assert (first["node"], first["peer"], first["workload"], first["pid"]) == (
        "a",
        f"{b.address}:7707",
        "victim",
        f"{pid}",
    )
    assert (last["node"], last["peer"], last["pid"]) == ("b", "a", str(report["destination_pid"]))
    assert "hook-failed" not in {each["code"] for each in report["problems"]}


async def test_each_node_has_hooks_of_its_own(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    ours, theirs = Script(tmp_path / "a.d/10-route"), Script(tmp_path / "b.d/10-route")
    (tmp_path / "a.d/20-route.off").touch()
    await a.start_phauld(hooks_dir=ours.path.parent)
    await b.start_phauld(hooks_dir=theirs.path.parent)
    victim = await Victim.start(a, tmp_path)
    (tmp_path / "b.d/20-route").touch()
    status, report = await migrate(a, "victim", b)
    assert (status, report["error"]["reason"]) == (REFUSED, "HOOK_FAILED")
    assert report["error"]["remedy"] == f"chmod +x {tmp_path}/b.d/20-route"
    (tmp_path / "b.d/20-route").unlink()
    status, report = await migrate(a, "victim", b)
    assert status == 0, report
    await victim.beats()
    assert ours.phases == ["prepare-source", "abort-source", "prepare-source", "commit-source"]
    assert [f"{phase}-destination" for phase in ("prepare", "abort", "prepare", "commit")] == theirs.phases


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("source", "fail"),
        ("source", "hang"),
        ("source", "not executable"),
        ("source", "missing"),
        ("destination", "fail"),
        ("destination", "hang"),
    ],
)
async def test_one_that_fails_in_prepare_prevents_the_move(
    nodes: Nodes, script: Script, tmp_path: Path, where: str, what: str
) -> None:
    a, b, _ = await both(nodes, hook_seconds=1.0 if what == "hang" else 4.0)
    victim = await Victim.start(a, tmp_path)
    script.order(f"prepare-{where}", what)
    if what == "not executable":
        script.path.chmod(0o644)
    if what == "missing":
        script.path.unlink()
    status, report = await migrate(a, "victim", b, "--hook", str(script.path))
    assert status == REFUSED
    assert report["error"]["reason"] == "HOOK_FAILED"
    said = {
        "fail": "no such route",
        "hang": "no end after",
        "not executable": "Permission denied",
        "missing": "No such",
    }
    assert said[what] in report["error"]["message"]
    await victim.beats()
    assert victim.pids(a)
    assert not victim.pids(b)
    for node in (a, b):
        await until(lambda node=node: not [line for _, line in processes(node) if "4242" in line])  # type: ignore[misc]
    if what in ("fail", "hang"):
        sides = ["source"] if where == "source" else ["source", "destination"]
        await until(
            lambda: sorted(script.phases) == sorted(f"{each}-{side}" for each in ("prepare", "abort") for side in sides)
        )


@pytest.mark.parametrize(("where", "what"), [("source", "hang"), ("destination", "fail"), ("destination", "hang")])
async def test_one_that_fails_in_commit_undoes_nothing(
    nodes: Nodes, script: Script, tmp_path: Path, where: str, what: str
) -> None:
    a, b, _ = await both(nodes, hook_seconds=1.0 if what == "hang" else 4.0)
    victim = await Victim.start(a, tmp_path)
    script.order(f"commit-{where}", what)
    status, report = await migrate(a, "victim", b, "--hook", str(script.path))
    assert status == 0, report
    await victim.beats()
    assert not victim.pids(a)
    await until(lambda: [each["attempt"] for each in script.calls if each["side"] == where][1:] == ["1", "2", "3"])
    assert ("hook-failed" in {each["code"] for each in report["problems"]}) == (where == "source")
    assert "abort" not in {each["phase"] for each in script.calls}


async def test_a_daemon_that_dies_while_its_hook_hangs(nodes: Nodes, script: Script, tmp_path: Path) -> None:
    a, b, _ = await both(nodes, hook_seconds=8.0)
    victim = await Victim.start(a, tmp_path)
    script.order("commit-destination", "hang")
    migration = asyncio.create_task(migrate(a, "victim", b, "--hook", str(script.path)))
    await until(lambda: "commit-destination" in script.phases, 20)
    await b.kill_phauld()  # the tree there is built and committed, but nothing of it has run
    script.order("commit-destination", "")
    await b.start_phauld()
    status, report = await migration
    assert status == 4, report
    await victim.beats()
    assert victim.pids(a)
    assert not victim.pids(b)
    await until(lambda: {"abort-source", "abort-destination"} <= set(script.phases))


class Server(hooks_pb2_grpc.HooksServicer):
    """Somebody else's, who keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, hooks_pb2.HookCall]] = []
        self.refuses = ""

    async def _take(self, phase: str, call: hooks_pb2.HookCall, context: Any) -> None:
        self.told.append((phase, call))
        if self.refuses == phase:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the router is busy")

    async def Prepare(self, request: hooks_pb2.HooksPrepareRequest, context: Any) -> hooks_pb2.HooksPrepareResponse:
        await self._take("prepare", request.call, context)
        return hooks_pb2.HooksPrepareResponse()

    async def Commit(self, request: hooks_pb2.HooksCommitRequest, context: Any) -> hooks_pb2.HooksCommitResponse:
        await self._take("commit", request.call, context)
        return hooks_pb2.HooksCommitResponse()

    async def Abort(self, request: hooks_pb2.HooksAbortRequest, context: Any) -> hooks_pb2.HooksAbortResponse:
        await self._take("abort", request.call, context)
        return hooks_pb2.HooksAbortResponse()


@contextlib.asynccontextmanager
async def serving(address: str) -> AsyncIterator[Server]:
    server, hooks = grpc.aio.server(), Server()
    hooks_pb2_grpc.add_HooksServicer_to_server(hooks, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield hooks
    finally:
        await server.stop(None)


async def test_a_server_is_told_and_can_prevent_the_move(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = await both(nodes)
    victim = await Victim.start(a, tmp_path)
    hook = ["--hook", f"grpc:unix:{tmp_path}/hooks.sock"]
    status, report = await migrate(a, "victim", b, *hook)
    assert (status, report["error"]["reason"]) == (REFUSED, "HOOK_FAILED")  # nobody listens
    async with serving(f"unix:{tmp_path}/hooks.sock") as server:
        server.refuses = "prepare"
        status, report = await migrate(a, "victim", b, *hook)
        assert status == REFUSED
        assert "the router is busy" in report["error"]["message"]
        await victim.beats()
        await until(lambda: [phase for phase, _ in server.told] == ["prepare", "abort"])
        server.told, server.refuses = [], ""
        status, report = await migrate(a, "victim", b, *hook)
        assert status == 0, report
    await victim.beats()
    source, destination = hooks_pb2.HOOK_SIDE_SOURCE, hooks_pb2.HOOK_SIDE_DESTINATION
    assert [(phase, call.side) for phase, call in server.told] == [
        ("prepare", source),
        ("prepare", destination),
        ("commit", source),
        ("commit", destination),
    ]
    assert server.told[-1][1].pid == report["destination_pid"]


async def test_what_is_no_hook_is_refused(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    await Victim.start(a, tmp_path)
    for text in ("route", "grpc:", "grpc:unix:relative", "grpc:host:99999"):
        done = await a.phaul("migrate", "victim", "--to", b.address, "--hook", text)
        assert done.returncode == 2, text
        assert "grpc:HOST:PORT" in done.stderr
