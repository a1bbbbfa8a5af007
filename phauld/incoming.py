"""One incoming migration: the shell around the table in `session.py`.

It feeds calls and happenings in, one at a time, and performs the acts that come out. The invariant: nothing of the
tree runs before COMMITTING is in the journal, and whatever ends the session earlier leaves nothing behind.
"""

import asyncio
import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Final, assert_never

from google.protobuf import json_format

from phaul.v1 import remote_pb2
from phaul_client.errors import PhaseError, PhaulError
from phaul_client.hook_calls import HookSettings
from phaul_client.pipe import LinkTerms
from phaul_criu.child import finish
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.urgency import in_a_hurry
from phauld import convert, session, unattended
from phauld.dataport import DataPort
from phauld.filling import Filling
from phauld.image_store import ImageStore
from phauld.images import ImageWriter
from phauld.incoming_spec import Incoming
from phauld.journal import IncomingEntry, IncomingRecord
from phauld.page_stream import STREAM_SECONDS, PageStream
from phauld.placement import Promise
from phauld.restoring import Restoring
from phauld.session import Do, Event, Phase, Record
from phauld.surroundings import Surroundings
from phauld.sync_receiver import SyncReceiver
from phauld.sync_records import SyncRecords
from phauld.workloads import Workloads

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
_WHY_ABORTED: Final = {
    Event.LEASE_EXPIRED: ("LEASE_EXPIRED", "the source was silent", "try again; a larger lease_seconds"),
    Event.RESTARTED: ("DAEMON_RESTARTED", "phauld was started anew at the destination before the commit", "try again"),
}


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
        self._data_port = data_port
        self._journal = journal
        self._phase = phase
        self._on_end = on_end
        self._lock = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._ending_round = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._around = Surroundings(
            incoming,
            node_name=node_name,
            hooks=hooks,
            sync=sync,
            pid=lambda: self.pid,
            is_recovered=phase is not Phase.ABSENT,
        )
        self._filling = Filling(incoming, criu, journal)
        self._tree = Restoring(incoming, criu, workloads, journal, self._filling, self._around, self)
        self._images = ImageStore(incoming, directory, criu)
        self._stream = PageStream(data_port, incoming.pipe)
        self._taking: asyncio.Task[int] | None = None  # files of a container
        self._transitions = session.POSTCOPY_TRANSITIONS if incoming.postcopy else session.TRANSITIONS
        self._lease: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._holds_images = phase not in session.FINAL
        self._is_in_a_hurry = False
        self.failure: BaseException | None = None
        self.created_at = self.phase_since = time.time()
        self.lease_expires_at = 0.0
        self._marks: list[tuple[str, float]] = []

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def pid(self) -> int:
        """Of the tree's root; 0 before there is one."""
        return self._tree.pid

    @property
    def rounds(self) -> int:
        """Whose pages have arrived."""
        return self._images.rounds

    @property
    def bytes_received(self) -> int:
        """Of pages and of images."""
        return self._images.bytes_received

    @property
    def sync(self) -> SyncReceiver:
        """Of the directories that `--sync` brings."""
        return self._around.sync

    @property
    def promise(self) -> Promise:
        """What is reserved for it now: nothing, once its pages are in the tree."""
        return self.incoming.promise if self._holds_images else Promise(bytes=0, in_memory=False)

    @property
    def is_filling(self) -> bool:
        """Whether pages are missing at the source's end of a post-copy."""
        return self._filling.fetches

    @property
    def pages_missing(self) -> int:
        """Pages of a post-copy that have not arrived; 0 if that is not known."""
        return self._filling.pages_missing

    @property
    def token(self) -> bytes:
        """The one-time token for the page stream."""
        return self._stream.token

    def remember(self, entry: IncomingEntry) -> None:
        """This session is an earlier phauld's: know again what it left."""
        self._tree.remember(entry)
        self._around.made = self.incoming.carried
        self._directory = Path(entry.detail.get("images", self._directory))
        self._filling.remember(entry, self._directory)
        if entry.failure is not None:
            self.failure = convert.error(entry.failure)
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
        await self._around.check()
        container = self._around.container
        is_opened_first = container is not None and container.is_opened_first
        try:
            await self._stream.open()
            await asyncio.to_thread(self.sync.open)
            if not is_opened_first:
                await self._tree.make_slot()
            self._journal.note(
                images=str(self._directory),
                record=str(self._tree.slot.directory) if self._tree.slot is not None else "",
                workload=self.incoming.spec.name,
                **self._around.note(),
            )
            await self._filling.open(self._directory)
            await self.fire(Event.OPEN_SESSION)
            if self._phase is not Phase.OPEN:  # an Abort was quicker
                raise PhaseError(self._phase, "OPEN_SESSION")
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # now that the journal knows of it
            if container is not None:
                await container.open()
            if is_opened_first:
                await self._tree.make_slot()
                assert self._tree.slot is not None
                self._journal.note(record=str(self._tree.slot.directory))
                await self._journal.record(self._phase)
            await self._around.hooks.prepare()
        except BaseException:
            await finish(self.fire(Event.ABORT) if self._phase is Phase.OPEN else self._clean_up())
            raise
        self.renew()

    def open_stream(self, terms: LinkTerms) -> bytes:
        """A token for one more connection, which goes to the relay. Raises `PhaseError`."""
        is_over = self._phase is Phase.ABORTED or (self._phase is Phase.RUNNING and not self.is_filling)
        fetching = self._filling.fetching
        if fetching is None or is_over:
            raise PhaseError(self._phase, "OPEN_STREAM")
        expected, task = fetching.expect(self._data_port, self.incoming.lease_seconds or STREAM_SECONDS, terms)
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
            if self._phase is Phase.RECEIVING:
                try:
                    await self._images.end_round()
                except BaseException as exc:
                    why = await self._stream.why() if isinstance(exc, CriuError) else None
                    with contextlib.suppress(PhaseError):  # aborted meanwhile
                        await self.fire(Event.ROUND_FAILED)
                    if why is not None:
                        raise why from exc
                    raise
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
        if self._around.container is None or self._taking is not None:
            raise PhaseError(self._phase, "PUT_FILES")
        self.renew()
        self._taking = asyncio.create_task(self._around.container.take(requests, first), name="files")
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
        without_pages = self._filling.fetching is not None and self._phase is Phase.OPEN
        return self._images.writer(without_pages=without_pages, on_first=self._hurry)

    def accept(self, writer: ImageWriter) -> None:
        """The files of `writer` are complete. Raises `PhaseError`."""
        self.check_takes_files()
        self._images.accept(writer)

    async def restore(self, image_files: int) -> None:
        """Build the tree and hold it. Raises `PhaseError`, and what made the restore fail."""
        if self._phase is Phase.RECEIVING:
            await self.stop_iter(final=True)
            self.mark("page server ends")
        await self.sync.aclose()
        self._images.check_complete(image_files)
        await self.fire(Event.RESTORE)
        await self._wait_for_change(Phase.RESTORING)
        if self._phase is Phase.ABORTED:
            raise self.failure or PhaseError(self._phase, "RESTORE")
        self.mark("journal: prepared")

    async def commit(self) -> None:
        """Let the tree run, and see it run. Raises `PhaseError` if it never ran and never will."""
        await self._abort_if_pages_are_lost()
        await self.fire(Event.COMMIT)
        await self._wait_for_change(Phase.COMMITTING)
        if self._phase is not Phase.RUNNING:
            raise PhaseError(self._phase, "COMMIT")
        self.mark("journal: running")

    async def _abort_if_pages_are_lost(self) -> None:
        """Who fills the tree may have died since it was prepared; then the source is where it must run on."""
        if self._phase is not Phase.PREPARED:
            return
        try:
            await self._filling.check()
        except CriuError as exc:
            self.failure = exc
            with contextlib.suppress(PhaseError):  # it came to an end meanwhile
                await self.fire(Event.TREE_LOST)

    def take_marks(self) -> list[tuple[str, float]]:
        """The steps since they were taken last, each named at its end, on the monotonic clock."""
        marks, self._marks = self._marks, []
        return marks

    def mark(self, name: str) -> None:
        """A step of the pause has ended."""
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
            self._lease = asyncio.get_running_loop().call_later(seconds, self.tell, Event.LEASE_EXPIRED)

    async def close(self) -> None:
        """phauld stops: what is not committed is aborted, what is being let go is seen through."""
        await self._wait_for_change(Phase.COMMITTING)
        if self._phase not in session.FINAL:
            await self.fire(Event.ABORT)
        if self._lease is not None:
            self._lease.cancel()
        if self._around.container is not None:
            self._around.container.give_up()
        if self.is_filling:  # the next phauld sees to the end of it
            self._filling.leave()
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tree.aclose()

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

    def tell(self, event: Event, failure: BaseException | None = None) -> None:
        """Something happened, `failure` is why, if it is the end: take it when its turn comes; too late is no error.

        It cannot be refused as a call can: while the journal cannot be written, it is taken again and again.
        """
        if failure is not None:
            self.failure = failure

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
                assert self._images.last is not None
                self._tree.start(self._images.last, fetches=self._images.is_without_pages)
            case Do.RELEASE_TREE:
                await self._tree.release()
            case Do.KILL_TREE:
                await finish(self._kill_tree())
            case Do.CLEAN_UP:
                await finish(self._clean_up())
                self._start(self._forget())
            case Do.LOOK_AT_TREE:
                self._start(self._tree.look())
            case Do.ANSWER | Do.ANSWER_WAITING:
                pass  # the calls answer when they see the phase
            case _:
                assert_never(act)

    async def _start_page_server(self) -> None:
        memfd = await self._stream.take()
        await self._images.start_round(memfd, in_a_hurry=self.incoming.stands_still)

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
        await self._around.mute()
        await self.sync.aclose()
        await self._tree.kill()

    async def _settle(self) -> None:
        """The tree runs: its record stands for its name, and what it was made of goes."""
        self._calm()
        await self._around.settle()
        await self._tree.settle()
        try:
            await self._filling.wait()
        except CriuError as exc:
            await self._lose_pages(exc)
        if self.is_filling:
            self.failure = None  # of the restore; whatever it was, the tree runs
            try:
                await self._filling.wait_for_source(self._tree.root)
            except CriuError as exc:  # stays filling: the source must not give up its copy
                self.failure = exc
                logger.error("pages lost migration_id=%s error=%s", self.incoming.migration_id, exc)
                return
        await self._around.hooks.commit_again()
        await self._clean_up()
        await self._forget()

    async def _lose_pages(self, error: CriuError) -> None:
        """Pages are missing: better no process than one with zeros in their place."""
        await unattended.kill(self._tree.root)
        self.failure = error
        logger.error("pages lost, the tree was killed migration_id=%s error=%s", self.incoming.migration_id, error)
        self._journal.note_failure(json_format.MessageToDict(convert.failure(error)))

    async def _forget(self) -> None:
        """Nothing of it is left but what the journal says."""
        container = self._around.container
        if self._phase is Phase.ABORTED and container is not None and not await container.is_gone():
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
        await self._images.aclose()
        await self._stream.aclose()
        await self._tree.discard()
        await self._filling.aclose()
        if not await self._remove_images():
            self._start(self._remove_images_later())
        self._holds_images = False
        if self._phase is Phase.ABORTED:
            await self._around.take_back()

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
