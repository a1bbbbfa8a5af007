"""Whether a tree was let go, when criu is dead and cannot say: the shim looks at what its tasks do.

The tasks here do what the restorer's code does in one that was not let go: they compute, then wait, in an anonymous
mapping that is writable and executable.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from phauld.trees import let_go

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="its machine code is that of x86-64")

CRIU: Final = "/bin/sh"  #: a program that no task here is

#: The code spins until byte 256 of its mapping is not zero, then sleeps in pause(2) for ever.
_TASK: Final = """
import ctypes, mmap, signal, sys, time
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
                   flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
spin = b"\\x80\\x3d\\xf9\\x00\\x00\\x00\\x00\\x74\\xf7"  # 0: cmp byte [256], 0; je 0
wait = b"\\xb8\\x22\\x00\\x00\\x00\\x0f\\x05\\xeb\\xf7"  # mov eax, SYS_pause; syscall; jmp back
memory[:len(spin + wait)] = spin + wait
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None)
libc.prctl(1, 9, 0, 0, 0)  # its end is that of its parent
what = sys.argv[1]
if what == "waits":
    memory[256] = 1
print("ready", flush=True)
if what == "let-go":
    time.sleep(1000)
ctypes.CFUNCTYPE(None)(address)()
"""


@contextmanager
def _task(what: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-ISc", _TASK, what], stdout=subprocess.PIPE) as task:
        try:
            assert task.stdout is not None
            assert task.stdout.readline() == b"ready\n"
            yield task
        finally:
            task.kill()


def _let_it_wait(task: subprocess.Popen[bytes]) -> None:
    """Write the byte that its code spins on."""
    lines = Path(f"/proc/{task.pid}/maps").read_text().splitlines()
    (start,) = (
        int(line.partition("-")[0], 16) for line in lines if line.split()[1:2] == ["rwxp"] and len(line.split()) == 5
    )
    with open(f"/proc/{task.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(start + 256)
        memory.write(b"\1")


async def _until(task: subprocess.Popen[bytes], verdict: bool | None) -> None:
    async with asyncio.timeout(10):
        while let_go.was_let_go(task.pid, CRIU) is not verdict:  # noqa: ASYNC110 - it is on its way there
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("what", "verdict"), [("let-go", True), ("waits", False), ("spins", None)])
async def test_a_look_at_a_task(what: str, verdict: bool | None) -> None:
    with _task(what) as task:
        await _until(task, verdict)


async def test_a_task_on_its_way_to_where_it_waits_is_not_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look finds it on a processor. Taken for one that runs, it would stay for ever, and its source would go."""
    (tmp_path / "released").touch()
    with _task("spins") as task:
        await _until(task, None)
        looks, look = [], let_go.was_let_go

        def looking(pid: int, criu: str) -> bool | None:
            looks.append(look(pid, criu))
            if len(looks) == 3:
                _let_it_wait(task)
            return looks[-1]

        monkeypatch.setattr(let_go, "was_let_go", looking)
        assert await asyncio.to_thread(let_go.look_at, str(tmp_path), [task.pid], CRIU) is False
        assert looks[:3] == [None] * 3


async def test_a_program_that_computes_in_such_a_mapping_for_long_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "released").touch()
    with _task("spins") as task:
        assert await asyncio.to_thread(let_go.look_at, str(tmp_path), [task.pid], CRIU) is True


def test_nothing_is_let_go_that_was_not_released(tmp_path: Path) -> None:
    with _task("let-go") as task:
        assert not let_go.look_at(str(tmp_path), [task.pid], CRIU)


def test_a_root_that_was_killed_was_not_let_go(tmp_path: Path) -> None:
    (tmp_path / "released").touch()
    with _task("let-go") as task:
        os.kill(task.pid, signal.SIGKILL)
        os.waitid(os.P_PID, task.pid, os.WEXITED | os.WNOWAIT)
        assert not let_go.look_at(str(tmp_path), [task.pid], CRIU)
