"""The process trees that this node started or restored, each under a shim that outlives phauld.

Everything known about a tree is in its directory (`shim.py` says which files), so a restarted phauld knows as much as
the one before it. The invariant: of a name at most one record is alive, and the newest record stands for the name.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from phaul_client.errors import InvalidRequest, PhaulError, WorkloadExists, WorkloadNotFound
from phaul_client.tree import KILL_TIMEOUT_SECONDS, Tree, descendants, is_alive, wait_until_gone
from phaul_criu.child import Child, spawn
from phauld import identities, shim
from phauld.scope import in_scope

logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_SHIM: Final = (sys.executable, "-I", "-S", shim.__file__)
START_TIMEOUT_SECONDS: Final = 10.0
EXIT_RECORD_TIMEOUT_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.01

State = Literal["starting", "running", "exited", "moved", "never-ran", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """How a workload is started; it travels with the tree."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    log_path: str = ""  #: where its output goes, the same path on every node; empty for trees that phaul did not start
    new_pid_namespace: bool = True
    user: str = ""  #: who it runs as, with ":group" if wanted; empty: as phauld
    limits: Mapping[str, int] = field(default_factory=dict)  #: soft and hard, see `identities.py`
    new_ipc_namespace: bool = False  #: what it has of System V IPC is its own, and moves along
    new_time_namespace: bool = False  #: its monotonic and boot-time clocks go on where they were on the next node

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"{self.name!r} is not a name",
                remedy="letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 63",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A record, as it stands now."""

    directory: Path
    spec: WorkloadSpec
    state: State
    pid: int | None  #: root of the tree, while it runs
    created_at: float  #: seconds since the epoch
    exit_code: int | None = None
    signal: int | None = None
    moved_to: str | None = None
    error: str = ""  #: why phaul ended it

    @property
    def name(self) -> str:
        return self.spec.name


class Workloads:
    """The records below one directory."""

    def __init__(self, directory: Path, log_dir: Path) -> None:
        self._directory = directory
        self._log_dir = log_dir
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        log_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._reapers: set[asyncio.Task[int]] = set()
        self._forget_unstarted()

    def list(self) -> list[Workload]:
        """The newest record of every name, in the order of their making."""
        newest = {workload.name: workload for workload in sorted(self._records(), key=lambda each: each.created_at)}
        return sorted(newest.values(), key=lambda each: each.created_at)

    def get(self, name: str) -> Workload:
        """The newest record of a name. Raises `WorkloadNotFound`."""
        for workload in self.list():
            if workload.name == name:
                return workload
        raise WorkloadNotFound(name)

    def by_pid(self, pid: int) -> Workload | None:
        """The running workload whose root has this PID."""
        return next((each for each in self.list() if each.pid == pid and each.state == "running"), None)

    @property
    def log_dir(self) -> Path:
        """Where the logs of workloads are."""
        return self._log_dir

    def log_path(self, name: str) -> str:
        return str(self._log_dir / f"{name}.log")

    async def run(self, spec: WorkloadSpec) -> Workload:
        """Start a workload. Raises `WorkloadExists`, and `InvalidRequest` when it cannot be started."""
        self._check_free(spec.name)
        _check_directory(spec.cwd)
        identity, limits = identities.of_user(spec.user), identities.resource_limits(spec.limits)
        init = shutil.which("tini") if spec.new_pid_namespace else None
        if spec.new_pid_namespace and init is None:
            raise InvalidRequest("tini, the init of workloads, is missing", remedy="apt-get install tini")
        search = spec.env.get("PATH", os.defpath)
        program = shutil.which(spec.argv[0], path=search) if "/" not in spec.argv[0] else spec.argv[0]
        if program is None or not _is_program(os.path.join(spec.cwd, program)):
            raise InvalidRequest(f"{spec.argv[0]!r} is no program on this node", remedy=f"searched in {search}")
        argv, ids = [program, *spec.argv[1:]], identity
        if init is not None:
            argv, ids = [init, "--", *identities.becoming(identity), *argv], None
        directory = self._make_record(spec)
        shim.write_json(str(directory), "spec.json", {**_to_json(spec), "argv": argv, "ids": ids, "rlimits": limits})
        try:
            outcome = await self._start_under_shim(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        if "error" in outcome:
            shutil.rmtree(directory, ignore_errors=True)
            raise InvalidRequest(f"{spec.argv[0]!r} did not start: {outcome['error']}")
        self.forget_older(spec.name, directory)
        logger.info("workload started name=%s pid=%s", spec.name, outcome["pid"])
        return self._read(directory)

    async def _start_under_shim(self, directory: Path) -> dict[str, Any]:
        """What its shim says of it: a "pid", or an "error", and then the shim has ended. Raises `TimeoutError`."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = await self._start_shim(("run", str(directory), str(theirs.fileno())), theirs.fileno())
            try:
                async with asyncio.timeout(START_TIMEOUT_SECONDS):
                    outcome: dict[str, Any] = json.loads(await _read_all(ours) or '{"error": "its shim died"}')
                    if "error" in outcome:
                        await child.wait()
            except BaseException:
                child.kill()
                raise
        return outcome

    async def restore_under_shim(
        self, spec: WorkloadSpec, criu: Path, *, new_cgroup_namespace: bool = False, inherited: tuple[int, ...] = ()
    ) -> "RestoreSlot":
        """Start a shim with a `criu swrk` below it, ready for a restore request. Raises `WorkloadExists`.

        criu inherits those descriptors. With a new cgroup namespace it waits for `RestoreSlot.go`: the cgroups that it
        is in by then are its roots.
        """
        self._check_free(spec.name)
        directory = self._make_record(spec)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        go_fds = os.pipe() if new_cgroup_namespace else ()
        try:
            fd = theirs.fileno()
            go = str(go_fds[0]) if go_fds else "-"
            arguments = ("restore", str(directory), str(fd), str(criu), go, *map(str, inherited))
            child = await self._start_shim(arguments, fd, *go_fds[:1], *inherited)
        except BaseException:
            ours.close()
            for go_fd in go_fds[1:]:
                os.close(go_fd)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            theirs.close()
            for go_fd in go_fds[:1]:
                os.close(go_fd)
        return RestoreSlot(self, directory, ours, child, go_fds[1] if go_fds else None)

    def found_slot(self, directory: Path) -> "RestoreSlot":
        """What an earlier phauld had begun to restore in `directory`."""
        return RestoreSlot(self, directory, None, None)

    def mark_moved(self, workload: Workload, destination: str) -> None:
        """Record that the tree lives on elsewhere."""
        shim.write_json(str(workload.directory), "moved.json", {"to": destination, "at": time.time()})

    async def wait(self, name: str) -> Workload:
        """Wait until the tree has ended (or moved away); its last record. Raises `WorkloadNotFound`."""
        workload = self.get(name)
        while workload.state in ("starting", "running"):
            if workload.pid is not None:
                await wait_until_gone(workload.pid)
            await asyncio.sleep(POLL_SECONDS)
            workload = self._read(workload.directory)
        return workload

    async def lose(self, directory: Path, reason: str) -> None:
        """Kill the tree of a record, with what has lost its parent in it, and keep why. Raises `OSError`."""
        async with asyncio.timeout(KILL_TIMEOUT_SECONDS):
            while below := _below(directory):
                for pid in below:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(POLL_SECONDS)
        shim.write_json(str(directory), "failure.json", {"error": reason, "at": time.time()})

    def send_signal(self, name: str, number: int) -> None:
        """Signal the root of a tree; killing the root of a PID namespace ends the tree. Raises `WorkloadNotFound`."""
        workload = self.get(name)
        if workload.state != "running" or workload.pid is None:
            raise InvalidRequest(f"{name} does not run here (it is {workload.state})")
        os.kill(workload.pid, number)

    def remove(self, name: str) -> None:
        """Forget a workload that does not run. Raises `WorkloadNotFound`, `InvalidRequest`."""
        workload = self.get(name)
        if workload.state in ("starting", "running"):
            raise PhaulError(f"{name} runs", reason="WRONG_PHASE", remedy=f"phaul stop {name}, then remove it")
        for record in list(self._records()):
            if record.name == name:
                shutil.rmtree(record.directory, ignore_errors=True)

    async def close(self) -> None:
        """Stop watching. The trees and their shims stay."""
        if self._reapers:
            await asyncio.wait(self._reapers, timeout=0)  # reaps those that have ended
        for task in self._reapers:
            task.cancel()
        await asyncio.gather(*self._reapers, return_exceptions=True)

    async def _start_shim(self, arguments: tuple[str, ...], *fds: int) -> Child:
        scope = in_scope("tree", Path(arguments[1]).name)
        child = await spawn([*scope, *_SHIM, *arguments], pass_fds=fds)
        task = asyncio.create_task(child.wait(), name=f"shim-{child.pid}")
        self._reapers.add(task)
        task.add_done_callback(self._reapers.discard)
        return child

    def _check_free(self, name: str) -> None:
        for workload in self._records():
            if workload.name == name and workload.state in ("starting", "running"):
                raise WorkloadExists(name)

    def _make_record(self, spec: WorkloadSpec) -> Path:
        directory = self._directory / f"{spec.name}@{uuid.uuid4().hex[:12]}"
        directory.mkdir(mode=0o700)
        record = {"spec": _to_json(spec), "created_at": time.time()}
        try:
            shim.write_json(str(directory), "record.json", record)
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory

    def _forget_unstarted(self) -> None:
        """Drop what an earlier phauld, killed in the middle of it, had no shim for: it would seem to start for ever."""
        for directory in self._directory.iterdir():
            if not (directory / "shim.json").exists():
                shutil.rmtree(directory, ignore_errors=True)

    def forget_older(self, name: str, kept: Path) -> None:
        """Drop every record of a name but one."""
        for record in list(self._records()):
            if record.name == name and record.directory != kept:
                shutil.rmtree(record.directory, ignore_errors=True)

    def _records(self) -> Iterator[Workload]:
        for directory in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield self._read(directory)

    def _read(self, directory: Path) -> Workload:
        record = json.loads((directory / "record.json").read_text(encoding="utf-8"))
        tree = _read_json(directory / "tree.json")
        ending = _read_json(directory / "exit.json")
        moved = _read_json(directory / "moved.json")
        state, pid = _state(_read_json(directory / "shim.json"), tree, ending, moved, record["created_at"])
        if state == "lost" and (ending := _read_json(directory / "exit.json")) is not None:  # written meanwhile
            state, pid = _state(None, tree, ending, moved, record["created_at"])
        return Workload(
            directory=directory,
            spec=_from_json(record["spec"]),
            state=state,
            pid=pid,
            created_at=record["created_at"],
            exit_code=(ending or {}).get("exit_code"),
            signal=(ending or {}).get("signal"),
            moved_to=(moved or {}).get("to"),
            error=(_read_json(directory / "failure.json") or {}).get("error", ""),
        )


