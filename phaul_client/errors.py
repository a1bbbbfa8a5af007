"""What can go wrong with a migration, as data.

PhaulError(message)                    every error that phaul raises on purpose, criu's own (CriuError) aside
├── InvalidRequest                     the request itself is wrong
├── PhaseError(seen, event)            the event does not fit the phase; nothing has changed
├── MigrationNotFound(migration_id)    never heard of it
├── WorkloadNotFound(name)             no workload by this name on this node
├── WorkloadExists(name)               a workload by this name runs on this node already
├── TooManyMigrations                  this node is at its limit; try again later
├── NoRoom                             the tree or its images do not fit on this node
├── ImageCorrupt                       what arrived is not what was sent
├── PreflightRefused(problems)         something stands in the way; nothing was touched
├── PeerError(peer)                    the other node; says nothing about the outcome of the call that failed
│   ├── PeerUnavailable                no answer: it may or may not have done what it was asked
│   ├── PeerRefused                    it answered no, with a reason of its own
│   └── RemoteProtocolError            it broke the protocol
└── MigrationFailed(migration_id)      how a migration ended that is not DONE
    ├── RolledBack                     the process runs on at the source, as if nothing had happened
    ├── MigrationCancelled             the same, because somebody asked for it
    └── OutcomeUnknown                 the process is stopped until the destination, or an operator, has answered

`str()` is for people; the attributes are for programs. `reason` is the name of a `phaul.v1.ErrorReason` without its
prefix: a plain string, so that this module knows no gRPC. The cause of a RolledBack is its `__cause__`. Cancellation of
a task is never turned into one of these.
"""

from __future__ import annotations

from typing import ClassVar


class PhaulError(Exception):
    """Something that phaul refused or failed to do.

    Attributes:
        message: what happened, in one line.
        reason: the name of an ErrorReason without its prefix.
        remedy: what to do about it; empty if there is nothing to say.
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.remedy = remedy


class InvalidRequest(PhaulError):
    """The request itself is wrong; the message names what."""

    default_reason = "INVALID_ARGUMENT"


class PhaseError(PhaulError):
    """The event does not fit the phase; the phase is what it was.

    Attributes:
        seen: the phase.
        event: what happened, or was asked for, in it.
    """

    default_reason = "WRONG_PHASE"

    def __init__(self, seen: str, event: str, *, remedy: str = "") -> None:
        super().__init__(f"{event} does not fit phase {seen}", remedy=remedy)
        self.seen = seen
        self.event = event


class MigrationNotFound(PhaulError):
    """No migration by this id was ever here."""

    default_reason = "MIGRATION_NOT_FOUND"

    def __init__(self, migration_id: str, *, remedy: str = "") -> None:
        super().__init__(f"no migration {migration_id}", remedy=remedy)
        self.migration_id = migration_id


class WorkloadNotFound(PhaulError):
    """No workload by this name is known on this node."""

    default_reason = "WORKLOAD_NOT_FOUND"

    def __init__(self, name: str) -> None:
        super().__init__(f"no workload {name!r} on this node", remedy="phaul ps lists them")
        self.name = name


class WorkloadExists(PhaulError):
    """A workload by this name runs on this node already."""

    default_reason = "WORKLOAD_EXISTS"

    def __init__(self, name: str) -> None:
        super().__init__(f"a workload {name!r} runs on this node already", remedy="choose another name, or stop it")
        self.name = name


class TooManyMigrations(PhaulError):
    """This node moves as many trees as it may; nothing was reserved."""

    default_reason = "TOO_MANY_MIGRATIONS"


class NoRoom(PhaulError):
    """The tree or its images do not fit on this node; nothing was reserved. The reason is NO_MEMORY or NO_SPACE."""

    default_reason = "NO_SPACE"


class ImageCorrupt(PhaulError):
    """An image or a carried file is not what was sent."""

    default_reason = "IMAGE_CORRUPT"


class PreflightRefused(PhaulError):
    """Something stands in the way; neither node was touched.

    Attributes:
        problems: one line for each thing that stands in the way, the gravest first.
    """

    default_reason = "PREFLIGHT_FAILED"

    def __init__(self, problems: tuple[str, ...], *, reason: str = "", remedy: str = "") -> None:
        super().__init__("; ".join(problems), reason=reason, remedy=remedy)
        self.problems = problems


class PeerError(PhaulError):
    """A call to the other node failed. Not a word about whether the call took effect.

    Attributes:
        peer: the node, as host:port or by its node id.
        log_tail: the end of criu's log there; empty if it is not about criu.
    """

    default_reason = "PEER_UNREACHABLE"

    def __init__(self, peer: str, message: str, *, reason: str = "", remedy: str = "", log_tail: str = "") -> None:
        super().__init__(f"{peer}: {message}", reason=reason, remedy=remedy)
        self.peer = peer
        self.log_tail = log_tail


class PeerUnavailable(PeerError):
    """No answer, or the connection broke: the call may or may not have taken effect."""


class PeerRefused(PeerError):
    """The other node answered no; `reason` is the one that it gave."""

    default_reason = "INTERNAL"


class RemoteProtocolError(PeerError):
    """The other node sent what the protocol does not allow."""

    default_reason = "INTERNAL"


class MigrationFailed(PhaulError):
    """A migration that did not end in DONE.

    Attributes:
        migration_id: which one.
    """

    def __init__(self, migration_id: str, message: str, *, reason: str = "", remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)
        self.migration_id = migration_id


class RolledBack(MigrationFailed):
    """The process runs on at the source. `reason` and `__cause__` are those of what went wrong."""


class MigrationCancelled(MigrationFailed):
    """Cancelled on request; the process runs on at the source."""

    default_reason = "CANCELLED"

    def __init__(self, migration_id: str) -> None:
        super().__init__(migration_id, "cancelled on request; the process runs on at the source")


class OutcomeUnknown(MigrationFailed):
    """After the commit the destination does not answer; the process is stopped at the source until it does."""

    default_reason = "OUTCOME_UNKNOWN"

    def __init__(self, migration_id: str) -> None:
        super().__init__(
            migration_id,
            "the destination does not answer; the process is stopped at the source until it is known where it runs",
            remedy=f"bring the destination back; if it is gone for good: phaul resolve {migration_id}",
        )
