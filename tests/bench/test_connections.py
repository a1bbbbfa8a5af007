"""The pause of a process with many established TCP connections, which move with its address.

    ./check bench -k connections [--quick] [--json FILE]

The process goes to and fro, a client holds its connections all the while, and in the end each of them must answer. The
pause is the process's own, the longest gap between two beats; beside it is what each step took, from phaul's report,
and what criu says of its own part (`stats-dump`, `stats-restore`).
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest

from tests.bench.test_pause import _pause
from tests.node.test_move_address import ADDRESS, PORT, PYTHON, give, listening
from tests.nodes import Nodes, two_nodes, until
from tests.started import Process
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.bench, pytest.mark.criu, pytest.mark.timeout(600)]

HEARTBEAT: Final = Path(__file__).parents[1] / "victims/heartbeat.py"
COUNTS: Final = (0, 100, 1000, 4000)
#: Holds so many connections; at the end of its input it asks each of them for the number of beats.
CLIENT: Final = """
import resource, socket, sys
count = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
held = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(count)]
open(sys.argv[4], "w").close()
while not __import__("os").path.exists(sys.argv[5]): __import__("time").sleep(0.05)
alive = 0
for each in held:
    each.settimeout(10)
    try:
        each.sendall(b"how many?\\n")
        alive += each.recv(64).strip().isdigit()
    except OSError as exc:
        print(exc)
print(alive, flush=True)
"""


@pytest.mark.parametrize("restore", ["lazy", "eager"])
@pytest.mark.parametrize("count", COUNTS)
async def test_connections(count: int, restore: str, tmp_path: Path, json_report: dict[str, Any], quick: bool) -> None:
    """There and back again."""
    beats, steps, pauses = tmp_path / "beats", defaultdict[str, list[float]](list), []
    async with two_nodes(tmp_path / "nodes") as nodes:
        client = await _start(nodes, tmp_path, beats, count)
        for number in range(2 if quick else 6):
            source, destination = (nodes.a, nodes.b) if number % 2 == 0 else (nodes.b, nodes.a)
            await _forget(nodes, beats)
            options = ("--tcp", "keep", "--move-address", ADDRESS, "--restore", restore, "--json")
            moved = await source.phaul("migrate", "victim", "--to", destination.address, *options)
            assert moved.returncode == 0, moved.stdout + moved.stderr
            pauses.append(await _pause(beats))
            for step in moved.events()[-1]["timeline"]:
                steps[step["name"]].append(step["end_ms"] - step["start_ms"])
        (tmp_path / "enough").touch()
        await client.wait()
        assert client.log.read_text().split() == [str(count)], client.log.read_text()
    medians = {name: round(statistics.median(took), 1) for name, took in steps.items()}
    figures = {"connections": count, "restore": restore, "pause_s": pauses, "steps_ms": medians}
    json_report.setdefault("connections", []).append(figures)
    low, middle, high = (each * 1000 for each in (min(pauses), statistics.median(pauses), max(pauses)))
    sys.stdout.write(f"\n{count} connections, {restore}: pause {middle:.0f} ms ({low:.0f} to {high:.0f}); {medians}\n")


async def _start(nodes: Nodes, directory: Path, beats: Path, count: int) -> Process:
    """The workload `victim` with its clients."""
    await nodes.a.start_phauld()
    await nodes.b.start_phauld()
    await give(nodes.a)
    limited = ["sh", "-c", f'ulimit -n {count + 100} && exec "$@"', "sh"]
    words = [*limited, *PYTHON, str(HEARTBEAT), str(beats), "--listen", str(PORT)]
    await nodes.a.phaul("run", "--name", "victim", "--", *words, check=True)
    await listening(nodes.a, PORT)
    held, enough = directory / "held", directory / "enough"
    argv = [*PYTHON, "-c", CLIENT, ADDRESS, str(PORT), str(count), str(held), str(enough)]
    client = await nodes.client.start(argv, log=directory / "client.log")
    await until(held.exists, 60)
    return client


async def _forget(nodes: Nodes, beats: Path) -> None:
    """The longest gap so far: what comes after the signal counts."""
    for node in (nodes.a, nodes.b):
        await node.run(["pkill", "-USR2", "-f", str(beats)], check=False)
    seen = read_beats(beats).count
    await until(lambda: read_beats(beats).count > seen + 20)