class RestoreSlot:
    """A shim with the criu that restores below it; `keep` or `discard` ends it."""

    def __init__(
        self,
        workloads: Workloads,
        directory: Path,
        swrk: socket.socket | None,
        child: Child | None,
        go_fd: int | None = None,
    ) -> None:
        self._swrk = swrk
        self._go_fd = go_fd  # where criu waits for a word
        self._child = child  # the shim, if it is ours
        self._workloads = workloads
        self.directory = directory

    @property
    def ran(self) -> bool:
        """Whether the shim says that the tree ran."""
        ending = _read_json(self.directory / "exit.json")
        if ending is not None:
            return bool(ending["outcome"] == "exited")
        return (self.directory / "tree.json").exists()

    def take_swrk(self) -> socket.socket:
        """Our end of the connection to criu, now the caller's."""
        assert self._swrk is not None, "the connection was taken already"
        swrk, self._swrk = self._swrk, None
        return swrk

    async def criu_pid(self) -> int:
        """The criu that waits for its request. Raises `TimeoutError`."""
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            while True:  # nothing tells when it is there
                if found := [pid for pid in descendants(self._shim_pid) if pid != self._shim_pid]:
                    return found[0]
                await asyncio.sleep(POLL_SECONDS)

    def go(self) -> None:
        """criu is in the cgroups that it is to be in. Raises `OSError` if it has ended."""
        if self._go_fd is not None:
            go_fd, self._go_fd = self._go_fd, None
            with os.fdopen(go_fd, "wb", buffering=0) as pipe:
                pipe.write(b".")

    def release(self) -> None:
        """The tree is about to be let go: from now on its shim asks the tree, not criu, whether it ran."""
        (self.directory / "released").touch(mode=0o600)

    async def outcome(self) -> int | None:
        """Wait until the shim has said whether the tree ran; the PID of its root, if it still runs."""
        while not (self.directory / "tree.json").exists() and not (self.directory / "exit.json").exists():
            if not self._shim_lives():
                break  # killed, or the node was booted since: so is the tree
            await asyncio.sleep(POLL_SECONDS)
        tree = _read_json(self.directory / "tree.json")
        return tree["pid"] if tree is not None and is_alive(tree) else None

    @property
    def _has_said(self) -> bool:
        return any((self.directory / name).exists() for name in ("tree.json", "exit.json"))

    @property
    def is_unattended(self) -> bool:
        """Whether the shim was killed before it had said anything about the tree."""
        return not self._has_said and not self._shim_lives()

    def keep(self, name: str) -> None:
        """The tree runs: its record stands for the name from now on."""
        self._workloads.forget_older(name, self.directory)

    async def vouch(self, root: Mapping[str, Any]) -> None:
        """Wait until the shim has said that the tree runs; if it is killed before, say it, or nobody could find it."""
        while not self._has_said and self._shim_lives():  # noqa: ASYNC110 (it is another process)
            await asyncio.sleep(POLL_SECONDS)
        if root and not self._has_said:
            with contextlib.suppress(OSError):
                shim.write_json(os.fspath(self.directory), "tree.json", dict(root))

    async def discard(self) -> None:
        """The tree never ran, and criu's connection is closed: wait until its shim has cleaned up, and forget it."""
        if self._swrk is not None:
            self._swrk.close()
        if self._go_fd is not None:
            os.close(self._go_fd)
            self._go_fd = None
        try:
            async with asyncio.timeout(EXIT_RECORD_TIMEOUT_SECONDS):
                await self._ended()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError), Tree.below(self._shim_pid) as left:
                await left.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _ended(self) -> None:
        if self._child is not None:  # it may not have said yet who it is
            await self._child.wait()
        while self._shim_lives():
            await wait_until_gone(self._shim_pid)

    @property
    def _shim_pid(self) -> int:
        if self._child is not None:
            return self._child.pid
        return int((_read_json(self.directory / "shim.json") or {})["pid"])

    def _shim_lives(self) -> bool:
        shim_process = _read_json(self.directory / "shim.json")
        return shim_process is not None and _lives(shim_process)


