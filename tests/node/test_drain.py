"""`phaul drain`: twenty workloads leave a node for two others, and what cannot leave is named and stays."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.node.test_daemons import Victim
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

NUMBER: Final = 20
REFUSED: Final = 3


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


async def test_a_node_that_is_not_there_is_told(nodes: Nodes) -> None:
    await nodes.a.start_phauld()
    assert (await nodes.a.phaul("drain", "10.77.1.2", "--to", "10.77.1.1")).returncode == 6
