"""`phaul drain`: twenty workloads leave a node for two others, and what cannot leave is named and stays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.test_daemons import Victim
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

NUMBER: Final = 20
REFUSED: Final = 3
ROLLED_BACK: Final = 4
CRAWL_BYTES_PER_SECOND: Final = 256 << 10


async def three_daemons(nodes: Nodes) -> tuple[str, str]:
    """The addresses of the two destinations."""
    await nodes.a.start_phauld()
    await nodes.b.start_phauld()
    await nodes.client.start_phauld(listen=f"{nodes.client.lan_address}:7707")
    return nodes.b.address, nodes.client.lan_address


async def test_twenty_workloads_are_spread_over_two_nodes(nodes: Nodes, tmp_path: Path) -> None:
    a, b, client = nodes
    destinations = await three_daemons(nodes)
    victims = [await Victim.start(a, tmp_path, f"victim-{number}", mib=1) for number in range(NUMBER)]
    done = await a.phaul("drain", "--to", ",".join(destinations), "--jobs", "3", "--json", timeout_seconds=150)
    *reports, last = done.events()
    assert done.returncode == 0, done
    assert (last["event"], last["moved"], last["failed"], last["not_tried"]) == ("drained", NUMBER, [], [])
    assert sorted(last["destinations"].values()) == [NUMBER // 2, NUMBER // 2]
    assert sorted(each["workload"] for each in reports) == sorted(victim.name for victim in victims)
    for victim in victims:
        await victim.beats()
        assert victim.pids(a) == []
        assert len(victim.pids(b)) + len(victim.pids(client)) == 1
    assert (await a.phaul("ps", "--json", check=True)).json() == {"workloads": []}
    again = await a.phaul("drain", "--to", b.address)
    assert (again.returncode, again.stdout.splitlines()[0][:12]) == (0, "moved 0 of 0")


async def test_what_does_not_move_is_named_and_keeps_no_other(nodes: Nodes, tmp_path: Path) -> None:
    a, b, client = nodes
    first, second = await three_daemons(nodes)
    names = ["one", "stuck", "picky", "two"]
    victims = {name: await Victim.start(a, tmp_path, name, mib=1) for name in names}
    for node, taken in ((b, "stuck"), (client, "stuck"), (b, "picky")):  # their names are taken there
        await node.phaul("run", "--name", taken, "--", "sleep", "1000", check=True)
    done = await a.phaul("drain", a.address, "--to", first, "--to", second, "--jobs", "1", "--json")
    last = done.events()[-1]
    assert last["moved"] == 3
    assert [each["workload"] for each in last["failed"]] == ["stuck"], last
    assert "stuck" in last["failed"][0]["error"]["message"]
    assert done.returncode == REFUSED, done
    for name, victim in victims.items():
        await victim.beats()
        assert [len(victim.pids(node)) for node in (a, b, client)].count(1) == 1
        assert len(victim.pids(a)) == (name == "stuck")
    assert len(victims["picky"].pids(client)) == 1  # the first one asked refused it


async def test_what_arrives_is_told_and_leaves_once_it_runs(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    _, third = await three_daemons(nodes)
    victim = await Victim.start(a, tmp_path, "guest", mib=8)

    async def at_b() -> dict[str, Any] | None:
        listed = (await b.phaul("ps", "--json", check=True)).json()["workloads"]
        return listed[0] if listed else None

    await a.limit_bandwidth(CRAWL_BYTES_PER_SECOND)
    moving = asyncio.create_task(a.phaul("migrate", "guest", "--to", b.address, "--mode", "stop-copy"))
    seen = None
    async with asyncio.timeout(30):
        while seen is None:
            seen = await at_b()
    assert (seen["state"], seen["pid"], bool(seen["migration_id"])) == ("arriving", 0, True)
    assert "arriving" in (await b.phaul("ps", check=True)).stdout
    for words in (["stop", "guest"], ["rm", "guest"], ["migrate", "guest", "--to", a.address]):
        refused = await b.phaul(*words, "--json")
        assert refused.returncode in (1, REFUSED), refused
        assert "WRONG_PHASE" in refused.stdout, refused
        assert "is arriving here" in refused.stdout
    draining = asyncio.create_task(b.phaul("drain", "--to", third, "--json"))
    await a.limit_bandwidth(None)
    assert (await moving).returncode == 0
    done = await draining
    assert (done.returncode, done.events()[-1]["moved"], done.events()[-1]["failed"]) == (0, 1, []), done
    await victim.beats()
    assert [len(victim.pids(node)) for node in nodes] == [0, 0, 1]


async def test_what_was_to_arrive_and_does_not_is_no_failure(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    _, third = await three_daemons(nodes)
    await Victim.start(a, tmp_path, "guest", mib=8)
    await a.limit_bandwidth(CRAWL_BYTES_PER_SECOND)
    moving = asyncio.create_task(a.phaul("migrate", "guest", "--to", b.address, "--mode", "stop-copy"))
    async with asyncio.timeout(30):
        while not (await b.phaul("ps", "--json", check=True)).json()["workloads"]:
            pass
    draining = asyncio.create_task(b.phaul("drain", "--to", third, "--json"))
    await a.phaul("cancel", "guest", check=True)
    await a.limit_bandwidth(None)
    assert (await moving).returncode == ROLLED_BACK
    done = await draining
    last = done.events()[-1]
    assert (done.returncode, last["moved"], last["failed"], last["not_tried"]) == (0, 0, [], []), done


async def test_a_node_that_is_not_there_is_told(nodes: Nodes) -> None:
    await nodes.a.start_phauld()
    assert (await nodes.a.phaul("drain", "10.77.1.2", "--to", "10.77.1.1")).returncode == 6
