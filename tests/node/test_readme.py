"""The README is true: its sessions are run as they stand there, by hand and with buf, and so is its library."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from phaul_client import Local
from phauld import Server
from tests.node.criu_victims import no_leaks, start_victim, subreaper
from tests.nodes import PROGRAMS, ROOT, Node, Nodes
from tests.seed_api import OwnLocal
from tests.started import Completed

pytestmark = pytest.mark.criu

README: Final = (ROOT / "README.md").read_text()
BUF_CANNOT_BE_HAD: Final = 3  # exit status of scripts/proto-check
#: The files of the README's paths, but the node's own.
PRIVATE: Final = "for each in /var/lib /var/log /dev/shm; do mount -t tmpfs tmpfs $each; done"
READY: Final = """
for each in unix:/run/phaul/phauld.sock 127.0.0.1:7717; do
    until phaul --daemon $each info >/dev/null 2>&1; do sleep 0.1; done
done
"""


def blocks(language: str) -> list[str]:
    """What stands between ```LANGUAGE and ```."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The lines after a prompt."""
    return [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]


async def run_session(node: Node, lines: list[str]) -> Completed:
    """Start the README's daemons, run these lines, each after a line "$ LINE", and end the daemons."""
    start, *daemons = commands(blocks("console")[0])
    assert start.startswith("scripts/setup ")
    told = [f"printf '\\n$ %s\\n' {json.dumps(line.split()[0])}\n{line}" for line in lines]
    script = "\n".join([PRIVATE, "set -e", *(f"{each[:-2]} >/dev/null 2>&1 &" for each in daemons), READY, *told])
    return await node.run(["bash", "-c", f"cd {ROOT}\n{script}\nkill $(jobs -p) 2>/dev/null || true\nwait"])


def buf_directory() -> Path:
    """Where buf is; skips where it cannot be had."""
    done = subprocess.run([ROOT / "scripts/proto-check", "--buf"], capture_output=True, text=True, timeout=110)
    if done.returncode == BUF_CANNOT_BE_HAD:
        pytest.skip(f"buf cannot be had here: {done.stderr.strip()}")
    return Path(done.stdout.strip()).parent


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts directories on the PATH of what is started."""

    def prepend(*directories: Path) -> None:
        monkeypatch.setenv("PATH", ":".join([*map(str, directories), os.environ["PATH"]]))

    return prepend


async def test_the_session_by_hand(nodes: Nodes, paths: Callable[..., None]) -> None:
    paths(PROGRAMS)
    lines = commands(blocks("console")[1])
    assert len(lines) <= 10
    done = await run_session(nodes.a, lines)
    assert done.stdout.count("moved clock to b as pid ") == 1
    assert done.stdout.count("moved clock to a as pid ") == 1
    assert "clock exited" in done.stdout


async def test_the_session_with_buf(nodes: Nodes, paths: Callable[..., None]) -> None:
    paths(PROGRAMS, buf_directory())
    *lines, last = commands(blocks("console")[2])
    assert last == "kill %1 %2"
    done = await run_session(nodes.a, lines)
    _, started, listed, asked, watched, stopped = done.stdout.split("\n$ ")
    assert started.startswith("phaul\nsleeper ")
    assert {"phaul.v1.Remote", "phaul.v1.Migrations", "phaul.v1.Node"} <= set(listed.split())
    assert json_values(asked)[0]["migration"]["migrationId"] == "first"
    last_seen = json_values(watched)[-1]["migration"]
    assert last_seen["phase"] == "MIGRATION_PHASE_DONE"
    assert last_seen["destinationPid"] > 0
    assert json_values(stopped)[0]["workload"]["state"] == "WORKLOAD_STATE_EXITED"


def json_values(text: str) -> list[dict[str, Any]]:
    """JSON values one after another, after a first line."""
    rest, values = text.partition("\n")[2].strip(), []
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        values.append(value)
        rest = rest[end:].strip()
    return values


async def test_the_library(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (destination := tmp_path / "destination").mkdir()
    (images := tmp_path / "images").mkdir()
    made: list[OwnLocal] = []

    def make_local(server: Server) -> Local:
        made.append(OwnLocal(server, images))
        return made[0]

    code = blocks("python")
    assert len(code) == 1
    names: dict[str, Any] = {}
    exec(compile(code[0], "README.md", "exec"), names)
    with subreaper(), no_leaks():
        victim = start_victim(tmp_path, workers=1)
        await names["move"](victim.pid, source, destination, make_local)
        victim.reaped()
        victim.restored_as(made[0].restored_pid)
        assert victim.is_beating()
        victim.kill()
