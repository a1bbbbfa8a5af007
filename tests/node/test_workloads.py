"""Workloads and their shims, for real: what is written down of how they end, and what outlives whom."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from phaul_client.errors import InvalidRequest, PhaulError, WorkloadExists, WorkloadNotFound
from phaul_criu.install import find_binary
from phaul_criu.swrk import Swrk
from phauld.trees import record_files, restore_slot, shims
from phauld.trees.restart_policy import NEVER, Restart, When
from phauld.trees.workload_records import Workload
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads
from tests.node.criu_victims import alive, no_leaks
from tests.nodes import ROOT, children, until

pytestmark = pytest.mark.criu


@pytest.fixture
async def workloads(tmp_path: Path) -> AsyncIterator[Workloads]:
    with no_leaks():
        made = Workloads(tmp_path / "records", tmp_path / "log")
        yield made
        for each in made.list():
            if each.pid is not None:
                os.kill(each.pid, signal.SIGKILL)
        await until(lambda: not made._shims._reapers)  # every shim has ended
        await made.close()


def spec(workloads: Workloads, *argv: str, **fields: Any) -> WorkloadSpec:
    name = fields.setdefault("name", "web")
    return WorkloadSpec(argv=argv, **{"log_path": workloads.log_path(name), "env": {"PATH": os.defpath}, **fields})


def shim_of(workload: Workload) -> int:
    pid: int = json.loads((workload.directory / "shim.json").read_text())["pid"]
    return pid


def log_of(workload: Workload) -> str:
    return Path(workload.spec.log_path).read_text()


OWN_OR_NOT = pytest.mark.parametrize("own", [True, False], ids=["own PID namespace", "the node's"])


@OWN_OR_NOT
async def test_the_exit_code_is_written_down(workloads: Workloads, own: bool) -> None:
    started = await workloads.run(spec(workloads, "sh", "-c", "echo hello; exit 3", new_pid_namespace=own))
    assert started.state in ("running", "starting", "ending", "exited")
    ended = await workloads.wait("web")
    assert (ended.state, ended.exit_code, ended.signal, ended.pid) == ("exited", 3, None, None)
    assert log_of(ended) == "hello\n"


@OWN_OR_NOT
async def test_it_runs_as_the_user_and_with_the_limits_that_it_was_given(workloads: Workloads, own: bool) -> None:
    command = "id -u; id -g; id -G; ulimit -n; ulimit -c; ulimit -Hn; grep CapEff /proc/self/status"
    given = {"user": "4242:4243", "limits": {"nofile": 77, "core": 0}}
    await workloads.run(spec(workloads, "sh", "-c", command, new_pid_namespace=own, **given))
    ended = await workloads.wait("web")
    assert ended.exit_code == 0, log_of(ended)
    assert log_of(ended).split() == ["4242", "4243", "4243", "77", "0", "77", "CapEff:", "0" * 16]
    assert (ended.spec.user, ended.spec.limits) == (given["user"], given["limits"])


@pytest.mark.parametrize("own", [True, False], ids=["own IPC namespace", "the node's"])
async def test_its_ipc_namespace(workloads: Workloads, own: bool) -> None:
    await workloads.run(spec(workloads, "readlink", "/proc/self/ns/ipc", new_ipc_namespace=own))
    ended = await workloads.wait("web")
    assert (log_of(ended).strip() != os.readlink("/proc/self/ns/ipc")) == own


async def test_its_init_is_roots_whoever_it_runs_as(workloads: Workloads) -> None:
    """criu lets the init mount a /proc, which it must be allowed to."""
    started = await workloads.run(spec(workloads, "sleep", "100", user="4242:4243"))
    assert started.pid is not None

    def users() -> list[int]:
        return [os.stat(f"/proc/{pid}").st_uid for pid in tree(started.pid or 0)]

    await until(lambda: users() == [os.getuid(), 4242])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"user": "nobody-of-this-name"}, "is no user"),
        ({"user": "4242"}, "is no user"),
        ({"user": "root:no-group-of-this-name"}, "is no group"),
        ({"user": f"{2**32 - 1}:0"}, "is no user"),
        ({"limits": {"files": 3}}, "is no resource limit"),
        ({"limits": {"nofile": 2**64 - 2}}, "is too high"),
        ({"limits": {"nofile": 2**62}}, "did not start"),
    ],
)
async def test_what_there_is_not_is_refused_and_nothing_runs(
    workloads: Workloads, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await workloads.run(spec(workloads, "true", **given))
    assert workloads.list() == []


async def test_the_signal_is_written_down(workloads: Workloads) -> None:
    await workloads.run(spec(workloads, "sleep", "100", new_pid_namespace=False))
    workloads.send_signal("web", signal.SIGTERM)
    ended = await workloads.wait("web")
    assert (ended.state, ended.exit_code, ended.signal) == ("exited", None, signal.SIGTERM)


@pytest.mark.parametrize("ended", ["before", "by the signal"])
async def test_what_has_just_ended_is_ending_and_is_stopped_when_its_shim_has_said_so(
    workloads: Workloads, ended: str
) -> None:
    started = await workloads.run(spec(workloads, "sleep", "100", new_pid_namespace=False))
    assert started.pid is not None
    os.kill(shim_of(started), signal.SIGSTOP)
    if ended == "before":
        os.kill(started.pid, signal.SIGINT)
        await until(lambda: workloads.get("web").state == "ending")
        with pytest.raises(InvalidRequest, match="it is ending"):
            workloads.send_signal("web", signal.SIGTERM)
        with pytest.raises(WorkloadExists):
            await workloads.run(spec(workloads, "true"))
    stopping = asyncio.create_task(workloads.stop("web", signal.SIGINT, 0))
    await until(lambda: workloads.get("web").state == "ending")
    await asyncio.sleep(0.1)
    assert not stopping.done()
    os.kill(shim_of(started), signal.SIGCONT)
    stopped = await stopping
    assert (stopped.state, stopped.signal) == ("exited", signal.SIGINT)
    assert (await workloads.stop("web", signal.SIGTERM, 0)) == stopped


async def test_killing_the_root_of_a_namespace_ends_the_whole_tree(workloads: Workloads) -> None:
    started = await workloads.run(spec(workloads, "sh", "-c", "setsid sleep 100 & sleep 100"))
    assert started.pid is not None
    await until(lambda: len(tree(started.pid or 0)) == 4)  # tini, sh, two sleeps
    pids = tree(started.pid)
    workloads.send_signal("web", signal.SIGKILL)
    ended = await workloads.wait("web")
    assert ended.signal == signal.SIGKILL
    await until(lambda: not any(map(alive, pids)))


def tree(pid: int) -> list[int]:
    return [pid, *(each for child in children(pid) for each in tree(child))]


async def test_what_a_workload_finds_around_it(workloads: Workloads, tmp_path: Path) -> None:
    script = "env | grep -v ^_= | sort; pwd; readlink /proc/self/fd/0; ls /proc/$$/fd; ps -o sid=,tty= -p $$; umask"
    fields = {"env": {"PATH": os.environ["PATH"], "A": "1"}, "cwd": str(tmp_path), "new_pid_namespace": False}
    started = await workloads.run(spec(workloads, "sh", "-c", script, **fields))
    ended = await workloads.wait("web")
    lines = log_of(ended).split("\n")
    assert set(lines[:3]) == {"A=1", f"PATH={os.environ['PATH']}", f"PWD={tmp_path}"}
    assert lines[3:5] == [str(tmp_path), "/dev/null"]
    assert lines[5:8] == ["0", "1", "2"]
    assert lines[8].split() == [str(started.pid), "?"]
    assert os.stat(ended.spec.log_path).st_mode & 0o777 == 0o640


async def test_output_is_appended(workloads: Workloads) -> None:
    for word in ("one", "two"):
        await workloads.run(spec(workloads, "echo", word))
        ended = await workloads.wait("web")
    assert log_of(ended) == "one\ntwo\n"
    assert len(workloads.list()) == 1
    assert len(list(ended.directory.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("argv", "fields", "says"),
    [
        (("no-such-program",), {}, "is no program"),
        (("/no/such/program",), {}, "is no program"),
        (("/etc/passwd",), {}, "is no program"),
        (("/etc",), {}, "is no program"),
        (("sleep", "1"), {"env": {"PATH": "/nowhere"}}, "is no program"),
        (("sleep", "1"), {"cwd": "/no/such/directory"}, "no directory"),
        (("sleep", "1"), {"log_path": "/no/such/directory/web.log"}, "did not start"),
        (("BAD",), {}, "did not start"),
    ],
)
@OWN_OR_NOT
async def test_what_cannot_be_started_says_why_and_leaves_nothing(
    workloads: Workloads, tmp_path: Path, argv: tuple[str, ...], fields: dict[str, Any], says: str, own: bool
) -> None:
    bad = tmp_path / "bad"
    bad.write_text("\x7fELF no program")
    bad.chmod(0o755)
    argv = tuple(str(bad) if word == "BAD" else word for word in argv)
    if argv == (str(bad),) and own:
        pytest.skip("tini starts, and tells by its exit code")
    with pytest.raises(InvalidRequest, match=says):
        await workloads.run(spec(workloads, *argv, new_pid_namespace=own, **fields))
    assert workloads.list() == []
    assert list((tmp_path / "records").iterdir()) == []


async def test_a_shim_that_cannot_be_started_leaves_nothing(
    workloads: Workloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shims, "_SHIM", ("/nonexistent",))
    with pytest.raises(OSError, match="nonexistent"):
        await workloads.run(spec(workloads, "sleep", "1"))
    with pytest.raises(OSError, match="nonexistent"):
        await workloads.restore_under_shim(spec(workloads, "sleep", "1"), find_binary())
    assert list((tmp_path / "records").iterdir()) == []


async def test_a_name_is_taken_while_it_runs_and_free_afterwards(workloads: Workloads) -> None:
    await workloads.run(spec(workloads, "sleep", "100"))
    with pytest.raises(WorkloadExists):
        await workloads.run(spec(workloads, "true"))
    with pytest.raises(WorkloadExists):
        await workloads.restore_under_shim(spec(workloads), find_binary())
    with pytest.raises(PhaulError, match="web runs"):
        workloads.remove("web")
    workloads.send_signal("web", signal.SIGKILL)
    await workloads.wait("web")
    await workloads.run(spec(workloads, "true"))
    assert (await workloads.wait("web")).exit_code == 0
    workloads.remove("web")
    with pytest.raises(WorkloadNotFound):
        workloads.get("web")


async def test_a_name_is_taken_once_by_many_at_once(workloads: Workloads) -> None:
    outcomes = await asyncio.gather(
        *(workloads.run(spec(workloads, "sleep", "100")) for _ in range(4)), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in outcomes) == ["Workload", *["WorkloadExists"] * 3]
    assert len(workloads.list()) == 1


async def test_names_that_begin_alike_are_different(workloads: Workloads) -> None:
    for name in ("web", "web-2", "web.3"):
        await workloads.run(spec(workloads, "sleep", "100", name=name))
    assert [each.name for each in workloads.list()] == ["web", "web-2", "web.3"]
    second = workloads.get("web-2")
    assert second.pid is not None
    assert workloads.by_pid(second.pid) == second
    assert workloads.by_pid(1) is None


async def test_the_root_ends_and_an_orphan_lives_on(workloads: Workloads) -> None:
    """Its shim is the orphan's parent now, and ends with it."""
    await workloads.run(spec(workloads, "sh", "-c", "setsid sleep 100 & echo $!; exit 5", new_pid_namespace=False))
    ended = await workloads.wait("web")
    assert (ended.state, ended.exit_code) == ("exited", 5)
    orphan = int(log_of(ended))
    assert alive(orphan)
    assert children(shim_of(ended)) == [orphan]
    os.kill(orphan, signal.SIGKILL)
    await until(lambda: not alive(shim_of(ended)))


