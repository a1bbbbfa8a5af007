"""What ends a doubt: the destination's answer, or, for one that cannot answer, an operator's word or the policy's.

The invariant: whoever speaks for the destination is overruled by any answer of its own, for only it knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from phaul_client.commit import Event

#: How long the destination may still answer for itself once somebody else has spoken for it.
LAST_WORD_SECONDS: Final = 2.0
ANSWERS: Final = frozenset(
    {
        Event.DESTINATION_RUNNING,
        Event.DESTINATION_ABORTED,
        Event.DESTINATION_PREPARED,
        Event.DESTINATION_COMMITTING,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """What to do when the destination does not answer."""

    seconds: float = 60.0  #: how long to ask before the doubt is an operator's
    event: Event | None = None  #: what the policy says then; `None` holds
    has_expired: bool = False  #: before phauld was started anew, which then may not have acted on it


class Speaker(Enum):
    """Who answered a question to the destination."""

    DESTINATION = auto()  #: itself, or nobody
    SOMEBODY_ELSE = auto()  #: for it
    DESTINATION_AFTER_ALL = auto()  #: itself, though somebody has spoken for it


class Resolution:
    """The place where somebody may speak for the destination: open from the first question to it on."""

    def __init__(self) -> None:
        self._word: asyncio.Future[Event] | None = None
        self._given_at = 0.0
        self.speaker = ""  #: who said it
        self._overruled: asyncio.Future[Event] | None = None

    def open(self) -> asyncio.Future[Event]:
        """From now on it may be given. What will have been said."""
        if self._word is None:
            loop = asyncio.get_running_loop()
            self._word, self._overruled = loop.create_future(), loop.create_future()
        return self._word

    def give(self, event: Event, speaker: str) -> asyncio.Future[Event] | None:
        """Say it: `None` if nobody listens, else the answer of the destination that overrules it, if one comes."""
        if self._word is None or self._word.done():
            return None
        self._given_at = time.monotonic()
        self.speaker = speaker
        self._word.set_result(event)
        return self._overruled

    async def wait(self, timeout_seconds: float) -> None:
        """Until it is given, but no longer than that."""
        await asyncio.wait({self.open()}, timeout=timeout_seconds)

    async def against(self, question: Coroutine[None, None, Event]) -> tuple[Event, Speaker]:
        """What the destination answers to the question, or what was said for it.

        Once something was said, the question is waited for no longer than `LAST_WORD_SECONDS`.
        """
        asked = asyncio.create_task(question)
        word = self.open()
        try:
            await asyncio.wait({asked, word}, return_when=asyncio.FIRST_COMPLETED)
            if not word.done():
                return await asked, Speaker.DESTINATION
            left_seconds = self._given_at + LAST_WORD_SECONDS - time.monotonic()
            await asyncio.wait({asked}, timeout=max(0.0, left_seconds))
            answer = asked.result() if asked.done() else Event.NO_ANSWER
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        if answer is Event.DOUBT_EXPIRED:  # it is what the policy has just spoken about
            return answer, Speaker.DESTINATION
        if answer not in ANSWERS:
            return word.result(), Speaker.SOMEBODY_ELSE
        assert self._overruled is not None
        self._overruled.set_result(answer)
        self._word, self.speaker = None, ""
        return answer, Speaker.DESTINATION_AFTER_ALL
