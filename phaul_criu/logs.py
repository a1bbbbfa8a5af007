"""The first cause of a failure in the text of a criu log, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: "(00.012345)     12: Error (criu/files.c:123): message"; time (below log level 3), PID and "pie: " may be missing.
_LINE: Final = re.compile(
    r"^\s*(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?(?P<level>Error|Warn)\s+"
    r"\((?P<file>[^():]+):(?P<line>\d+)\):\s*(?P<message>.*)$"
)

#: Errors that criu survives, or that only say that something before them failed.
_HARMLESS: Final = re.compile(
    r"Can't setup RLIMIT_NOFILE|^Dumping FAILED|^Pre-dumping FAILED|^Restoring FAILED"
    r"|^RPC client reported script error|^Child exited with an error"
)

#: The warnings that say why the errors after them happened.
_TELLING_WARNING: Final = re.compile(r"^Unable to interrupt task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why criu failed."""

    message: str
    #: Place in criu's source; empty and 0 if unknown.
    file: str = ""
    line: int = 0
    #: Short stable name of a known cause; empty for an unknown one.
    code: str = ""
    #: What to do about a known cause; empty for an unknown one.
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _KnownCause:
    code: str
    pattern: str
    remedy: str


_KNOWN: Final = tuple(
    (re.compile(known.pattern), known)
    for known in (
        _KnownCause(
            "no-such-process",
            r"Unable to interrupt task: \d+ \(No such process\)|^Can't open /proc/\d+.*No such file",
            "check the PID: the process does not exist (any more), or it is in another PID namespace",
        ),
        _KnownCause(
            "not-permitted",
            r"Unable to interrupt task: \d+ \(Operation not permitted\)",
            "the process is a kernel thread, or a debugger or strace holds it: end that, and run as root",
        ),
        _KnownCause(
            "pid-taken",
            r"Can't fork for \d+: File exists",
            "that PID is in use here: start the workload in a PID namespace of its own (`phaul run`)",
        ),
        _KnownCause(
            "kernel-too-new",
            r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
            "criu before 4.2 cannot dump TCP and UDP sockets on Linux 6.16 and newer: install criu 4.2",
        ),
        _KnownCause(
            "tcp-in-flight",
            r"In-flight connection",
            "a TCP connection is just being made: try again, or leave such connections out (tcp_skip_in_flight)",
        ),
        _KnownCause(
            "tcp-connected",
            r"Connected TCP socket",
            "allow established TCP connections to be carried (tcp_established) or closed (tcp_close)",
        ),
        _KnownCause(
            "address-missing",
            r"Can't bind inet socket.*Cannot assign requested address",
            "this node lacks the address that a socket is bound to: move the address, or close the connection",
        ),
        _KnownCause(
            "address-in-use",
            r"Can't bind inet socket.*Address already in use",
            "another process here uses that port: stop it, or give the workload a network namespace of its own",
        ),
        _KnownCause(
            "file-differs",
            r"^File .* has bad (?:build-ID|size|mode)",
            "the file is not the same on this node: install the same version of it",
        ),
        _KnownCause(
            "file-missing",
            r"^Can't open file .*: No such file or directory",
            "the file is missing on this node: copy or mount it under the same path",
        ),
        _KnownCause(
            "session-leader-outside",
            r"session leader of .*is outside of its pid namespace",
            "the process belongs to the session of another: start it with setsid, or allow shell jobs (shell_job)",
        ),
        _KnownCause(
            "terminal-taken",
            r"tty: Unable to open dev/ptmx with specified index \d+",
            "a pseudo terminal of that number is open here: end what has it, or move to a node where it is free",
        ),
        _KnownCause(
            "terminal",
            r"Found dangling tty|tty: .*(?:No task found with sid|Don't have tty to inherit)",
            "the process has a terminal: start it without one (`phaul run`), or allow shell jobs (shell_job)",
        ),
        _KnownCause(
            "ghost-file-too-big",
            r"Can't dump ghost file .*increase limit",
            "a deleted but open file is larger than the limit: raise ghost_limit_bytes",
        ),
        _KnownCause(
            "mount-outside",
            r"Can't lookup mount",
            "an open file lies outside the process's mount namespace (an inherited /dev/null, for instance): "
            "start it with files of its own namespace",
        ),
        _KnownCause(
            "link-remap-needed",
            r"Can't create link remap",
            "an open file lost its name but for another hard link: allow link_remap",
        ),
        _KnownCause(
            "unix-socket-outside",
            r"External socket (?:is used|found in image)|Can't dump half of .* unix connection"
            r"|name-less external socket",
            "the other end of a unix socket is outside the tree: close it, or allow it (ext_unix_sk, external)",
        ),
        _KnownCause(
            "file-lock",
            r"Some file locks are hold",
            "the tree holds file locks: allow them (file_locks)",
        ),
        _KnownCause(
            "unsupported-file",
            r"Can't dump file \d+ of that type",
            "criu cannot carry a file of that kind (io_uring, a device, …): the program must close it first",
        ),
        _KnownCause(
            "cpu-differs",
            r"CPU (?:instruction )?capabilities do not match|FPU feature required by image"
            r"|CPU xfeatures has unsupported bits|CPU xsave .*mismatch",
            "this node's CPU lacks features of the source's: move to a CPU that has them",
        ),
        _KnownCause(
            "no-memory-tracking",
            r"Tracking memory is not available",
            "this kernel has no soft-dirty tracking (CONFIG_MEM_SOFT_DIRTY): use a mode without pre-copy",
        ),
        _KnownCause(
            "pipe-limit",
            r"splice: -1: Bad file descriptor|Unable to set a pipe size",
            "raise the pipe limit: sysctl -w fs.pipe-max-size=4194304",
        ),
        _KnownCause(
            "userfaultfd",
            r"Unable to open an userfaultfd descriptor|Failed to get uffd API",
            "lazy pages need userfaultfd: run as root, or sysctl -w vm.unprivileged_userfaultfd=1",
        ),
        _KnownCause(
            "page-connection",
            r"Connection (?:reset by peer|refused)|Broken pipe|Remote side closed connection"
            r"|socket was closed unexpectedly",
            "the connection that carries the pages broke: check the network between the nodes, then try again",
        ),
        _KnownCause(
            "no-space",
            r"No space left on device",
            "the file system of the images is full: make room, or put the images elsewhere",
        ),
        _KnownCause(
            "network-lock",
            r"Locking (?:network|connection) failed|CRIU was built without libnftables",
            "criu could not lock the tree's connections: load nf_tables, or use another network lock",
        ),
    )
)


def first_cause(log: str) -> Cause | None:
    """The first known cause among the errors of a log, or else its first error; None if the log has no error."""
    causes = list(_causes(log))
    return next((cause for cause in causes if cause.code), causes[0] if causes else None)


def explain(message: str) -> Cause:
    """A cause made of one message, such as the one in criu's answer."""
    match = _LINE.match(message.strip())
    text = match["message"].strip() if match else message.strip()
    known = next((known for pattern, known in _KNOWN if pattern.search(text)), None)
    return Cause(
        message=text,
        file=match["file"] if match else "",
        line=int(match["line"]) if match else 0,
        code=known.code if known else "",
        remedy=known.remedy if known else "",
    )


def tail(log: str, *, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.splitlines()[-lines:])


def _causes(log: str) -> Iterator[Cause]:
    for line in log.splitlines():
        match = _LINE.match(line)
        if match is None or _HARMLESS.search(match["message"]):
            continue
        if match["level"] == "Error" or _TELLING_WARNING.search(match["message"]):
            yield explain(line)
