"""When the filling of a tree's memory gives way to the tree (pure).

A tree that has just been restored touches its first pages, one after the other, and wants a processor. criu asks for
one page for whoever waits, for many in between, and takes the answers in the order of its questions; so a question for
many is held back for a moment, in which one for a single page may come. If one comes, the question before it is made
one for a single page, too, so that the two take no longer than one: criu asks for the rest again. That goes on for as
long as such questions come, and not for long: whoever fills at full speed is done sooner. What is filled in a moment is
not held back at all: that would keep a tree waiting for pages all over its memory. Measured: docs/performance.md.
"""

from typing import Final

#: How long a question for many pages waits, unless another comes.
GAP_SECONDS: Final = 0.002
#: From the first such question on: the tree is let go within this, and has begun to run.
LEAST_SECONDS: Final = 0.15
MOST_SECONDS: Final = 0.5
#: After a question for one page: the next may come.
QUIET_SECONDS: Final = 0.05
#: What can be filled within this is filled at once.
MOMENT_SECONDS: Final = 0.15
#: How fast pages come, until there is something to tell it by.
FIRST_PAGES_PER_SECOND: Final = 250_000
FIRST_SECONDS: Final = 0.05


class Courtesy:
    """Told of each question, with the time of a monotonic clock in seconds. `pages`: how many are to come in all."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._began_at: float | None = None
        self._touched_at = 0.0

    def gives_way(self, pages: int, arrived: int, now: float) -> bool:
        """Whether this question is to wait for `GAP_SECONDS`, or for the next one; `arrived` pages have come."""
        if pages == 1:
            self._touched_at = now
            return False
        if self._began_at is None:
            self._began_at = now
        if self._left_seconds(arrived, now - self._began_at) <= MOMENT_SECONDS:
            return False
        least, quiet = self._began_at + LEAST_SECONDS, self._touched_at + QUIET_SECONDS
        return now < min(max(least, quiet), self._began_at + MOST_SECONDS)

    def _left_seconds(self, arrived: int, elapsed_seconds: float) -> float:
        speed = arrived / elapsed_seconds if elapsed_seconds > FIRST_SECONDS else FIRST_PAGES_PER_SECOND
        return (self._pages - arrived) / max(speed, 1.0)