async def test_a_shim_that_is_killed_takes_the_exit_status_with_it_but_not_the_tree(workloads: Workloads) -> None:
    started = await workloads.run(spec(workloads, "sleep", "100", new_pid_namespace=False))
    os.kill(shim_of(started), signal.SIGKILL)
    await until(lambda: not alive(shim_of(started)))
    assert workloads.get("web").state == "running"
    assert started.pid is not None
    os.kill(started.pid, signal.SIGKILL)
    ended = await workloads.wait("web")
    assert (ended.state, ended.exit_code, ended.signal) == ("lost", None, None)


DAEMON = """
import asyncio, sys
from pathlib import Path
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads
async def main():
    workloads = Workloads(Path(sys.argv[1], "records"), Path(sys.argv[1], "log"))
    spec = WorkloadSpec(name="web", argv=("sh", "-c", "sleep 0.5; exit 9"), log_path=workloads.log_path("web"))
    print((await workloads.run(spec)).pid, flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""


async def killed_daemon(directory: Path) -> int:
    """The PID of a workload whose phauld was killed right after it was started."""
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DAEMON, str(directory)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert daemon.stdout is not None
    pid = int(await daemon.stdout.readline())
    daemon.kill()
    await daemon.wait()
    return pid


@pytest.mark.parametrize("ends", ["while nobody looks", "while another one looks"])
async def test_a_workload_outlives_the_daemon_and_is_found_again(tmp_path: Path, ends: str) -> None:
    pid = await killed_daemon(tmp_path)
    assert alive(pid)
    if ends == "while nobody looks":
        await until(lambda: not alive(pid))
        await asyncio.sleep(0.1)
    again = Workloads(tmp_path / "records", tmp_path / "log")
    if ends == "while another one looks":
        assert (again.get("web").state, again.get("web").pid) == ("running", pid)
        with pytest.raises(WorkloadExists):
            await again.run(spec(again, "true"))
    ended = await again.wait("web")
    assert (ended.state, ended.exit_code) == ("exited", 9)
    await again.close()


@pytest.mark.parametrize("policy", [NEVER, Restart(when=When.ALWAYS)], ids=["no", "always"])
async def test_a_full_disk_keeps_nothing_running_that_nobody_would_start_again(
    workloads: Workloads, monkeypatch: pytest.MonkeyPatch, policy: Restart
) -> None:
    await workloads.run(spec(workloads, "sleep", "100", restart=policy))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("phauld.trees.workloads.write_json", full)
    if policy == NEVER:
        assert (await workloads.stop("web", signal.SIGKILL, 10)).signal == signal.SIGKILL
        return
    with pytest.raises(OSError, match="No space left"):
        await workloads.stop("web", signal.SIGKILL, 10)
    assert workloads.get("web").state == "running"


async def test_a_record_that_no_shim_ever_took_up_does_not_block_its_name(
    workloads: Workloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """phauld was killed between the record and the shim."""
    directory = workloads.records.make(spec(workloads, "sleep", "100"))
    assert workloads.get("web").state == "starting"
    record = json.loads((directory / "record.json").read_text())
    (directory / "record.json").write_text(json.dumps({**record, "created_at": time.time() - 60}))
    assert workloads.get("web").state == "lost"
    await workloads.run(spec(workloads, "true"))
    assert (await workloads.wait("web")).exit_code == 0
    assert not directory.exists()


async def test_an_end_between_two_looks_is_not_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit record is written after it was looked for, and the shim is gone when that is looked at."""
    await killed_daemon(tmp_path)
    read = record_files.read_json

    def slowly(path: Path) -> dict[str, Any] | None:
        content = read(path)
        if path.name == "exit.json" and content is None:
            time.sleep(1)
        return content

    monkeypatch.setattr(record_files, "read_json", slowly)
    found = Workloads(tmp_path / "records", tmp_path / "log").get("web")
    assert (found.state, found.exit_code) == ("exited", 9)


