"""Checks of terminals (pure). criu restores a pseudo terminal only if both of its ends are in the tree, /dev/tty beside
one that the same process has open, and what is a terminal of the node itself by opening it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from phaul_client.preflight.model import FileKind, OpenFile, Process, TreeFacts
from phaul_client.preflight.problems import Problem, error, warning

_REMEDY = "start it without a terminal: `phaul run`, or setsid with its input and output in files"
#: Majors of virtual consoles and serial lines, /dev/tty and /dev/console, and the slaves of pseudo terminals.
_CONSOLE, _TTY, _SLAVES = 4, 5, range(136, 144)
_CURRENT: Final = 0x500  #: /dev/tty
_NODE_CONSOLE: Final = 0x501
_VIRTUAL: Final = range(_CONSOLE << 8 | 1, _CONSOLE << 8 | 64)  #: minors from 64 on are serial lines, unknown to criu


def is_terminal(device_number: int) -> bool:
    """Whether a character device is a terminal."""
    return _major(device_number) in (_CONSOLE, _TTY) or _major(device_number) in _SLAVES


def masters(tree: TreeFacts) -> frozenset[int]:
    """The numbers of the pseudo terminals whose masters the tree has open."""
    return frozenset(file.terminal_index for file in tree.open_files if file.terminal_index is not None)


def check_terminals(tree: TreeFacts) -> Iterator[Problem]:
    """Terminals that end outside the tree: open ones, or the controlling one."""
    open_terminals = [
        file for file in tree.open_files if file.kind is FileKind.CHARACTER_DEVICE and is_terminal(file.device_number)
    ]
    inside = masters(tree)
    named = set()
    for file in open_terminals:
        hung_up = file.deleted  # its master is closed everywhere
        if hung_up or _ends_inside(file, inside) or (file.pid, file.path) in named:
            continue
        if file.device_number == _CURRENT and _stands_for_a_pair(tree, open_terminals, inside):
            continue
        named.add((file.pid, file.path))
        where = f"is open in {tree.process(file.pid)} (fd {file.fd})"
        if _opens_again(file, tree):
            yield warning("terminal-of-node", file.path, f"{where}: it will be the destination's", "close it first")
        else:
            yield error("terminal", file.path, f"{where}, and its other end is outside the tree", _REMEDY)
    for process in tree.processes:
        is_inside = _major(process.terminal) in _SLAVES and _slave_index(process.terminal) in inside
        if process.terminal and not is_inside and process.pid not in {pid for pid, _path in named}:
            message = "has a controlling terminal outside the tree, and will have none"
            yield warning("controlling-terminal", str(process), message, _REMEDY)


def _ends_inside(file: OpenFile, inside: frozenset[int]) -> bool:
    if _major(file.device_number) in _SLAVES:
        return _slave_index(file.device_number) in inside
    return file.terminal_index is not None


def _stands_for_a_pair(tree: TreeFacts, terminals: Sequence[OpenFile], inside: frozenset[int]) -> bool:
    """Whether criu can make /dev/tty again: as the one process of the tree with terminals, a session's leader in the
    foreground of a pair that it has open. criu takes some with more processes, in an order of its own.
    """
    holders = {file.pid for file in terminals}
    process = _process(tree, next(iter(holders))) if len(holders) == 1 else None
    if process is None or _major(process.terminal) not in _SLAVES or _slave_index(process.terminal) not in inside:
        return False
    return process.pid == process.session == process.foreground


def _opens_again(file: OpenFile, tree: TreeFacts) -> bool:
    """Whether it is a terminal of the node that criu opens by its name there. If it controls a session, the leader of
    that must come along.
    """
    if file.device_number != _NODE_CONSOLE and file.device_number not in _VIRTUAL:
        return False
    process = _process(tree, file.pid)
    controls = process is not None and process.terminal == file.device_number
    return not controls or (process is not None and process.session in tree.pids)


def _process(tree: TreeFacts, pid: int) -> Process | None:
    return next((process for process in tree.processes if process.pid == pid), None)


def _major(device_number: int) -> int:
    return device_number >> 8 & 0xFFF


def _slave_index(device_number: int) -> int:
    minor = device_number & 0xFF | device_number >> 12 & 0xFFF00
    return (_major(device_number) - _SLAVES.start) * 256 + minor
