"""The lab keeps its promises: without that, nothing that is shown in it means anything."""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from phaul_criu.stats import parse_dump_stats
from tests.conftest import Report
from tests.started import CommandFailed
from tests.vm.channel import GuestDied
from tests.vm.guest import Guest
from tests.vm.image import ROOT
from tests.vm.lab import Lab

IN_GUEST: Final = Path("/phaul/tests/vm/in_guest")
HOST_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
MBIT: Final = 10**6
PING: Final = ("ping", "-c", "3", "-i", "0.2", "-W", "1")


async def throughput(sender: Guest, receiver: Guest, port: int, seconds: float) -> float:
    """Bits a second from one guest to the other by TCP."""
    log = Path(f"/tmp/receive.{port}")
    listening = await receiver.start(["python3", IN_GUEST / "stream.py", "receive", str(port)], log=log)
    await until_contains(receiver, log, "listening")
    await sender.run(["python3", IN_GUEST / "stream.py", "send", receiver.address, str(port), str(seconds)])
    assert await listening.wait() == 0
    size_bytes, duration_seconds = (await receiver.get(log)).split()[1:]
    return int(size_bytes) * 8 / float(duration_seconds)


async def until_contains(guest: Guest, path: Path, text: str, timeout_seconds: float = 30) -> None:
    async with asyncio.timeout(timeout_seconds):
        while True:
            if text in (await guest.run(["cat", path], check=False)).stdout:
                return
            await asyncio.sleep(0.05)


async def test_two_kernels(lab: Lab) -> None:
    assert len({lab.a.boot_id, lab.b.boot_id, HOST_BOOT_ID}) == 3
    for guest in lab.guests:
        assert (await guest.run(["cat", "/proc/sys/kernel/random/boot_id"])).stdout.strip() == guest.boot_id
        assert (await guest.run(["uname", "-r"])).stdout.strip() == guest.kernel
        assert (await guest.run(["uname", "-n"])).stdout.strip() == guest.name


async def test_working_tree_runs_in_the_guests(lab: Lab) -> None:
    code = "import phauld.server, phaul.v1.remote_pb2, pycriu.rpc_pb2; print(phauld.server.__file__)"
    assert (await lab.a.run(["python3", "-c", code])).stdout == "/phaul/phauld/server.py\n"
    assert await lab.a.get("/phaul/phauld/server.py") == (ROOT / "phauld" / "server.py").read_bytes()


async def test_phauld_starts(lab: Lab) -> None:
    phauld = await lab.a.start_phauld()
    assert phauld.returncode is None
    assert await lab.a.kill_phauld(signal.SIGTERM) == 0


async def test_run_tells_all(lab: Lab) -> None:
    done = await lab.a.run(
        ["sh", "-c", "cat; echo $X; pwd; echo no >&2; exit 3"], check=False, stdin=b"in\n", env={"X": "x"}, cwd="/tmp"
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "in\nx\n/tmp\n", "no\n")
    with pytest.raises(CommandFailed, match="no such thing"):
        await lab.a.run(["sh", "-c", "echo no such thing >&2; exit 1"])
    with pytest.raises(CommandFailed, match="FileNotFoundError"):
        await lab.a.run(["/no/such/program"])
    assert (await lab.a.run(["sh", "-c", "kill -9 $$"], check=False)).returncode == -signal.SIGKILL


async def test_commands_run_beside_each_other(lab: Lab) -> None:
    slow = asyncio.create_task(lab.a.run(["sleep", "3"]))
    quick = await asyncio.gather(*(lab.a.run(["echo", str(number)]) for number in range(10)))
    assert [done.stdout for done in quick] == [f"{number}\n" for number in range(10)]
    assert not slow.done()
    await slow


async def test_background_does_not_hold_up_a_command(lab: Lab) -> None:
    async with asyncio.timeout(10):
        pid = (await lab.a.run(["sh", "-c", "sleep 1000 & echo $!"])).stdout.strip()
    await lab.a.run(["kill", pid])


async def test_late_and_cancelled_commands_are_killed(lab: Lab) -> None:
    with pytest.raises(TimeoutError):
        await lab.a.run(["sh", "-c", "sleep 1234 & sleep 1234"], timeout_seconds=0.5)
    task = asyncio.create_task(lab.a.run(["sleep", "1234"]))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await lab.a.run(["sh", "-c", "while pgrep -f 'sleep 123[4]'; do sleep 0.1; done"], timeout_seconds=10)


async def test_processes(lab: Lab) -> None:
    process = await lab.a.start(["sh", "-c", "echo here; exec sleep 1000"], log="/tmp/sleeper.log")
    await until_contains(lab.a, process.log, "here")
    assert process.returncode is None
    assert (await lab.a.run(["cat", f"/proc/{process.pid}/comm"])).stdout == "sleep\n"
    assert await process.stop() == -signal.SIGTERM
    await process.send_signal(signal.SIGTERM)  # too late, and harmless


async def test_files(lab: Lab) -> None:
    data = bytes(range(256)) * 8192
    await lab.a.put("/tmp/new/file", data, mode=0o600)
    assert (await lab.a.run(["stat", "-c", "%a %s", "/tmp/new/file"])).stdout == f"600 {len(data)}\n"
    assert await lab.a.get("/tmp/new/file") == data
    with pytest.raises(CommandFailed, match="FileNotFoundError"):
        await lab.a.get("/tmp/none")


async def test_round_trip(lab: Lab, json_report: Report) -> None:
    seconds = []
    for _ in range(20):
        began = time.monotonic()
        await lab.a.run(["true"])
        seconds.append(time.monotonic() - began)
    json_report.setdefault("lab", {})["round_trip_seconds"] = round(statistics.median(seconds), 4)
    assert statistics.median(seconds) < 0.5


