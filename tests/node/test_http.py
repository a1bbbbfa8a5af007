"""What phauld tells: metrics that the examples in deploy/ use, the page in a real browser, log lines, health."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, types_pb2
from tests.browser import browser, browser_missing
from tests.node.test_daemons import Victim
from tests.nodes import Node, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

ROOT: Final = Path(__file__).resolve().parents[2]
HTTP: Final = "127.0.0.1:7709"
FETCH: Final = """
import sys, urllib.error, urllib.request
try:
    headers = dict(word.split("=", 1) for word in sys.argv[2:])
    answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers))
except urllib.error.HTTPError as exc:
    answer = exc
print(answer.status, dict(answer.headers))
sys.stdout.flush()
sys.stdout.buffer.write(answer.read())
"""


async def fetch(node: Node, path: str, *headers: str) -> tuple[int, str, str]:
    """Status, headers and body of a page of the node's own."""
    done = await node.run([sys.executable, "-I", "-c", FETCH, f"http://{HTTP}{path}", *headers], check=True)
    head, _, body = done.stdout.partition("\n")
    return int(head[:3]), head[4:], body


async def moved(nodes: Nodes) -> None:
    for node in (nodes.a, nodes.b):
        await node.start_phauld(http_listen=HTTP, log_format="json")
    await nodes.a.phaul("run", "--name", "clock", "--", "sleep", "1000", check=True)
    await nodes.a.phaul("migrate", "clock", "--to", nodes.b.address, check=True)


async def test_the_page_is_read_only_and_for_this_machine(nodes: Nodes) -> None:
    await moved(nodes)
    status, headers, _ = await fetch(nodes.a, "/")
    assert status == 200
    assert "default-src 'none'" in headers
    assert (await fetch(nodes.a, "/", "Host=evil.example"))[0] == 421
    assert (await fetch(nodes.a, "/api/migrations/none"))[0] == 404
    assert (await fetch(nodes.a, "/../web.py"))[0] == 404
    assert (await fetch(nodes.a, "/healthz"))[0] == 200
    state: dict[str, Any] = json.loads((await fetch(nodes.a, "/api/state"))[2])
    (migration,) = state["migrations"]
    assert (migration["outcome"], migration["workload"]) == ("moved", "clock")
    status, _, report = await fetch(nodes.a, f"/migrations/{migration['migration_id']}/report")
    assert status == 200
    assert "<svg" in report


async def test_a_port_that_is_taken_is_told_before_anything_is_served(nodes: Nodes) -> None:
    await nodes.a.start_phauld(http_listen=HTTP)
    words = ["--listen", "127.0.0.1:9707", "--data-port", "9708", "--unix", "/run/other.sock", "--http-listen", HTTP]
    words += ["--state-dir", "/run/other", "--images-dir", "/run/images", "--log-dir", "/run/log"]
    done = await nodes.a.run([nodes.a.programs / "phauld", *words], check=False)
    assert done.returncode == 1
    said = done.stderr
    assert f"cannot listen on {HTTP}: Address already in use" in said
    assert "Traceback" not in said
    assert not (nodes.a.root / "run/other.sock").exists()


async def test_log_lines_are_objects_with_the_migration(nodes: Nodes) -> None:
    await moved(nodes)
    assert nodes.a.daemon.process is not None
    lines = [json.loads(line) for line in nodes.a.daemon.process.log.read_text().splitlines()]
    (line,) = [each for each in lines if each["event"] == "moved"]
    assert line["migration_id"]
    assert isinstance(line["pid"], int)
    assert line["level"] == "info"


POLL: Final = """
import sys, urllib.error, urllib.request
while True:
    try:
        print(urllib.request.urlopen(sys.argv[1]).status, flush=True)
    except urllib.error.HTTPError as exc:
        sys.exit(f"{exc.code} {exc.read().decode().strip()}")
"""


