"""Is a workload that has ended started again, and when? Pure: a table, and a back-off.

Rule 1: this file decides; `restarts.py` waits, writes down and starts. The invariant: a tree is started again only
where it is known to run nowhere: all of it has ended here, how is known (or that it must have, as after a reboot), and
no migration has taken it away or may have. Whatever is not known is waited for, or is the end.

The constants are docker's (moby, package restartmanager: defaultTimeout 100 ms, doubled up to 1 min, from
the beginning again after 10 s of running), and so is the meaning of `on-failure:N`: N restarts in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

FIRST_DELAY_SECONDS: Final = 0.1
LONGEST_DELAY_SECONDS: Final = 60.0
LONG_RUN_SECONDS: Final = 10.0  #: who ran for so long is no longer taken for one that fails at its start


class When(StrEnum):
    """When a workload is started again."""

    #: Never.
    NO = "no"
    #: When it has failed: an exit code other than 0, or a signal.
    ON_FAILURE = "on-failure"
    #: Whenever it has ended, also by a reboot, unless it was stopped.
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """What a workload was told of restarts."""

    when: When = When.NO
    most: int = 0  #: restarts in all, for `on-failure`; 0: no limit


NEVER: Final = Restart()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """What has become of it so far, on whichever node."""

    restarts: int = 0  #: in all
    in_a_row: int = 0  #: of those, since it last ran for long


NO_ATTEMPTS: Final = Attempts()


class Standing(StrEnum):
    """Whose the tree of a record is."""

    #: This node's.
    HERE = "HERE"
    #: A migration away from here is open or in doubt, or how it ended has not been noted yet.
    LEAVING = "LEAVING"
    #: A migration to here is not over: whether it ran here, or who has its pages, is not settled.
    ARRIVING = "ARRIVING"
    #: Another node's.
    MOVED = "MOVED"
    #: Somebody stopped it with `phaul stop`.
    STOPPED = "STOPPED"


class Ending(StrEnum):
    """How the tree of a record ended."""

    #: It has not, or not all of it.
    NOT_YET = "NOT_YET"
    #: Exit code 0.
    SUCCESS = "SUCCESS"
    #: Another exit code, or a signal.
    FAILURE = "FAILURE"
    #: All of it has ended for certain, but nobody saw how: the node was booted since, or its PID namespace is gone.
    UNSEEN = "UNSEEN"
    #: Nobody saw how, nor whether all of it has ended.
    UNSURE = "UNSURE"
    #: A restored tree that was never let go: phaul ended it.
    NEVER_RAN = "NEVER_RAN"


class Act(StrEnum):
    """What follows."""

    #: Start it again, after a while.
    RESTART = "RESTART"
    #: It stays as it ended.
    LEAVE = "LEAVE"
    #: It is not known yet: look again later.
    WAIT = "WAIT"


#: For what is this node's and has ended.
ENDED: Final[Mapping[tuple[When, Ending], Act]] = MappingProxyType(
    {
        **{(When.NO, ending): Act.LEAVE for ending in Ending},
        (When.ON_FAILURE, Ending.SUCCESS): Act.LEAVE,
        (When.ON_FAILURE, Ending.FAILURE): Act.RESTART,
        (When.ON_FAILURE, Ending.UNSEEN): Act.LEAVE,  # it may have ended well
        (When.ON_FAILURE, Ending.UNSURE): Act.LEAVE,
        (When.ON_FAILURE, Ending.NEVER_RAN): Act.LEAVE,
        (When.ALWAYS, Ending.SUCCESS): Act.RESTART,
        (When.ALWAYS, Ending.FAILURE): Act.RESTART,
        (When.ALWAYS, Ending.UNSEEN): Act.RESTART,
        (When.ALWAYS, Ending.UNSURE): Act.LEAVE,  # part of it may run on: better none than two
        (When.ALWAYS, Ending.NEVER_RAN): Act.LEAVE,
        **{(when, Ending.NOT_YET): Act.WAIT for when in When},
    }
)

#: Whose it is comes first.
STANDINGS: Final[Mapping[Standing, Act | None]] = MappingProxyType(
    {
        Standing.HERE: None,  # as ENDED says
        Standing.LEAVING: Act.WAIT,
        Standing.ARRIVING: Act.WAIT,
        Standing.MOVED: Act.LEAVE,
        Standing.STOPPED: Act.LEAVE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows, and for a restart how it is counted and how long after the end it comes."""

    act: Act
    delay_seconds: float = 0.0
    attempts: Attempts = NO_ATTEMPTS


UNDECIDED: Final = Verdict(act=Act.WAIT)


def decide(restart: Restart, attempts: Attempts, standing: Standing, ending: Ending, ran_seconds: float) -> Verdict:
    """What becomes of a workload that ran for so long."""
    act = STANDINGS[standing] or ENDED[restart.when, ending]
    if act is not Act.RESTART:
        return Verdict(act=act)
    if restart.when is When.ON_FAILURE and restart.most and attempts.restarts >= restart.most:
        return Verdict(act=Act.LEAVE)
    known = after_running(attempts, ran_seconds)
    again = Attempts(restarts=known.restarts + 1, in_a_row=known.in_a_row + 1)
    return Verdict(act=act, delay_seconds=delay_seconds(known), attempts=again)


def after_running(attempts: Attempts, ran_seconds: float) -> Attempts:
    """How it is counted on from here; also what a node tells the next one when the tree moves."""
    if ran_seconds >= LONG_RUN_SECONDS:
        return Attempts(restarts=attempts.restarts)
    return attempts


def delay_seconds(attempts: Attempts) -> float:
    """How long after its end it is started again."""
    doublings = min(attempts.in_a_row, 32)  # far beyond the longest delay, and no float overflows
    return min(FIRST_DELAY_SECONDS * 2.0**doublings, LONGEST_DELAY_SECONDS)
