"""`http_listen` beyond loopback with TLS: HTTPS for those whom the policy names, each for what it may see."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phaul_client.certs import issue, make_ca
from tests.nodes import Node, two_nodes

pytestmark = pytest.mark.criu

POLICY = "[peers.admin]\nadminister = true\n[peers.prometheus]\n"
FETCH = """
import ssl, sys, urllib.error, urllib.request
url, ca, directory = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
context.check_hostname = False
if directory != "none":
    context.load_cert_chain(directory + "/node.crt", directory + "/node.key")
try:
    print(urllib.request.urlopen(url, context=context, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print("no connection", error)
"""


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    make_ca(tmp_path / "ca")
    make_ca(tmp_path / "rogue-ca")
    for name in ("b", "admin", "prometheus", "stranger"):
        issue(tmp_path / "ca", name, tmp_path / name)
    issue(tmp_path / "ca", "admin", tmp_path / "expired", days=-1)
    issue(tmp_path / "rogue-ca", "admin", tmp_path / "rogue")
    (tmp_path / "b" / "policy.toml").write_text(POLICY)
    async with two_nodes(tmp_path / "nodes") as nodes:
        node = nodes.b
        await node.start_phauld(tls_dir=tmp_path / "b", insecure=False, http_listen=f"{node.address}:7709")
        yield node


async def fetch(node: Node, who: Path | str, path: str, ca: Path) -> str:
    words = [sys.executable, "-I", "-c", FETCH, f"https://{node.address}:7709{path}", str(ca), str(who)]
    return (await node.run(words)).stdout.strip()


async def test_who_may_see_what(node: Node, tmp_path: Path) -> None:
    ca = tmp_path / "ca" / "ca.crt"
    for path in ("/", "/metrics", "/healthz", "/api/state"):
        assert await fetch(node, tmp_path / "admin", path, ca) == "200"
        assert "not in the policy" in await fetch(node, tmp_path / "stranger", path, ca)
        for nobody in ("none", tmp_path / "expired", tmp_path / "rogue"):
            assert "no connection" in await fetch(node, nobody, path, ca), (nobody, path)
    assert await fetch(node, tmp_path / "prometheus", "/metrics", ca) == "200"
    assert await fetch(node, tmp_path / "prometheus", "/healthz", ca) == "200"
    for path in ("/", "/api/state", "/api/migrations/x", "/migrations/x/report"):
        assert (await fetch(node, tmp_path / "prometheus", path, ca)).startswith("403 prometheus has no right")
    plain = [sys.executable, "-I", "-c", FETCH, f"http://{node.address}:7709/", str(ca), "none"]
    assert "200" not in (await node.run(plain)).stdout


async def test_what_is_replaced_counts_at_once(node: Node, tmp_path: Path) -> None:
    ca = tmp_path / "ca" / "ca.crt"
    (tmp_path / "b" / "policy.toml").write_text("[peers.prometheus]\n")
    assert "not in the policy" in await fetch(node, tmp_path / "admin", "/", ca)
    make_ca(tmp_path / "ca2")
    issue(tmp_path / "ca2", "b", tmp_path / "b2")
    issue(tmp_path / "ca2", "prometheus", tmp_path / "prometheus2")
    for file in ("ca.crt", "node.key", "node.crt"):
        os.replace(tmp_path / "b2" / file, tmp_path / "b" / file)
    ca2 = tmp_path / "ca2" / "ca.crt"
    assert await fetch(node, tmp_path / "prometheus2", "/metrics", ca2) == "200"
    assert "no connection" in await fetch(node, tmp_path / "prometheus", "/metrics", ca2)
