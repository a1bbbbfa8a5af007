"""One task in the hands of this process, which traces it: stops, registers, signal mask, system calls. x86-64 alone."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Sequence

from phauld.guarding.criu_memory import AX, EXTENDED_BYTES, IP, ORIG_AX, REGISTERS
from phauld.guarding.lazy_guard import (
    ALL_CHILDREN,
    EVENT_STOP,
    PTRACE_CONT,
    PTRACE_SEIZE,
    ptrace,
)

PTRACE_POKEUSER = 6
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
MASK_BYTES = 8
NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202
SYSCALL_STOP = signal.SIGTRAP | 0x80
DEBUG_CONTROL_AT = 904  # offsetof(struct user, u_debugreg[7])
RT_SIGRETURN = 15
ALL_SIGNALS = (1 << 64) - 1
PATIENCE_SECONDS = 20.0
LOOK_SECONDS = 0.0002
NO_SYSCALL = (1 << 64) - 1


class Lost(Exception):
    """The task has ended, or does not do what it should."""


class IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Tracee:
    """Raises `Lost`, `OSError`."""

    def __init__(self, tid: int) -> None:
        """Seize it; it will stop."""
        self.tid = tid
        try:
            ptrace(PTRACE_SEIZE, tid, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP)
        except OSError:  # not permitted to us, or not known to the kernel
            ptrace(PTRACE_SEIZE, tid, PTRACE_O_TRACESYSGOOD)
        ptrace(PTRACE_INTERRUPT, tid)

    def next_stop(self) -> tuple[int, int]:
        """The event of its next stop, and the signal."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.tid, ALL_CHILDREN | os.WNOHANG)
            if pid == 0:
                time.sleep(LOOK_SECONDS)
            elif os.WIFSTOPPED(status):
                return status >> 16, os.WSTOPSIG(status)
            else:
                break
        raise Lost(self.tid)

    def settle(self) -> None:
        """Wait until it stands where no signal is being delivered: on its way on it restarts its own system call."""
        while True:
            event, number = self.next_stop()
            if event == EVENT_STOP:
                return
            is_ours = number in (signal.SIGSTOP, signal.SIGTRAP, SYSCALL_STOP)
            ptrace(PTRACE_CONT, self.tid, None if event or is_ours else number)

    def registers(self) -> list[int]:
        return list(REGISTERS.unpack(self._get(NT_PRSTATUS, REGISTERS.size)))

    def set_registers(self, registers: Sequence[int]) -> None:
        self._set(NT_PRSTATUS, REGISTERS.pack(*registers))

    def set_extended(self, state: bytes) -> None:
        """All other registers, as XSAVE has them."""
        usual = len(self._get(NT_X86_XSTATE, EXTENDED_BYTES))
        self._set(NT_X86_XSTATE, state[:usual])

    def mask(self) -> int:
        mask = ctypes.c_uint64()
        ptrace(PTRACE_GETSIGMASK, self.tid, ctypes.byref(mask), MASK_BYTES)
        return mask.value

    def set_mask(self, mask: int) -> None:
        ptrace(PTRACE_SETSIGMASK, self.tid, ctypes.byref(ctypes.c_uint64(mask)), MASK_BYTES)

    def clear_breakpoints(self) -> None:
        ptrace(PTRACE_POKEUSER, self.tid, 0, DEBUG_CONTROL_AT)

    def call(self, instruction: int, number: int, *arguments: int) -> int:
        """Have it do a system call, with a `syscall` instruction of its own; then it stands as before."""
        before, mask = self.registers(), self.mask()
        self.set_mask(ALL_SIGNALS)
        registers = list(before)
        registers[IP], registers[AX], registers[ORIG_AX] = instruction, number, NO_SYSCALL
        for place, value in zip((14, 13, 12, 7, 9, 8), arguments, strict=False):  # di, si, dx, r10, r8, r9
            registers[place] = value
        try:
            self.set_registers(registers)
            self._to_syscall()
            self._to_syscall()
            result = self.registers()[AX]
        finally:
            self.set_registers(before)
            self.set_mask(mask)
        self._stop_again()
        return result

    def finish_handler(self) -> None:
        """Let it run until it returns from a signal handler, before anything else of it has run."""
        for _ in range(10000):
            self._to_syscall()
            number = self.registers()[ORIG_AX]
            self._to_syscall()
            if number == RT_SIGRETURN:
                self._stop_again()
                return
        raise Lost(self.tid)

    def detach(self) -> None:
        """Let it go, also where it runs."""
        with contextlib.suppress(OSError, Lost):
            try:
                ptrace(PTRACE_DETACH, self.tid)
            except ProcessLookupError:  # it does not stand, or it has ended
                ptrace(PTRACE_INTERRUPT, self.tid)
                self.settle()
                ptrace(PTRACE_DETACH, self.tid)

    def _to_syscall(self) -> None:
        """To the beginning of a system call, or to its end."""
        number = 0
        while True:
            ptrace(PTRACE_SYSCALL, self.tid, number)
            event, number = self.next_stop()
            if number == SYSCALL_STOP:
                return
            if event or number in (signal.SIGSTOP, signal.SIGTRAP):
                number = 0

    def _stop_again(self) -> None:
        """From the end of a system call to where a task stops: see `settle`."""
        ptrace(PTRACE_INTERRUPT, self.tid)
        ptrace(PTRACE_CONT, self.tid)
        self.settle()

    def _get(self, kind: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        vector = IoVector(ctypes.cast(buffer, ctypes.c_void_p), size)
        ptrace(PTRACE_GETREGSET, self.tid, ctypes.byref(vector), kind)
        return buffer.raw[: vector.length]

    def _set(self, kind: int, content: bytes) -> None:
        buffer = ctypes.create_string_buffer(content, len(content))
        vector = IoVector(ctypes.cast(buffer, ctypes.c_void_p), len(content))
        ptrace(PTRACE_SETREGSET, self.tid, ctypes.byref(vector), kind)