@pytest.mark.parametrize("other", [{"boot_id": "another"}, {"start_ticks": 1}])
async def test_a_process_with_the_same_pid_is_not_the_same_process(workloads: Workloads, other: dict[str, Any]) -> None:
    started = await workloads.run(spec(workloads, "sleep", "100"))
    os.kill(shim_of(started), signal.SIGKILL)
    tree_file = started.directory / "tree.json"
    before = tree_file.read_text()
    tree_file.write_text(json.dumps({**json.loads(before), **other}))
    await until(lambda: workloads.get("web").state == "lost")
    with pytest.raises(InvalidRequest, match="does not run here"):
        workloads.send_signal("web", signal.SIGKILL)
    tree_file.write_text(before)


# Restore slots


@pytest.mark.parametrize("patience_seconds", [0, 0.3])
async def test_a_slot_that_is_discarded_leaves_nothing(
    workloads: Workloads, tmp_path: Path, patience_seconds: float
) -> None:
    slot = await workloads.restore_under_shim(spec(workloads), find_binary())
    await asyncio.sleep(patience_seconds)
    with pytest.raises(WorkloadExists):
        await workloads.run(spec(workloads, "true"))
    await slot.discard()
    assert list((tmp_path / "records").iterdir()) == []
    await workloads.run(spec(workloads, "true"))
    await workloads.wait("web")


