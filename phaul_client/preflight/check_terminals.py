"""Checks of terminals (pure). criu restores a pseudo terminal only if both of its ends are in the tree."""

from __future__ import annotations

from collections.abc import Iterator

from phaul_client.preflight.model import FileKind, OpenFile, TreeFacts
from phaul_client.preflight.problems import Problem, error, warning

_REMEDY = "start it without a terminal: `phaul run`, or setsid with its input and output in files"
#: Majors of virtual consoles and serial lines, /dev/tty and /dev/console, and the slaves of pseudo terminals.
_CONSOLE, _TTY, _SLAVES = 4, 5, range(136, 144)


def is_terminal(device_number: int) -> bool:
    """Whether a character device is a terminal."""
    return _major(device_number) in (_CONSOLE, _TTY) or _major(device_number) in _SLAVES


def check_terminals(tree: TreeFacts) -> Iterator[Problem]:
    """Terminals that end outside the tree: open ones, or the controlling one."""
    open_terminals = [
        file for file in tree.open_files if file.kind is FileKind.CHARACTER_DEVICE and is_terminal(file.device_number)
    ]
    masters = {file.terminal_index for file in open_terminals} - {None}
    named = set()
    for file in open_terminals:
        hung_up = file.deleted  # its master is closed everywhere
        if hung_up or _ends_inside(file, masters) or (file.pid, file.path) in named:
            continue
        named.add((file.pid, file.path))
        message = f"is open in {tree.process(file.pid)} (fd {file.fd}), and its other end is outside the tree"
        yield error("terminal", file.path, message, _REMEDY)
    for process in tree.processes:
        inside = _major(process.terminal) in _SLAVES and _slave_index(process.terminal) in masters
        if process.terminal and not inside and process.pid not in {pid for pid, _path in named}:
            message = "has a controlling terminal outside the tree, and will have none"
            yield warning("controlling-terminal", str(process), message, _REMEDY)


def _ends_inside(file: OpenFile, masters: set[int | None]) -> bool:
    if _major(file.device_number) in _SLAVES:
        return _slave_index(file.device_number) in masters
    return file.terminal_index is not None


def _major(device_number: int) -> int:
    return device_number >> 8 & 0xFFF


def _slave_index(device_number: int) -> int:
    minor = device_number & 0xFF | device_number >> 12 & 0xFFF00
    return (_major(device_number) - _SLAVES.start) * 256 + minor
