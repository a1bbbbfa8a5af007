"""`./demo`, as anyone would call it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodes import ROOT, until

pytestmark = [pytest.mark.criu, pytest.mark.slow]

KEYS = {"workload", "keys_before", "keys_after", "same_data", "source_alive", "destination_alive"}
KEYS |= {"mode", "pause_ms", "total_ms", "bytes", "criu", "kernel"}


async def start_demo(directory: Path, *arguments: str) -> asyncio.subprocess.Process:
    """The demo, with its temporary files below a directory."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "scripts/demo.py"), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(directory)},
        start_new_session=True,
    )


def processes_of(directory: Path) -> list[str]:
    """Command lines of what still runs for a demo."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(directory) in line:
            found.append(line)
    return found


async def test_moves_redis_and_proves_it(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    demo = await start_demo(scratch, "--keys", "2000", "--mib", "8", "--by-hand", "--json", str(file))
    output, _ = await demo.communicate()

    assert demo.returncode == 0, output.decode()
    assert output.decode().count("✔") == 4
    result = json.loads(file.read_text())
    assert result.keys() >= KEYS
    assert (result["keys_before"], result["keys_after"]) == (2008, 2008)
    assert (result["same_data"], result["lost_writes"]) == (True, 0)
    assert (result["source_alive"], result["destination_alive"]) == (False, True)
    assert result["bytes"] > 8 << 20
    assert 0 < result["pause_ms"] <= result["total_ms"]
    assert result["client_pause_ms"] > 0
    assert result["by_hand_pause_ms"] > 0
    assert os.listdir(scratch) == []
    assert processes_of(scratch) == []


async def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = await start_demo(tmp_path, "--keys", "2000", "--mib", "200")
    await until(lambda: any("redis" in line for line in processes_of(tmp_path)))

    demo.send_signal(signal.SIGINT)
    output, _ = await demo.communicate()

    assert demo.returncode == 130, output.decode()
    assert "Traceback" not in output.decode()
    assert os.listdir(tmp_path) == []
    assert processes_of(tmp_path) == []


async def test_a_wrong_call_is_refused(tmp_path: Path) -> None:
    demo = await start_demo(tmp_path, "--keys", "0")
    output, _ = await demo.communicate()
    assert demo.returncode == 2
    assert "--keys must be 1 or more" in output.decode()
