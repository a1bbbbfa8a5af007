"""Child processes: real ones. Whatever happens, no process, zombie or descriptor is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_criu import child
from phaul_criu.child import finish, spawn


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = children(), descriptors()
    yield
    # the event loop of the test is closed only after this: its descriptors were open before, too
    assert (children(), descriptors()) == before


async def test_exit_status() -> None:
    async with await spawn(["sh", "-c", "exit 3"]) as process:
        assert await process.wait() == 3
        assert await process.wait() == 3
    assert process.returncode == 3


async def test_death_by_signal_is_minus_its_number() -> None:
    async with await spawn(["sleep", "100"]) as process:
        process.terminate()
        assert await process.wait() == -signal.SIGTERM


async def test_leaving_kills_and_reaps() -> None:
    async with await spawn(["sleep", "100"]) as process:
        assert str(process.pid) in children()
    assert process.returncode == -signal.SIGKILL


async def test_killing_takes_what_it_forked_along() -> None:
    read_end, write_end = os.pipe()
    async with await spawn(["sh", "-c", "sleep 100 & echo $!; wait"], stdout=write_end):
        grandchild = int(os.read(read_end, 100))
    os.close(read_end)
    os.close(write_end)
    async with asyncio.timeout(30):
        while alive(grandchild):  # noqa: ASYNC110 - it is dying, and it is not ours
            await asyncio.sleep(0.01)


async def test_patience_lets_it_end_by_itself() -> None:
    process = await spawn(["sh", "-c", "sleep 0.1; exit 4"])
    await process.aclose(patience_seconds=10)
    assert process.returncode == 4


async def test_cancelled_while_closing_still_reaps() -> None:
    process = await spawn(["sh", "-c", "sleep 0.2; exit 4"])
    closing = asyncio.create_task(process.aclose(patience_seconds=10))
    await asyncio.sleep(0.02)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert process.returncode == 4


async def test_cancelled_while_waiting_leaves_the_child_alone() -> None:
    async with await spawn(["sleep", "100"]) as process:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await process.wait()
        assert process.returncode is None


def test_a_loop_that_is_closed_while_closing_leaves_nothing() -> None:
    async def main() -> None:
        process = await spawn(["sleep", "100"])
        _closing = asyncio.create_task(process.aclose(patience_seconds=100))  # noqa: RUF006
        await asyncio.sleep(0.02)

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 30


async def test_a_missing_program_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        await spawn(["/nonexistent/program"])


async def test_passed_descriptors_keep_their_numbers_and_no_other_is_inherited() -> None:
    read_end, write_end = os.pipe()
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    script = f"import os; os.write({write_end}, ' '.join(os.listdir('/proc/self/fd')).encode())"
    async with await spawn([sys.executable, "-I", "-S", "-c", script], pass_fds=(write_end,)) as process:
        assert await process.wait() == 0
    seen = set(os.read(read_end, 1000).decode().split())
    for fd in (read_end, write_end, other):
        os.close(fd)
    assert seen - {"3"} == {"0", "1", "2", str(write_end)} - {"3"}  # 3 may be the listed directory itself


async def test_the_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("LD_PRELOAD", "")
    ended = await child.run(["env"], timeout_seconds=10)
    assert {line.partition("=")[0] for line in ended.output.splitlines()} <= {"PATH", "HOME", "LANG", "TMPDIR"}


async def test_run_collects_output_and_status() -> None:
    ended = await child.run(["sh", "-c", "echo one; echo two >&2; exit 7"], timeout_seconds=10)
    assert ended == child.Ended(returncode=7, output="one\ntwo")


async def test_run_kills_at_the_deadline() -> None:
    with pytest.raises(TimeoutError):
        await child.run(["sleep", "100"], timeout_seconds=0.05)


async def test_the_end_of_standard_error_is_kept() -> None:
    async with await spawn(["sh", "-c", "echo why >&2; exit 1"]) as process:
        await process.wait()
    assert process.stderr_tail == "why"


async def test_finish_runs_to_the_end_and_then_raises_the_cancellation() -> None:
    done: list[int] = []

    may_end = asyncio.Event()

    async def cleanup() -> None:
        await may_end.wait()
        done.append(1)

    task = asyncio.create_task(finish(cleanup()))
    for _ in range(2):
        await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.sleep(0.01)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [1]


async def test_finish_passes_result_and_exception_on() -> None:
    async def fail() -> None:
        raise ValueError("x")

    assert await finish(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ValueError, match="x"):
        await finish(fail())
