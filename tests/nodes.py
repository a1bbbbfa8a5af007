"""Two nodes and a client on this machine, each a set of namespaces of its own, joined by networks of their own.

    async with two_nodes(directory) as (a, b, client):
        await a.start_phauld()
        await a.run(["ip", "address"])

Everything of a node ends with its init, and its init ends when the pipe that we hold to it closes: at the end of the
block, and when this process is killed. Nothing is made in the namespaces of the host: no link, no mount, no file
outside of the given directory.

A node shares the host's files but for `/run`, which is its own tmpfs. Between the nodes is a veth pair (`address`, and
each knows the other by its name); all three are on a second network, a bridge in the client's namespace
(`lan_address`).
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from tests.daemon import Phauld
from tests.inventory import Inventory, take_inventory
from tests.namespaces import ADDRESSES, LAN_ADDRESSES, MAIN_LINK, NAMESPACES, hold, join, let_go
from tests.started import END_SECONDS, RUN_SECONDS, CommandFailed, Completed, Process

Found = TypeVar("Found")

ROOT: Final = Path(__file__).resolve().parents[1]
PROGRAMS: Final = Path(sys.executable).parent
START_SECONDS: Final = 30.0

#: The standard descriptors are opened inside: criu refuses to dump a file of a mount that the node does not have.
_DETACHED: Final = 'exec "$@" </dev/null >>"$0" 2>&1'
_CUT: Final = f"""
table inet cut {{
    chain in {{ type filter hook input priority raw; iifname {MAIN_LINK} drop; }}
    chain out {{ type filter hook output priority raw; oifname {MAIN_LINK} drop; }}
}}
"""
_ATTACHED: Final = 'exec "$@" </dev/null'


class Node:
    """One set of namespaces. `pid` is the host's PID of its init, which reaps."""

    def __init__(self, name: str, directory: Path, init: asyncio.subprocess.Process, pid: int) -> None:
        self.name = name
        self.directory = directory
        self.pid = pid
        self.address = ADDRESSES.get(name, "")  #: on the link between the nodes
        self.lan_address = LAN_ADDRESSES[name]  #: on the client's network
        self.programs = PROGRAMS  #: where its phaul and phauld are
        self.daemon = Phauld(self)
        self._init = init
        self._entered: list[asyncio.subprocess.Process] = []

    @property
    def root(self) -> Path:
        """The node's root directory, as seen from outside; its unix sockets can be connected to from here."""
        return Path(f"/proc/{self.pid}/root")

    async def run(
        self,
        argv: Sequence[str | Path],
        *,
        check: bool = True,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float = RUN_SECONDS,
    ) -> Completed:
        """Run a command to its end. Raises CommandFailed if `check` and it fails, TimeoutError (it is killed then)."""
        words = tuple(map(str, argv))
        inside = words if stdin is not None else ("sh", "-c", _ATTACHED, "sh", *words)
        entered = await asyncio.create_subprocess_exec(
            *self._enter(inside),
            stdin=asyncio.subprocess.PIPE if stdin is not None else None,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_seconds):
                output, errors = await entered.communicate(stdin)
        except BaseException:
            for pid in children(entered.pid) or [entered.pid]:  # it reaps its child, and ends as that did
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await entered.wait()
            raise
        assert entered.returncode is not None
        done = Completed(words, entered.returncode, output.decode(), errors.decode())
        if check and done.returncode != 0:
            raise CommandFailed(f"{self.name}: {words} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done

    async def show(self, argv: Sequence[str | Path]) -> int:
        """Run a command on our own terminal, which it may be interrupted from; its exit status."""
        entered = await asyncio.create_subprocess_exec(*self._enter(("sh", "-c", _ATTACHED, "sh", *map(str, argv))))
        self._entered.append(entered)
        return await entered.wait()

    async def start(
        self, argv: Sequence[str | Path], *, log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a command whose output goes to a log file, by default one in the node's directory."""
        words = tuple(map(str, argv))
        log = log or self.directory / f"{Path(words[0]).name}.log"
        entered = await asyncio.create_subprocess_exec(
            *self._enter(("sh", "-c", _DETACHED, str(log), *words)),
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self._entered.append(entered)
        try:
            pid = await _only_child(entered)
        except CommandFailed as exc:
            raise CommandFailed(f"{self.name}: {words} did not start: {log_tail(log)}") from exc
        return Process(entered, pid, log)

    async def phaul(
        self, *arguments: str | Path, check: bool = False, timeout_seconds: float = RUN_SECONDS
    ) -> Completed:
        """Run the `phaul` command here."""
        return await self.run([self.programs / "phaul", *arguments], check=check, timeout_seconds=timeout_seconds)

    async def start_phauld(self, **config: object) -> Process:
        """Start phauld with these settings over the node's own, and wait until it serves."""
        return await self.daemon.start(None, **config)

    async def kill_phauld(self, number: int = signal.SIGKILL) -> int:
        """Signal phauld and wait for its end; its exit status."""
        assert self.daemon.process is not None, "phauld was not started"
        return await self.daemon.process.stop(number)

    async def inventory(self) -> Inventory:
        """What there is in this node now."""
        return await take_inventory(self)

    async def cut(self) -> None:
        """Lose every packet on the link between the nodes from now on, silently and in both directions."""
        await self.run(["nft", "-f", "-"], stdin=_CUT.encode())

    async def mend(self) -> None:
        """Undo `cut`."""
        await self.run(["nft", "delete", "table", "inet", "cut"])

    async def limit_bandwidth(self, bytes_per_second: int | None) -> None:
        """Let no more than this out to the other node; `None` undoes it."""
        await self.run(["tc", "qdisc", "delete", "dev", MAIN_LINK, "root"], check=False)
        if bytes_per_second is not None:
            burst_bytes = max(bytes_per_second // 50, 65536 * 2)  # 20 ms, and no less than two offloaded packets
            shape = ["tbf", "rate", f"{bytes_per_second}bps", "burst", str(burst_bytes), "latency", "50ms"]
            await self.run(["tc", "qdisc", "add", "dev", MAIN_LINK, "root", *shape])

    async def delay(self, seconds: float) -> None:
        """Delay every packet to the other node; 0 undoes it. Raises CommandFailed on a kernel without netem."""
        await self.run(["tc", "qdisc", "delete", "dev", MAIN_LINK, "root"], check=False)
        if seconds > 0:
            await self.run(["tc", "qdisc", "add", "dev", MAIN_LINK, "root", "netem", "delay", f"{seconds * 1000}ms"])

    async def end(self) -> None:
        """Kill everything in the node."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await let_go(self._init)
        finally:
            if self._init.returncode is None:
                os.kill(self.pid, signal.SIGKILL)
                await self._init.wait()
        async with asyncio.timeout(END_SECONDS):
            for entered in self._entered:
                await entered.wait()

    def _enter(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *argv]


class Nodes(NamedTuple):
    """Two nodes, and a client that reaches both."""

    a: Node
    b: Node
    client: Node


@contextlib.asynccontextmanager
async def two_nodes(directory: Path) -> AsyncIterator[Nodes]:
    """Two nodes and a client; whatever runs in them ends with the block. Needs root."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = Nodes(*[await stack.enter_async_context(_node(name, directory)) for name in ("a", "b", "client")])
        await join(*nodes)
        yield nodes


@contextlib.asynccontextmanager
async def _node(name: str, directory: Path) -> AsyncIterator[Node]:
    own_directory = directory / name
    own_directory.mkdir(parents=True)
    init = await hold(name)
    try:
        node = Node(name, own_directory, init, await _only_child(init))
    except BaseException:
        await let_go(init)
        raise
    try:
        yield node
    finally:
        await asyncio.shield(node.end())


async def until(condition: Callable[[], Found], timeout_seconds: float = START_SECONDS) -> Found:
    """Wait for something to be true; what was found then. Raises TimeoutError."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            if found := condition():
                return found
            await asyncio.sleep(0.002)


def children(pid: int) -> list[int]:
    """The children of a process; empty if it has ended."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


async def _only_child(parent: asyncio.subprocess.Process) -> int:
    await until(lambda: children(parent.pid) or parent.returncode is not None)
    if parent.returncode is not None:
        raise CommandFailed(f"ended at once with {parent.returncode}")
    return children(parent.pid)[0]


def log_tail(path: Path, lines: int = 20) -> str:
    """The end of a log file, for error messages."""
    with contextlib.suppress(FileNotFoundError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return f"{path} is empty"


def missing_programs() -> list[str]:
    """What the nodes need and this machine lacks."""
    return [program for program in ("unshare", "nsenter", "ip", "nft", "tini") if shutil.which(program) is None]
