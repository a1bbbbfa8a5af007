"""What phauld tells: metrics that the examples in deploy/ use, the page in a real browser, log lines, health."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
BROWSER: Final = shutil.which("chromium") or shutil.which("chromium-browser")


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


async def test_metrics_of_a_move_are_those_of_the_dashboard_and_the_alerts(nodes: Nodes) -> None:
    await moved(nodes)
    _, _, source = await fetch(nodes.a, "/metrics")
    _, _, destination = await fetch(nodes.b, "/metrics")
    assert 'phaul_migrations_ended_total{outcome="moved",reason=""} 1.0' in source
    assert re.search(r'phaul_migration_pause_seconds_count\{mode="[a-z-]+"\} 1.0', source)
    assert float(re.findall(r"^phaul_sent_bytes_total (\S+)", source, re.M)[0]) > 0
    assert "phaul_migration_phase_seconds_count" in source
    assert "phaul_freeze_step_seconds_count" in source
    for _ in range(100):  # the session is over when its images are gone
        if 'phaul_sessions_ended_total{outcome="running",reason=""} 1.0' in destination:
            break
        await asyncio.sleep(0.1)
        _, _, destination = await fetch(nodes.b, "/metrics")
    else:
        pytest.fail("the session was not counted")
    assert float(re.findall(r"^phaul_received_bytes_total (\S+)", destination, re.M)[0]) > 0
    there = set(re.findall(r"^(phaul_\w+)", source, re.M))
    for example in ("grafana-dashboard.json", "prometheus-alerts.yml"):
        used = set(re.findall(r"\bphaul_\w+", (ROOT / "deploy" / example).read_text()))
        assert used
        assert used <= there, (example, used - there)


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


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (apt-get install chromium)")
async def test_a_browser_shows_what_has_moved(nodes: Nodes, tmp_path: Path) -> None:
    await moved(nodes)
    state = json.loads((await fetch(nodes.a, "/api/state"))[2])
    url = f"http://{HTTP}/#{state['migrations'][0]['migration_id']}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    assert BROWSER is not None
    done = await nodes.a.run([BROWSER, *flags, "--virtual-time-budget=3000", "--dump-dom", url])
    assert "clock" in done.stdout
    assert 'class="ok"' in done.stdout
    assert "freeze and dump" in done.stdout, "the timeline is not there"
    assert "Refused to" not in done.stderr, "the page breaks its own policy"