async def test_guests_reach_each_other(lab: Lab) -> None:
    await lab.a.run([*PING, lab.b.address])
    await lab.b.run([*PING, "a"])


async def test_cut_link(lab: Lab) -> None:
    await lab.link(False)
    assert (await lab.a.run([*PING, lab.b.address], check=False)).returncode != 0
    assert (await lab.b.run(["cat", "/sys/class/net/eth0/carrier"])).stdout == "0\n"
    await lab.link(True)
    await lab.a.run(["ping", "-c", "1", "-w", "10", lab.b.address])


async def test_bandwidth(lab: Lab, json_report: Report) -> None:
    free = await throughput(lab.a, lab.b, 7001, 4)
    await lab.bandwidth(40 * MBIT)
    limited = await throughput(lab.a, lab.b, 7002, 4)
    await lab.bandwidth(None)
    again = await throughput(lab.a, lab.b, 7003, 2)
    json_report.setdefault("lab", {}).update(
        throughput_bits_per_second=int(free), limited_to_40_mbit_bits_per_second=int(limited)
    )
    assert 30 * MBIT < limited < 44 * MBIT
    assert free > 2 * limited
    assert again > 2 * limited


async def test_memory_is_tracked(lab: Lab) -> None:
    """Two pre-dumps, a dump and a restore by the criu command: later rounds skip what did not change."""
    guest = lab.a
    assert "is supported" in (await guest.run(["criu", "check", "--feature", "mem_dirty_track"])).stdout
    victim = await guest.start(["python3", IN_GUEST / "dirtier.py", "64", "2", "/tmp/count"])
    await counted_to(guest, 3)
    skipped, written = [], []
    for number, action in enumerate(("pre-dump", "pre-dump", "dump")):
        images = Path(f"/tmp/images/{number}")
        await guest.run(["mkdir", "-p", images])
        parent = ["--prev-images-dir", f"../{number - 1}"] if number else []
        await guest.run(["criu", action, "-t", str(victim.pid), "-D", images, "--track-mem", *parent])
        stats = parse_dump_stats(await guest.get(images / "stats-dump"))
        skipped.append(stats.pages_skipped_parent)
        written.append(stats.pages_written)
    assert await victim.wait(10) == -signal.SIGKILL
    assert skipped[0] == 0
    assert written[0] >= 64 * 256
    assert min(skipped[1:]) > 60 * 256, (skipped, written)
    assert max(written[1:]) < 10 * 256, (skipped, written)

    count = await counted_to(guest, 0)
    await guest.run(["criu", "restore", "-D", "/tmp/images/2", "--restore-detached", "--shell-job"])
    await counted_to(guest, count + 3)
    await guest.run(["kill", "-9", str(victim.pid)])


async def counted_to(guest: Guest, least: int) -> int:
    """Wait until the dirtier has counted so far; where it is."""
    async with asyncio.timeout(60):
        while True:
            count = (await guest.run(["cat", "/tmp/count"], check=False)).stdout
            if count and int(count) >= least:
                return int(count)
            await asyncio.sleep(0.1)


async def test_killed_guest_is_noticed_and_boots_again(lab: Lab) -> None:
    before, other = lab.b.boot_id, lab.a.boot_id
    waiting = asyncio.create_task(lab.b.run(["sleep", "1000"]))
    process = await lab.b.start(["sleep", "1000"])
    await asyncio.sleep(0.2)
    await lab.b.kill()
    with pytest.raises(GuestDied):
        await waiting
    with pytest.raises(GuestDied):
        await process.wait()
    with pytest.raises(GuestDied):
        await lab.b.run(["true"])
    assert not lab.b.running
    await lab.a.run(["ping", "-c", "20", "-i", "0.05", "-W", "1", "-q", lab.b.address], check=False)

    await lab.b.boot()
    assert lab.b.boot_id not in (before, other)
    assert lab.a.boot_id == other
    await lab.a.run(["ping", "-c", "1", "-w", "10", lab.b.address])
    uptimes = [float((await guest.run(["cat", "/proc/uptime"])).stdout.split()[0]) for guest in lab.guests]
    assert uptimes[0] > uptimes[1] + 5  # clocks of their own


async def test_panic_is_noticed(lab: Lab) -> None:
    with pytest.raises(GuestDied):
        await lab.b.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100"])
    await lab.b.wait_dead()
    assert not lab.b.running
    assert "panic" in lab.b.console


async def test_qemu_dies_with_us(session_lab: Lab) -> None:
    """A process that boots a guest is killed with -9: QEMU is gone, too."""
    script = """
import asyncio
from tests.vm.lab import open_lab
from tests.vm.qemu import Qemu
import tests.vm.guest as guest
start = guest.start_qemu
async def told(*arguments):
    qemu = await start(*arguments)
    print(qemu.child.pid, flush=True)
    return qemu
guest.start_qemu = told
async def main():
    async with open_lab():
        pass
asyncio.run(main())
"""
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin",
        "PYTHONPATH": f"{ROOT}:{ROOT}/proto",
        "PHAUL_LAB_ACCELERATOR": "tcg",
        "HOME": str(Path.home()),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=environment, cwd="/"
    )
    assert process.stdout is not None
    pids = [int(await process.stdout.readline()) for _ in range(2)]
    assert all(is_running(pid) for pid in pids)
    process.kill()
    await process.wait()
    async with asyncio.timeout(5):
        while True:
            if not any(is_running(pid) for pid in pids):
                return
            await asyncio.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process runs; a zombie that waits for the host's init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
