"""`phaul run --restart`: what ends is started again, once, and not where nobody knows whether it runs elsewhere."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.nodes import Node, Nodes, until
from tests.restarting import Restarting

pytestmark = [pytest.mark.criu, pytest.mark.timeout(60)]

#: A systemd-run of which one waits at a gate: between the record of a workload and its shim.
_GATE = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
if mv "{gate}" "{gate}.held" 2>/dev/null; then
    echo $$ >"{gate}.held"
    while [ -e "{gate}.held" ]; do sleep 0.02; done
fi
exec "$@"
"""


@pytest.fixture
async def node(nodes: Nodes) -> Node:
    await nodes.a.start_phauld()
    return nodes.a


async def test_a_failure_is_followed_by_so_many_restarts_and_no_more(node: Node, tmp_path: Path) -> None:
    script = f"echo >>{tmp_path}/starts; exit 3"
    await node.phaul("run", "--name", "web", "--restart", "on-failure:2", "--", "sh", "-c", script, check=True)
    assert (await node.phaul("wait", "web")).returncode == 3
    assert (tmp_path / "starts").read_text() == "\n" * 3
    shown = (await node.phaul("ps", "--all")).stdout.splitlines()
    assert shown[0].split() == ["NAME", "PID", "STATE", "SINCE", "RESTARTS", "COMMAND"]
    assert shown[1].split()[:4] == ["web", "-", "exited", "(status"]
    assert " 2 " in shown[1]
    state = node.root / "run/phaul/state/workloads"
    assert len(list(state.iterdir())) == 1


async def test_what_ended_well_is_over_unless_it_is_always_to_run(node: Node, tmp_path: Path) -> None:
    always, once = Restarting("always", tmp_path), Restarting("once", tmp_path)
    await always.run(node, "--restart", "always")
    await once.run(node, "--restart", "on-failure")
    always.end(0)
    once.end(0)
    await always.beats(2)
    assert (await once.shown(node))["state"] == "exited"
    found = await always.shown(node)
    assert (found["state"], found["restarts"]) == ("running", 1)
    assert once.starts == 1


async def test_who_stops_it_has_the_last_word(node: Node, tmp_path: Path) -> None:
    web = Restarting("web", tmp_path)
    await web.run(node, "--restart", "always")
    stopped = await node.phaul("stop", "web", check=True)
    assert stopped.stdout == "web exited (status 143)\n"
    await node.kill_phauld()
    await node.start_phauld()
    await asyncio.sleep(0.5)
    assert (web.starts, (await web.shown(node))["state"]) == (1, "exited")


