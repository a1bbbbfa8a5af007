"""Two phaulds of different versions: an older one moves trees to today's and back; two that do not fit are refused.

The older one is the first that README.md described, taken from this repository's history, with its own code for the
API; and a client that only knows the API of that day, whose descriptor is kept here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from tests import daemon
from tests.nodes import PROGRAMS, ROOT, Node, Nodes
from tests.started import Completed

pytestmark = pytest.mark.criu

OLDER: Final = "7b7346b8"
DESCRIPTOR: Final = Path(__file__).with_name(f"api-{OLDER}.binpb")
#: Today's phauld but for what it says of itself.
OTHER: Final = "import phauld.node; phauld.node.API_FEATURES = {}; from phauld.__main__ import main; main()"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the older version, with its generated code."""
    directory = tmp_path_factory.mktemp("older")
    archive = subprocess.run(["git", "-C", ROOT, "archive", OLDER], capture_output=True, timeout=60)
    if archive.returncode != 0:
        pytest.skip(f"the history of this checkout does not reach back to {OLDER}")
    subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True, timeout=60)
    protos = [str(path.relative_to(directory / "proto")) for path in sorted((directory / "proto").rglob("*.proto"))]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", "--python_out=.", "--grpc_python_out=."]
    subprocess.run([*protoc, *protos], cwd=directory / "proto", check=True, timeout=60)
    return directory


def of(checkout: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{checkout}:{checkout / 'proto'}"}


async def start(node: Node, argv: list[str], env: dict[str, str] | None = None) -> None:
    """A phauld that is not today's, with the settings of today's that were known then."""
    settings: dict[str, object] = {
        "listen": f"{node.address}:{daemon.PORT}",
        "unix": daemon.SOCKET,
        "data_port": daemon.DATA_PORT,
        "state_dir": daemon.STATE_DIR,
        "images_dir": daemon.IMAGES_DIR,
        "log_dir": daemon.LOG_DIR,
        "node_name": node.name,
        "insecure": True,
    }
    file = node.directory / "phauld.toml"
    file.write_text("".join(f"{key} = {daemon._toml(value)}\n" for key, value in settings.items()))
    process = await node.start([sys.executable, *argv, "--config", file], env=env, log=node.directory / "phauld.log")
    await node.daemon._until_serving(process)


async def older_phaul(node: Node, checkout: Path, *words: str) -> Completed:
    return await node.run([sys.executable, "-m", "phaul_client.cli", *words], check=False, env=of(checkout))


@pytest.mark.slow
async def test_an_older_phauld(nodes: Nodes, older: Path) -> None:
    """There and back, each way once with the older command and once with today's."""
    await start(nodes.a, ["-m", "phauld"], of(older))
    await nodes.b.start_phauld()
    await nodes.a.phaul("run", "--name", "sleeper", "--", "sleep", "1000", check=True)
    for source, target, with_older in (
        (nodes.a, nodes.b, True),
        (nodes.b, nodes.a, False),
        (nodes.a, nodes.b, False),
        (nodes.b, nodes.a, True),
    ):
        words = ("migrate", "sleeper", "--to", target.name)
        moved = await (older_phaul(source, older, *words) if with_older else source.phaul(*words))
        assert moved.returncode == 0, f"{source.name} with_older={with_older}: {moved.stdout}{moved.stderr}"
        assert f"moved sleeper to {target.name}" in moved.stdout
        running = await older_phaul(target, older, "ps") if with_older else await target.phaul("ps")
        assert "running" in running.stdout


class Client:
    """Knows the API as it was, and nothing of today's modules."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR.read_bytes()).file:
            self._pool.Add(file)

    async def call(self, service: str, call: str, /, **fields: Any) -> dict[str, Any]:
        """One call; the answer, or the first of a stream, as JSON."""
        method = self._pool.FindServiceByName(f"phaul.v1.{service}").methods_by_name[call]
        request = json_format.ParseDict(fields, message_factory.GetMessageClass(method.input_type)())
        kind = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        made: Any = kind(
            f"/phaul.v1.{service}/{call}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        answers = made(request, timeout=30)
        last: Any = None
        if method.server_streaming:
            async for each in answers:
                last = each
        else:
            last = await answers
        found: dict[str, Any] = json_format.MessageToDict(last)
        return found


async def test_an_older_client(daemons: Nodes) -> None:
    """Every kind of thing that an orchestrator does, with the API of that day."""
    async with daemons.a.daemon.channel() as channel:
        client = Client(channel)
        assert (await client.call("Node", "GetInfo"))["node"]["nodeName"] == "a"
        await client.call("Node", "RunWorkload", spec={"name": "sleeper", "argv": ["sleep", "1000"]})
        found = (await client.call("Node", "ListWorkloads"))["workloads"]
        assert [each["spec"]["name"] for each in found] == ["sleeper"]
        asked = {"migration_id": "old", "workload": "sleeper", "destination": f"{daemons.b.address}:{daemon.PORT}"}
        await client.call("Migrations", "StartMigration", **asked)
        ended = (await client.call("Migrations", "WatchMigration", migration_id="old"))["migration"]
        assert ended["phase"] == "MIGRATION_PHASE_DONE", ended
    async with daemons.b.daemon.channel() as channel:
        client = Client(channel)
        assert (await client.call("Node", "GetWorkload", name="sleeper"))["workload"]["state"].endswith("RUNNING")
        session = (await client.call("Remote", "GetSession", migration_id="old"))["session"]
        assert session["phase"] == "SESSION_PHASE_RUNNING"
        source = {"apiFeatures": ["commit-v1", "put-images-v1"]}
        tree = await client.call("Remote", "CheckTree", migration_id="next", tree={"rootPid": 1}, source=source)
        assert "destination" in tree


@pytest.mark.parametrize("odd", ["a", "b"], ids=["source", "destination"])
async def test_two_that_do_not_fit(nodes: Nodes, odd: str) -> None:
    """Refused before the tree stands still, whichever of them is the newer."""
    for node in (nodes.a, nodes.b):
        if node.name == odd:
            await start(node, ["-c", OTHER.format(("commit-v2", "put-images-v1"))])
        else:
            await node.start_phauld()
    await nodes.a.phaul("run", "--name", "sleeper", "--", "sleep", "1000", check=True)
    refused = await nodes.a.run(
        [PROGRAMS / "phaul", "migrate", "sleeper", "--to", nodes.b.address, "--json"], check=False
    )
    report = refused.events()[-1]
    assert report["outcome"] == "refused", report
    assert report["error"]["reason"] == "PEER_INCOMPATIBLE", report
    assert f"{'a' if odd == 'a' else 'b'} (phaul" in report["error"]["message"]
    assert "commit-v1" in report["error"]["message"]
    assert not report["timeline"]
    assert "running" in (await nodes.a.phaul("ps", check=True)).stdout
    assert "sleeper" not in (await nodes.b.phaul("ps", check=True)).stdout


def test_the_older_api_is_a_part_of_todays() -> None:
    """Also without the history of this repository."""
    if shutil.which("npm") is None:
        pytest.skip("npm is missing, so there is no buf: apt-get install npm")
    found = subprocess.run([ROOT / "scripts" / "proto-check", "--buf"], capture_output=True, text=True, timeout=110)
    if found.returncode != 0:
        pytest.skip(f"buf cannot be had here: {found.stderr.strip()}")
    done = subprocess.run(
        [found.stdout.strip(), "breaking", "proto", "--against", DESCRIPTOR], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
