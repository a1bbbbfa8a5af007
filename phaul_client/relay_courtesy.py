"""When the filling of a tree's memory gives way to the tree (pure).

A tree that has just been restored touches its first pages, one after the other, and wants a processor. criu asks for
one page for whoever waits, for many in between, and takes the answers in the order of its questions; so a question for
many is held back for a moment, in which one for a single page may come. That goes on for as long as such questions
come, and not for long: whoever fills at full speed is done sooner. Measured: docs/performance.md.
"""

from typing import Final

#: How long a question for many pages waits, unless another comes.
GAP_SECONDS: Final = 0.002
#: From the first such question on: the tree is let go within this, and has begun to run.
LEAST_SECONDS: Final = 0.15
MOST_SECONDS: Final = 0.5
#: After a question for one page: the next may come.
QUIET_SECONDS: Final = 0.05


class Courtesy:
    """Told of each question, with the time of a monotonic clock in seconds."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._touched_at = 0.0

    def gives_way(self, pages: int, now: float) -> bool:
        """Whether this question is to wait for `GAP_SECONDS`, or for the next one."""
        if pages == 1:
            self._touched_at = now
            return False
        if self._began_at is None:
            self._began_at = now
        least, quiet = self._began_at + LEAST_SECONDS, self._touched_at + QUIET_SECONDS
        return now < min(max(least, quiet), self._began_at + MOST_SECONDS)
