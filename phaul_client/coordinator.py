"""The shell around the table in `commit.py`: takes events, writes the journal, asks the destination.

`LastStep` adds the acts of a dump that is under way, `Recovery` those for a migration found in the journal.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import Final, assert_never

from phaul.v1 import types_pb2
from phaul_client import commit
from phaul_client.case import Case
from phaul_client.commit import Do, Event, Phase, Record
from phaul_client.doubt import Resolution, Speaker
from phaul_client.errors import PeerError, PeerRefused, PhaulError
from phaul_client.hook_calls import Hooks
from phaul_client.movers import Addresses
from phaul_client.status import from_failure
from phaul_client.timeline import Step, aligned
from phaul_client.tree import Tree

logger = logging.getLogger(__name__)

COMMIT_SECONDS: Final = 10.0
ABORT_SECONDS: Final = 3.0
FIRST_PATIENCE_SECONDS: Final = 0.05
LAST_PATIENCE_SECONDS: Final = 5.0
_ANSWERS: Final[Mapping[int, Event]] = {
    types_pb2.SESSION_PHASE_PREPARED: Event.DESTINATION_PREPARED,
    types_pb2.SESSION_PHASE_COMMITTING: Event.DESTINATION_COMMITTING,
    types_pb2.SESSION_PHASE_RUNNING: Event.DESTINATION_RUNNING,
    types_pb2.SESSION_PHASE_ABORTED: Event.DESTINATION_ABORTED,
}


class Coordinator:
    """The source of one migration, from the phase that it is given."""

    def __init__(self, case: Case, phase: Phase) -> None:
        self._case = case
        self._migration_id = case.migration_id
        self._remote = case.remote
        self._journal = case.journal
        self._phase = phase
        self._transitions = commit.TRANSITIONS
        self._patience = FIRST_PATIENCE_SECONDS
        self._doubt_since = 0.0
        self._has_expired = case.doubt.has_expired  # if not, it is held for a cause of which the policy does not speak
        self._resolution = Resolution()
        self._abort: asyncio.Task[None] | None = None
        self._tree: Tree | None = None
        self._may_be_committed = False  # COMMITTED may be in the journal, whatever its write ended as
        self._cause: BaseException | None = None  # of a roll-back
        self.addresses = Addresses()  #: that move along
        self.hooks = Hooks()  #: that are told
        self.destination_pid = 0
        self.steps: list[Step] = []

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def spoken_for(self) -> str:
        """Who has said what becomes of the tree, in place of the destination; "" if nobody has."""
        return self._resolution.speaker

    @property
    def cause(self) -> BaseException | None:
        """Of a roll-back; `None` if nobody said."""
        return self._cause

    def resolve(self, event: Event, operator: str = "an operator") -> asyncio.Future[Event] | None:
        """An operator's word for a destination that does not answer: `None` when there is no doubt.

        Else what the destination answers after all, if it does: then the word is void.
        """
        return self._resolution.give(event, operator) if self._phase in commit.IN_DOUBT else None

    async def fire(self, event: Event) -> None:
        """Take an event, and the ones that its acts lead to, to the end.

        A phase is entered once it is in the journal: if it cannot be written down, the one before still holds. Raises
        `OSError` then, but where there is a way on: see `_write_down`.
        """
        following: Event | None = event
        while following is not None:
            phase, actions = commit.advance(self._phase, following, self._transitions)
            following = None
            for action in actions:
                if isinstance(action, Record):
                    if not await self._write_down(action.phase):
                        phase, following = self._phase, Event.NO_ANSWER
                        break
                else:
                    self._enter(phase)
                    following = await self._move_addresses(action) or await self.perform(action) or following
            self._enter(phase)

    async def _move_addresses(self, act: Do) -> Event | None:
        """They leave before the commit and are back before the tree runs on; if they cannot leave, it does."""
        try:
            if act is Do.SEND_COMMIT:
                await self.addresses.withdraw()
                await self.hooks.commit()
            elif act is Do.RESUME_TREE:
                await self.addresses.put_back()
                if self.hooks.may_be_committed:  # else there is nothing that the tree would have to wait for
                    await self.hooks.abort()
        except PhaulError as exc:
            logger.error("address not moved migration_id=%s act=%s error=%s", self._migration_id, act, exc)
            if act is Do.SEND_COMMIT:
                await self._abort_destination()
                return Event.NO_ANSWER
        return None

    async def _write_down(self, phase: Phase) -> bool:
        """Whether the phase is to be entered. Raises `OSError` if it is not in the journal and must be.

        In doubt the answer is lost with the write: the destination is asked again. A roll-back before the commit and a
        final phase wait for no disk: whoever finds the phase before it in the journal comes to the same end. But if
        that may be COMMITTED, it comes to the same end only once the destination has aborted. While pages are served
        there is nobody else who could end it: the disk is waited for.
        """
        self._may_be_committed |= phase is Phase.COMMITTED
        try:
            await self._journal.record(phase)
        except OSError as exc:
            logger.error("journal not written migration_id=%s phase=%s error=%s", self._migration_id, phase, exc)
            if self._phase in commit.IN_DOUBT:
                await asyncio.sleep(self._patience)
                return False
            if self._phase is Phase.FILLING:
                await self._insist(phase)
                return True
            if phase not in (Phase.ROLLING_BACK, *commit.FINAL):
                raise
            if phase is Phase.ROLLING_BACK and self._may_be_committed:
                await self._write_down_or_abort(phase)
        return True

    async def _insist(self, phase: Phase) -> None:
        """Until the phase is in the journal."""
        while True:
            await asyncio.sleep(self._patience)
            self._patience = min(2 * self._patience, LAST_PATIENCE_SECONDS)
            with contextlib.suppress(OSError):
                return await self._journal.record(phase)

    async def _write_down_or_abort(self, phase: Phase) -> None:
        """Until the phase is in the journal, or the destination's says that its copy never runs."""
        while not await self._has_aborted():
            await asyncio.sleep(self._patience)
            self._patience = min(2 * self._patience, LAST_PATIENCE_SECONDS)
            with contextlib.suppress(OSError):
                await self._journal.record(phase)
                return

    async def _has_aborted(self) -> bool:
        await self._abort_destination()
        try:
            return (await self._remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        except PeerError:
            return False

    async def perform(self, act: Do) -> Event | None:
        """Do it; the event that it ends in, if it has ended."""
        match act:
            case Do.SEND_COMMIT:
                return await self._send_commit()
            case Do.ASK_DESTINATION:
                return await self._ask_destination()
            case Do.ABORT_DESTINATION:
                self._abort = asyncio.create_task(self._abort_destination())
            case Do.CLEAN_UP:
                if self._abort is not None:
                    await self._abort
                await self._case.clean_up()
            case Do.KILL_TREE:
                return await self._kill_tree()
            case Do.RESUME_TREE:
                return await self._resume_tree()
            case Do.OPEN_SESSION:
                pass  # the migration's owner does it
            case Do.START_DUMP | Do.COPY_IMAGES | Do.SEND_RESTORE | Do.STOP_TREE:
                raise NotImplementedError(act)  # there is no dump in this process
            case Do.ANSWER_POST_DUMP | Do.SERVE_PAGES:
                raise NotImplementedError(act)
            case _:
                assert_never(act)
        return None

    def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            logger.info("phase migration_id=%s phase=%s", self._migration_id, phase)
            self._phase = phase
            self._case.on_phase(phase)

    async def _kill_tree(self) -> Event | None:
        """SIGKILL by pidfd whatever is left."""
        if self._tree is not None:
            await self._tree.kill()
        return Event.TREE_KILLED

    async def _resume_tree(self) -> Event | None:
        """SIGCONT to every process that phaul stopped."""
        if self._tree is not None:
            self._tree.resume()
        return Event.TREE_RESUMED

    async def _send_commit(self) -> Event:
        self._doubt_since = self._doubt_since or time.monotonic()
        return await self._answer_to(self._commit())

    async def _commit(self) -> Event:
        sent = time.monotonic()
        try:
            answer = await self._remote.commit(timeout_seconds=COMMIT_SECONDS)
        except PeerError as exc:
            logger.warning("commit not answered migration_id=%s error=%s", self._migration_id, exc)
            return Event.NO_ANSWER
        self.destination_pid = answer.pid
        self.steps += aligned(answer.timeline, sent, time.monotonic())
        return Event.DESTINATION_RUNNING

    async def _ask_destination(self) -> Event:
        """Ask after a pause that grows, or once more at once when somebody has spoken for the destination."""
        self._doubt_since = self._doubt_since or time.monotonic()
        await self._resolution.wait(self._patience)
        self._patience = min(2 * self._patience, LAST_PATIENCE_SECONDS)
        return await self._answer_to(self._ask())

    async def _ask(self) -> Event:
        try:
            session = await self._remote.get_session()
        except PeerRefused as exc:
            known = exc.reason in ("MIGRATION_NOT_FOUND", "NODE_MISMATCH")
            return Event.DESTINATION_NOT_FOUND if known else self._no_answer()
        except PeerError:
            return self._no_answer()
        self.destination_pid = session.pid or self.destination_pid
        if session.phase == types_pb2.SESSION_PHASE_ABORTED:
            self._cause = from_failure(self._remote.address, session.error)
        return _ANSWERS.get(session.phase, Event.NO_ANSWER)

    async def _answer_to(self, question: Coroutine[None, None, Event]) -> Event:
        """The destination's answer, or an operator's or the policy's, who have given it up."""
        answer, speaker = await self._resolution.against(question)
        if speaker is Speaker.SOMEBODY_ELSE:
            logger.warning("resolved migration_id=%s event=%s by=%s", self._migration_id, answer, self.spoken_for)
            self._cause = PhaulError(
                f"the destination did not answer; {self.spoken_for} decided", reason="OUTCOME_UNKNOWN"
            )
        elif speaker is Speaker.DESTINATION_AFTER_ALL:
            logger.warning("not resolved: it answers migration_id=%s answer=%s", self._migration_id, answer)
            self._doubt_since = time.monotonic()
        return answer

    async def _wait_for_resolution(self) -> Event:
        """An operator's answer, where nobody else can give one."""
        return await asyncio.shield(self._resolution.open())

    def _no_answer(self) -> Event:
        is_held = self._phase is Phase.HELD
        if (is_held and not self._has_expired) or time.monotonic() - self._doubt_since < self._case.doubt.seconds:
            return Event.NO_ANSWER
        self._has_expired = True
        self._journal.note(doubt_expired=True)
        if self._case.doubt.event is not None:
            self._resolution.give(self._case.doubt.event, "the policy")
        return Event.NO_ANSWER if is_held else Event.DOUBT_EXPIRED

    async def _abort_destination(self) -> None:
        try:
            await self._remote.abort(timeout_seconds=ABORT_SECONDS)
        except PeerError as exc:
            logger.warning("abort not answered, the lease will do it migration_id=%s error=%s", self._migration_id, exc)
