"""The source of one migration: a real process tree that is really held and signalled, and a scripted destination."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from phaul_client.cargo import Cargo
from phaul_client.case import Case
from phaul_client.commit import Event, Phase
from phaul_client.config import Config
from phaul_client.doubt import Doubt
from phaul_client.last_step import Settings
from phaul_client.local import CriuLocal
from phaul_criu.requests import DumpOptions
from phauld.session import Phase as SessionPhase
from tests.fakes.criu import FakeCriu
from tests.fakes.remote import Act, ScriptedRemote
from tests.node.criu_victims import Victim, alive
from tests.nodes import until

PATIENCE_SECONDS: Final = 10.0
SIGSTOP_BIT = 1 << (signal.SIGSTOP - 1)


@dataclass
class FakeJournal:
    """`fails_at`: the disk is full from this phase on."""

    fails_at: Phase | None = None
    is_full: bool = False
    failures: int = 0
    phases: list[Phase] = field(default_factory=list)
    noted: dict[str, object] = field(default_factory=dict)
    meanwhile: Callable[[Phase], None] = lambda _: None

    def note(self, **detail: object) -> None:
        self.noted |= detail

    async def record(self, phase: Phase) -> None:
        self.meanwhile(phase)
        await asyncio.sleep(0)
        self.is_full |= phase is self.fails_at
        if self.is_full:
            self.failures += 1
            raise OSError(28, "No space left on device")
        self.phases.append(phase)


class Tree:
    """The victim: a root and a worker, both of which beat."""

    def __init__(self, victim: Victim) -> None:
        self.root = victim.pid
        self._victim = victim
        (self.worker,) = children(victim.pid)

    def reap(self) -> None:
        self._victim.popen.wait()

    @property
    def pids(self) -> tuple[int, int]:
        return self.root, self.worker

    @property
    def runs(self) -> bool:
        return self._victim.is_beating() and self._victim.is_beating(0)

    @property
    def is_silent(self) -> bool:
        return self._victim.is_silent()

    @property
    def is_gone(self) -> bool:
        return not any(map(alive, self.pids))

    @property
    def is_stopped(self) -> bool:
        """By a signal, not by a tracer: so it stays, whoever dies."""
        deadline = time.monotonic() + PATIENCE_SECONDS  # the signal takes effect when its tracer is gone
        while [state(pid) for pid in self.pids] != ["T", "T"] and time.monotonic() < deadline:
            time.sleep(0.01)
        return [state(pid) for pid in self.pids] == ["T", "T"] and self.is_silent

    @property
    def has_stop_pending(self) -> bool:
        return all(int(status(pid, "ShdPnd"), 16) & SIGSTOP_BIT for pid in self.pids)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(pid: int, key: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value.strip()
    raise KeyError(key)


def state(pid: int) -> str:
    return status(pid, "State")[:1]


@dataclass
class Move:
    """One last step of a migration, ready to begin."""

    tree: Tree
    remote: ScriptedRemote
    directory: Path
    journal: FakeJournal = field(default_factory=FakeJournal)
    criu: FakeCriu = field(default_factory=lambda: FakeCriu("/nonexistent"))
    freeze_budget_seconds: float = 30.0
    doubt: Doubt = field(default_factory=Doubt)
    phases: list[Phase] = field(default_factory=list)
    cleaned: int = 0
    carried: tuple[Path, ...] = ()
    root: Mapping[str, object] | None = None

    def script(self, **acts: list[Act]) -> None:
        self.remote.script |= acts

    async def _clean_up(self) -> None:
        self.cleaned += 1

    @property
    def case(self) -> Case:
        return Case(
            migration_id="move",
            remote=self.remote,
            journal=self.journal,
            doubt=self.doubt,
            on_phase=self.phases.append,
            clean_up=self._clean_up,
        )

    def make(self) -> CriuLocal:
        settings = Settings(
            dump=DumpOptions(images_dir_fd=-1, pid=0),
            root=self.root,
            cargo=Cargo(self.remote, self.carried),
            freeze_budget_seconds=self.freeze_budget_seconds,
        )
        self.local = CriuLocal(self.case, settings)
        return self.local

    async def run(self) -> None:
        """Raises what the last step raises; it has 10 s."""
        local = self.make()
        await local.fire(Event.PREFLIGHT_PASSED)
        await local.fire(Event.SESSION_OPENED)
        config = Config(self.tree.root, self.remote.page_socket.fileno(), self.directory)
        async with asyncio.timeout(10):
            await local.dump_copy_restore(self.criu, config, None)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.run())

    async def until(self, condition: Callable[[], bool]) -> None:
        await until(condition, timeout_seconds=10)

    def assert_moved(self) -> None:
        assert self.tree.is_gone
        assert self.remote.phase is SessionPhase.RUNNING
        assert self.local.phase is Phase.DONE
        assert self.journal.phases[-2:] == [Phase.CONFIRMED, Phase.DONE]
        assert self.cleaned == 1

    def assert_rolled_back(self) -> None:
        assert self.tree.runs
        assert not self.remote.ever_ran
        assert self.local.phase is Phase.ROLLED_BACK
        assert self.journal.phases[-2:] == [Phase.ROLLING_BACK, Phase.ROLLED_BACK]
        assert self.remote.calls.count("abort") == 1
        assert self.cleaned == 1


def doing(act: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    async def behaviour() -> None:
        act()

    return behaviour


async def for_ever() -> None:
    await asyncio.Event().wait()
