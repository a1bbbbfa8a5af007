"""The simulator, the policies in it, and the table in the documentation."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phaul_client.policy import DowntimePolicy, Finish, FinishReason, Limits, StopCopyPolicy
from phaul_client.simulator import Costs, Outcome, simulate, table, workloads
from phaul_client.writers import read_trace, recorded

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {workload.name: simulate(workload, DowntimePolicy(), limits, Costs()) for workload, limits in workloads()}


def test_the_documentation_shows_what_the_simulator_prints() -> None:
    document = (ROOT / "docs" / "policy.md").read_text()
    assert table() in document, "run python -m phaul_client.simulator, paste its table"
    replayed = table(read_trace(ROOT / "docs/traces/lab.json")).removeprefix(table())
    assert replayed in document, "run it with --trace docs/traces/lab.json, paste its last rows"


def test_it_runs_as_a_command_and_quickly() -> None:
    started_at_seconds = time.monotonic()
    command = [sys.executable, "-m", "phaul_client.simulator"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == table() + "\n"
    assert time.monotonic() - started_at_seconds < 60  # 0.5 s alone; the machine may be busy


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("idle", FinishReason.GOAL_REACHED),
        ("a fifth of the link", FinishReason.GOAL_REACHED),
        ("hot set of 48 MiB, fast", FinishReason.PLATEAU),
        ("growing by 10 MB/s every second", FinishReason.DIVERGING),
        ("above the link, 1.5 of it", FinishReason.PLATEAU),
        ("above the link, 1.5 of it, throttled", FinishReason.GOAL_REACHED),
        ("goal of 30 ms, cannot be met", FinishReason.PLATEAU),
        ("above the link, deadline of 25 s", FinishReason.DEADLINE),
    ],
)
def test_each_writer_ends_for_its_reason(outcomes: dict[str, Outcome], name: str, reason: FinishReason) -> None:
    assert outcomes[name].verdict.reason is reason


def test_a_pause_within_the_goal_is_kept(outcomes: dict[str, Outcome]) -> None:
    reached = [outcome for outcome in outcomes.values() if outcome.verdict.reason is FinishReason.GOAL_REACHED]
    assert len(reached) >= 4
    assert all(outcome.pause_seconds <= Limits().downtime_goal_seconds for outcome in reached)


def test_a_writer_at_a_fifth_of_the_link(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["a fifth of the link"]
    assert outcome.pause_seconds <= outcome.stop_copy_pause_seconds / 4
    assert 1 / 1.5 <= outcome.pause_seconds / outcome.expected_pause_seconds <= 1.5


def test_no_pause_is_much_longer_than_expected(outcomes: dict[str, Outcome]) -> None:
    assert all(outcome.pause_seconds <= 1.5 * outcome.expected_pause_seconds for outcome in outcomes.values())


def test_the_deadline_is_kept(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["above the link, deadline of 25 s"].total_seconds <= 25


def test_the_throttle_is_what_makes_the_difference(outcomes: dict[str, Outcome]) -> None:
    free, held = outcomes["above the link, 1.5 of it"], outcomes["above the link, 1.5 of it, throttled"]
    assert free.throttle_percent == 0 < held.throttle_percent
    assert held.pause_seconds < free.pause_seconds / 20


def test_without_rounds_the_pause_is_that_of_stop_and_copy() -> None:
    workload, limits = workloads()[1]
    outcome = simulate(workload, StopCopyPolicy(), limits, Costs())
    assert outcome.verdict == Finish(FinishReason.NO_ROUNDS)
    assert outcome.pause_seconds == outcome.stop_copy_pause_seconds


def test_a_recorded_writer_writes_what_was_recorded() -> None:
    workload = recorded("r", [(2.0, 64 * MIB), (1.0, 8 * MIB)], memory_bytes=256 * MIB)
    assert workload.written_bytes(1.0) == pytest.approx(32 * MIB)
    assert workload.written_bytes(2.5) == pytest.approx(68 * MIB)
    assert workload.written_bytes(4.0) == pytest.approx(80 * MIB), "the last rate goes on"


def test_a_report_can_be_replayed(tmp_path: Path) -> None:
    rounds = [
        {"pages_written": 65536, "pages_skipped_parent": 0, "duration_ms": 2400},
        {"pages_written": 3000, "pages_skipped_parent": 62536, "duration_ms": 200},
        {"pages_written": 500, "pages_skipped_parent": 65036, "duration_ms": 60},
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"cases": [{"name": "redis", "rounds": rounds}, {"name": "none", "rounds": []}]}))
    (workload,) = read_trace(report)
    assert workload.memory_bytes == 256 * MIB
    outcome = simulate(workload, DowntimePolicy(), Limits(), Costs())
    assert outcome.verdict.reason is FinishReason.GOAL_REACHED
    assert "recorded: redis" in table([workload])
