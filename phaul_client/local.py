"""The source's side of the last step: the seed's `Local`, and `CriuLocal`, which keeps the commit protocol.

`CriuLocal` is the shell around the table in `commit.py`: it feeds events in and performs the acts that come out. All
the time from `post-dump` on, the tree is frozen in criu's hands.
"""

import asyncio
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, assert_never

from phaul.v1 import types_pb2
from phaul_client import commit
from phaul_client.commit import Do, Event, Phase, Record
from phaul_client.config import Config
from phaul_client.errors import MigrationCancelled, PeerError, PeerRefused, RolledBack
from phaul_client.images import relative_parent
from phaul_client.pieces import carried_pieces, image_pieces
from phaul_client.remote import GrpcRemote
from phaul_client.status import reason_of, remedy_of
from phaul_client.tree import Tree, stopped_pids
from phaul_criu.child import finish
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.requests import DumpOptions
from phaul_criu.stats import DumpStats
from phaul_criu.swrk import Notification

logger = logging.getLogger(__name__)

COMMIT_SECONDS: Final = 10.0
FIRST_PATIENCE_SECONDS: Final = 0.05
LAST_PATIENCE_SECONDS: Final = 5.0


class Local(Protocol):
    """The seed's interface to the source: the last dump, the copy of its images, and the restore."""

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """Dump the tree over `config.memfd`, with `last_client_images_path` as the parent; copy; restore.

        The tree is frozen all the while. Returning kills it; raising lets it run on.
        """


