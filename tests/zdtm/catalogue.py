"""What there is in a directory of built zdtm tests: programs that check themselves once they are told to end.

Each is started with `--pidfile=NAME.pid --outfile=NAME.out`, daemonises, and on SIGTERM says PASS or FAIL in the
latter. `NAME.desc` says how criu is to be told to move it, as a Python dictionary; the Makefile beside it, further
arguments.
"""

from __future__ import annotations

import ast
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: What a description may ask for that phaul has an option for; the others it sets by itself, or has not.
OPTIONS: Final = {
    "--tcp-established": ("--tcp", "keep"),
    "--tcp-close": ("--tcp", "close"),
    "--ext-unix-sk": ("--ext-unix-sk",),
    "--shell-job": ("--shell-job",),
    "-j": ("--shell-job",),
}
#: phaul finds these to be needed, by itself.
BY_ITSELF: Final = frozenset({"--file-locks", "--link-remap", "--skip-in-flight", "--evasive-devices"})
_MAKE_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One test."""

    path: Path
    arguments: tuple[str, ...] = ()
    criu_options: tuple[str, ...] = ()  #: of dump and restore
    dump_options: tuple[str, ...] = ()
    restore_options: tuple[str, ...] = ()
    must_fail: bool = False  #: criu is meant to refuse it
    why_not: str = ""  #: it cannot be run here

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def phaul_options(self) -> tuple[str, ...]:
        return tuple(word for each in self.criu_options for word in OPTIONS.get(each, ()))

    @property
    def own_files(self) -> bool:
        """Its files must not be the same at both nodes: a lock that is held here would be waited for there, and a fifo
        be full already."""
        if self.name.startswith("file_lease"):  # what --sync reads would lose its lease
            return False
        return "--file-locks" in self.criu_options or self.name.startswith("fifo")

    @property
    def unknown_options(self) -> tuple[str, ...]:
        """What phaul cannot be told."""
        words = (*self.criu_options, *self.dump_options, *self.restore_options)
        return tuple(word for word in words if word.startswith("-") and word not in {*OPTIONS, *BY_ITSELF})


def find_programs(directory: Path) -> list[Program]:
    """All of them, by name."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.is_file() and os.access(path, os.X_OK) and not path.suffix:
            found.append(read_program(path))
    return found


def read_program(path: Path) -> Program:
    """What its description and its Makefile say."""
    description: dict[str, str] = {}
    why_not = ""
    if path.with_name(f"{path.name}.desc").exists():
        try:
            description = ast.literal_eval(path.with_name(f"{path.name}.desc").read_text())
        except (SyntaxError, ValueError):
            why_not = "its description is a program"
    flags, flavors = description.get("flags", "").split(), description.get("flavor", "h").split()
    if why_not:
        pass
    elif "h" not in flavors:
        why_not = f"wants namespaces of its own ({' '.join(flavors)})"
    elif excluded := {"noauto", "pre-dump-notify", "reqrst"} & set(flags):
        why_not = f"not by itself: {' '.join(sorted(excluded))}"
    elif path.with_name(f"{path.name}.hook").exists() or path.with_name(f"{path.name}.checkskip").exists():
        why_not = "has a hook of zdtm's own"
    return Program(
        path=path,
        arguments=_arguments(path),
        criu_options=tuple(description.get("opts", "").split()),
        dump_options=tuple(description.get("dopts", "").split()),
        restore_options=tuple(description.get("ropts", "").split()),
        must_fail="crfail" in flags,
        why_not=why_not,
    )


def _arguments(path: Path) -> tuple[str, ...]:
    """Beside the two that all have."""
    if not path.with_name("Makefile").exists():
        return ()
    said = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", f"{path.name}.pid"],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=_MAKE_SECONDS,
        check=False,
    )
    for line in said.stdout.splitlines():
        words = line.split()
        if words and words[0] == f"./{path.name}" and any(word.startswith("--pidfile=") for word in words):
            return tuple(word for word in words[1:] if not word.startswith(("--pidfile=", "--outfile=")))
    return ()
