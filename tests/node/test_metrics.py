"""Every metric against a real move and what its report says; and what is made of them: the guide, alerts, dashboard."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.node.test_daemons import Victim
from tests.nodes import ROOT, Node, Nodes
from tests.prometheus import HTTP, Samples, scrape

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

DEPLOY: Final = ROOT / "deploy"
#: What makes up PromQL beside the names of metrics.
DASHBOARD_VARIABLES: Final = {"$__rate_interval": "5m", "$instance": ".*"}


async def settled(node: Node, name: str, **labels: str) -> Samples:
    """The metrics, when this counter has counted: a session is over when its images are gone."""
    async with asyncio.timeout(20):
        while not (seen := await scrape(node)).get(name, **labels):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.05)
        return seen


@pytest.fixture
async def served(nodes: Nodes) -> Nodes:
    """Two nodes whose phaulds serve metrics."""
    for node in (nodes.a, nodes.b):
        await node.start_phauld(http_listen=HTTP)
    return nodes


async def test_a_move_is_counted_as_its_report_says(served: Nodes, tmp_path: Path) -> None:
    a, b, _ = served
    await Victim.start(a, tmp_path, "victim", 16)
    report = (await a.phaul("migrate", "victim", "--to", b.address, "--json", check=True)).events()[-1]
    there = await settled(b, "phaul_sessions_ended_total", outcome="running", reason="")
    here = await scrape(a)
    assert there.get("phaul_sessions_ended_total", outcome="running", reason="") == 1
    assert here.get("phaul_migrations_ended_total", outcome="moved", reason="") == 1
    mode = report["mode"]
    assert here.get("phaul_migration_pause_seconds_count", mode=mode) == 1
    assert here.get("phaul_migration_pause_seconds_sum", mode=mode) == pytest.approx(
        report["pause_ms"] / 1000, abs=1e-3
    )
    assert here.get("phaul_migration_rounds_sum", mode=mode) == len(report["rounds"])
    total_seconds = here.get("phaul_migration_duration_seconds_sum", outcome="moved")
    assert total_seconds == pytest.approx(report["total_ms"] / 1000, abs=1e-3)
    assert here.get("phaul_sent_bytes_total") == report["bytes"] >= 16 << 20
    assert there.get("phaul_received_bytes_total") == pytest.approx(report["bytes"], rel=0.01)
    passed = here.values("phaul_migration_phase_seconds_count", "phase")
    assert passed == dict.fromkeys(passed, 1.0)
    expected = {"PREFLIGHT", "OPENING", "ITERATING", "FREEZING", "COPYING_IMAGES", "RESTORING", "PREPARED", "COMMITTED"}
    assert expected <= set(passed)
    assert sum(here.values("phaul_migration_phase_seconds_sum", "phase").values()) == pytest.approx(
        total_seconds, abs=0.2
    )
    steps = {step["name"] for step in report["timeline"] if step["node_name"] == "a"}
    assert set(here.values("phaul_freeze_step_seconds_count", "step")) == steps
    assert set(here.values("phaul_migrations", "phase").values()) == {0.0}
    assert (here.get("phaul_migrations_limit"), there.get("phaul_sessions_limit")) == (16, 16)
    assert here.get("phaul_memory_available_bytes") > 0 < here.get("phaul_images_free_bytes")
    assert here.labels("phaul_node_info")["node_name"] == "a"
    documented(here)
    for seen in (here, there):
        check("check", "metrics", stdin=seen.text)


async def test_what_goes_on_and_what_does_not_succeed(served: Nodes, tmp_path: Path) -> None:
    a, b, _ = served
    await Victim.start(a, tmp_path, "victim", 64)
    await a.limit_bandwidth(2 << 20)  # half a minute, or until it is cancelled
    started = (await a.phaul("migrate", "victim", "--to", b.address, "--detach", check=True)).stdout.split()[0]
    here, there = (
        await settled(a, "phaul_migrations", phase="FREEZING"),
        await settled(b, "phaul_sessions", phase="RECEIVING"),
    )
    assert here.get("phaul_migrations", phase="FREEZING") == there.get("phaul_sessions", phase="RECEIVING") == 1
    seen = await settled(a, "phaul_sent_bytes_total")
    assert seen.get("phaul_migrations_ended_total", outcome="moved", reason="") == 0, "bytes are counted meanwhile"
    again = await a.phaul("migrate", "victim", "--to", b.address)
    assert again.returncode != 0
    assert (await scrape(a)).get("phaul_calls_refused_total", reason="MIGRATION_EXISTS") == 1
    await a.phaul("cancel", started, check=True)
    await settled(a, "phaul_migrations_ended_total", outcome="cancelled", reason="CANCELLED")
    await settled(b, "phaul_sessions_ended_total", outcome="aborted")
    refused = await a.phaul("migrate", "victim", "--to", b.address, "--deadline", "1ms")
    assert refused.returncode == 3, refused.stdout
    ended = (await scrape(a)).values("phaul_migrations_ended_total", "outcome")
    assert ended == {"moved": 0, "cancelled": 1, "refused": 1}


async def test_restarts_are_counted(served: Nodes) -> None:
    a, _, _ = served
    await a.phaul("run", "--name", "brief", "--restart", "on-failure:1", "--", "sh", "-c", "exit 3", check=True)
    await settled(a, "phaul_workload_restarts_total", result="started")
    seen = await settled(a, "phaul_workloads", state="exited")  # the one restart is used up
    assert seen.values("phaul_workload_restarts_total", "result") == {"started": 1, "failed": 0}
    assert (seen.get("phaul_workloads", state="exited"), seen.get("phaul_workloads", state="running")) == (1, 0)


def documented(seen: Samples) -> None:
    """Each is in the guide, and those of the dashboard and of the alerts exist."""
    names = {family.name for family in text_string_to_metric_families(seen.text)}
    ours = {name for name in names if name.startswith("phaul_")}
    rows = re.findall(r"^\| (`phaul_.*?) \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    table = re.findall(r"phaul_\w+", " ".join(rows))
    assert {name.removesuffix("_total").removesuffix("_info") for name in table} == {
        name.removesuffix("_info") for name in ours
    }
    assert len(table) == len(set(table))
    samples = set(re.findall(r"^(phaul_\w+)", seen.text, re.MULTILINE))
    families = {name for name in ours if f"{name}_total" not in samples}
    known = samples | {f"{name}_{part}" for name in families for part in ("bucket", "sum", "count")}
    for example in ("grafana-dashboard.json", "prometheus-alerts.yml"):
        used = set(re.findall(r"\bphaul_\w+", (DEPLOY / example).read_text()))
        assert used
        assert used <= known, (example, used - known)


@functools.cache
def promtool() -> str:
    done = subprocess.run([ROOT / "scripts/promtool"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def check(*words: str | Path, stdin: str | None = None) -> None:
    done = subprocess.run(
        [promtool(), *words], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=DEPLOY
    )
    assert done.returncode == 0, done.stdout


def test_alerts_are_raised_when_they_should() -> None:
    check("check", "rules", "--lint=all", "--lint-fatal", "prometheus-alerts.yml")
    check("test", "rules", "prometheus-alerts-test.yml")
    tests = (DEPLOY / "prometheus-alerts-test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", (DEPLOY / "prometheus-alerts.yml").read_text()):
        assert re.search(rf"alertname: {alert}\b(?!, eval_time: \w+}}).*\n\s+exp_alerts", tests), (
            f"{alert} is not tested"
        )


def targets(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_each_question_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    rules = []
    for number, question in enumerate(targets(json.loads((DEPLOY / "grafana-dashboard.json").read_text()))):
        for variable, value in DASHBOARD_VARIABLES.items():
            question = question.replace(variable, value)
        rules.append({"record": f"panel:{number}", "expr": question})
    file = tmp_path / "dashboard.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check("check", "rules", file)
