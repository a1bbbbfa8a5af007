"""Which processes a tree consists of. With the standard library alone, and little of that: phauld's small processes
start with it.
"""

import os

TYPE_CHECKING = False  # that of `typing` costs its import

if TYPE_CHECKING:
    from collections.abc import Iterator


def descendants(*roots: int) -> "Iterator[int]":
    """The PIDs of trees as they stand now, each after its parent; a root is the first of its tree."""
    pending = list(roots)
    while pending:
        pid = pending.pop()
        yield pid
        for task in _tasks(pid):
            pending += _children(pid, task)


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _children(pid: int, task: str) -> list[int]:
    """Perhaps in the freeze, of hundreds of tasks: text and no `Path`, and no buffer."""
    try:
        with open(f"/proc/{pid}/task/{task}/children", "rb", buffering=0) as file:
            return [int(child) for child in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
