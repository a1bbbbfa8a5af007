"""How long preflight takes for a process with a thousand descriptors."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any, Final

from phaul_client.preflight import Wishes, check_source, look_up, read_node, read_tree, requirements

PROGRAM: Final = """
import os, socket, tempfile
kept = [open("/etc/passwd") for _ in range(400)] + [tempfile.TemporaryFile() for _ in range(100)]
kept += [socket.socketpair() for _ in range(100)] + [os.pipe() for _ in range(100)]
kept += [socket.create_server(("127.0.0.1", 0)) for _ in range(97)]
print(len(os.listdir("/proc/self/fd")), flush=True)
input()
"""


def test_a_thousand_descriptors(json_report: dict[str, Any]) -> None:
    argv = [sys.executable, "-I", "-S", "-c", PROGRAM]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) >= 1000
        node = read_node()
        runs = [_run(process.pid, node) for _ in range(5)]
        process.kill()
    source, everything = (min(column) for column in zip(*runs, strict=True))
    json_report["preflight_1000_descriptors"] = {"source_ms": source * 1000, "both_ms": everything * 1000}
    sys.stdout.write(f"\npreflight, 1000 descriptors: source {source * 1000:.0f} ms, both {everything * 1000:.0f} ms\n")


def _run(pid: int, node: Any) -> tuple[float, float]:
    started = time.monotonic()
    tree = read_tree(pid)
    problems = check_source(tree, node, Wishes())
    source = time.monotonic() - started
    look_up(requirements(tree, node), node)
    assert len(tree.open_files) >= 1000
    assert problems
    return source, time.monotonic() - started
