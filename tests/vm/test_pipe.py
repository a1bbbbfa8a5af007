"""Rounds between two kernels through phaul's own page pipe: with checksums, compressed, and under TLS.

Every round and the last dump go through it one after the other; the process itself says whether its memory is intact.
An emulated processor has no instructions for AES: under TLS there is little to move.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.conftest import Report
from tests.vm.lab import Lab
from tests.vm.scenarios import (
    TLS,
    Answer,
    Moved,
    ask,
    case,
    give_certificates,
    move,
    ready,
    restart_phaulds,
    take,
    writer,
)

pytestmark = pytest.mark.timeout(560)

MIB: Final = 48
ARGV: Final = writer(MIB, 8, 2e6)
TLS_MIB: Final = 12
TLS_ARGV: Final = writer(TLS_MIB, 1, 2e5)
KINDS: Final[dict[str, Answer]] = {
    "checksums": {"checksum": True},
    "checksums, zstd": {"compression": "COMPRESSION_ZSTD"},
}


@pytest.fixture(autouse=True)
def _when_asked_for(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all"):
        pytest.skip("rounds through the page pipe in the lab: only with --all")


def assert_rounds(moved: Moved) -> None:
    """At least two, of which the first carried everything and the second found it there."""
    first, second = moved.rounds[:2]
    assert first["pages_written"] >= (MIB << 20) // 4096
    assert second["pages_skipped_parent"] > first["pages_written"] // 2


@pytest.mark.parametrize("kind", KINDS)
async def test_rounds_through_the_pipe(kind: str, lab: Lab, json_report: Report) -> None:
    await ready(lab)
    answers = await take(
        lab,
        [
            {"run": "piped", "argv": ARGV, "on": "a"},
            ask("piped", "a", "reset"),
            move("piped", "a", "b", "PRE_COPY", restore_mode="RESTORE_MODE_LAZY", **KINDS[kind]),
            ask("piped", "b", "check"),
            {"stop": "piped", "on": "b"},
        ],
    )
    moved = Moved(answers[2])
    _report(json_report, f"pre-copy, {kind}", lab, moved, answers[3])
    assert answers[3]["intact"]
    assert moved.record["page_stream"] == kind
    assert_rounds(moved)
    assert int(moved.record["wire_bytes"]) > 0


@pytest_asyncio.fixture(loop_scope="session")
async def secured(lab: Lab, tmp_path: Path) -> AsyncIterator[Lab]:
    """Both guests with a phauld that has a certificate, and leaves TLS to pipes; `ready` starts the usual one again."""
    await ready(lab)
    await give_certificates(lab, tmp_path)
    await restart_phaulds(lab, *TLS, "--kernel-tls", "false", insecure=False)
    yield lab
    for guest in lab.guests:
        await guest.kill_phauld()


async def test_rounds_under_tls(secured: Lab, json_report: Report) -> None:
    """There by pre-copy, and back by hybrid, whose last pages go by the relays."""
    a, b = secured.guests
    assert (await a.phaul("run", "--name", "secret", "--", *TLS_ARGV)).returncode == 0
    for source, destination, mode, stream in (
        (a, b, "pre-copy", "checksums, TLS"),
        (b, a, "hybrid", "checksums, TLS; lazy pages under TLS"),
    ):
        await take(secured, [ask("secret", source.name, "reset")])
        words = ["migrate", "secret", "--to", f"{destination.address}:7707", "--mode", mode, "--restore", "lazy"]
        done = await source.phaul(*words, "--downtime", "1ms", "--max-rounds", "2", "--json", timeout_seconds=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (told,) = await take(secured, [ask("secret", destination.name, "check")])
        record = json.loads(done.stdout.splitlines()[-1])
        json_report.setdefault("tls", []).append({"mode": mode, "pause_ms": told["gap_ms"], "report": record})
        assert told["intact"]
        assert record["page_stream"] == stream, record
    assert (await a.phaul("stop", "secret", "--grace", "0")).returncode == 0


def _report(report: Report, name: str, lab: Lab, moved: Moved, told: dict[str, Any]) -> None:
    found = case(name, lab, moved, pause_ms=told["gap_ms"], data_intact=told["intact"])
    found["wire_bytes"] = int(moved.record["wire_bytes"])
    report.setdefault("cases", []).append(found)
