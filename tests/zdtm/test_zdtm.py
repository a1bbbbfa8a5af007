"""Programs that check themselves move: a few of our own, and with `--dir DIR` those of a directory, criu's own tests.

    ./check zdtm --dir criu/test/zdtm/static --json zdtm.json

The directory is one of built tests (`make -C test/zdtm/lib && make -k -C test/zdtm/static` in criu's source).
"""

from __future__ import annotations

import collections
import fnmatch
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.nodes import Nodes
from tests.zdtm.catalogue import find_programs, read_program
from tests.zdtm.runner import OWN, Runner, better_by_criu

pytestmark = pytest.mark.criu

#: As criu's tests are: `--pidfile`, `--outfile`, and a word about itself after SIGTERM.
OURS: Final = """#!{python} -IS
import os, signal, socket, sys, time
arguments = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
ready = os.pipe()
if pid := os.fork():
    os.close(ready[1])
    os.read(ready[0], 1)
    open(arguments["pidfile"], "w").write(f"{{pid}}\\n")
    os._exit(0)
os.setsid()
for fd in (0, 1, 2):
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
{before}
for fd in ready:
    os.close(fd)
signal.sigwait([signal.SIGTERM])
{after}
open(arguments["outfile"], "w").write("PASS\\n" if good else "FAIL: it is not as it was\\n")
"""
PROGRAMS: Final = {
    "keeps": ("file = open(__file__); boot = os.getpid()", "good = os.getpid() == boot and file.read(2) == '#!'"),
    "notices": ("mounts = os.readlink('/proc/self/ns/net')", "good = os.readlink('/proc/self/ns/net') == mounts"),
    "cannot": ("pipe = os.pipe2(os.O_DIRECT)", "good = True"),
    "never": ("pass", "good = False"),
}
EXPECTED: Final = {
    "keeps": ("pass", "pass", "pass"),
    "notices": ("pass", "wrong", "wrong"),
    "cannot": ("pass", "dump-failed", "refused"),
    "never": ("unfit", None, None),
}
#: What plain criu moves and phaul does not, or not so, and why (docs/zdtm.md).
NOT_MOVED: Final = frozenset({"cgroup_stray", "cgroupns", "file_lease00"})
NOT_SHARED: Final = frozenset({"cow00", "cow01"})


@pytest.mark.timeout(120)
async def test_the_runner_sees_what_moves_and_what_does_not(nodes: Nodes, tmp_path: Path) -> None:
    runner = await start(nodes, tmp_path)
    for name, (before, after) in PROGRAMS.items():
        file = tmp_path / name
        file.write_text(OURS.format(python=sys.executable, before=before, after=after))
        file.chmod(0o755)
        row = await runner.run(read_program(file))
        assert (row["alone"], row.get("criu"), row.get("phaul")) == EXPECTED[name], row


@pytest.mark.timeout(0)
async def test_those_of_a_directory(
    pytestconfig: pytest.Config, nodes: Nodes, short_path: Path, json_report: dict[str, Any]
) -> None:
    directory = pytestconfig.getoption("--dir")
    if not directory:
        pytest.skip("no directory of built zdtm tests was named (--dir)")
    runner = await start(nodes, short_path, pytestconfig.getoption("--mode"))
    wanted = pytestconfig.getoption("--only").split(",")
    rows = json_report.setdefault("zdtm", [])
    for program in find_programs(Path(directory)):
        if not any(fnmatch.fnmatch(program.name, pattern) for pattern in wanted):
            continue
        row = await runner.run(program)
        rows.append(row)
        if "skipped" not in row:
            print(f"{row['name']:<32} {row['alone']:<8} criu {row.get('criu', '-'):<15} phaul {row.get('phaul', '-')}",
                  row.get("phaul_detail", ""), flush=True)  # fmt: skip
    for way in ("criu", "phaul"):
        counted = collections.Counter(row[way] for row in rows if way in row)
        json_report[f"zdtm_{way}"] = dict(counted)
        print(way, dict(counted))
    known = {*NOT_MOVED, *(NOT_SHARED if pytestconfig.getoption("--mode") in ("lazy", "post-copy") else ())}
    assert [name for name in better_by_criu(rows) if name not in known] == []


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a name so short that unix sockets can be named in it, for all users."""
    with tempfile.TemporaryDirectory(prefix="z", dir="/tmp") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


async def start(nodes: Nodes, directory: Path, mode: str = "auto") -> Runner:
    for node in (nodes.a, nodes.b):  # terminals have numbers, and the same ones at both
        await node.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=666,mode=620", "devpts", "/dev/pts"])
    await nodes.a.start_phauld()
    await nodes.b.start_phauld(sync_roots=OWN)
    return Runner(nodes, directory, mode)
