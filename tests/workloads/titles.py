"""The tables of docs/workloads.md: which there are, and their rows and columns (scripts/workloads-table).

Nothing but the standard library: it is read before anything is installed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

PAGE: Final = Path(os.environ.get("PHAUL_WORKLOADS_PAGE") or Path(__file__).resolve().parents[2] / "docs/workloads.md")
#: Key of the report: the markers around the table.
TABLES: Final = {
    name: (f"<!-- {name}: scripts/workloads-table -->\n", f"<!-- end of {name} -->\n")
    for name in ("workloads", "lab_workloads")
}
#: Key of the report: mode of a row, and the head of its column.
MODES: Final = {
    "workloads": {"eager": "stop-copy, eager", "lazy": "stop-copy, lazy", "post-copy": "post-copy"},
    "lab_workloads": {
        "stop-copy": "stop-copy",
        "pre-copy": "pre-copy",
        "post-copy": "post-copy",
        "hybrid": "hybrid",
    },
}
#: Name: what it is called, and what its client does.
TITLES: Final = {
    "redis": ("redis", "SET, and every key read back"),
    "nginx": ("nginx, a master and three workers", "GET, the body compared"),
    "memcached": ("memcached, four threads", "set, and every key read back"),
    "postgres": (
        "PostgreSQL, a transaction open across the move",
        "INSERT and UPDATE in one transaction, each row and the sum read back, pg_amcheck",
    ),
    "asyncio": ("Python asyncio server", "a running sum, each answer checked"),
    "node": ("Node.js server", "the same"),
    "jvm": ("JVM (serial collector, 128 MiB)", "the same"),
    "go": ("Go server", "the same"),
    "threads": ("C program with 500 threads", "itself: every thread's count"),
    "tree": (
        "tree of 50 processes: pipes, unix sockets, eventfd, epoll, timerfd, inotify, shared memory, file locks",
        "itself: every object in turn",
    ),
}


def has_cell(text: str, table: str, name: str, mode: str) -> bool:
    """Whether a page has a value for a workload in a mode."""
    begin, end = TABLES[table]
    rows = [line.split(" | ") for line in text.partition(begin)[2].partition(end)[0].splitlines()]
    column = 2 + list(MODES[table]).index(mode)
    return any(row[0] == f"| {TITLES[name][0]}" and row[column].strip(" |") != "-" for row in rows)