async def test_health_says_so_while_phauld_stops(daemons: Nodes) -> None:
    await daemons.a.kill_phauld(signal.SIGTERM)
    await daemons.a.start_phauld(http_listen=HTTP)
    probe = await daemons.a.start([sys.executable, "-I", "-c", POLL, f"http://{HTTP}/healthz"])
    await until(lambda: probe.log.exists() and "200" in probe.log.read_text())
    request = health_pb2.HealthCheckRequest(service="phaul.v1.Remote")
    async with daemons.a.daemon.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no method
        told = stub.Watch(request)
        assert (await told.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert daemons.a.daemon.process is not None
        daemons.a.daemon.process.send_signal(signal.SIGTERM)
        assert (await told.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await probe.wait()  # the stream that is open keeps phauld for a second
        assert probe.log.read_text().splitlines()[-1] == "503 stopping"
        told.cancel()
    assert await daemons.a.daemon.process.wait() == 0


FITS: Final = "document.documentElement.scrollWidth <= innerWidth"
LONG_NAME: Final = "a-workload-with-quite-a-long-name-of-its-own"
MANY: Final = 50


async def refuse_many(node: Node, name: str, destination: str, number: int) -> None:
    """So many migrations that are refused: none of them has that little time."""
    async with node.daemon.channel() as channel:
        stub = migrations_pb2_grpc.MigrationsStub(channel)
        for each in range(number):
            request = migrations_pb2.StartMigrationRequest(
                migration_id=f"refused-{each}",
                workload=name,
                destination=destination,
                options=types_pb2.Options(deadline=duration_pb2.Duration(nanos=1_000_000)),
            )
            started = (await stub.StartMigration(request)).migration
            watched = migrations_pb2.WatchMigrationRequest(migration_id=started.migration_id)
            async for _ in stub.WatchMigration(watched):
                pass  # until it is over


async def test_a_browser_shows_what_moves_and_what_has_moved(nodes: Nodes, tmp_path: Path) -> None:
    """In a window of every width, bright and dark, with nothing, one and many migrations to show."""
    if reason := browser_missing():
        pytest.skip(reason)
    for node in (nodes.a, nodes.b):
        await node.start_phauld(http_listen=HTTP)
    async with browser(nodes.a, tmp_path) as page:
        await page.open(f"http://{HTTP}/", width=400, height=700)
        await page.until("document.body.innerText.includes('Nothing has left this node yet')")
        await Victim.start(nodes.a, tmp_path, LONG_NAME, 64)
        await nodes.a.limit_bandwidth(2 << 20)  # half a minute, or until that is undone
        await nodes.a.phaul("migrate", LONG_NAME, "--to", nodes.b.address, "--detach", check=True)
        await page.until("document.querySelector('.card progress')?.value > 0")
        assert LONG_NAME in await page.value("document.querySelector('.card').textContent")
        assert await page.value(FITS)
        async with browser(nodes.b, tmp_path / "b") as there:
            await there.open(f"http://{HTTP}/", width=400, height=700)
            await there.until("document.querySelector('#incoming td')")
            assert await there.value(FITS)
        await nodes.a.limit_bandwidth(None)
        await page.until("document.querySelector('#finished .ok')")
        await nodes.a.phaul("run", "--name", "clock", "--", "sleep", "1000", check=True)
        await refuse_many(nodes.a, "clock", nodes.b.address, MANY)
        await page.until(f"document.querySelectorAll('#finished tr').length == {MANY + 1}")
        await page.value("[...document.querySelectorAll('#finished tr')].at(-1).click()")
        await page.until("document.querySelector('#detail svg rect')")
        steps = await page.value("document.querySelector('#detail').textContent")
        assert "freeze and dump" in steps
        assert await page.value("document.querySelector('.chosen').nextSibling.id") == "detail"
        for width, dark in ((400, False), (1100, True)):
            await page.open(await page.value("location.href"), width=width, height=700, dark=dark)
            await page.until("document.querySelector('#detail svg rect')")
            assert await page.value(FITS), width
            background = await page.value("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(15, 20, 27)") == dark
        assert page.problems == []
