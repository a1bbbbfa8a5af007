"""Another round, or the last one? Pure functions over the history of rounds.

`Policy.decide(history, limits)` says whether to pre-dump once more, to stop and move, or to switch to post-copy, and
why. A decision depends on nothing but its arguments, and every policy ends after at most its round limit.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Protocol

from phaul_client import throttle
from phaul_client.forecast import Forecast, forecast
from phaul_client.rounds import PAGE_SIZE_BYTES, History, IterStats, Limits, elapsed_seconds

__all__ = [
    "PAGE_SIZE_BYTES",
    "ClassicPolicy",
    "DowntimePolicy",
    "Finish",
    "FinishReason",
    "Forecast",
    "History",
    "IterStats",
    "Iterate",
    "Limits",
    "Policy",
    "PostCopyPolicy",
    "StopCopyPolicy",
    "SwitchToPostcopy",
    "Switchable",
    "Verdict",
    "forecast",
]


class FinishReason(enum.StrEnum):
    """Why no further round is run."""

    #: The expected pause is within the goal.
    GOAL_REACHED = "goal-reached"
    #: The last round wrote next to nothing: what remains of the pause is not memory.
    IDLE = "idle"
    #: Rounds no longer shorten the pause by more than they freeze the process themselves.
    PLATEAU = "plateau"
    #: Every round finds more dirty memory than the one before.
    DIVERGING = "diverging"
    #: Another round would end after the deadline.
    DEADLINE = "deadline"
    #: The allowed number of rounds has been run.
    ROUND_LIMIT = "round-limit"
    #: The time after which the user wants post-copy has gone.
    POSTCOPY_TIME = "postcopy-time"
    #: Somebody asked for post-copy now.
    ASKED = "asked"
    #: The mode has no rounds.
    NO_ROUNDS = "no-rounds"

    @property
    def sentence(self) -> str:
        """The reason for people, as a report shows it."""
        return _SENTENCES[self]


_SENTENCES: Final = {
    FinishReason.GOAL_REACHED: "the expected pause is within the goal",
    FinishReason.IDLE: "the last round found next to nothing to send; the rest of the pause is not memory",
    FinishReason.PLATEAU: "further rounds would cost the process more than they save it",
    FinishReason.DIVERGING: "the process dirties more memory from round to round",
    FinishReason.DEADLINE: "another round would end after the deadline",
    FinishReason.ROUND_LIMIT: "the allowed number of rounds has been run",
    FinishReason.POSTCOPY_TIME: "the time allowed for pre-copy is over",
    FinishReason.ASKED: "post-copy was asked for",
    FinishReason.NO_ROUNDS: "this mode has no rounds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterate:
    """Run another pre-dump, holding the tree back for `throttle_percent` of the time meanwhile (0: not at all)."""

    throttle_percent: int = 0
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Stop the tree, dump the rest, restore. `forecast` is what to expect; None if no round was run."""

    reason: FinishReason
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class SwitchToPostcopy:
    """Stop the tree, move its state, fetch the rest of memory while it runs."""

    reason: FinishReason
    forecast: Forecast | None = None


Verdict = Iterate | Finish | SwitchToPostcopy


class Policy(Protocol):
    """Decides after every round, and before the first with an empty history."""

    def decide(self, history: History, limits: Limits) -> Verdict: ...


class StopCopyPolicy:
    """No rounds: freeze, dump, copy, restore."""

    def decide(self, history: History, limits: Limits) -> Verdict:
        return Finish(FinishReason.NO_ROUNDS)


