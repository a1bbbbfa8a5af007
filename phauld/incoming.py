"""One incoming migration: the shell around the table in `session.py`.

It feeds calls and happenings in, one at a time, and performs the acts that come out. The invariant: nothing of the
tree runs before COMMITTING is in the journal, and whatever ends the session earlier leaves nothing behind.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, assert_never

from google.protobuf import json_format

from phaul.v1 import remote_pb2
from phaul_client.addresses import Address, parse_address
from phaul_client.config import Config
from phaul_client.errors import ImageCorrupt, PhaseError, PhaulError
from phaul_client.hook_calls import Hooks, HookSettings
from phaul_client.hooks import Facts, Hook, Side, parse_hook
from phaul_client.images import relative_parent
from phaul_client.movers import Addresses, find
from phaul_client.pipe import LinkTerms
from phaul_client.tree import identity
from phaul_criu.child import finish
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError, LazyPagesFailed
from phaul_criu.lazy import LazyPages, LazyPagesOptions
from phaul_criu.requests import RestoreOptions
from phaul_criu.swrk import Notification, Swrk
from phaul_criu.timers import rearm
from phaul_criu.urgency import calm, in_a_hurry
from phauld import convert, session, shim, stuck_criu, unattended
from phauld.container_place import ContainerPlace
from phauld.dataport import DataPort
from phauld.fetching import Fetching
from phauld.images import ImageWriter
from phauld.journal import IncomingEntry, IncomingRecord
from phauld.lazy_chain import PageSource, has_parent, make_lazy
from phauld.lazy_hold import Guard, Left
from phauld.page_stream import STREAM_SECONDS, PageStream, PipeTerms
from phauld.placement import Promise
from phauld.podman_place import place_from_journal
from phauld.receiver import Server
from phauld.restart_policy import NO_ATTEMPTS, Attempts
from phauld.restore_slot import RestoreSlot
from phauld.session import Do, Event, Phase, Record
from phauld.sync_receiver import SyncReceiver
from phauld.sync_records import SyncRecords
from phauld.workload_spec import WorkloadSpec
from phauld.workloads import Workloads

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
GUARD_SECONDS: Final = 5.0
_WHY_ABORTED: Final = {
    Event.LEASE_EXPIRED: ("LEASE_EXPIRED", "the source was silent", "try again; a larger lease_seconds"),
    Event.RESTARTED: ("DAEMON_RESTARTED", "phauld was started anew at the destination before the commit", "try again"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What OpenSession said."""

    migration_id: str
    source_node_id: str
    spec: WorkloadSpec
    restore: RestoreOptions  #: everything but descriptors
    carried: tuple[Path, ...]
    lease_seconds: float
    promise: Promise
    place: str = ""  #: of the images, in memory or on disk, and why
    postcopy: bool = False  #: pages may come after the commit
    stands_still: bool = False  #: from its first page on
    addresses: tuple[Address, ...] = ()  #: that move along
    hooks: tuple[Hook, ...] = ()  #: that are told, beside those of this node
    source_name: str = ""
    container: ContainerPlace | None = None
    sync: tuple[str, ...] = ()  #: directories that `--sync` brings
    sync_overwrite: bool = False
    attempts: Attempts = NO_ATTEMPTS  #: how often it was started again so far
    owner: str = ""  #: the name in the certificate that opened it; empty without TLS
    pipe: PipeTerms | None = None  #: between its page stream and the network

    @classmethod
    def unknown(cls, migration_id: str, source_node_id: str = "", owner: str = "") -> "Incoming":
        """What is left to say of a session whose opening was never seen, or is long past."""
        return cls(
            migration_id=migration_id,
            source_node_id=source_node_id,
            spec=WorkloadSpec(name=f"moved-{migration_id[:8]}", argv=()),
            restore=RestoreOptions(images_dir_fd=-1),
            carried=(),
            lease_seconds=0,
            promise=Promise(bytes=0, in_memory=False),
            owner=owner,
        )

    @classmethod
    def from_journal(cls, entry: IncomingEntry) -> "Incoming":
        """What the journal says of a session of an earlier phauld."""
        known = cls.unknown(entry.migration_id, entry.source_node_id, entry.detail.get("owner", ""))
        if "record" not in entry.detail:
            return known
        return dataclasses.replace(
            known,
            spec=dataclasses.replace(known.spec, name=entry.detail["workload"]),
            carried=tuple(Path(path) for path in entry.detail["carried"]),
            postcopy="relay" in entry.detail,
            addresses=tuple(map(parse_address, entry.detail.get("addresses", ()))),
            hooks=tuple(map(parse_hook, entry.detail.get("hooks", ()))),
            source_name=entry.detail.get("source_name", ""),
            container=place_from_journal(entry.detail["container"]) if entry.detail.get("container") else None,
            sync=tuple(entry.detail.get("sync", ())),
        )


