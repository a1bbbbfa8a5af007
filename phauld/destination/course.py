"""How far one session has come: the table in `session.py`, the journal, the lease, and what is told meanwhile.

Events are taken one at a time, and a phase is entered once it is in the journal. The acts that come out are the
session's to perform. The invariant: an event that was told is not lost, for it cannot be refused as a call can.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from google.protobuf import json_format

from phaul_client.errors import PhaseError, PhaulError
from phaul_criu.child import finish
from phauld import convert, session
from phauld.destination.incoming_spec import Incoming
from phauld.journal import IncomingRecord
from phauld.session import Do, Event, Phase, Record

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
_WHY_ABORTED: Final = {
    Event.LEASE_EXPIRED: ("LEASE_EXPIRED", "the source was silent", "try again; a larger lease_seconds"),
    Event.RESTARTED: ("DAEMON_RESTARTED", "phauld was started anew at the destination before the commit", "try again"),
}


class Course:
    """Of one session, from ABSENT, or from where an earlier phauld left it, to RUNNING or ABORTED."""

    def __init__(
        self,
        incoming: Incoming,
        journal: IncomingRecord,
        phase: Phase,
        *,
        perform: Callable[[Do], Awaitable[None]],
        on_phase: Callable[[Phase], None],
    ) -> None:
        self._migration_id = incoming.migration_id
        self._lease_seconds = incoming.lease_seconds
        self._transitions = session.POSTCOPY_TRANSITIONS if incoming.postcopy else session.TRANSITIONS
        self._journal = journal
        self._phase = phase
        self._perform = perform
        self._on_phase = on_phase
        self._lock = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._lease: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._marks: list[tuple[str, float]] = []
        self.failure: BaseException | None = None  #: why it has ended, for the source, which may ask much later
        self.created_at = self.phase_since = time.time()
        self.lease_expires_at = 0.0

    @property
    def phase(self) -> Phase:
        return self._phase

    async def fire(self, event: Event) -> None:
        """Take one event to its end, also when the call that brought it is cancelled. Raises `PhaseError`."""
        await finish(self._take(event))

    async def _take(self, event: Event) -> None:
        async with self._lock:
            phase, actions = session.advance(self._phase, event, self._transitions)
            if phase is Phase.ABORTED and self._phase not in session.FINAL:
                self._note_why(event)
            for action in actions:
                if isinstance(action, Record):
                    await self._journal.record(action.phase)
                    await self._enter(phase)
                elif action not in (Do.ANSWER, Do.ANSWER_WAITING):  # the calls answer when they see the phase
                    await self._perform(action)
            await self._enter(phase)
        self.renew()

    async def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            logger.info("session migration_id=%s phase=%s", self._migration_id, phase)
            self.phase_since = time.time()
            self._phase = phase
            async with self._changed:
                self._changed.notify_all()
            self._on_phase(phase)

    async def left(self, phase: Phase) -> None:
        """Wait until that is not its phase, and the acts of the step are done."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._phase is not phase)
        async with self._lock:
            pass

    def _note_why(self, event: Event) -> None:
        """It is about to be aborted."""
        if self.failure is None and event in _WHY_ABORTED:
            reason, message, remedy = _WHY_ABORTED[event]
            self.failure = PhaulError(message, reason=reason, remedy=remedy)
        if self.failure is not None:
            self.note_failure(self.failure)

    def note_failure(self, failure: BaseException) -> None:
        """Why it has ended, or is about to; the journal keeps it with the next phase."""
        self.failure = failure
        self._journal.note_failure(json_format.MessageToDict(convert.failure(failure)))

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
                    return logger.debug("too late migration_id=%s event=%s", self._migration_id, event)
                except OSError as exc:
                    logger.error("event waits migration_id=%s event=%s error=%s", self._migration_id, event, exc)
                    await asyncio.sleep(seconds)
                except Exception:
                    return logger.exception("event failed migration_id=%s event=%s", self._migration_id, event)

        self.start(take())

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside the calls; `aclose` waits for it."""
        self.keep(asyncio.create_task(work))

    def keep(self, task: asyncio.Task[None]) -> None:
        """`aclose` waits for it, too."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def renew(self) -> None:
        """The source is alive: the lease starts anew."""
        self._end_lease()
        if self._phase in session.LEASED:
            self.lease_expires_at = time.time() + self._lease_seconds
            self._lease = asyncio.get_running_loop().call_later(self._lease_seconds, self.tell, Event.LEASE_EXPIRED)

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None

    def mark(self, name: str) -> None:
        """A step of the pause has ended."""
        self._marks.append((name, time.monotonic()))

    def take_marks(self) -> list[tuple[str, float]]:
        """The steps since they were taken last, each named at its end, on the monotonic clock."""
        marks, self._marks = self._marks, []
        return marks

    async def aclose(self, *, cancel: bool) -> None:
        """No lease any more; what was begun comes to its end, or, with `cancel`, is left to the next phauld."""
        self._end_lease()
        if cancel:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
