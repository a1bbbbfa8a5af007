"""When the filling of a tree's memory gives way to the tree (pure).

A tree that has just been restored touches its first pages, one after the other, and wants a processor. criu asks for
one page for whoever waits, for many in between, and takes the answers in the order of its questions; so a question for
many is held back for a moment, in which one for a single page may come. That goes on for as long as such questions
come, and not for long: whoever fills at full speed is done sooner. A memory that is filled in a moment is not held back
at all: a tree that touches pages all over it would wait for longer. Measured: docs/performance.md.
"""

from typing import Final

#: How long a question for many pages waits, unless another comes.
GAP_SECONDS: Final = 0.002
#: From the first such question on: the tree is let go within this, and has begun to run.
LEAST_SECONDS: Final = 0.15
MOST_SECONDS: Final = 0.5
#: After a question for one page: the next may come.
QUIET_SECONDS: Final = 0.05
#: What is filled within this is filled at once.
MOMENT_SECONDS: Final = 0.15
#: How fast pages come over a quick link; it is one until, after `FIRST_SECONDS`, there is something to tell it by.
PAGES_PER_SECOND: Final = 250_000
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
        if self._takes_a_moment(arrived, now - self._began_at):
            return False
        least, quiet = self._began_at + LEAST_SECONDS, self._touched_at + QUIET_SECONDS
        return now < min(max(least, quiet), self._began_at + MOST_SECONDS)

    def _takes_a_moment(self, arrived: int, elapsed_seconds: float) -> bool:
        if self._pages > MOMENT_SECONDS * PAGES_PER_SECOND:
            return False
        speed = arrived / elapsed_seconds if elapsed_seconds > FIRST_SECONDS else PAGES_PER_SECOND
        return self._pages - arrived <= MOMENT_SECONDS * speed
