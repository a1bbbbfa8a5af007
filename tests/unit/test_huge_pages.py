"""Which mappings are put into huge pages; and that it is done, and harms none of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phaul_client.huge_pages import CHUNK_BYTES, SETTINGS, Mapping, chunks, collapse_tree, parse_smaps

MIB = 1 << 20
HUGE = 2 * MIB
SMAPS = """\
7f0000000000-7f0004000000 rw-p 00000000 00:00 0 
Size:              65536 kB
Private_Dirty:     65536 kB
AnonHugePages:         0 kB
ProtectionKey:         0
VmFlags: rd wr mr mw me ac sd 
7f0004000000-7f0004001000 r--p 00000000 fd:00 1234    /usr/lib/some thing.so (deleted)
Private_Dirty:         4 kB
VmFlags: rd mr mw me sd 
"""  # noqa: W291

#: Fills memory, says so, and checks it when asked to.
_VICTIM = """
import mmap, sys
memory = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pattern = bytes(range(256)) * 16
for page in range(8192):
    memory[page * 4096:(page + 1) * 4096] = pattern[page % 256:] + pattern[:page % 256]
print("filled", flush=True)
sys.stdin.readline()
ok = all(memory[p * 4096:(p + 1) * 4096] == pattern[p % 256:] + pattern[:p % 256] for p in range(8192))
print("intact" if ok else "damaged", flush=True)
"""


def full(size: int, **changes: object) -> Mapping:
    kib = {"Private_Dirty": size >> 10, "AnonHugePages": 0}
    values: dict[str, object] = {"start": HUGE, "end": HUGE + size, "anonymous": True, "kib": kib}
    return Mapping(**{**values, **changes})  # type: ignore[arg-type]


def test_smaps_are_read() -> None:
    first, second = parse_smaps(SMAPS.splitlines())
    assert (first.start, first.end, first.anonymous) == (0x7F0000000000, 0x7F0004000000, True)
    assert first.kib["Private_Dirty"] == 65536
    assert "sd" in first.flags
    assert first.gains
    assert not second.gains


@pytest.mark.parametrize(
    ("mapping", "gains"),
    [
        (full(64 * MIB), True),
        (full(4 * MIB), False),  # small
        (full(64 * MIB, anonymous=False), False),
        (full(64 * MIB, kib={"Private_Dirty": 32 << 10, "AnonHugePages": 0}), False),  # holes would become memory
        (full(64 * MIB, kib={"Private_Dirty": 64 << 10, "AnonHugePages": 64 << 10}), False),  # it has them
        (full(64 * MIB, flags=frozenset({"nh"})), False),  # the program does not want them
        (full(64 * MIB, flags=frozenset({"um"})), False),  # pages are still to come
    ],
)
def test_what_gains(mapping: Mapping, gains: bool) -> None:
    assert mapping.gains is gains


def test_chunks_are_whole_huge_pages() -> None:
    mapping = full(64 * MIB, start=HUGE + 4096, end=HUGE + 70 * MIB + 4096)
    found = chunks(mapping, HUGE)
    assert found[0] == (2 * HUGE, CHUNK_BYTES)
    assert sum(length for _, length in found) == 68 * MIB
    assert found[-1][0] + found[-1][1] == HUGE + 70 * MIB


async def test_a_running_process() -> None:
    if not (SETTINGS / "hpage_pmd_size").exists() or "[never]" in (SETTINGS / "enabled").read_text():
        pytest.skip("no huge pages here")
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdin is not None
        assert victim.stdout.readline() == "filled\n"
        done = await collapse_tree(victim.pid)
        if not done:
            pytest.skip("this kernel collapses nothing when asked to")
        kib = [line.split()[1] for line in _lines(victim.pid) if line.startswith("AnonHugePages:")]
        assert int(kib[0]) << 10 >= done >= 28 * MIB
        victim.stdin.write("\n")
        victim.stdin.flush()
        assert victim.stdout.readline() == "intact\n"


def _lines(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
