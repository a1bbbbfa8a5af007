"""A scope of systemd for each process that outlives phauld, so that nothing done to phauld's unit touches its trees.

`systemd-run --scope` asks for the scope, enters it, and becomes the command: the same PID, the same descriptors.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

#: Exists while systemd is PID 1: sd_booted(3).
BOOTED: Final = Path("/run/systemd/system")
SLICE: Final = "phaul.slice"
_PROPERTIES: Final = (
    "Before=phauld.service",  # at shutdown phauld stops first, and sees through what is committed
    "TasksMax=infinity",
)


def is_booted() -> bool:
    """Whether there are scopes."""
    return _program() is not None


def _program() -> str | None:
    return shutil.which("systemd-run") if BOOTED.is_dir() and os.geteuid() == 0 else None


def in_scope(kind: str, name: str, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What to put before a command so that it gets the scope `phaul-KIND-NAME.scope`; nothing without systemd."""
    program = _program()
    if program is None:
        return ()
    unit = f"phaul-{kind}-{name.replace('@', '-')}.scope"
    properties = (word for each in _properties(more) for word in ("--property", each))
    return (program, "--scope", "--quiet", "--collect", "--unit", unit, "--slice", SLICE, *properties, "--")


def _properties(more: tuple[str, ...]) -> tuple[str, ...]:
    """Those of all scopes, unless there is a word of the same name."""
    names = {each.partition("=")[0] for each in more}
    return (*(each for each in _PROPERTIES if each.partition("=")[0] not in names), *more)