class Journal(Protocol):
    """Where a phase is written down before it is acted on."""

    async def record(self, phase: Phase) -> None:
        """On return the phase survives a crash. Raises `OSError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the last step is done."""

    dump: DumpOptions  #: everything but descriptors, directories and the parent
    carried: tuple[Path, ...] = ()  #: files that travel with the tree, such as its log
    freeze_budget_seconds: float = 60.0  #: a tree that stands still for longer is let run on
    in_doubt_seconds: float = 60.0  #: how long to ask before the doubt is an operator's
    doubt_event: Event | None = None  #: what the policy says then; `None` holds


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the last part, for the timeline; times from one monotonic clock, in seconds."""

    name: str
    start: float
    end: float


class CriuLocal:
    """Moves the tree from its last dump to its commit. Good for one migration."""

    def __init__(
        self,
        migration_id: str,
        remote: GrpcRemote,
        journal: Journal,
        settings: Settings,
        on_phase: Callable[[Phase], None] = lambda _: None,
    ) -> None:
        self._migration_id = migration_id
        self._remote = remote
        self._journal = journal
        self._settings = settings
        self._on_phase = on_phase
        self._phase = Phase.ITERATING
        self._transitions = commit.TRANSITIONS
        self._config: Config | None = None
        self._directory = Path()
        self._carried_bytes: dict[Path, int] = {}
        self._tree: Tree | None = None
        self._stopped_before: frozenset[int] = frozenset()
        self._stop_wanted: Event | None = None  # a cancel or a deadline, until it has become an event
        self._task: asyncio.Task[object] | None = None
        self._cause: BaseException | None = None
        self._abort: asyncio.Task[None] | None = None
        self._patience = FIRST_PATIENCE_SECONDS
        self._doubt_since = 0.0
        self._resolution: asyncio.Future[Event] | None = None
        self._image_files = 0
        self.steps: list[Step] = []
        self.destination_pid = 0
        self.pause_seconds: float | None = None
        self.dump_stats: DumpStats | None = None
        self.image_bytes = 0

    @property
    def phase(self) -> Phase:
        return self._phase

    def cancel(self, event: Event = Event.CANCELLED) -> bool:
        """Stop as soon as possible and let the tree run on; `False` when it is too late."""
        if self._phase not in commit.CANCELLABLE:
            return False
        self._stop_wanted = event
        if self._task is not None:
            self._task.cancel()
        return True

    def resolve(self, event: Event) -> bool:
        """An operator's answer to a doubt; `False` when there is none."""
        if self._phase not in commit.IN_DOUBT or self._resolution is None or self._resolution.done():
            return False
        self._resolution.set_result(event)
        return True

    async def carry_beforehand(self) -> None:
        """Send the carried files while the tree runs, so that only their tails are left. Raises `PeerError`."""
        for path in self._settings.carried:
            answer = await self._remote.put_images(carried_pieces(path))
            self._carried_bytes[path] = answer.bytes

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """See `Local`. Raises `RolledBack` or `MigrationCancelled` (the tree runs on here)."""
        self._config = config
        self._task = asyncio.current_task()
        self._directory = config.wdir / "last"
        self._directory.mkdir(mode=0o700)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        watchdog = asyncio.get_running_loop().call_later(
            self._settings.freeze_budget_seconds, self.cancel, Event.DEADLINE_PASSED
        )
        try:
            options = dataclasses.replace(
                self._settings.dump,
                images_dir_fd=descriptor,
                pid=config.pid,
                page_server_fd=config.memfd,
                parent_img=relative_parent(self._directory, last_client_images_path),
                track_mem=last_client_images_path is not None,
                log_file="dump.log",
            )
            await self._dump(criu, options)
        except (Exception, asyncio.CancelledError) as exc:
            watchdog.cancel()
            await finish(self._unwind(exc))
        else:
            await finish(self._complete())
        finally:
            watchdog.cancel()
            os.close(descriptor)
            if self._tree is not None:
                self._tree.close()

    async def _dump(self, criu: Criu, options: DumpOptions) -> None:
        swrk = await criu.prestart(options.passed_fds)
        started = time.monotonic()
        try:
            await self.fire(Event.LAST_ROUND)
        except BaseException:
            await swrk.aclose()
            raise
        stats = await criu.dump(options, on_notify=self._notified, swrk=swrk)
        ended = time.monotonic()
        self.dump_stats = stats
        frozen_at = max(started, ended - (stats.freezing_microseconds + stats.frozen_microseconds) / 1e6)
        self.steps.insert(0, Step("freeze and dump", frozen_at, self.steps[0].start if self.steps else ended))
        commits = [step for step in self.steps if step.name == "commit"]
        self.pause_seconds = (commits[-1].end if commits else ended) - frozen_at

    async def _notified(self, notification: Notification) -> None:
        match notification.name:
            case "pre-dump":
                assert self._config is not None
                self._stopped_before = stopped_pids(self._config.pid)
            case "query-ext-files":
                self._uncork()
            case "post-dump":
                await self.fire(Event.TREE_FROZEN)
                if self._phase is Phase.ROLLING_BACK:
                    raise self._cause or RuntimeError("rolled back without a cause")

    def _uncork(self) -> None:
        """Undo criu's TCP_CORK, which costs 200 ms when the stream ends (criu/page-xfer.c, connect_to_page_server)."""
        page_socket = self._remote.page_socket
        if page_socket.family in (socket.AF_INET, socket.AF_INET6):
            page_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            page_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    async def fire(self, event: Event) -> None:
        """Take an event, and the ones that its acts lead to, to the end.

        A phase is entered once it is in the journal: if it cannot be written down, the one before still holds.
        """
        following: Event | None = event
        while following is not None:
            phase, actions = commit.advance(self._phase, following, self._transitions)
            following = None
            for action in actions:
                if isinstance(action, Record):
                    await self._journal.record(action.phase)
                else:
                    self._enter(phase)
                    following = await self._perform(action) or following
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            logger.info("phase migration_id=%s phase=%s", self._migration_id, phase)
            self._phase = phase
            self._on_phase(phase)

    async def _perform(self, act: Do) -> Event | None:
        match act:
            case Do.COPY_IMAGES:
                return await self._timed("copy images", self._copy_images)
            case Do.SEND_RESTORE:
                return await self._timed("restore", self._send_restore)
            case Do.STOP_TREE:
                return self._stop_tree()
            case Do.SEND_COMMIT:
                return await self._timed("commit", self._send_commit)
            case Do.ASK_DESTINATION:
                return await self._ask_destination()
            case Do.ABORT_DESTINATION:
                self._abort = asyncio.create_task(self._abort_destination())
            case Do.START_DUMP | Do.KILL_TREE | Do.RESUME_TREE:
                pass  # criu does it: by the request that follows, or by the answer to `post-dump`
            case Do.CLEAN_UP | Do.OPEN_SESSION:
                pass  # the migration's owner does it
            case Do.ANSWER_POST_DUMP | Do.SERVE_PAGES:
                raise NotImplementedError(act)
            case _:
                assert_never(act)
        return None

    async def _timed(self, name: str, act: Callable[[], Awaitable[Event]]) -> Event:
        start = time.monotonic()
        try:
            return await act()
        finally:
            self.steps.append(Step(name, start, time.monotonic()))

    async def _copy_images(self) -> Event:
        index = self._remote.image_index
        pieces = list(image_pieces(self._directory, index))
        self._image_files = len({piece.image_name for piece in pieces})
        for path in self._settings.carried:
            pieces += carried_pieces(path, self._carried_bytes.get(path, 0))
        try:
            self.image_bytes = (await self._remote.put_images(pieces)).bytes
        except (PeerError, OSError) as exc:
            return self._failed(exc)
        return Event.IMAGES_COPIED

    async def _send_restore(self) -> Event:
        try:
            answer = await self._remote.restore(
                image_files=self._image_files, timeout_seconds=self._settings.freeze_budget_seconds
            )
        except PeerError as exc:
            return self._failed(exc)
        self.destination_pid = answer.pid
        return Event.DESTINATION_PREPARED

    def _stop_tree(self) -> Event:
        """No await in here: between the look at criu and the commit nothing may happen."""
        assert self._config is not None
        try:
            self._tree = Tree(self._config.pid)
        except ProcessLookupError as exc:
            return self._failed(exc)
        self._tree.stop(self._stopped_before)
        if not self._tree.is_traced():
            self._cause = CriuError("dump", "criu died with the tree in its hands")
            return Event.CRIU_LOST
        if self._stop_wanted is not None:  # its cancellation has not arrived yet, and must not arrive after this
            return self._stop_wanted
        return Event.TREE_STOPPED

    async def _send_commit(self) -> Event:
        self._doubt_since = self._doubt_since or time.monotonic()
        try:
            answer = await self._remote.commit(timeout_seconds=COMMIT_SECONDS)
        except PeerError as exc:
            logger.warning("commit not answered migration_id=%s error=%s", self._migration_id, exc)
            return Event.NO_ANSWER
        self.destination_pid = answer.pid
        return Event.DESTINATION_RUNNING

    async def _ask_destination(self) -> Event:
        """Ask after a pause that grows, unless an operator answers first."""
        if self._resolution is None:
            self._resolution = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._resolution], timeout=self._patience)
        if self._resolution.done():
            return self._resolution.result()
        self._patience = min(2 * self._patience, LAST_PATIENCE_SECONDS)
        if self._phase is Phase.COMMITTED and self._doubt_lasts():
            return Event.DOUBT_EXPIRED
        try:
            session = await self._remote.get_session()
        except PeerRefused as exc:
            known = exc.reason in ("MIGRATION_NOT_FOUND", "NODE_MISMATCH")
            return Event.DESTINATION_NOT_FOUND if known else Event.NO_ANSWER
        except PeerError:
            return Event.NO_ANSWER
        self.destination_pid = session.pid or self.destination_pid
        return _ANSWERS.get(session.phase, Event.NO_ANSWER)

    def _doubt_lasts(self) -> bool:
        lasts = time.monotonic() - self._doubt_since > self._settings.in_doubt_seconds
        if lasts and self._settings.doubt_event is not None and self._resolution is not None:
            self._resolution.set_result(self._settings.doubt_event)
        return lasts

    async def _abort_destination(self) -> None:
        try:
            await self._remote.abort()
        except PeerError as exc:
            logger.warning("abort not answered, the lease will do it migration_id=%s error=%s", self._migration_id, exc)

    def _failed(self, cause: BaseException) -> Event:
        self._cause = cause
        return Event.FAILED

    async def _complete(self) -> None:
        """criu has ended well: it killed the tree."""
        if self._phase is not Phase.CONFIRMED:
            raise RuntimeError(f"criu ended well in phase {self._phase}")
        await self._kill_tree()

    async def _kill_tree(self) -> None:
        if self._tree is not None:
            await self._tree.kill()
        await self.fire(Event.TREE_KILLED)

    async def _unwind(self, error: BaseException) -> None:
        """The dump ended with an error, or we are cancelled: criu has let go of the tree."""
        if self._phase is Phase.CONFIRMED:  # the tree runs at the destination; criu failed to kill this one
            await self._kill_tree()
            return
        if self._phase in commit.IN_DOUBT:  # stopped, and to stay so until somebody knows
            raise error
        if self._phase in commit.CANCELLABLE:
            self._cause = self._cause or error
            await self.fire(self._stop_wanted or Event.FAILED)
        if self._tree is not None:
            self._tree.resume()
        await self.fire(Event.TREE_RESUMED)
        if self._abort is not None:
            await self._abort
        raise self._end(error) from error

    def _end(self, error: BaseException) -> BaseException:
        if self._stop_wanted is Event.CANCELLED:
            return MigrationCancelled(self._migration_id)
        cause = self._cause or error
        if self._stop_wanted is Event.DEADLINE_PASSED:
            budget = self._settings.freeze_budget_seconds
            return RolledBack(
                self._migration_id,
                f"the tree stood still for more than {budget:g} s and runs on here",
                reason="DEADLINE_EXCEEDED",
                remedy="a larger --freeze-budget, a faster link, or pre-copy",
            )
        if isinstance(cause, asyncio.CancelledError):
            return cause
        return RolledBack(self._migration_id, str(cause), reason=reason_of(cause), remedy=remedy_of(cause))


_ANSWERS: Final = {
    types_pb2.SESSION_PHASE_PREPARED: Event.DESTINATION_PREPARED,
    types_pb2.SESSION_PHASE_COMMITTING: Event.DESTINATION_COMMITTING,
    types_pb2.SESSION_PHASE_RUNNING: Event.DESTINATION_RUNNING,
    types_pb2.SESSION_PHASE_ABORTED: Event.DESTINATION_ABORTED,
}
