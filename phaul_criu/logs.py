"""The first cause of a failure in the text of a criu log, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: "(00.012345)     12: Error (criu/files.c:123): message"; time, PID and "pie: " may be missing.
_ERROR_LINE: Final = re.compile(
    r"^(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?Error \((?P<file>[^():]+):(?P<line>\d+)\):\s*(?P<message>.*)$"
)

#: Errors that criu survives, or that only say that something before them failed.
_HARMLESS: Final = re.compile(
    r"Can't setup RLIMIT_NOFILE"
    r"|^Dumping FAILED|^Pre-dumping FAILED|^Restoring FAILED"
    r"|RPC client reported script error"
    r"|^Child exited with an error"
)


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
            r"[Nn]o process|No such process|Can't open /proc/\d+|seize task.*No such process",
            "check the PID: the process does not exist (any more), or it is in another PID namespace",
        ),
        _KnownCause(
            "pid-taken",
            r"Can't fork for \d+: File exists|Pid \d+ .*do not match|Unable to restore pid",
            "that PID is in use on the destination: start the workload in a PID namespace of its own (`phaul run`)",
        ),
        _KnownCause(
            "tcp-connected",
            r"Connected TCP socket",
            "allow established TCP connections to be carried (tcp_established) or closed (tcp_close)",
        ),
        _KnownCause(
            "address-missing",
            r"Cannot assign requested address|Can't bind inet socket",
            "the destination lacks the address that a socket is bound to: move the address, or close the connections",
        ),
        _KnownCause(
            "file-differs",
            r"bad build-ID|bad size|bad mode",
            "the file is not the same on the destination: install the same version of it there",
        ),
        _KnownCause(
            "file-missing",
            r"Can't open file .*: No such file|File .* not found|Can't open file \S+ on restore",
            "the file is missing on the destination: copy or mount it there under the same path",
        ),
        _KnownCause(
            "session-leader-outside",
            r"session leader .*outside of its pid namespace|session leader of \d+\(\d+\) is outside",
            "the process belongs to the session of another: start it with setsid, or allow shell jobs (shell_job)",
        ),
        _KnownCause(
            "terminal",
            r"Found dangling tty|tty: .*(?:sid|unpaired|slave|external)|Controlling terminal",
            "the process has a terminal: start it without one (`phaul run`), or allow shell jobs (shell_job)",
        ),
        _KnownCause(
            "ghost-file-too-big",
            r"[Gg]host file .*too big",
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
            r"[Ll]ink.?remap",
            "an open file lost its name: allow link_remap",
        ),
        _KnownCause(
            "unix-socket-outside",
            r"[Ee]xternal socket is used|unix socket.*external|Can't dump half of (?:stream|dgram) unix|[Dd]angling",
            "the other end of a unix socket is outside the tree: close it, or name it as external",
        ),
        _KnownCause(
            "file-lock",
            r"[Ss]ome file locks are hold|file lock",
            "the tree holds file locks: allow file_locks",
        ),
        _KnownCause(
            "unsupported-file",
            r"Can't dump file \d+ of that type|Unknown file type|anon_inode:\[",
            "criu cannot carry a file of that kind (io_uring, a device, …): the program must close it first",
        ),
        _KnownCause(
            "cpu-differs",
            r"cpu: .*(?:not supported|not present|[Mm]ismatch)|CPU.*(?:capabilit|feature)",
            "the destination's CPU lacks features of the source's: move to a CPU that has them",
        ),
        _KnownCause(
            "no-memory-tracking",
            r"[Tt]racking memory is not available|[Dd]irty.?track|Memory tracking|mem.?track",
            "this kernel has no soft-dirty tracking (CONFIG_MEM_SOFT_DIRTY): use a mode without pre-copy",
        ),
        _KnownCause(
            "pipe-limit",
            r"splice: -1: Bad file descriptor|Unable to set a pipe size|Can't (?:set|tune) pipe size",
            "raise the pipe limit: sysctl -w fs.pipe-max-size=4194304",
        ),
        _KnownCause(
            "userfaultfd",
            r"userfaultfd|uffd: .*not permitted",
            "lazy pages need userfaultfd: run as root, or sysctl -w vm.unprivileged_userfaultfd=1",
        ),
        _KnownCause(
            "traced",
            r"already being traced|seize task.*Operation not permitted",
            "another program (a debugger, strace) traces the process: stop it first",
        ),
        _KnownCause(
            "page-connection",
            r"Connection (?:reset|refused)|Broken pipe|page.?server.*(?:short|closed|hang)|Unexpected EOF",
            "the connection that carries the pages broke: check the network between the nodes, then try again",
        ),
        _KnownCause(
            "no-space",
            r"No space left on device",
            "the file system of the images is full: make room, or put the images elsewhere",
        ),
        _KnownCause(
            "network-lock",
            r"iptables-restore|nftables|nft ",
            "criu could not lock the tree's connections: use the NFTABLES lock with nf_tables in the kernel, or SKIP",
        ),
    )
)


def first_cause(log: str) -> Cause | None:
    """The first known cause among the errors of a log, or else its first error; None if the log has no error."""
    causes = list(_causes(log))
    return next((cause for cause in causes if cause.code), causes[0] if causes else None)


def explain(message: str) -> Cause:
    """A cause made of one message, such as the one in criu's answer."""
    match = _ERROR_LINE.match(message.strip())
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
        if _ERROR_LINE.match(line):
            cause = explain(line)
            if not _HARMLESS.search(cause.message):
                yield cause
