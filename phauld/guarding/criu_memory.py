"""What a criu that dumps remembers of the tasks that it has changed, found in its memory. x86-64 alone.

Before criu puts code into a task it keeps the task's signal mask and registers (compel/include/infect-priv.h: `struct
thread_ctx`, in `struct parasite_ctl` of a process, in `struct parasite_thread_ctl` of another thread). Where these lie
differs with the version, how they look does not:

    0    signal mask
    8    27 registers, in the order of `struct user_regs_struct`
    224  0x0a: of a 64-bit task
    320  the extended state, as XSAVE has it; of a thread

At a multiple of 64 bytes before it, the struct around it begins with the task's ID. What is found is believed only if
the registers that criu never changes are those which the task has now.
"""

import re
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

REGISTERS = struct.Struct("<27Q")
R15, R14, R13, R12, BP, BX = range(6)
AX, ORIG_AX, IP, CS, FLAGS, SP, SS = 10, 15, 16, 17, 18, 19, 20
FS_BASE, GS_BASE, DS, ES, FS, GS = range(21, 27)
NEVER_CHANGED = (CS, SS, FS_BASE, GS_BASE, DS, ES, FS, GS)
KEPT_BY_SYSCALLS = (R15, R14, R13, R12, BP, BX, SP)

EXTENDED_AT = 320
EXTENDED_BYTES = 4 * 4096  # criu's XSAVE_SIZE
_ALIGNMENT = 64
_FARTHEST = 16 * _ALIGNMENT
_REGISTERS_AT = 8
_CS_AT = _REGISTERS_AT + 8 * CS
#: cs and ss of a 64-bit task, and criu's mark behind the registers.
_LOOKS = re.compile(rb"\x33\0{7}.{16}\x2b\0{7}.{48}\x0a\0", re.DOTALL)


class Saved(NamedTuple):
    """How a task was when criu seized it."""

    task: int
    is_thread: bool  #: and not the first of its process
    mask: int
    registers: tuple[int, ...]
    extended: bytes


def find(memory: bytes, tasks: Collection[int]) -> Iterator[Saved]:
    """All that looks like it in a stretch of criu's memory, of these tasks."""
    for match in _overlapping(memory):
        start = match - _CS_AT
        if start < _ALIGNMENT:
            continue
        for distance in range(_ALIGNMENT, min(_FARTHEST, start) + 1, _ALIGNMENT):
            is_thread = distance == _ALIGNMENT
            (task,) = struct.unpack_from("<i" if is_thread else "<q", memory, start - distance)
            if task in tasks:
                yield _saved(memory, start, task, is_thread)


def _overlapping(memory: bytes) -> Iterator[int]:
    at = 0
    while match := _LOOKS.search(memory, at):
        yield match.start()
        at = match.start() + 1


def _saved(memory: bytes, start: int, task: int, is_thread: bool) -> Saved:
    (mask,) = struct.unpack_from("<Q", memory, start)
    extended = memory[start + EXTENDED_AT : start + EXTENDED_AT + EXTENDED_BYTES] if is_thread else b""
    return Saved(task, is_thread, mask, REGISTERS.unpack_from(memory, start + _REGISTERS_AT), extended)


def choose(found: Sequence[Saved], now: Sequence[int], *, was_called: bool) -> Saved | None:
    """The one that this task, whose registers are `now`, can have been; `None` if there is none, or a doubt.

    `was_called`: it stands in a system call that criu put in its place, and not in code of criu.
    """
    same = NEVER_CHANGED + (KEPT_BY_SYSCALLS if was_called else ())
    fitting = {each for each in found if all(each.registers[index] == now[index] for index in same)}
    states = {(each.mask, each.registers) for each in fitting}
    return fitting.pop() if len(states) == 1 else None