async def test_what_waits_for_its_restart_holds_its_name_and_can_be_stopped(node: Node, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    script = f"echo >>{starts}; exit 1"
    await node.phaul("run", "--name", "web", "--restart", "always", "--", "sh", "-c", script, check=True)
    await node.kill_phauld()
    record = await until(lambda: newest_ended(node))
    assert record is not None
    content = json.loads((record / "record.json").read_text())
    (record / "record.json").write_text(json.dumps({**content, "in_a_row": 9}))  # the next one comes after 51 s
    count = starts.read_text()
    await node.start_phauld()
    taken, removed, listed = await asyncio.gather(
        node.phaul("run", "--name", "web", "--", "true"),
        node.phaul("rm", "web"),
        node.phaul("ps", "--json", check=True),
    )
    assert (taken.returncode, removed.returncode) != (0, 0)
    assert "web" in taken.stderr
    (shown,) = listed.json()["workloads"]
    assert (shown["state"], shown["exit_status"]["exit_code"]) == ("restarting", 1)
    assert shown["restart_at"]
    waiting = asyncio.create_task(node.phaul("wait", "web"))
    assert (await node.phaul("stop", "web", check=True)).stdout == "web exited (status 1)\n"
    assert (await waiting).returncode == 1
    assert starts.read_text() == count


def newest_ended(node: Node) -> Path | None:
    """The newest record, if its tree has ended."""
    records = [each.parent for each in (node.root / "run/phaul/state/workloads").glob("*/record.json")]
    newest: Path = max(records, key=lambda each: json.loads((each / "record.json").read_text())["created_at"])
    return newest if (newest / "exit.json").exists() else None


async def test_a_new_phauld_goes_on_with_what_ended_meanwhile(node: Node, tmp_path: Path) -> None:
    web, well = Restarting("web", tmp_path), Restarting("well", tmp_path)
    await web.run(node, "--restart", "on-failure")
    await well.run(node, "--restart", "on-failure")
    await node.kill_phauld()
    web.end(7)
    well.end(0)
    await until(lambda: not web.order.exists() and not well.order.exists())
    await node.start_phauld()
    await web.beats(2)
    assert (await web.shown(node))["restarts"] == 1
    assert (await well.shown(node))["state"] == "exited"
    assert (web.starts, well.starts) == (2, 1)


@pytest.mark.parametrize("late", [False, True], ids=["and its shim", "whose shim comes too late"])
async def test_phauld_is_killed_between_the_record_of_a_restart_and_its_start(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    node, gate, held = nodes.a, tmp_path / "gate", tmp_path / "gate.held"
    program = tmp_path / "bin" / "systemd-run"
    program.parent.mkdir()
    program.write_text(_GATE.format(gate=gate))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    await node.run(["mkdir", "-p", "/run/systemd/system"])
    await node.start_phauld()
    web = Restarting("web", tmp_path)
    await web.run(node, "--restart", "always")
    gate.touch()
    web.end(1)
    await until(lambda: held.exists() and held.read_text())
    await node.kill_phauld()
    if not late:
        await node.run(["kill", "-KILL", held.read_text().strip()])
    await node.start_phauld()
    await web.beats(2)
    held.unlink()
    await asyncio.sleep(0.5)
    await web.beats(2)
    found = await web.shown(node)
    assert (found["restarts"], found["state"]) == (1, "running")
    assert len(list((node.root / "run/phaul/state/workloads").iterdir())) == 1


async def test_what_can_no_longer_be_started_says_so_and_is_tried_again(node: Node, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nwhile [ -e {tmp_path}/wait ]; do sleep 0.05; done\nexit 5\n")
    program.chmod(0o755)
    (tmp_path / "wait").touch()
    await node.phaul("run", "--name", "web", "--restart", "on-failure:2", "--", str(program), check=True)
    program.unlink()
    (tmp_path / "wait").unlink()
    assert (await node.phaul("wait", "web")).returncode == 127
    (shown,) = (await node.phaul("ps", "--all", "--json", check=True)).json()["workloads"]
    assert (shown["restarts"], shown["start_error"]) == (2, f"'{program}' is no program on this node")


async def test_a_tree_whose_end_nobody_saw(node: Node, tmp_path: Path) -> None:
    """Its shim was killed. With an init of its own all of it is gone; without, who knows?"""
    always, failed, loose = (Restarting(name, tmp_path) for name in ("always", "failed", "loose"))
    await always.run(node, "--restart", "always")
    await failed.run(node, "--restart", "on-failure")
    await loose.run(node, "--restart", "always", "--no-pid-namespace")
    await node.run(["pkill", "-KILL", "-f", "bare.py .*shim run"])
    for each in (always, failed, loose):
        await each.beats(1)
        each.end(9)
    await always.beats(2)
    assert [(await each.shown(node))["state"] for each in (failed, loose)] == ["lost", "lost"]
    assert (failed.starts, loose.starts) == (1, 1)


async def test_the_count_moves_along_and_so_does_the_policy(nodes: Nodes, node: Node, tmp_path: Path) -> None:
    b = nodes.b
    await b.start_phauld()
    web = Restarting("web", tmp_path)
    await web.run(node, "--restart", "on-failure:2")
    web.end(1)
    await web.beats(2)
    await node.phaul("migrate", "web", "--to", b.address, check=True)
    await web.beats(2)
    assert (await web.shown(node))["state"] == "moved"
    web.end(1)
    await web.beats(3)
    found = await web.shown(b)
    assert (found["restarts"], found["spec"]["restart"]["max_restarts"]) == (2, 2)
    web.end(4)
    assert (await b.phaul("wait", "web")).returncode == 4  # that was the last one
    assert web.starts == 3
    assert (await web.shown(node))["state"] == "moved"


async def test_a_node_with_a_workload_that_is_restarted_is_drained(nodes: Nodes, node: Node, tmp_path: Path) -> None:
    b = nodes.b
    await b.start_phauld()
    web = Restarting("web", tmp_path)
    await node.run(["sh", "-c", "echo 20000 >/proc/sys/kernel/ns_last_pid"])  # whose PIDs are free there
    # The first one leaves a child behind: the next one is not started as long as that lives.
    script = f'mkdir {tmp_path}/first || exec "$@"; setsid sleep 1000 & echo $! >{tmp_path}/orphan; exit 1'
    words = ["run", "--name", "web", "--restart", "always", "--no-pid-namespace", "--", "sh", "-c", script, "sh"]
    await node.phaul(*words, *web.argv, check=True)
    while (await web.shown(node))["state"] != "restarting":  # noqa: ASYNC110 - it is phauld's
        await asyncio.sleep(0.01)
    draining = asyncio.create_task(node.phaul("drain", "--to", b.address, "--json", check=True))
    await asyncio.sleep(1.5)
    assert not draining.done()
    assert web.starts == 0
    await node.run(["kill", (tmp_path / "orphan").read_text().strip()])
    drained = (await draining).events()[-1]
    assert (drained["moved"], drained["failed"]) == (1, [])
    await web.beats(1)
    assert [(await web.shown(each))["state"] for each in (node, b)] == ["moved", "running"]
    assert (await web.shown(b))["restarts"] == 1


async def test_it_is_stopped_where_it_arrives_and_not_while_it_moves(nodes: Nodes, node: Node, tmp_path: Path) -> None:
    b = nodes.b
    await b.start_phauld()
    web = Restarting("web", tmp_path)
    await web.run(node, "--restart", "always")
    await node.limit_bandwidth(1 << 20)
    moving = asyncio.create_task(node.phaul("migrate", "web", "--to", b.address, "--mode", "stop-copy"))
    records = node.root / "run/phaul/state/workloads"
    await until(lambda: list(records.glob("*/leaving.json")))
    refused = await node.phaul("stop", "web")
    assert "on the move" in refused.stderr
    assert "phaul cancel" in refused.stderr
    await node.limit_bandwidth(None)
    assert (await moving).returncode == 0
    await web.beats(1)
    assert (await b.phaul("stop", "web", check=True)).stdout == "web exited (status 143)\n"
    assert web.starts == 1
