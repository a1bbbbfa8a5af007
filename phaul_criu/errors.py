"""What can go wrong with criu, as data.

CriuError(op, message)                 op is the operation: "dump", "restore", "page-server", …
├── CriuMissing                        no criu binary, or no pycriu
├── CriuTooOld                         older than the oldest version that phaul works with
├── CheckFailed                        `criu check`, a feature check or a CPU check said no
├── DumpFailed                         the tree runs on
│   └── PreDumpFailed                  the tree runs on
├── RestoreFailed                      no part of the restored tree runs
├── PageServerFailed                   the pages that arrived are not complete
├── LazyPagesFailed                    the lazy-pages child ended with an error
├── CriuTimeout                        the deadline passed; criu was made to unwind
└── CriuDied                           criu ended without an answer

`str()` is for people; the attributes are for programs. Cancellation is never turned into one of these.
"""

from __future__ import annotations


class CriuError(Exception):
    """An operation of criu failed.

    Attributes:
        op: the operation, as a word of criu's command line ("dump", "pre-dump", "restore", "page-server", …).
        message: what happened, without the cause.
        errno: criu's own error number, if it gave one.
        cause: the first cause in criu's log; empty if there is none.
        code: a short stable name of a known cause ("pid-taken", …); empty for an unknown one.
        remedy: what to do about a known cause; empty for an unknown one.
        log_tail: the end of criu's log.
    """

    def __init__(
        self,
        op: str,
        message: str,
        *,
        errno: int | None = None,
        cause: str = "",
        code: str = "",
        remedy: str = "",
        log_tail: str = "",
    ) -> None:
        super().__init__(op, message)
        self.op = op
        self.message = message
        self.errno = errno
        self.cause = cause
        self.code = code
        self.remedy = remedy
        self.log_tail = log_tail

    def __str__(self) -> str:
        text = f"criu {self.op}: {self.message}"
        return f"{text}: {self.cause}" if self.cause else text


class CriuMissing(CriuError):
    """There is no criu binary, or no pycriu."""


class CriuTooOld(CriuError):
    """criu is older than the oldest version that phaul works with."""


class CheckFailed(CriuError):
    """criu, the kernel or the CPU cannot do what was asked about."""


class DumpFailed(CriuError):
    """The dump failed; the tree runs on."""


class PreDumpFailed(DumpFailed):
    """A pre-dump failed; the tree runs on."""


class RestoreFailed(CriuError):
    """The restore failed; no part of the restored tree runs."""


class PageServerFailed(CriuError):
    """The page server ended with an error: the pages that arrived are not complete."""


class LazyPagesFailed(CriuError):
    """The lazy-pages child ended with an error."""


class CriuTimeout(CriuError):
    """The deadline passed. criu was made to unwind, as on cancellation."""


class CriuDied(CriuError):
    """criu ended without an answer. `exit_code` or `signal` says how; both are None if criu is not our child."""

    def __init__(
        self, op: str, message: str, *, exit_code: int | None = None, signal: int | None = None, log_tail: str = ""
    ) -> None:
        super().__init__(op, message, log_tail=log_tail)
        self.exit_code = exit_code
        self.signal = signal
