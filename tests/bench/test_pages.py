"""How fast pages go from criu to criu: by hand, and by phaul without a pipe and with each kind of pipe.

    ./check bench [--quick] [--json FILE]

The speed is criu's own: pages written by the dump, by the time that it took to write them (`stats-dump`). One process,
variants in turn, memory warmed before each. Half of the memory is noise, half is text. `link`: what the sending side's
TCP is limited to, by `--bandwidth`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from phaul_client.certs import issue, make_ca
from phaul_criu.install import find_binary
from phaul_criu.stats import parse_dump_stats
from tests.by_hand import IMAGES, PORT, _until_listening, start_tree, warm_memory
from tests.nodes import Node, Nodes, two_nodes, until

pytestmark = [pytest.mark.bench, pytest.mark.criu, pytest.mark.timeout(1800)]

MIB: Final = 1 << 20
PAGE_BYTES: Final = 4096
_VICTIM: Final = """
import glob, os, sys, time
text = b"".join(open(name, "rb").read() for name in sorted(glob.glob(os.path.dirname(os.__file__) + "/*.py")))
data = bytearray(int(sys.argv[1]) << 20)
for start in range(0, len(data), 1 << 16):
    at = start * 7 % (len(text) - 32768)
    data[start : start + 32768] = os.urandom(32768)
    data[start + 32768 : start + 65536] = text[at : at + 32768]
open(sys.argv[2], "w").close()
while True:
    time.sleep(0.05)
"""
POLICY: Final = '[peers.{peer}]\nreceive_from = true\nsend_to = true\naddresses = ["{address}"]\n'
VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "no pipe": ("--no-checksum",),
    "checksums": ("--checksum",),
    "lz4": ("--compression", "lz4"),
    "zstd": ("--compression", "zstd"),
    "auto": ("--compression", "auto"),
    "TLS": (),
    "TLS, auto": ("--compression", "auto"),
}
BY_HAND: Final = "by hand"
LINKS: Final = {"veth": (), "1 Gbit/s": ("--bandwidth", "1Gbit"), "10 Gbit/s": ("--bandwidth", "10Gbit")}


@pytest.fixture
async def pairs(tmp_path: Path) -> AsyncIterator[dict[bool, Nodes]]:
    """Two nodes without TLS, and two with it."""
    make_ca(tmp_path / "ca")
    async with two_nodes(tmp_path / "clear") as clear, two_nodes(tmp_path / "tls") as secured:
        for node in (clear.a, clear.b):
            await node.start_phauld()
        for node, peer in ((secured.a, secured.b), (secured.b, secured.a)):
            directory = tmp_path / f"certificates-{node.name}"
            issue(tmp_path / "ca", node.name, directory)
            (directory / "policy.toml").write_text(POLICY.format(peer=peer.name, address=peer.address))
            await node.start_phauld(tls_dir=directory, insecure=False)
        yield {False: clear, True: secured}


@pytest.mark.parametrize("link", LINKS)
async def test_pages(
    link: str, pairs: dict[bool, Nodes], tmp_path: Path, json_report: dict[str, Any], quick: bool
) -> None:
    """Each variant, in turn, the order turned each time."""
    mib = 256 if quick or link == "1 Gbit/s" else 512
    variants = [*([BY_HAND] if link == "veth" else []), *VARIANTS]
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    wire: dict[str, float] = {}
    for number in range(2 if quick else 5):
        turned = variants[number % len(variants) :] + variants[: number % len(variants)]
        for name in turned:
            nodes = pairs[name.startswith("TLS")]
            await warm_memory(nodes.a, mib * MIB)
            ready = tmp_path / f"{number}-{name}".replace(" ", "-")
            if name == BY_HAND:
                speeds[name].append(await _by_hand(nodes, mib, ready))
                continue
            report = await _by_phaul(nodes, mib, ready, *VARIANTS[name], *LINKS[link])
            speeds[name].append(report["rounds"][-1]["bandwidth_bytes_per_second"])
            wire[name] = report["wire_bytes"] / max(1, report["bytes"])
    rows = [
        {"link": link, "variant": name, "mib": mib, "bytes_per_second": values, "wire_share": wire.get(name, 1.0)}
        for name, values in speeds.items()
    ]
    json_report.setdefault("pages", []).extend(rows)
    for name, values in speeds.items():
        spread = f"{statistics.median(values) / 1e6:.0f} MB/s ({min(values) / 1e6:.0f} to {max(values) / 1e6:.0f})"
        sys.stdout.write(f"\n{link}, {mib} MiB, {name}: {spread}, {wire.get(name, 1.0):.2f} on the wire")
    sys.stdout.write("\n")


async def _by_phaul(nodes: Nodes, mib: int, ready: Path, *options: str) -> dict[str, Any]:
    argv = [sys.executable, "-I", "-S", "-c", _VICTIM, mib, ready]
    await nodes.a.phaul("run", "--name", "victim", "--", *map(str, argv), check=True)
    await until(ready.exists, 60)
    words = ("migrate", "victim", "--to", nodes.b.address, "--mode", "stop-copy", "--json", *options)
    report = (await nodes.a.phaul(*words, check=True)).events()[-1]
    await nodes.b.phaul("stop", "victim", "--grace", "0", check=True)
    await nodes.b.phaul("rm", "victim", check=True)
    await nodes.a.phaul("rm", "victim")
    return dict(report)


async def _by_hand(nodes: Nodes, mib: int, ready: Path) -> float:
    criu = find_binary()
    argv = [sys.executable, "-I", "-S", "-c", _VICTIM, str(mib), str(ready)]
    pid = await start_tree(nodes.a, argv, ready.with_suffix(".log"))
    await until(ready.exists, 60)
    for node in (nodes.a, nodes.b):
        await node.run(["mkdir", IMAGES])
    where = ["--page-server", "--address", nodes.b.address, "--port", str(PORT)]
    server = await nodes.b.start([criu, "page-server", "--images-dir", IMAGES, *where[1:]])
    await _until_listening(nodes.b)
    await nodes.a.run([criu, "dump", "--tree", str(pid), "--images-dir", IMAGES, *where])
    await server.wait()
    speed = _speed_of(nodes.a)
    for node in (nodes.a, nodes.b):
        await node.run(["rm", "-r", IMAGES])
    return speed


def _speed_of(node: Node) -> float:
    stats = parse_dump_stats((node.root / IMAGES.relative_to("/") / "stats-dump").read_bytes())
    return stats.pages_written * PAGE_BYTES / (stats.memwrite_microseconds / 1e6)
