"""Which columns of `phaul top` fit into a terminal, and how wide they are (pure).

The invariant: a number is never cut short. Names are, and what is least needed is left out.
"""

from collections.abc import Mapping
from typing import Final

GAP: Final = 2
#: What gives way first: a column, and what it needs at least.
SHRINK: Final = (("PROGRESS", 8), ("WHAT", 16), ("TO", 10), ("WHAT", 10))
#: What is left out then, one after the other.
LEFT_OUT: Final = ("ROUNDS", "MODE", "RATE", "TO", "TIME", "PROGRESS", "SENT", "ID", "PAUSE")


def fit(widths: Mapping[str, int], available: int) -> dict[str, int]:
    """The columns of these natural widths that fit, in their order, with the widths that they get."""
    fitting = dict(widths)

    def excess() -> int:
        return sum(fitting.values()) + GAP * (len(fitting) - 1) - available

    for column, least in SHRINK:
        if excess() > 0 and column in fitting:
            fitting[column] = max(min(least, fitting[column]), fitting[column] - excess())
    for column in LEFT_OUT:
        if excess() > 0:
            fitting.pop(column, None)
    if excess() > 0 and "WHAT" in fitting:
        fitting["WHAT"] = max(1, fitting["WHAT"] - excess())
    elif "WHAT" in fitting:  # a column that was left out may have left room
        fitting["WHAT"] = min(widths["WHAT"], fitting["WHAT"] - excess())
    return fitting
