"""Bounds what strangers can write into the log (pure)."""

from dataclasses import dataclass, field
from typing import Final

WINDOW_SECONDS: Final = 60.0


@dataclass(slots=True)
class Seldom:
    """Lets `lines` of a kind through in a minute, and says how many it kept back with the first of the next."""

    lines: int
    _since: float = field(default=-WINDOW_SECONDS, init=False)
    _said: int = field(default=0, init=False)
    _kept_back: int = field(default=0, init=False)

    def may_say(self, now: float) -> bool:
        """Whether this one may be said; `now` is on the monotonic clock."""
        if now - self._since >= WINDOW_SECONDS:
            self._since, self._said = now, 0
        self._said += 1
        if self._said > self.lines:
            self._kept_back += 1
        return self._said <= self.lines

    def take_kept_back(self) -> int:
        """How many were not said since this was asked last."""
        number, self._kept_back = self._kept_back, 0
        return number
