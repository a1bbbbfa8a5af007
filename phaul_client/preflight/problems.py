"""One thing that stands, or may stand, in a migration's way (pure)."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

#: Problems with the same code that are told one by one.
_SHOWN_ALIKE: Final = 10


class Severity(enum.IntEnum):
    """How much a problem matters; a greater value is worse."""

    #: Worth knowing; phaul copes by itself.
    INFO = 1
    #: The tree moves, but something will be different or slower.
    WARNING = 2
    #: The tree cannot move as asked.
    ERROR = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a check found."""

    #: Stable name of the check, as in docs/preflight.md.
    code: str
    severity: Severity
    #: The thing itself: a path, "pid 4242 (redis-server)", an address, CPU flags.
    subject: str
    #: One line for people.
    message: str
    #: What to do about it, or what phaul does by itself.
    remedy: str


def error(code: str, subject: str, message: str, remedy: str) -> Problem:
    """The tree cannot move as asked."""
    return Problem(code=code, severity=Severity.ERROR, subject=subject, message=message, remedy=remedy)


def warning(code: str, subject: str, message: str, remedy: str) -> Problem:
    """The tree moves, but something will be different or slower."""
    return Problem(code=code, severity=Severity.WARNING, subject=subject, message=message, remedy=remedy)


def info(code: str, subject: str, message: str, remedy: str) -> Problem:
    """Worth knowing; phaul copes by itself."""
    return Problem(code=code, severity=Severity.INFO, subject=subject, message=message, remedy=remedy)


def blocks(problems: Iterable[Problem]) -> bool:
    """Whether the tree cannot move."""
    return any(problem.severity is Severity.ERROR for problem in problems)


def worst_first(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Each problem once; the worst first, otherwise in the order in which they were found.

    Of many with the same code (a server's thousand connections) the first are kept, and one that counts the others.
    """
    alike: dict[tuple[Severity, str], list[Problem]] = {}
    for problem in dict.fromkeys(problems):
        alike.setdefault((problem.severity, problem.code), []).append(problem)
    shown = [each for group in alike.values() for each in _shortened(group)]
    return tuple(sorted(shown, key=lambda problem: -problem.severity))


def _shortened(group: list[Problem]) -> list[Problem]:
    if len(group) <= _SHOWN_ALIKE:
        return group
    return [*group[:_SHOWN_ALIKE], replace(group[-1], subject=f"{len(group) - _SHOWN_ALIKE} more", message="likewise")]