@pytest.mark.parametrize("before", [False, True], ids=["never here", "here before"])
async def test_who_waits_for_what_a_migration_brings_hears_when_it_brings_nothing(
    workloads: Workloads, before: bool
) -> None:
    if before:
        await workloads.run(spec(workloads, "sh", "-c", "exit 3"))
        await workloads.wait("web")
    slot = await workloads.restore_under_shim(spec(workloads), find_binary(), migration_id="m")
    assert (workloads.get("web").is_arriving, workloads.get("web").brought_by) == (True, "m")
    for refused in (workloads.stop("web", signal.SIGKILL, 10), asyncio.to_thread(workloads.remove, "web")):
        with pytest.raises(PhaulError, match="web is arriving here with the migration m") as caught:
            await refused
        assert caught.value.reason == "WRONG_PHASE"
    waiting = asyncio.create_task(workloads.wait("web"))
    await asyncio.sleep(0)  # it looks at the record before it waits
    await slot.discard()
    (found,) = await asyncio.gather(waiting, return_exceptions=True)
    if before:
        assert isinstance(found, Workload)
        assert (found.state, found.exit_code) == ("exited", 3)
    else:
        assert isinstance(found, WorkloadNotFound)


async def test_a_slot_has_a_criu_that_answers(workloads: Workloads, tmp_path: Path) -> None:
    slot = await workloads.restore_under_shim(spec(workloads), find_binary())
    async with Swrk.attach(slot.take_swrk()) as swrk:
        from phaul_criu.requests import version_request

        assert (await swrk.request(version_request(), timeout_seconds=5)).version.major_number >= 4
    assert not slot.ran
    await slot.discard()
    assert list((tmp_path / "records").iterdir()) == []


