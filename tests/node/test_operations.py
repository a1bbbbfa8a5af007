"""What docs/operations.md tells to do about firewalls and certificates, done as it is written there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.node.test_daemons import Victim
from tests.nodes import ROOT, Node, Nodes
from tests.started import Completed

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

GUIDE: Final = (ROOT / "docs/operations.md").read_text()
PORTS: Final = (7707, 7708)
CONNECTS: Final = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.5)"
POLICY: Final = """
revoked = []
[peers.admin]
administer = true
"""


def blocks(heading: str, language: str) -> list[str]:
    """The examples below a heading of the guide."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", GUIDE, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


async def reaches(node: Node, address: str) -> list[int]:
    """Those of phauld's ports that answer to a connection."""
    asked = {port: await node.run(["python3", "-c", CONNECTS, address, str(port)], check=False) for port in PORTS}
    return [port for port, done in asked.items() if done.returncode == 0]


async def test_the_firewall_lets_nodes_in_and_nobody_else(nodes: Nodes, tmp_path: Path) -> None:
    a, b, client = nodes
    for node in (a, b):
        await node.start_phauld(listen="0.0.0.0:7707")
    await Victim.start(a, tmp_path, "victim", 1)
    assert await reaches(client, b.lan_address) == [7707, 7708]
    (rules,) = blocks("Firewall", "nft")
    rules = rules.replace("10.0.0.2, 10.0.0.3", f"{a.address}, {b.address}")
    await b.run(["nft", "-f", "-"], stdin=rules.encode())
    assert await reaches(client, b.lan_address) == []
    assert await reaches(a, b.address) == [7707, 7708]
    await a.phaul("migrate", "victim", "--to", b.address, check=True)
    (command,) = re.findall(r"`(nft add element [^`]*)`", GUIDE)
    assert "phaul_ports nodes" in command
    await b.run(["sh", "-c", command.replace("nodes", "admins").replace("10.0.0.4", client.lan_address)])
    assert await reaches(client, b.lan_address) == [7707]
    await b.run(["nft", "delete", "table", "inet", "phaul_ports"])
    assert await reaches(client, b.lan_address) == [7707, 7708]


async def test_certificates_are_made_renewed_and_revoked(nodes: Nodes, tmp_path: Path) -> None:
    a = nodes.a
    made, renew, revoke = blocks("Certificates", "sh")
    tls = tmp_path / "tls"

    async def do(block: str) -> Completed:
        lines = f"cd {tmp_path}\nexport PATH={a.programs}:$PATH TLS={tls}\n{block}"
        return await a.run(["sh", "-ec", lines])

    async def ask() -> Completed:
        words: list[str | Path] = [
            "--tls-dir",
            tmp_path / "admin",
            "--tls-name",
            "node-a",
            "--daemon",
            f"{a.address}:7707",
            "ps",
        ]
        return await a.phaul(*words)

    shown = await do(made)
    assert "notAfter=" in shown.stdout
    assert "Fingerprint=" in shown.stdout
    shutil.copytree(tmp_path / "node-a", tls)
    (tls / "policy.toml").write_text(POLICY)
    await a.start_phauld(tls_dir=tls, insecure=False)
    assert (await ask()).returncode == 0
    before = (tls / "node.crt").read_bytes()
    await do(renew)
    assert (tls / "node.crt").read_bytes() != before
    assert (await ask()).returncode == 0
    await do("phaul certs init --ca other && phaul certs issue --ca other --name admin --out theirs")
    await do('cat other/ca.crt >>"$TLS/ca.crt" && cat ca/ca.crt >>theirs/ca.crt && mv admin first && mv theirs admin')
    assert (await ask()).returncode == 0, "of the new CA, while both count"
    await do(revoke)
    refused = await ask()
    assert refused.returncode != 0
    assert "revoked" in refused.stderr
    assert (await do("mv admin second && mv first admin")).returncode == 0
    assert (await ask()).returncode == 0, "the other certificate of the same name still counts"
