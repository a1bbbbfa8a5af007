"""gRPC over mutual TLS between real daemons: who gets in, reload without a restart, a move."""

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phaul_client.certs import issue, make_ca
from tests.nodes import PROGRAMS, Nodes, two_nodes, until
from tests.started import Completed

pytestmark = pytest.mark.criu

POLICY = (
    '[peers.{peer}]\nreceive_from = true\nsend_to = true\naddresses = ["{address}"]\n[peers.admin]\nadminister = true\n'
)


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    make_ca(tmp_path / "ca")
    make_ca(tmp_path / "rogue-ca")
    async with two_nodes(tmp_path / "nodes") as nodes:
        for name in ("a", "b", "admin", "stranger"):
            issue(tmp_path / "ca", name, tmp_path / name)
        issue(tmp_path / "rogue-ca", "admin", tmp_path / "rogue")
        shutil.copy(tmp_path / "ca" / "ca.crt", tmp_path / "rogue" / "ca.crt")
        issue(tmp_path / "ca", "admin", tmp_path / "expired", days=-1)
        for node, peer in ((nodes.a, nodes.b), (nodes.b, nodes.a)):
            (tmp_path / node.name / "policy.toml").write_text(POLICY.format(peer=peer.name, address=peer.address))
            await node.start_phauld(tls_dir=tmp_path / node.name, insecure=False)
        yield nodes


async def ask(nodes: Nodes, directory: Path, *words: str, name: str = "b") -> Completed:
    argv: list[str | Path] = [PROGRAMS / "phaul", "--daemon", f"{nodes.b.address}:7707", *words]
    env = {"PHAUL_TLS_DIR": str(directory), "PHAUL_TLS_NAME": name}
    return await nodes.a.run(argv, check=False, env=env)


async def test_who_gets_in(nodes: Nodes, tmp_path: Path) -> None:
    assert (await ask(nodes, tmp_path / "admin", "ps")).returncode == 0
    refused = await ask(nodes, tmp_path / "a", "ps")
    assert refused.returncode != 0
    assert "a has no right administer" in refused.stderr
    assert (await ask(nodes, tmp_path / "a", "info")).returncode == 0
    assert "not in the policy" in (await ask(nodes, tmp_path / "stranger", "info")).stderr
    assert "page tls" in (await nodes.b.phaul("info", check=True)).stdout
    assert "kernel-tls" in (await nodes.b.phaul("doctor", check=True)).stdout
    for wrong in ("rogue", "expired"):
        assert (await ask(nodes, tmp_path / wrong, "ps")).returncode == 6, wrong
    assert (await ask(nodes, tmp_path / "admin", "ps", name="a")).returncode == 6
    assert (await nodes.a.phaul("--daemon", f"{nodes.b.address}:7707", "ps")).returncode == 6


async def test_certificates_are_replaced_without_a_restart(nodes: Nodes, tmp_path: Path) -> None:
    make_ca(tmp_path / "ca2")
    issue(tmp_path / "ca2", "b", tmp_path / "b2")
    issue(tmp_path / "ca2", "admin", tmp_path / "admin2")
    assert (await ask(nodes, tmp_path / "admin2", "ps")).returncode == 6
    for file in ("ca.crt", "node.key", "node.crt"):
        os.replace(tmp_path / "b2" / file, tmp_path / "b" / file)
    assert (await ask(nodes, tmp_path / "admin2", "ps")).returncode == 0
    assert (await ask(nodes, tmp_path / "admin", "ps")).returncode == 6
    (tmp_path / "b" / "policy.toml").write_text("")
    assert "not in the policy" in (await ask(nodes, tmp_path / "admin2", "ps")).stderr


async def test_a_move(nodes: Nodes, tmp_path: Path) -> None:
    await nodes.a.phaul("run", "--name", "sleeper", "--", "sleep", "1000", check=True)
    await nodes.a.phaul("migrate", "sleeper", "--to", nodes.b.address, check=True)
    assert "sleeper" in (await nodes.b.phaul("ps", check=True)).stdout


async def test_a_destination_that_the_policy_does_not_know(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "a" / "policy.toml").write_text("")
    await nodes.a.phaul("run", "--name", "sleeper", "--", "sleep", "1000", check=True)
    moved = await nodes.a.phaul("migrate", "sleeper", "--to", nodes.b.address)
    assert moved.returncode != 0
    assert "policy" in moved.stderr
    assert "sleeper" in (await nodes.a.phaul("ps", check=True)).stdout


_MARK = b"a page that nobody else shall read"
_VICTIM = f"data = [{_MARK!r} * 100_000 for _ in range(8)]\nimport time\nwhile True:\n    time.sleep(0.05)\n"
_SNIFF = """
import socket, sys
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
sniffer.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
print("sniffs", flush=True)
sniffer.settimeout(0.5)
with open(sys.argv[1], "wb") as file:
    while True:
        try:
            file.write(sniffer.recv(1 << 17))
        except TimeoutError:
            file.flush()
"""


async def moved_bytes(nodes: Nodes, tmp_path: Path, *options: str) -> tuple[dict[str, object], bytes]:
    """Move a program with memory that is known; the report, and all that was seen on the network meanwhile."""
    await nodes.a.phaul("run", "--name", "victim", "--", sys.executable, "-c", _VICTIM, check=True)
    seen = tmp_path / "seen"
    sniffer = await nodes.a.start([sys.executable, "-c", _SNIFF, seen])
    await until(lambda: seen.exists(), 10)
    report = (
        await nodes.a.phaul("migrate", "victim", "--to", nodes.b.address, "--json", *options, check=True)
    ).events()
    size = -1
    while size != seen.stat().st_size:
        size = seen.stat().st_size
        await asyncio.sleep(1)
    await sniffer.stop(9)
    return report[-1], seen.read_bytes()


async def test_pages_are_not_seen_on_the_network(nodes: Nodes, tmp_path: Path) -> None:
    report, seen = await moved_bytes(nodes, tmp_path)
    assert "TLS" in str(report["page_stream"])
    assert len(seen) > 20 * len(_MARK) * 10_000  # it was looked at
    assert seen.count(_MARK) == 0


async def test_without_tls_they_are(tmp_path: Path) -> None:
    """So that the test above is one."""
    async with two_nodes(tmp_path / "nodes") as nodes:
        for node in (nodes.a, nodes.b):
            await node.start_phauld()
        report, seen = await moved_bytes(nodes, tmp_path)
        assert "TLS" not in str(report["page_stream"])
        assert seen.count(_MARK) > 1000
