"""Which of several destinations takes the next workload (pure)."""

from collections.abc import Collection, Sequence


class Spread:
    """Counts what goes where; the one with the least, moved and under way, is next."""

    def __init__(self, destinations: Sequence[str]) -> None:
        self.moved: dict[str, int] = dict.fromkeys(destinations, 0)  #: how many each has got
        self._under_way = dict.fromkeys(self.moved, 0)
        self._refused = dict.fromkeys(self.moved, 0)

    def take(self, tried: Collection[str]) -> str | None:
        """The next destination for what these have refused; `None` if all have. Its end is to be told by `ended`."""
        left = [each for each in self.moved if each not in tried]
        if not left:
            return None
        chosen = min(left, key=lambda each: (self.moved[each] + self._under_way[each], self._refused[each]))
        self._under_way[chosen] += 1
        return chosen

    def ended(self, destination: str, *, moved: bool) -> None:
        """A migration to it has ended."""
        self._under_way[destination] -= 1
        counts = self.moved if moved else self._refused
        counts[destination] += 1