class Switchable:
    """Another policy, until somebody asks for post-copy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.is_asked = False

    def decide(self, history: History, limits: Limits) -> Verdict:
        return SwitchToPostcopy(FinishReason.ASKED) if self.is_asked else self.policy.decide(history, limits)


class PostCopyPolicy:
    """No rounds: move the state, then the memory behind the running tree."""

    def decide(self, history: History, limits: Limits) -> Verdict:
        return SwitchToPostcopy(FinishReason.NO_ROUNDS)


@dataclass(frozen=True, slots=True)
class ClassicPolicy:
    """go-criu's phaul: 8 rounds, 64 pages, growth of 32 pages.

    go-criu compares the first round with a statistic of zeros, so that it always "grows" and the loop ends after one
    round. Here the first round has no round before it, and cannot grow.
    """

    max_rounds: int = 8
    min_pages: int = 64
    max_growth_pages: int = 32

    def decide(self, history: History, limits: Limits) -> Verdict:
        if not history:
            return Iterate()
        reason = self._finish_reason(history)
        expected = forecast(history, limits)
        return Iterate(forecast=expected) if reason is None else Finish(reason, expected)

    def _finish_reason(self, history: History) -> FinishReason | None:
        if len(history) >= self.max_rounds:
            return FinishReason.ROUND_LIMIT
        written_pages = history[-1].pages_written
        if written_pages < self.min_pages:
            return FinishReason.IDLE
        if len(history) > 1 and written_pages - history[-2].pages_written >= self.max_growth_pages:
            return FinishReason.DIVERGING
        return None


_GIVING_UP: Final = frozenset(FinishReason) - {FinishReason.GOAL_REACHED, FinishReason.IDLE}
"""Reasons that leave a pause above the goal: post-copy, where allowed, does better."""
_NOT_CONVERGING: Final = frozenset({FinishReason.PLATEAU, FinishReason.DIVERGING})
"""Reasons against which holding the writer back helps."""


class DowntimePolicy:
    """QEMU's rule with criu's costs: stop as soon as the expected pause is within the goal.

    If it cannot be brought there: at the deadline, at the round limit, when dirtying grows, or on a plateau.
    """

    def decide(self, history: History, limits: Limits) -> Verdict:
        if not history:
            return Iterate() if limits.max_rounds > 0 else Finish(FinishReason.ROUND_LIMIT)
        expected = forecast(history, limits)
        reason = _finish_reason(history, limits, expected)
        stuck = reason in _NOT_CONVERGING
        percent = throttle.wanted_percent(history, stuck=stuck) if limits.allow_throttle else 0
        if stuck and limits.allow_throttle and not throttle.is_exhausted(history):
            reason = None
        if reason is None:
            return Iterate(throttle_percent=percent, forecast=expected)
        if limits.allow_postcopy and reason in _GIVING_UP:
            return SwitchToPostcopy(reason, expected)
        return Finish(reason, expected)


def _finish_reason(history: History, limits: Limits, expected: Forecast) -> FinishReason | None:
    """The first reason that holds, the good ones before the bad; None for another round."""
    if expected.expected_pause_seconds <= limits.downtime_goal_seconds:
        return FinishReason.GOAL_REACHED
    if history[-1].pages_written < limits.min_pages:
        return FinishReason.IDLE
    if _is_overdue(history, limits, expected):
        return FinishReason.DEADLINE
    if _wants_postcopy(history, limits):
        return FinishReason.POSTCOPY_TIME
    if len(history) >= limits.max_rounds:
        return FinishReason.ROUND_LIMIT
    if _is_diverging(history, limits):
        return FinishReason.DIVERGING
    if _is_plateau(history, limits, expected):
        return FinishReason.PLATEAU
    return None


def _is_overdue(history: History, limits: Limits, expected: Forecast) -> bool:
    """Whether the deadline would pass before another round and the pause after it were over."""
    if limits.deadline_seconds is None:
        return False
    later_pause_seconds = expected.expected_pause_seconds - expected.next_gain_seconds
    return elapsed_seconds(history) + expected.next_round_seconds + later_pause_seconds > limits.deadline_seconds


def _wants_postcopy(history: History, limits: Limits) -> bool:
    after_seconds = limits.postcopy_after_seconds
    return limits.allow_postcopy and after_seconds is not None and elapsed_seconds(history) >= after_seconds


def _is_diverging(history: History, limits: Limits) -> bool:
    """Whether the last two rounds each found clearly more than the one before; one may be a burst."""
    if len(history) < 3:
        return False
    older, before, latest = (stats.pages_written for stats in history[-3:])
    return before > older * limits.max_growth_ratio and latest > before * limits.max_growth_ratio


def _is_plateau(history: History, limits: Limits, expected: Forecast) -> bool:
    """Whether rounds have stopped paying.

    A round pays if it leaves an expected pause that is shorter than the best so far by more than the round itself
    froze the tree: both are seconds in which the process stands still. Counted are the latest rounds in a row that did
    not pay, and the next one if it is not expected to. The first round to see a new throttle starts the count anew.
    """
    unpaid_rounds = int(expected.next_gain_seconds <= history[-1].frozen_seconds)
    pauses = [forecast(history[:count], limits).expected_pause_seconds for count in range(1, len(history) + 1)]
    for index in range(len(history) - 1, 0, -1):
        stats = history[index]
        pays = pauses[index] < min(pauses[:index]) - stats.frozen_seconds
        if pays or not throttle.is_settled(history[:index]):
            break
        unpaid_rounds += 1
    return unpaid_rounds >= limits.plateau_rounds
