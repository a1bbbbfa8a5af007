"""The files in the record of a workload, as they are; see `workload_records.py` and `shim.py` for who writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaul_client.tree import is_alive


@dataclass(slots=True, kw_only=True)
class RecordFiles:
    """What is written in a record, beside record.json."""

    shim: dict[str, Any] | None
    tree: dict[str, Any] | None
    ending: dict[str, Any] | None
    moved: dict[str, Any] | None
    leaving: dict[str, Any] | None
    arriving: dict[str, Any] | None
    stopped: dict[str, Any] | None
    failure: dict[str, Any] | None

    @classmethod
    def read(cls, directory: Path) -> RecordFiles:
        tree = read_json(directory / "tree.json")  # before the ending: who is seen to have begun has not ended before
        return cls(
            tree=tree,
            ending=read_json(directory / "exit.json"),
            moved=read_json(directory / "moved.json"),
            leaving=read_json(directory / "leaving.json"),
            arriving=read_json(directory / "arriving.json"),
            stopped=read_json(directory / "stopped.json"),
            failure=read_json(directory / "failure.json"),
            shim=read_json(directory / "shim.json"),
        )


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def lives(known: Mapping[str, Any]) -> bool:
    """Whether it runs; a zombie, whose parent may never reap it, does not."""
    if not known or not is_alive(known):
        return False
    try:
        return Path(f"/proc/{known['pid']}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None
