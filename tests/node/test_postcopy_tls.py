"""Post-copy between daemons with TLS: its relays speak TLS too, also after a cut and after a restart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.node.test_postcopy import (
    CUT_DATA_PORT,
    SLOW_BYTES_PER_SECOND,
    Victim,
    heartbeats,
    large_pipes,
    start_move,
    until_phase,
)
from tests.node.test_tls import _MARK, moved_bytes, nodes
from tests.nodes import ROOT, Nodes, until

__all__ = ["large_pipes", "nodes"]
pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]


async def restart(nodes: Nodes, tmp_path: Path) -> None:
    for node in (nodes.b, nodes.a):
        await node.kill_phauld()
        await node.start_phauld(tls_dir=tmp_path / node.name, insecure=False)


async def test_pages_are_not_seen_on_the_network(nodes: Nodes, tmp_path: Path) -> None:
    report, seen = await moved_bytes(nodes, tmp_path, "--mode", "post-copy")
    assert report["mode"] == "post-copy"
    assert len(seen) > 20 * len(_MARK) * 10_000  # it was looked at
    assert seen.count(_MARK) == 0


async def test_a_cut_and_a_restart_while_it_fills(nodes: Nodes, tmp_path: Path) -> None:
    """With certificates that were renewed meanwhile: each connection reads them anew."""
    await nodes.a.limit_bandwidth(SLOW_BYTES_PER_SECOND)
    victim = await Victim.start(nodes.a, tmp_path / "beats", 128)
    move = await start_move(nodes, "--detach")
    await until_phase(nodes.a, "filling")
    assert await move.wait(60) == 0
    await nodes.b.run(["nft", "-f", "-"], stdin=CUT_DATA_PORT.encode())
    log = nodes.a.directory / "phauld.log"
    await until(lambda: "page link not made" in log.read_text(), 20)
    await nodes.b.run(["nft", "delete", "table", "inet", "cut"])
    await until(lambda: "page link made" in log.read_text(), 20)
    await restart(nodes, tmp_path)
    await until_phase(nodes.a, "done", 60)
    await victim.check(nodes.b)
    assert heartbeats(nodes.a) == []


THIEF = """
import json, os, socket, ssl, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from phaul_client.wire import make_tls
address, token, directory = sys.argv[2], bytes.fromhex(sys.argv[3]), sys.argv[4]
sock = socket.create_connection((address, 7708))
sock.sendall(b"PHAULPG\\x01" + bytes([0, 1, 0, 2, 0, 0, 0, 0]) + token)
assert sock.recv(1) == b"\\0"
try:
    make_tls(sock, Path(directory), "b", server_side=False)
    print("in")
except OSError as error:
    print(error)
"""
ASK_TOKEN = """
import sys
sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[1] + "/proto")
import grpc
from pathlib import Path
from phaul.v1 import remote_pb2, remote_pb2_grpc
from phaul_client.tls import Tls
options = [("grpc.ssl_target_name_override", "b")]
channel = grpc.secure_channel(sys.argv[2] + ":7707", Tls(Path(sys.argv[3])).channel_credentials(), options)
stub = remote_pb2_grpc.RemoteStub(channel)
for tls in (False, True):
    try:
        asked = remote_pb2.OpenStreamRequest(migration_id=sys.argv[4], kind=2, tls=tls)
        print(stub.OpenStream(asked).data_token.hex())
    except grpc.RpcError as error:
        print(error.details())
"""


async def test_a_stolen_token_and_pages_in_clear(nodes: Nodes, tmp_path: Path) -> None:
    """The link that is there goes on; whoever has another certificate gets no byte."""
    await nodes.a.limit_bandwidth(SLOW_BYTES_PER_SECOND)
    victim = await Victim.start(nodes.a, tmp_path / "beats", 128)
    await start_move(nodes, "--detach")
    await until_phase(nodes.a, "filling")
    listed = json.loads((await nodes.a.phaul("status", "--json", check=True)).stdout)["migrations"]
    words: list[str | Path] = [
        sys.executable,
        "-c",
        ASK_TOKEN,
        str(ROOT),
        nodes.b.address,
        tmp_path / "a",
        str(listed[0]["migration_id"]),
    ]
    in_clear, token = (await nodes.a.run(words)).stdout.split("\n")[:2]
    assert "in clear" in in_clear
    words = [sys.executable, "-c", THIEF, ROOT, nodes.b.address, token, tmp_path / "stranger"]
    assert "does not take this node" in (await nodes.a.run(words)).stdout
    await until_phase(nodes.a, "done", 60)
    assert "page link made" not in (nodes.a.directory / "phauld.log").read_text()
    await victim.check(nodes.b)
