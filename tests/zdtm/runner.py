"""Moves programs that check themselves: by phaul between two daemons, by plain criu between the same two nodes, or not
at all. What happened is one word; see `OUTCOMES`.

Both nodes see the same files, but those of a program with file locks: each node has its own of them, phaul moves them
with `--sync`, and beside criu they are copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phaul_criu.install import find_binary
from tests.inventory import processes
from tests.nodes import Node, Nodes
from tests.started import CommandFailed
from tests.zdtm.catalogue import Program

PASS: Final = "pass"
OUTCOMES: Final = {
    PASS: "it moved, and found nothing wrong",
    "wrong": "it moved, and found something wrong, or said nothing",
    "refused": "refused before anything froze; it ran on, and found nothing wrong",
    "dump-failed": "the dump failed; it ran on, and found nothing wrong",
    "restore-failed": "the dump was good, the restore failed",
    "rolled-back": "it did not move; it ran on, and found nothing wrong",
    "lost": "it did not move, and then it found something wrong or was gone",
    "unfit": "it finds something wrong, or cannot be started, without any move",
}
START_SECONDS: Final = 20.0
END_SECONDS: Final = 20.0
MOVE_SECONDS: Final = 60.0
FREEZE: Final = ("--freeze-budget", "10s")
#: What phaul is told, by the word of `--mode`.
MODES: Final = {
    "auto": (),
    "eager": ("--mode", "stop-copy", "--restore", "eager"),
    "lazy": ("--mode", "stop-copy", "--restore", "lazy"),
    "post-copy": ("--mode", "post-copy"),
}
#: Ids of the programs: free at the other node, whatever was started there before. A range for each node: the id of a
#: thread of phauld may be the same as a program's nowhere.
_FIRST_PID: Final = 10_000
_PIDS_OF_A_NODE: Final = 10_000
_PIDS_EACH: Final = 60


#: Where each node has files of its own.
OWN: Final = Path("/run/zdtm")
Move = Callable[[Program, int, Path], Awaitable[tuple["Result", Node]]]


@dataclass(frozen=True, slots=True)
class Result:
    """What happened to one program in one way."""

    outcome: str
    detail: str = ""


class Runner:
    """Two nodes with daemons, which see the same files."""

    def __init__(self, nodes: Nodes, directory: Path, mode: str = "auto") -> None:
        self._a, self._b = nodes.a, nodes.b
        self._mode = MODES[mode]
        self._directory = directory
        self._count = 0

    def _seen(self, node: Node, place: Path) -> Path:
        """Where this process finds what the node has there."""
        return node.root / place.relative_to("/") if place.is_relative_to(OWN) else place

    async def run(self, program: Program) -> dict[str, Any]:
        """All three ways, as a row of the table."""
        row: dict[str, Any] = {"name": program.name, "must_fail": program.must_fail}
        if program.why_not:
            return {**row, "skipped": program.why_not}
        started = time.monotonic()
        for way, move in (("alone", None), ("criu", self._by_criu), ("phaul", self._by_phaul)):
            result = await self._one(program, move)
            row[way] = result.outcome
            if result.detail:
                row[f"{way}_detail"] = result.detail
            if way == "alone" and result.outcome != PASS:
                break
        row["unknown_options"] = list(program.unknown_options)
        row["seconds"] = round(time.monotonic() - started, 1)
        return row

    async def _one(self, program: Program, move: Move | None) -> Result:
        self._count += 1
        place = (OWN if program.own_files else self._directory) / f"{program.name}-{self._count}"
        self._seen(self._a, place).mkdir(parents=True)
        self._seen(self._a, place).chmod(0o777)  # some become another user, and write their report then
        try:
            try:
                pid = await self._start(program, place)
            except (CommandFailed, TimeoutError, OSError, ValueError) as exc:
                return Result("unfit", _short(exc))
            if move is None:
                good, detail = await self._end(self._a, pid, program, place)
                return Result(PASS if good else "unfit", detail)
            result, node = await move(program, pid, place)
            if result.outcome == "restore-failed":
                return result  # nobody is left, and who has its id now is another
            good, detail = await self._end(node, pid, program, place)
            if result.outcome == PASS:
                return Result(PASS if good else "wrong", detail)
            if not good:
                return Result("lost", f"{result.detail}; {detail}")
            return result
        finally:
            for node in (self._a, self._b):
                await self._end_all(node, place)
                shutil.rmtree(self._seen(node, place), ignore_errors=True)

    async def _start(self, program: Program, place: Path) -> int:
        """Its PID in the node."""
        first = _FIRST_PID + self._count * _PIDS_EACH % (_PIDS_OF_A_NODE - _PIDS_EACH)
        for node in (self._a, self._b):
            await node.run(
                ["sh", "-c", f"echo {first + (node is self._b) * _PIDS_OF_A_NODE} >/proc/sys/kernel/ns_last_pid"]
            )
        shutil.copy2(program.path, self._seen(self._a, place))
        binary = place / program.name
        words: list[str | Path] = [binary, f"--pidfile={binary}.pid", f"--outfile={binary}.out", *program.arguments]
        line = 'cd "$0" && exec "$@" >start.log 2>&1'
        await self._a.run(["sh", "-c", line, place, *words], timeout_seconds=START_SECONDS)
        return int((self._seen(self._a, place) / f"{program.name}.pid").read_text())

    async def _end(self, node: Node, pid: int, program: Program, place: Path) -> tuple[bool, str]:
        """Tell it to check: whether it has found everything right, and else what it said."""
        with contextlib.suppress(CommandFailed):
            await node.run(["kill", "-TERM", str(pid)])
        report = self._seen(node, place) / f"{program.name}.out"
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            if report.exists() and not (await _is_there(node, pid)):
                break
            if not await _is_there(node, pid) and not report.exists():
                await asyncio.sleep(0.3)
                break
            await asyncio.sleep(0.05)
        said = report.read_text(errors="replace") if report.exists() else ""
        if "PASS" in said.split():
            return True, ""
        inside = report.with_name(f"{report.name}.inprogress")
        said = said or (inside.read_text(errors="replace") if inside.exists() else "")
        return False, _short(said.strip().splitlines()[-1] if said.strip() else "it said nothing")

    async def _by_criu(self, program: Program, pid: int, place: Path) -> tuple[Result, Node]:
        images = self._directory / f"images-{self._count}"
        images.mkdir()
        criu = [str(find_binary())]
        common = ["-D", str(images), "-v4", "--network-lock", "nftables"]
        dump = [*criu, "dump", "-t", str(pid), *common, "-o", "dump.log", *program.criu_options, *program.dump_options]
        done = await self._a.run(dump, check=False, timeout_seconds=MOVE_SECONDS)
        if done.returncode != 0:
            return Result("dump-failed", _first_error(images / "dump.log")), self._a
        if program.own_files:
            self._seen(self._b, OWN).mkdir(exist_ok=True)
            copying = await asyncio.create_subprocess_exec(
                "cp", "-a", self._seen(self._a, place), self._seen(self._b, place)
            )
            assert await copying.wait() == 0
        restore = [
            *criu,
            "restore",
            "-d",
            *common,
            "-o",
            "restore.log",
            *program.criu_options,
            *program.restore_options,
        ]
        with contextlib.suppress(TimeoutError):
            done = await self._b.run(restore, check=False, timeout_seconds=MOVE_SECONDS)
        if done.returncode != 0:
            return Result("restore-failed", _first_error(images / "restore.log")), self._b
        return Result(PASS), self._b

    async def _by_phaul(self, program: Program, pid: int, place: Path) -> tuple[Result, Node]:
        words = ["migrate", str(pid), "--to", self._b.address, "--json", "-q"]
        words += [*FREEZE, *self._mode, *program.phaul_options]
        words += ["--sync", str(place)] if program.own_files else []
        done = await self._a.phaul(*words, timeout_seconds=MOVE_SECONDS)
        events = done.events()
        report: dict[str, Any] = {"outcome": "failed", "error": {"message": done.stderr}}
        report |= events[-1] if events else {}
        if report["outcome"] == "moved":
            return Result(PASS), self._b
        problems = [each["code"] for each in report.get("problems", ()) if each["severity"] == "error"]
        error = report.get("error") or {}
        detail = ", ".join(sorted(set(problems))) or _short(error.get("message", ""))
        return Result("refused" if report["outcome"] == "refused" else "rolled-back", detail), self._a

    async def _end_all(self, node: Node, place: Path) -> None:
        """Whatever is left of it there."""
        for _ in range(20):
            left = [pid for pid, line in processes(node) if str(place) in line]
            if not left:
                return
            for pid in left:
                with contextlib.suppress(CommandFailed):
                    await node.run(["kill", f"-{signal.SIGKILL:d}", str(pid)])
            await asyncio.sleep(0.05)


async def _is_there(node: Node, pid: int) -> bool:
    """Whether the process lives, zombies left aside."""
    try:
        line = (node.root / f"proc/{pid}/stat").read_text()
    except OSError:
        return False
    return line.rpartition(")")[2].split()[0] not in "ZX"


def better_by_criu(rows: list[dict[str, Any]]) -> list[str]:
    """What plain criu moves and phaul does not: what is phaul's to mend."""
    return [row["name"] for row in rows if row.get("criu") == PASS and row.get("phaul") != PASS]


def _first_error(log: Path) -> str:
    with contextlib.suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            if "Error (" in line and "RLIMIT_NOFILE" not in line:  # only a warning, whatever it says
                return _short(line.partition("Error (")[2].partition("): ")[2])
    return ""


def _short(what: object) -> str:
    return " ".join(str(what).split())[:200]
