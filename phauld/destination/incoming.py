"""One incoming migration: the shell around the table in `session.py`.

It feeds calls and happenings in, one at a time, and performs the acts that come out. The invariant: nothing of the
tree runs before COMMITTING is in the journal, and whatever ends the session earlier leaves nothing behind.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, assert_never

from phaul.v1 import remote_pb2
from phaul_client.errors import PhaseError
from phaul_client.pipe import LinkTerms
from phaul_criu.child import finish
from phaul_criu.errors import CriuError
from phauld import convert, session
from phauld.destination.course import Course
from phauld.destination.holdings import Holdings, Host
from phauld.destination.images import ImageWriter
from phauld.destination.incoming_spec import Incoming
from phauld.destination.page_stream import STREAM_SECONDS
from phauld.destination.placement import Promise
from phauld.destination.sync_receiver import SyncReceiver
from phauld.journal import IncomingEntry, IncomingRecord
from phauld.session import Do, Event, Phase

logger = logging.getLogger(__name__)


class Session:
    """One session from its opening to RUNNING or ABORTED."""

    def __init__(
        self,
        incoming: Incoming,
        host: Host,
        *,
        directory: Path,
        journal: IncomingRecord,
        phase: Phase,
        on_end: Callable[["Session"], None],
    ) -> None:
        self.incoming = incoming
        self._data_port = host.data_port
        self._journal = journal
        self._on_end = on_end
        self._opening = asyncio.Lock()
        self._ending_round = asyncio.Lock()
        self.course: Final = Course(incoming, journal, phase, perform=self._perform, on_phase=self._entered)
        self._held = Holdings(incoming, host, directory, journal, self.course)

    @property
    def phase(self) -> Phase:
        return self.course.phase

    @property
    def failure(self) -> BaseException | None:
        """Why it was aborted, or its pages are lost."""
        return self.course.failure

    @property
    def pid(self) -> int:
        """Of the tree's root; 0 before there is one."""
        return self._held.tree.pid

    @property
    def rounds(self) -> int:
        """Whose pages have arrived."""
        return self._held.images.rounds

    @property
    def bytes_received(self) -> int:
        """Of pages and of images."""
        return self._held.images.bytes_received

    @property
    def sync(self) -> SyncReceiver:
        """Of the directories that `--sync` brings."""
        return self._held.around.sync

    @property
    def promise(self) -> Promise:
        """What is reserved for it now."""
        return self._held.promise

    @property
    def is_filling(self) -> bool:
        """Whether pages are missing at the source's end of a post-copy."""
        return self._held.filling.fetches

    @property
    def pages_missing(self) -> int:
        """Pages of a post-copy that have not arrived; 0 if that is not known."""
        return self._held.filling.pages_missing

    @property
    def token(self) -> bytes:
        """The one-time token for the page stream."""
        return self._held.stream.token

    def remember(self, entry: IncomingEntry) -> None:
        """This session is an earlier phauld's: know again what it left."""
        self._held.remember(entry)
        if entry.failure is not None:
            self.course.failure = convert.error(entry.failure)
        self.course.created_at, self.course.phase_since = entry.created_at, entry.updated_at

    async def recover(self) -> None:
        """Do what the table says after a restart; answers that wait on it are given then."""
        await self.course.fire(Event.RESTARTED)
        self._entered(self.phase)

    # Calls of the source

    async def open(self) -> None:
        """Make room, expect the page stream, have a criu ready. Raises `OSError`, `WorkloadExists`, `CriuError`."""
        async with self._opening:  # the same call may come twice at once
            if self.phase in session.FINAL:
                raise PhaseError(self.phase, "OPEN_SESSION")
            if self.phase is Phase.ABSENT:
                await self._open()
            else:
                self._held.stream.expect_again()

    async def _open(self) -> None:
        await self._held.around.check()
        try:
            await self._held.prepare()
            await self.course.fire(Event.OPEN_SESSION)
            if self.phase is not Phase.OPEN:  # an Abort was quicker
                raise PhaseError(self.phase, "OPEN_SESSION")
            await self._held.make()
        except BaseException:
            await finish(self.course.fire(Event.ABORT) if self.phase is Phase.OPEN else self._held.clean_up())
            raise
        self.course.renew()

    def open_stream(self, terms: LinkTerms) -> bytes:
        """A token for one more connection, which goes to the relay. Raises `PhaseError`."""
        is_over = self.phase is Phase.ABORTED or (self.phase is Phase.RUNNING and not self.is_filling)
        fetching = self._held.filling.fetching
        if fetching is None or is_over:
            raise PhaseError(self.phase, "OPEN_STREAM")
        expected, task = fetching.expect(self._data_port, self.incoming.lease_seconds or STREAM_SECONDS, terms)
        self.course.keep(task)
        return expected.token

    async def start_iter(self) -> None:
        """Raises `PhaseError`, `TimeoutError` when no stream comes, `CriuError`."""
        await self.course.fire(Event.START_ITER)
        self._refuse_if_over("START_ITER")

    async def stop_iter(self, *, final: bool = False) -> None:
        """Wait for the end of the round's pages. Raises `PhaseError`, `CriuError`."""
        async with self._ending_round:  # a repeated call waits for the same end
            if self.phase is Phase.RECEIVING:
                try:
                    await self._held.images.end_round()
                except BaseException as exc:
                    why = await self._held.stream.why() if isinstance(exc, CriuError) else None
                    with contextlib.suppress(PhaseError):  # aborted meanwhile
                        await self.course.fire(Event.ROUND_FAILED)
                    if why is not None:
                        raise why from exc
                    raise
            await self.course.fire(Event.FINAL_ROUND_ENDED if final else Event.ROUND_ENDED)
            self._refuse_if_over("STOP_ITER")

    def _refuse_if_over(self, call: str) -> None:
        """The table lets calls that come again have their answer; to these it is no."""
        if self.phase in session.FINAL:
            raise self.failure or PhaseError(self.phase, call)

    async def put_files(
        self, requests: AsyncIterator[remote_pb2.PutFilesRequest], first: remote_pb2.PutFilesRequest
    ) -> int:
        """Take the files of a container; the bytes of it. Raises `PhaseError`, and what `ContainerPlace.take` does."""
        self.check_takes_files()
        self.course.renew()
        try:
            return await self._held.take_files(requests, first)
        finally:
            self.course.renew()

    def check_takes_files(self) -> None:
        """Raises `PhaseError`."""
        if self.phase not in (Phase.OPEN, Phase.RECEIVING, Phase.RECEIVED):
            raise PhaseError(self.phase, "PUT_IMAGES")

    def writer(self) -> ImageWriter:
        """Writes the files of a PutImages call; `accept` what it has written. Raises `PhaseError`."""
        self.check_takes_files()
        self.course.renew()
        if self.phase is not Phase.OPEN:  # what comes then is of the last dump
            self._held.hurry()
        without_pages = self._held.filling.fetching is not None and self.phase is Phase.OPEN
        return self._held.images.writer(without_pages=without_pages, on_first=self._held.hurry)

    def accept(self, writer: ImageWriter) -> None:
        """The files of `writer` are complete. Raises `PhaseError`."""
        self.check_takes_files()
        self._held.images.accept(writer)

    async def restore(self, image_files: int) -> None:
        """Build the tree and hold it. Raises `PhaseError`, and what made the restore fail."""
        if self.phase is Phase.RECEIVING:
            await self.stop_iter(final=True)
            self.course.mark("page server ends")
        await self.sync.aclose()
        self._held.images.check_complete(image_files)
        await self.course.fire(Event.RESTORE)
        await self.course.left(Phase.RESTORING)
        if self.phase is Phase.ABORTED:
            raise self.failure or PhaseError(self.phase, "RESTORE")
        self.course.mark("journal: prepared")

    async def commit(self) -> None:
        """Let the tree run, and see it run. Raises `PhaseError` if it never ran and never will."""
        await self._abort_if_pages_are_lost()
        await self.course.fire(Event.COMMIT)
        await self.course.left(Phase.COMMITTING)
        if self.phase is not Phase.RUNNING:
            raise PhaseError(self.phase, "COMMIT")
        self.course.mark("journal: running")

    async def _abort_if_pages_are_lost(self) -> None:
        """Who fills the tree may have died since it was prepared; then the source is where it must run on."""
        if self.phase is not Phase.PREPARED:
            return
        try:
            await self._held.filling.check()
        except CriuError as exc:
            self.course.failure = exc
            with contextlib.suppress(PhaseError):  # it came to an end meanwhile
                await self.course.fire(Event.TREE_LOST)

    async def abort(self) -> None:
        """End it, unless it is too late, which the phase then says."""
        await self.course.fire(Event.ABORT)

    async def close(self) -> None:
        """phauld stops: what is not committed is aborted, what is being let go is seen through."""
        await self.course.left(Phase.COMMITTING)
        if self.phase not in session.FINAL:
            await self.course.fire(Event.ABORT)
        if self._held.around.container is not None:
            self._held.around.container.give_up()
        is_filling = self.is_filling
        if is_filling:
            self._held.filling.leave()  # the next phauld sees to the end of it
        await self.course.aclose(cancel=is_filling)
        await self._held.tree.aclose()

    # What the table says

    async def _perform(self, act: Do) -> None:
        match act:
            case Do.START_PAGE_SERVER:
                memfd = await self._held.stream.take()
                await self._held.images.start_round(memfd, in_a_hurry=self.incoming.stands_still)
            case Do.START_RESTORE:
                images = self._held.images
                assert images.last is not None
                self._held.tree.start(images.last, fetches=images.is_without_pages)
            case Do.RELEASE_TREE:
                await self._held.tree.release()
            case Do.KILL_TREE:
                await finish(self._held.kill_tree())
            case Do.CLEAN_UP:
                await finish(self._held.clean_up())
                self.course.start(self._forget())
            case Do.LOOK_AT_TREE:
                self.course.start(self._held.tree.look())
            case Do.ANSWER | Do.ANSWER_WAITING:
                pass  # the calls answer when they see the phase
            case _:
                assert_never(act)

    def _entered(self, phase: Phase) -> None:
        if phase is Phase.RUNNING:
            self.course.start(self._settle())

    async def _settle(self) -> None:
        if await self._held.settle():
            await self._forget()

    async def _forget(self) -> None:
        """Nothing of it is left but what the journal says."""
        container = self._held.around.container
        if self.phase is Phase.ABORTED and container is not None and not await container.is_gone():
            return
        await self.cleaned()
        self._on_end(self)

    async def cleaned(self) -> None:
        """Nothing of it is left to clean. Raises `OSError`."""
        await self._journal.cleaned()
