"""Checks of devices, of anonymous inodes and of what is mapped of them (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.check_terminals import is_terminal
from phaul_client.preflight.model import FileKind, MappedFile, OpenFile, TreeFacts
from phaul_client.preflight.problems import Problem, error

_MEMORY_MAJOR, _MISC_MAJOR = 1, 10
_ZERO: Final = 1 << 8 | 5
_TUN: Final = 10 << 8 | 200
_AUTOFS_MINOR: Final = 235

#: What follows "anon_inode:" in /proc/PID/fd, and criu can restore.
_KNOWN_ANONYMOUS: Final = frozenset(
    {"[eventfd]", "[eventpoll]", "[timerfd]", "[signalfd]", "[pidfd]", "inotify", "[fanotify]"}
)
#: Kinds that have a code of their own: name → (code, what it is, remedy).
UNSUPPORTED: Final = {
    "[io_uring]": ("io-uring", "io_uring", "tell the program to use epoll instead of io_uring"),
    "[userfaultfd]": ("userfaultfd", "userfaultfd", "the program must close its userfaultfd"),
    "[perf_event]": ("perf-event", "a performance counter", "end the profiling"),
    "bpf-prog": ("bpf", "a loaded BPF program", "the program must close it"),
    "bpf-map": ("bpf", "a BPF map", "the program must close it"),
    "bpf_link": ("bpf", "a BPF link", "the program must close it"),
    "btf": ("bpf", "BPF type information", "the program must close it"),
    "/secretmem": ("secret-memory", "secret memory (memfd_secret)", "start the program without it"),
    "kvm-vm": ("kvm", "a virtual machine", "move virtual machines by their own means (QEMU, libvirt)"),
    "[landlock-ruleset]": ("landlock", "a Landlock rule set", "the program must close it before it is moved"),
}
_OTHER_REMEDY: Final = "the program must close it first"
#: Path prefix of a device → (code, what it is).
DEVICES: Final = (
    ("/dev/nvidia", "gpu", "an NVIDIA GPU"),
    ("/dev/dri/", "gpu", "a GPU"),
    ("/dev/kfd", "gpu", "an AMD GPU"),
    ("/dev/kvm", "kvm", "the virtual machine monitor"),
    ("/dev/fuse", "fuse", "a FUSE connection"),
    ("/dev/userfaultfd", "userfaultfd", "userfaultfd"),
)


def check_devices(tree: TreeFacts) -> Iterator[Problem]:
    """Files of kinds that criu cannot restore."""
    named = set()
    for file in tree.open_files:
        for problem in _open(file, tree):
            if (problem.code, problem.subject) not in named:
                named.add((problem.code, problem.subject))
                yield problem
    for mapped in tree.mapped_files:
        yield from _mapped(mapped, tree)
    for pid, name in tree.special_mappings:
        if name == "[uprobes]":
            yield error("uprobes", tree.process(pid), "has user probes of a tracer in its memory", "end the tracer")


def _open(file: OpenFile, tree: TreeFacts) -> Iterator[Problem]:
    where = f"fd {file.fd} of {tree.process(file.pid)}"
    if file.kind is FileKind.ANONYMOUS:
        yield from _anonymous(file, where, tree)
    elif file.device_number == _TUN and file.kind is FileKind.CHARACTER_DEVICE:
        yield from _tun(file, where, tree)
    elif file.kind is FileKind.CHARACTER_DEVICE and not _is_known_device(file.device_number):
        yield _device(file.path, where)
    elif file.kind is FileKind.BLOCK_DEVICE:
        yield error("device", file.path, f"{where} is a block device, which criu cannot carry", _OTHER_REMEDY)
    elif file.kind is FileKind.OTHER:
        yield error("unsupported-file", file.path, f"{where} is of a kind that criu does not know", _OTHER_REMEDY)


def _anonymous(file: OpenFile, where: str, tree: TreeFacts) -> Iterator[Problem]:
    name = file.path.removeprefix("anon_inode:").removeprefix("pidfd:")
    if file.target_pid is not None:
        if file.target_pid > 0 and file.target_pid not in tree.pids:
            message = f"{where} stands for a process outside the tree"
            yield error("pidfd-outside", f"pid {file.target_pid}", message, "move both, or close the descriptor")
        return
    if name in _KNOWN_ANONYMOUS:
        return
    code, what, remedy = UNSUPPORTED.get(name, ("unsupported-file", name.strip("[]"), _OTHER_REMEDY))
    yield error(code, where, f"is {what}, which criu cannot carry", remedy)


def _tun(file: OpenFile, where: str, tree: TreeFacts) -> Iterator[Problem]:
    root = tree.root
    if root is not None and root.namespaces.get("net") == tree.reader_namespaces.get("net"):
        message = f"{where} is a network tunnel in the network namespace of the node"
        yield error("tun", file.path, message, "start the program in a network namespace of its own")


def _mapped(mapped: MappedFile, tree: TreeFacts) -> Iterator[Problem]:
    known = mapped.path == "/[aio]" or mapped.path.startswith("socket:")  # the ring of a packet socket
    odd = mapped.kind in (FileKind.ANONYMOUS, FileKind.OTHER) and not known
    if odd or (mapped.kind is FileKind.CHARACTER_DEVICE and mapped.device_number != _ZERO):
        message = f"is mapped by {tree.process(mapped.pid)}; criu cannot carry such memory"
        yield error("device-mapping", mapped.path, message, "the program must unmap it first")


def _device(path: str, where: str) -> Problem:
    for prefix, code, what in DEVICES:
        if path.startswith(prefix):
            return error(code, path, f"{where} is {what}, which criu cannot carry", _OTHER_REMEDY)
    return error("device", path, f"{where} is a device that criu cannot carry", _OTHER_REMEDY)


def _is_known_device(device_number: int) -> bool:
    major, minor = device_number >> 8 & 0xFFF, device_number & 0xFF | device_number >> 12 & 0xFFF00
    return major == _MEMORY_MAJOR or is_terminal(device_number) or (major == _MISC_MAJOR and minor == _AUTOFS_MINOR)