async def test_a_slot_whose_criu_hangs_is_killed(
    workloads: Workloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_slot, "EXIT_RECORD_TIMEOUT_SECONDS", 0.2)
    deaf = tmp_path / "criu"
    deaf.write_text("#!/bin/sh\nsleep 100\n")
    deaf.chmod(0o755)
    slot = await workloads.restore_under_shim(spec(workloads), deaf)
    await until(lambda: (slot.directory / "shim.json").exists())
    await slot.discard()
    assert list((tmp_path / "records").iterdir()) == []


async def test_a_slot_without_a_criu_is_discarded_too(workloads: Workloads, tmp_path: Path) -> None:
    slot = await workloads.restore_under_shim(spec(workloads), tmp_path / "no-criu")
    with slot.take_swrk() as swrk:
        swrk.settimeout(30)
        assert swrk.recv(1) == b""
    assert await slot.outcome() is None
    assert not slot.ran
    await slot.discard()
    assert list((tmp_path / "records").iterdir()) == []


async def test_a_slot_that_is_lost_by_a_killed_daemon_is_found_and_discarded(
    workloads: Workloads, tmp_path: Path
) -> None:
    slot = await workloads.restore_under_shim(spec(workloads), find_binary())
    await until(lambda: (slot.directory / "shim.json").exists())
    slot.take_swrk().close()
    found = workloads.found_slot(slot.directory)
    assert await found.outcome() is None
    assert not found.ran
    await found.discard()
    assert list((tmp_path / "records").iterdir()) == []