class Session:
    """One session from its opening to RUNNING or ABORTED."""

    def __init__(
        self,
        incoming: Incoming,
        *,
        directory: Path,
        criu: Criu,
        workloads: Workloads,
        data_port: DataPort,
        journal: IncomingRecord,
        phase: Phase = Phase.ABSENT,
        on_end: Callable[["Session"], None] = lambda _: None,
        node_name: str = "",
        hooks: HookSettings | None = None,
        sync: SyncRecords,
    ) -> None:
        self.incoming = incoming
        self._directory = directory
        self._criu = criu
        self._workloads = workloads
        self._data_port = data_port
        self._journal = journal
        self._phase = phase
        self._on_end = on_end
        self._lock = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._ending_round = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._addresses = Addresses(incoming.addresses, incoming.migration_id)
        facts = Facts(
            migration_id=incoming.migration_id,
            side=Side.DESTINATION,
            node_name=node_name,
            peer=incoming.source_name or incoming.source_node_id,
            workload=incoming.spec.name,
            addresses=tuple(map(str, incoming.addresses)),
        )
        source = incoming.source_name or incoming.source_node_id
        self.sync = SyncReceiver(sync, incoming.migration_id, source, incoming.sync, overwrite=incoming.sync_overwrite)
        was_begun = phase is not Phase.ABSENT
        self._hooks = Hooks(hooks, incoming.hooks, facts, pid=lambda: self.pid, is_recovered=was_begun)
        self._container = incoming.container
        self._taking: asyncio.Task[int] | None = None  # its files
        self._stream = PageStream(data_port, incoming.pipe)
        self._server: Server | None = None
        self._slot: RestoreSlot | None = None
        self._lazy: LazyPages | None = None
        self._guard: Guard | None = None  # for a tree that is filled while it runs
        self._page_source: PageSource | None = None  # serves earlier rounds to the lazy-pages child
        self._fetching: Fetching | None = None
        self._transitions = session.POSTCOPY_TRANSITIONS if incoming.postcopy else session.TRANSITIONS
        self._lazy_left: Left | None = None  # the lazy-pages child of an earlier phauld
        self._restoring: asyncio.Task[None] | None = None
        self._released: asyncio.Future[None] | None = None
        self._lease: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._image_names: set[str] = set()
        self._fetched_round: Path | None = None
        self._root: dict[str, Any] = {}  # identity of the tree's root
        self._holder: dict[str, Any] = {}  # and of the criu that holds it
        self._made: tuple[Path, ...] = ()  # carried files that were not here before: dropped if it is aborted
        self._holds_images = phase not in session.FINAL
        self._is_in_a_hurry = False
        self.failure: BaseException | None = None
        self.pid = 0
        self.rounds = 0
        self.bytes_received = 0
        self.created_at = self.phase_since = time.time()
        self.lease_expires_at = 0.0
        self._marks: list[tuple[str, float]] = []

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def promise(self) -> Promise:
        """What is reserved for it now: nothing, once its pages are in the tree."""
        return self.incoming.promise if self._holds_images else Promise(bytes=0, in_memory=False)

    @property
    def is_filling(self) -> bool:
        """Whether pages are missing at the source's end of a post-copy."""
        return self._fetching is not None and self._fetching.is_filling

    @property
    def pages_missing(self) -> int:
        """Pages of a post-copy that have not arrived; 0 if that is not known."""
        return self._fetching.pages_missing if self._fetching is not None else 0

    @property
    def token(self) -> bytes:
        """The one-time token for the page stream."""
        return self._stream.token

    def remember(self, entry: IncomingEntry) -> None:
        """This session is an earlier phauld's: know again what it left."""
        if entry.detail.get("record") and entry.phase is not Phase.RUNNING:
            self._slot = self._workloads.found_slot(Path(entry.detail["record"]))
        self.pid = entry.detail.get("pid", 0)
        self._root = entry.detail.get("root", {})
        self._holder = entry.detail.get("holder", {})
        self._made = self.incoming.carried
        if "lazy" in entry.detail and not entry.cleaned:
            with contextlib.suppress(OSError):  # it has ended
                self._lazy_left = Left(entry.detail["lazy"])
        self._directory = Path(entry.detail.get("images", self._directory))
        if entry.failure is not None:
            self.failure = convert.error(entry.failure)
        if "relay" in entry.detail:
            filling = "fetching" in entry.detail and not entry.cleaned
            self._fetching = Fetching.found(self._directory / "relay", entry.detail["relay"], is_filling=filling)
        self.created_at, self.phase_since = entry.created_at, entry.updated_at

    async def recover(self) -> None:
        """Do what the table says after a restart; answers that wait on it are given then."""
        await self.fire(Event.RESTARTED)
        if self._phase is Phase.RUNNING:
            self._start(self._settle())

    # Calls of the source

    async def open(self) -> None:
        """Make room, expect the page stream, have a criu ready. Raises `OSError`, `WorkloadExists`, `CriuError`."""
        async with self._opening:  # the same call may come twice at once
            if self._phase in session.FINAL:
                raise PhaseError(self._phase, "OPEN_SESSION")
            if self._phase is Phase.ABSENT:
                await self._open()
            else:
                self._stream.expect_again()

    async def _open(self) -> None:
        self._made = tuple(path for path in self.incoming.carried if not _is_there(path))
        for each in self.incoming.addresses:  # what is here later is ours to drop
            if await find(each.ip) is not None:
                raise PhaulError(f"{each.ip} is an address of this node already", reason="PREFLIGHT_FAILED")
        if self._container is not None:
            await self._container.check()
        try:
            await self._stream.open()
            await asyncio.to_thread(self.sync.open)
            is_opened_first = self._container is not None and self._container.is_opened_first
            if not is_opened_first:
                self._slot = await self._make_slot()
            self._journal.note(
                images=str(self._directory),
                record=str(self._slot.directory) if self._slot is not None else "",
                workload=self.incoming.spec.name,
                carried=[str(path) for path in self._made],
                addresses=[str(each) for each in self.incoming.addresses],
                hooks=[str(each) for each in self.incoming.hooks],
                source_name=self.incoming.source_name,
                container=self._container.note() if self._container is not None else None,
                sync=self.incoming.sync,
            )
            if self.incoming.postcopy or self.incoming.restore.lazy_pages:
                self._guard = await Guard.start()
            if self.incoming.restore.lazy_pages and not (self.incoming.postcopy or self.incoming.stands_still):
                self._page_source = await PageSource.start()
            if self.incoming.postcopy:
                self._directory.mkdir(parents=True, mode=0o700)
                self._fetching = await Fetching.open(self._directory / "relay", await self._criu.version())
                self._journal.note(relay=self._fetching.relay.process)
            await self.fire(Event.OPEN_SESSION)
            if self._phase is not Phase.OPEN:  # an Abort was quicker
                raise PhaseError(self._phase, "OPEN_SESSION")
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # now that the journal knows of it
            if self._container is not None:
                await self._container.open()
            if is_opened_first:
                self._slot = await self._make_slot()
                self._journal.note(record=str(self._slot.directory))
                await self._journal.record(self._phase)
            await self._hooks.prepare()
        except BaseException:
            await finish(self.fire(Event.ABORT) if self._phase is Phase.OPEN else self._clean_up())
            raise
        self.renew()

    async def _make_slot(self) -> RestoreSlot:
        spec, criu = self.incoming.spec, self._criu.binary
        if self._container is None:
            return await self._workloads.restore_under_shim(
                spec, criu, attempts=self.incoming.attempts, migration_id=self.incoming.migration_id
            )
        with self._container.log(self.incoming.carried) as log:
            own_cgroups = self._container.has_cgroup_namespace
            slot = await self._workloads.restore_under_shim(spec, criu, new_cgroup_namespace=own_cgroups, inherited=log)
        try:
            await self._container.attend(slot.directory)
        except BaseException:
            await finish(slot.discard())
            raise
        return slot

    def open_stream(self, terms: LinkTerms) -> bytes:
        """A token for one more connection, which goes to the relay. Raises `PhaseError`."""
        is_over = self._phase is Phase.ABORTED or (self._phase is Phase.RUNNING and not self.is_filling)
        if self._fetching is None or is_over:
            raise PhaseError(self._phase, "OPEN_STREAM")
        expected, task = self._fetching.expect(self._data_port, self.incoming.lease_seconds or STREAM_SECONDS, terms)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return expected.token

    async def start_iter(self) -> None:
        """Raises `PhaseError`, `TimeoutError` when no stream comes, `CriuError`."""
        await self.fire(Event.START_ITER)
        self._refuse_if_over("START_ITER")

    async def stop_iter(self, *, final: bool = False) -> None:
        """Wait for the end of the round's pages. Raises `PhaseError`, `CriuError`."""
        async with self._ending_round:  # a repeated call waits for the same end
            if self._phase is Phase.RECEIVING and self._server is not None:
                try:
                    await self._server.stop_iter()
                except BaseException as exc:
                    why = await self._stream.why() if isinstance(exc, CriuError) else None
                    with contextlib.suppress(PhaseError):  # aborted meanwhile
                        await self.fire(Event.ROUND_FAILED)
                    if why is not None:
                        raise why from exc
                    raise
                self.rounds += 1
                self.bytes_received += _bytes_of(self._server.last_images_dir)
            await self.fire(Event.FINAL_ROUND_ENDED if final else Event.ROUND_ENDED)
            self._refuse_if_over("STOP_ITER")

    def _refuse_if_over(self, call: str) -> None:
        """The table lets calls that come again have their answer; to these it is no."""
        if self._phase in session.FINAL:
            raise self.failure or PhaseError(self._phase, call)

    async def put_files(
        self, requests: AsyncIterator[remote_pb2.PutFilesRequest], first: remote_pb2.PutFilesRequest
    ) -> int:
        """Take the files of a container; the bytes of it. Raises `PhaseError`, and what `ContainerPlace.take` does."""
        self.check_takes_files()
        if self._container is None or self._taking is not None:
            raise PhaseError(self._phase, "PUT_FILES")
        self.renew()
        self._taking = asyncio.create_task(self._container.take(requests, first), name="files")
        try:
            return await self._taking
        except asyncio.CancelledError:
            self._taking.cancel()  # by the caller; or it was, as the session is over
            raise
        finally:
            await asyncio.wait([self._taking])
            self._taking = None
            self.renew()

    def check_takes_files(self) -> None:
        """Raises `PhaseError`."""
        if self._phase not in (Phase.OPEN, Phase.RECEIVING, Phase.RECEIVED):
            raise PhaseError(self._phase, "PUT_IMAGES")

    def writer(self) -> ImageWriter:
        """Writes the files of a PutImages call; `accept` what it has written. Raises `PhaseError`."""
        self.check_takes_files()
        self.renew()
        if self._phase is not Phase.OPEN:  # what comes then is of the last dump
            self._hurry()
        if self._fetching is not None and self._phase is Phase.OPEN:
            return ImageWriter(None, self.incoming.carried, self._make_fetched_round)
        images = self._server.last_images_dir if self._server is not None else None
        return ImageWriter(images, self.incoming.carried)

    def _make_fetched_round(self) -> Path:
        """The directory of the round whose pages are fetched. Made again, it replaces the one before."""
        self._hurry()
        if self._fetched_round is None:
            if self._server is None:
                self._server = Server(Config(pid=0, memfd=-1, wdir=self._directory), self._criu)
            parent = self._server.last_images_dir
            self._fetched_round = self._server.next_images_dir()
            if parent is not None:
                (self._fetched_round / "parent").symlink_to(relative_parent(self._fetched_round, parent) or "")
        return self._fetched_round

    def accept(self, writer: ImageWriter) -> None:
        """The files of `writer` are complete. Raises `PhaseError`."""
        self.check_takes_files()
        self._image_names |= writer.image_names
        self.bytes_received += writer.bytes

    async def restore(self, image_files: int) -> None:
        """Build the tree and hold it. Raises `PhaseError`, and what made the restore fail."""
        if self._phase is Phase.RECEIVING:
            await self.stop_iter(final=True)
            self._mark("page server ends")
        await self.sync.aclose()
        if image_files and image_files != len(self._image_names):
            raise ImageCorrupt(f"{len(self._image_names)} images have arrived, {image_files} were sent")
        await self.fire(Event.RESTORE)
        await self._wait_for_change(Phase.RESTORING)
        if self._phase is Phase.ABORTED:
            raise self.failure or PhaseError(self._phase, "RESTORE")
        self._mark("journal: prepared")

    async def commit(self) -> None:
        """Let the tree run, and see it run. Raises `PhaseError` if it never ran and never will."""
        await self._abort_if_pages_are_lost()
        await self.fire(Event.COMMIT)
        await self._wait_for_change(Phase.COMMITTING)
        if self._phase is not Phase.RUNNING:
            raise PhaseError(self._phase, "COMMIT")
        self._mark("journal: running")

    async def _abort_if_pages_are_lost(self) -> None:
        """Who fills the tree may have died since it was prepared; then the source is where it must run on."""
        if self._phase is not Phase.PREPARED:
            return
        try:
            await self._check_pages()
        except CriuError as exc:
            self.failure = exc
            with contextlib.suppress(PhaseError):  # it came to an end meanwhile
                await self.fire(Event.TREE_LOST)

    async def _check_pages(self) -> None:
        """Raises `LazyPagesFailed` if who fills the tree has failed."""
        if self._fetching is not None:
            self._fetching.check()
        elif self._lazy is not None:
            await _check_lives(self._lazy)

    async def _hold_if_pages_are_lost(self) -> None:
        """Not to be let go: its guard kills it, and the criu that waits here, so that it never ran and resumes."""
        try:
            await self._check_pages()
        except CriuError as exc:
            logger.warning("pages lost before it ran migration_id=%s error=%s", self.incoming.migration_id, exc)
            await asyncio.sleep(GUARD_SECONDS)

    def take_marks(self) -> list[tuple[str, float]]:
        """The steps since they were taken last, each named at its end, on the monotonic clock."""
        marks, self._marks = self._marks, []
        return marks

    def _mark(self, name: str) -> None:
        self._marks.append((name, time.monotonic()))

    async def abort(self) -> None:
        """End it, unless it is too late, which the phase then says."""
        await self.fire(Event.ABORT)

    def renew(self) -> None:
        """The source is alive: the lease starts anew."""
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
        if self._phase in session.LEASED:
            seconds = self.incoming.lease_seconds
            self.lease_expires_at = time.time() + seconds
            self._lease = asyncio.get_running_loop().call_later(seconds, self._post, Event.LEASE_EXPIRED)

    async def close(self) -> None:
        """phauld stops: what is not committed is aborted, what is being let go is seen through."""
        await self._wait_for_change(Phase.COMMITTING)
        if self._phase not in session.FINAL:
            await self.fire(Event.ABORT)
        if self._lease is not None:
            self._lease.cancel()
        if self._container is not None:
            self._container.give_up()
        if self.is_filling and self._fetching is not None:  # the next phauld sees to the end of it
            self._fetching.leave()
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # The table

    async def fire(self, event: Event) -> None:
        """Take one event to its end, also when the call that brought it is cancelled. Raises `PhaseError`."""
        await finish(self._take(event))

    async def _take(self, event: Event) -> None:
        """A phase is entered once it is in the journal."""
        async with self._lock:
            phase, actions = session.advance(self._phase, event, self._transitions)
            if phase is Phase.ABORTED and self._phase not in session.FINAL:
                self._note_why(event)
            for action in actions:
                if isinstance(action, Record):
                    await self._journal.record(action.phase)
                    await self._enter(phase)
                elif action not in (Do.ANSWER, Do.ANSWER_WAITING):
                    await self._perform(action)
            await self._enter(phase)
        self.renew()

    def _note_why(self, event: Event) -> None:
        """It is about to be aborted: for the source, which may ask much later."""
        if self.failure is None and event in _WHY_ABORTED:
            reason, message, remedy = _WHY_ABORTED[event]
            self.failure = PhaulError(message, reason=reason, remedy=remedy)
        if self.failure is not None:
            self._journal.note_failure(json_format.MessageToDict(convert.failure(self.failure)))

    def _post(self, event: Event) -> None:
        """Something happened: take it when its turn comes; too late is no error.

        It cannot be refused as a call can: while the journal cannot be written, it is taken again and again.
        """

        async def take() -> None:
            for seconds in itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1])):
                try:
                    return await self.fire(event)
                except PhaseError:
                    return logger.debug("too late migration_id=%s event=%s", self.incoming.migration_id, event)
                except OSError as exc:
                    logger.error(
                        "event waits migration_id=%s event=%s error=%s", self.incoming.migration_id, event, exc
                    )
                    await asyncio.sleep(seconds)
                except Exception:
                    return logger.exception("event failed migration_id=%s event=%s", self.incoming.migration_id, event)

        self._start(take())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            logger.info("session migration_id=%s phase=%s", self.incoming.migration_id, phase)
            self.phase_since = time.time()
            self._phase = phase
            async with self._changed:
                self._changed.notify_all()
            if phase is Phase.RUNNING:
                self._start(self._settle())

    async def _wait_for_change(self, phase: Phase) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._phase is not phase)
        async with self._lock:  # the acts of the step are done, too
            pass

    async def _perform(self, act: Do) -> None:
        match act:
            case Do.START_PAGE_SERVER:
                await self._start_page_server()
            case Do.START_RESTORE:
                self._released = asyncio.get_running_loop().create_future()
                self._restoring = asyncio.create_task(self._restore_tree(), name="restore")
            case Do.RELEASE_TREE:
                assert self._released is not None
                assert self._slot is not None
                self._slot.release()
                self._mark("journal: committing")
                await self._addresses_are(
                    "announced", self._addresses.show
                )  # before its first packet, which has to have an answer
                if self._container is not None:
                    await self._container_is("connected", self._container.show)
                await self._hooks.commit()
                if self._page_source is not None:
                    self._page_source.calm()
                if self._lazy is not None:
                    calm(self._lazy.pid)  # else, on a node of few processors, the tree would wait for its own pages
                if self._fetching is not None:
                    self._fetching.make_way()
                self._released.set_result(None)
                self._start(stuck_criu.end_if_stuck(self._holder, self._root))
            case Do.KILL_TREE:
                await finish(self._kill_tree())
            case Do.CLEAN_UP:
                await finish(self._clean_up())
                self._start(self._forget())
            case Do.LOOK_AT_TREE:
                self._start(self._look_at_tree())
            case Do.ANSWER | Do.ANSWER_WAITING:
                pass  # the calls answer when they see the phase
            case _:
                assert_never(act)

    async def _start_page_server(self) -> None:
        memfd = await self._stream.take()
        if self._server is None:
            config = Config(pid=0, memfd=memfd, wdir=self._directory)
            self._server = Server(config, self._criu)
        await self._server.start_iter(in_a_hurry=self.incoming.stands_still or self.rounds > 0)

    async def _restore_tree(self) -> None:
        """Runs beside the calls: from the request to criu's last word."""
        assert self._server is not None
        assert self._server.last_images_dir is not None
        assert self._slot is not None
        images = os.open(self._server.last_images_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            options = dataclasses.replace(self.incoming.restore, images_dir_fd=images)
            _rearm_timers(self._server.last_images_dir)
            await self._addresses.hold()
            if self._container is not None:
                options = self._container.restore_options(options)
                await self._container.enter(await self._slot.criu_pid())
                self._slot.go()
            if self._fetching is not None and self._fetched_round is not None:
                self._journal.note(fetching=True)
                await self._fetching.start(self._criu.binary, self._fetched_round)
                self._mark("lazy-pages starts")
            elif options.lazy_pages:
                self._lazy = await self._start_lazy_pages(images, self._server.last_images_dir)
                self._mark("lazy-pages starts")
                self._journal.note(lazy=identity(self._lazy.pid))
            self.pid = await self._criu.restore(
                options, on_notify=self._notified, swrk=Swrk.attach(self._slot.take_swrk())
            )
            self._post(Event.TREE_RUNS)
        except Exception as exc:
            self.failure = exc
            logger.warning("restore failed migration_id=%s error=%s", self.incoming.migration_id, exc)
            self._post(Event.TREE_LOST)
        finally:
            os.close(images)
            if self._container is not None:
                await self._container_is("unmounted", self._container.leave)

    async def _start_lazy_pages(self, images_fd: int, images: Path) -> LazyPages:
        """Fill memory from the images; those of earlier rounds need somebody who serves them."""
        if not has_parent(images):
            return await LazyPages.start(self._criu.binary, LazyPagesOptions(images_dir_fd=images_fd))
        await asyncio.to_thread(make_lazy, images)
        if self._page_source is None:
            self._page_source = await PageSource.start()
        with self._page_source.serve(images) as source:
            options = LazyPagesOptions(images_dir_fd=images_fd, page_server_fd=source.fileno())
            return await LazyPages.start(self._criu.binary, options)

    async def _notified(self, notification: Notification) -> None:
        if notification.name == "pre-restore":
            self._mark("criu starts")
        elif notification.name == "post-restore":
            self._mark("criu builds the tree")
            assert self._released is not None
            self.pid = notification.pid or 0
            self._root = identity(self.pid)
            assert self._slot is not None
            self._holder = stuck_criu.find(self.pid, self._slot.shim_pid)
            self._journal.note(pid=self.pid, root=self._root, holder=self._holder)
            if self._container is not None:
                self._container.adopt(self.pid)
            await self._guard_pages()
            self._post(Event.TREE_HELD)
            await self._released
        elif notification.name == "pre-resume":
            await self._hold_if_pages_are_lost()
        elif notification.name == "post-resume":
            self._mark("criu lets it go")
            self._post(Event.TREE_RUNS)

    async def _guard_pages(self) -> None:
        """From now on the tree ends with who fills it. Raises `LazyPagesFailed` if that has ended already."""
        if self._guard is None:
            return
        try:
            if self.is_filling and self._fetching is not None:
                await self._guard.watch(await self._fetching.criu_pid(), self.pid)
            elif self._lazy is not None:
                await self._guard.watch(self._lazy.pid, self.pid)
        except OSError as exc:
            if self._lazy is not None:
                await _check_lives(self._lazy)
            raise LazyPagesFailed("lazy-pages", f"who fills the tree cannot be watched: {exc}") from exc

    async def _look_at_tree(self) -> None:
        """The shim decides: it outlived phauld, and it looks at the tree once criu is gone."""
        assert self._slot is not None
        if self._restoring is None:  # an earlier phauld's
            self._start(stuck_criu.end_if_stuck(self._holder, self._root))
        self.pid = await self._slot.outcome() or self.pid
        if self._slot.is_unattended:
            logger.error("the shim was killed, its tree is looked at migration_id=%s", self.incoming.migration_id)
            ran = await unattended.runs(self._root, self._criu.binary)
        else:
            ran = self._slot.ran
        self._post(Event.TREE_RUNS if ran else Event.TREE_NEVER_RAN)

    def _hurry(self) -> None:
        """The tree stands still from now on: this session goes first."""
        if not self._is_in_a_hurry:
            self._is_in_a_hurry = True
            in_a_hurry.enter()

    def _calm(self) -> None:
        if self._is_in_a_hurry:
            self._is_in_a_hurry = False
            in_a_hurry.leave()

    async def _kill_tree(self) -> None:
        await self._addresses_are("muted", self._addresses.mute)  # the end of its connections is nobody's business
        await self.sync.aclose()
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.gather(self._restoring, return_exceptions=True)
        if self._lazy is not None:
            await self._lazy.aclose()
            self._lazy = None
        await self._end_page_source()
        if self._fetching is not None:
            await self._fetching.aclose()
        if self._slot is not None:
            await self._slot.discard()
            self._slot = None
        await unattended.kill(self._root)  # if there was no shim to do it

    async def _end_page_source(self, patience_seconds: float = 0) -> None:
        if self._page_source is not None:
            await self._page_source.aclose(patience_seconds=patience_seconds)
            self._page_source = None

    async def _addresses_are(self, done: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What fails is logged: the tree does not wait for it."""
        try:
            await act()
        except PhaulError as exc:
            logger.error("address not %s migration_id=%s error=%s", done, self.incoming.migration_id, exc)

    async def _container_is(self, done: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What fails is logged: the tree does not wait for it."""
        try:
            await act()
        except (PhaulError, OSError) as exc:
            logger.error("container not %s migration_id=%s error=%s", done, self.incoming.migration_id, exc)

    async def _settle(self) -> None:
        """The tree runs: its record stands for its name, and what it was made of goes."""
        self._calm()
        await self._addresses_are("announced", self._addresses.show)  # again, for who missed it, and after a crash
        if self._container is not None:
            await self._container_is("connected", self._container.show)
            await self._container_is("unmounted", self._container.leave)
            await self._container_is("settled", self._container.settle)
        self._keep_directories()
        if self._slot is not None:
            self._slot.keep(self.incoming.spec.name)
        slot, self._slot = self._slot, None
        if self._restoring is not None:
            await asyncio.wait([self._restoring])
        if slot is not None:
            await slot.vouch(self._root)
        if self._lazy_left is not None:
            status = await self._lazy_left.wait()
            if status:
                await self._lose_pages(LazyPagesFailed("lazy-pages", f"ended with {status}"))
            elif status is None:
                logger.warning("not known whether every page came migration_id=%s", self.incoming.migration_id)
            self._lazy_left.close()
            self._lazy_left = None
        if self._lazy is not None:
            lazy, self._lazy = self._lazy, None
            try:
                await lazy.wait()
            except CriuError as exc:
                await self._lose_pages(exc)
        await self._end_page_source(STREAM_SECONDS)
        if self._fetching is not None and self._fetching.is_filling:
            self.failure = None  # of the restore; whatever it was, the tree runs
            try:
                await self._fetching.wait(self._root)
            except CriuError as exc:  # stays filling: the source must not give up its copy
                self.failure = exc
                logger.error("pages lost migration_id=%s error=%s", self.incoming.migration_id, exc)
                return
        await self._hooks.commit_again()
        await self._clean_up()
        await self._forget()

    def _keep_directories(self) -> None:
        """What `--sync` brought is the tree's from now on: no later move may replace it unasked."""
        try:
            self.sync.arrived()
        except OSError as exc:  # the record says that it came only in part, and allows more than it should
            logger.error("sync not on record migration_id=%s error=%s", self.incoming.migration_id, exc)

    async def _lose_pages(self, error: CriuError) -> None:
        """Pages are missing: better no process than one with zeros in their place."""
        await unattended.kill(self._root)
        self.failure = error
        logger.error("pages lost, the tree was killed migration_id=%s error=%s", self.incoming.migration_id, error)
        self._journal.note_failure(json_format.MessageToDict(convert.failure(error)))

    async def _forget(self) -> None:
        """Nothing of it is left but what the journal says."""
        if self._phase is Phase.ABORTED and self._container is not None and not await self._container.is_gone():
            return
        await self.cleaned()
        self._on_end(self)

    async def cleaned(self) -> None:
        """Nothing of it is left to clean. Raises `OSError`."""
        await self._journal.cleaned()

    async def _clean_up(self) -> None:
        self._calm()
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        await self.sync.aclose()
        self.sync.release()
        if self._guard is not None:
            await self._guard.aclose()
        await self._end_page_source()
        if self._server is not None:
            await self._server.aclose()
        await self._stream.aclose()
        if self._slot is not None:
            await self._slot.discard()
            self._slot = None
        if self._fetching is not None:
            await self._fetching.aclose()
        if not await self._remove_images():
            self._start(self._remove_images_later())
        self._holds_images = False
        if self._phase is Phase.ABORTED:
            await self._addresses_are("dropped", self._addresses.drop)
            if self._container is not None:
                await self._container_is("discarded", self._container.discard)
            await self._hooks.abort()
            for path in self._made:
                path.unlink(missing_ok=True)

    async def _remove_images(self) -> bool:
        try:
            await asyncio.to_thread(shutil.rmtree, self._directory)
        except FileNotFoundError:
            pass
        except OSError as exc:  # read-only, or an I/O error: not for ever, one hopes
            logger.error("images not removed migration_id=%s error=%s", self.incoming.migration_id, exc)
            return False
        return True

    async def _remove_images_later(self) -> None:
        while not await self._remove_images():  # noqa: ASYNC110 - nothing tells when it is writable again
            await asyncio.sleep(RETRY_SECONDS[-1])


def _bytes_of(images: Path | None) -> int:
    """Bytes of memory that the page server wrote in a round."""
    return sum(path.stat().st_size for path in images.glob("pages-*.img")) if images is not None else 0


def _is_there(path: Path) -> bool:
    """Also a link that leads nowhere: it is not ours to remove later."""
    return os.path.lexists(path)


async def _check_lives(lazy: LazyPages) -> None:
    """Raises `LazyPagesFailed` if it has failed already, or is about to: the event loop may not know yet."""
    if lazy.has_ended or shim.is_dead(lazy.pid):
        await lazy.wait()


def _rearm_timers(images: Path) -> None:
    """Raises `OSError`, `ImageCorrupt`."""
    try:
        files = rearm((images / "files.img").read_bytes())
    except FileNotFoundError:
        return
    except ValueError as exc:
        raise ImageCorrupt(str(exc)) from exc
    if files is not None:
        (images / "files.img").write_bytes(files)