def _state(
    shim_process: dict[str, Any] | None,
    tree: dict[str, Any] | None,
    ending: dict[str, Any] | None,
    moved: dict[str, Any] | None,
    created_at: float,
) -> tuple[State, int | None]:
    if moved is not None:
        return "moved", None
    if ending is not None:
        return ("exited" if ending["outcome"] == "exited" else "never-ran"), None
    if tree is not None and _lives(tree):
        return "running", tree["pid"]
    if shim_process is None:  # phauld may have ended before it could start one
        return ("starting" if time.time() - created_at < START_TIMEOUT_SECONDS else "lost"), None
    if _lives(shim_process):
        return "starting", None
    return "lost", None


def _below(directory: Path) -> list[int]:
    """The processes of the tree of a record; only the shim knows those whose parent has ended."""
    shim_process, root = (_read_json(directory / name) for name in ("shim.json", "tree.json"))
    if shim_process is not None and is_alive(shim_process):
        return [pid for pid in descendants(shim_process["pid"]) if pid != shim_process["pid"]]
    return list(descendants(root["pid"])) if root is not None and is_alive(root) else []


def _lives(known: Mapping[str, Any]) -> bool:
    """Whether it runs; a zombie, whose parent may never reap it, does not."""
    if not is_alive(known):
        return False
    try:
        return Path(f"/proc/{known['pid']}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _read_all(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    data = b""
    while chunk := await asyncio.get_running_loop().sock_recv(sock, 4096):
        data += chunk
    return data


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _check_directory(path: str) -> None:
    if not os.path.isdir(path):
        raise InvalidRequest(f"the working directory {path!r} is no directory on this node")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None


def _to_json(spec: WorkloadSpec) -> dict[str, Any]:
    return asdict(spec)


def _from_json(content: dict[str, Any]) -> WorkloadSpec:
    return WorkloadSpec(**{**content, "argv": tuple(content["argv"])})


def signal_number(name: str) -> int:
    """The number of a signal given as `TERM`, `SIGTERM` or `15`. Raises `InvalidRequest`."""
    try:
        return signal.Signals(int(name)) if name.isdigit() else signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise InvalidRequest(f"{name!r} is no signal") from None
