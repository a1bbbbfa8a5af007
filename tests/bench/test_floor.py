"""The floor of the pause: criu's own freeze and restore of a process with nothing in it, on one node.

    ./check bench [--quick] [--json FILE]

What criu itself says of it (stats-dump, stats-restore), with the highest priority and images in memory: no move that
uses criu is shorter. A process of the C library, and a Python interpreter.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from phaul_criu.install import find_binary
from phaul_criu.stats import parse_dump_stats, parse_restore_stats
from tests.by_hand import HURRIED, start_tree
from tests.nodes import Nodes, two_nodes, until
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.bench, pytest.mark.criu, pytest.mark.timeout(300)]

HEARTBEAT: Final = Path(__file__).parents[1] / "victims/heartbeat.py"
IMAGES: Final = Path("/run/floor")


@pytest.mark.parametrize("kind", ["sleep", "python"])
async def test_floor(kind: str, tmp_path: Path, json_report: dict[str, Any], quick: bool) -> None:
    """Dumped and restored again and again."""
    beats = tmp_path / "beats"
    argv = ["sleep", "infinity"] if kind == "sleep" else [sys.executable, "-I", "-S", str(HEARTBEAT), str(beats)]
    freezes, restores = [], []
    async with two_nodes(tmp_path / "nodes") as nodes:
        for _ in range(2 if quick else 5):
            pid = await start_tree(nodes.a, argv, tmp_path / "log")
            if kind == "python":
                await until(lambda: read_beats(beats).count > 20, 30)
            freeze, restore = await _once(nodes, pid)
            freezes.append(freeze)
            restores.append(restore)
            beats.unlink(missing_ok=True)
    json_report.setdefault("floor", []).append({"process": kind, "freeze_s": freezes, "restore_s": restores})
    sys.stdout.write(
        f"\nfloor, {kind}: freeze and dump {statistics.median(freezes) * 1000:.1f} ms, "
        f"restore {statistics.median(restores) * 1000:.1f} ms\n"
    )


async def _once(nodes: Nodes, pid: int) -> tuple[float, float]:
    criu, node = find_binary(), nodes.a
    await node.run(["mkdir", IMAGES])
    images = ["--images-dir", str(IMAGES), "-v2"]
    await node.run([*HURRIED, criu, "dump", "--tree", str(pid), *images])
    await node.run([*HURRIED, criu, "restore", "--restore-detached", "--pidfile", "root", *images])
    inside = node.root / IMAGES.relative_to("/")
    dumped = parse_dump_stats((inside / "stats-dump").read_bytes())
    restored = parse_restore_stats((inside / "stats-restore").read_bytes())
    await node.run(["kill", "-KILL", (inside / "root").read_text()])
    await node.run(["rm", "-r", IMAGES])
    return (
        (dumped.freezing_microseconds + dumped.frozen_microseconds) / 1e6,
        restored.restore_microseconds / 1e6,
    )
