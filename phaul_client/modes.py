"""Which way to move a tree: from what both nodes can do, from the goal, and from what the user allows. Pure.

`choose` answers a `Choice` with its reasons or a `Refusal` with cause and remedy, before anything has been touched:
nothing that is known here may fail in the middle of a migration.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from phaul_client.forecast import ASSUMED_BANDWIDTH_BYTES_PER_SECOND

MIN_CRIU_VERSION: Final = 4_01_00
"""criu 4.1, as major * 10000 + minor * 100 + sublevel."""
WIDE_STREAM_CRIU_VERSION: Final = 4_02_00
"""From criu 4.2 on the messages of the page stream are 32 bytes, before 24 (criu/page-xfer.c, struct page_server_iov):
each waits for ever for the other's."""
MIN_PIPE_SIZE_BYTES: Final = 4 << 20
"""Pipes that criu's page server makes for post-copy; with less it fails without a reason."""
EAGER_RESTORE_SECONDS_PER_BYTE: Final = 0.65e-9
"""Measured natively: 0.6 to 0.8 s for 1 GiB."""
MAX_ADDRESS_SPACE_BYTES: Final = 256 << 30
"""Of one process, for a round or post-copy: criu makes a table of 16 bytes for each page of a private mapping, there or
not, in the freeze (criu/page-pipe.c, create_page_pipe): 1 GiB for this much. For MariaDB's 8 TiB it took all memory."""
LAZY_GAIN_SECONDS: Final = 0.02
"""A lazy restore that gains less is not worth a second process that the tree depends on."""
MUCH_SHARED_BYTES: Final = 64 << 20
"""So much more memory for good is worth a longer pause, where it is more than the tree has otherwise."""
FIXED_PAUSE_SECONDS: Final = 0.05
"""Stop, state dump and restore of a tree without memory, measured natively."""


class Mode(enum.StrEnum):
    """How memory reaches the destination."""

    STOP_COPY = "stop-copy"
    PRE_COPY = "pre-copy"
    POST_COPY = "post-copy"
    HYBRID = "hybrid"
    AUTO = "auto"


class RestoreMode(enum.StrEnum):
    """When the destination reads the images into memory."""

    EAGER = "eager"
    LAZY = "lazy"
    AUTO = "auto"


class ProblemCode(enum.StrEnum):
    """Why a mode cannot work between two nodes."""

    CRIU_MISSING = "criu-missing"
    CRIU_TOO_OLD = "criu-too-old"
    CRIU_STREAMS_DIFFER = "criu-streams-differ"
    NO_MEMORY_TRACKING = "no-memory-tracking"
    NO_LAZY_PAGES = "no-lazy-pages"
    PIPE_SIZE_TOO_SMALL = "pipe-size-too-small"
    EAGER_POSTCOPY = "eager-postcopy"
    ADDRESS_SPACE = "address-space"
    OVERCOMMIT = "overcommit"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCapabilities:
    """What a node can do, as its feature check found it."""

    name: str
    criu_version: int
    """major * 10000 + minor * 100 + sublevel; 0: no criu."""
    mem_track: bool
    """The kernel tracks written pages (soft-dirty)."""
    lazy_pages: bool
    """userfaultfd works with all that criu needs of it."""
    pipe_max_size_bytes: int
    """fs.pipe-max-size."""
    mapping_limit_bytes: int = 0
    """The largest mapping that the kernel allows (vm.overcommit_memory); 0: any, or unknown."""
    may_exceed_pipe_size: bool = False
    """CAP_SYS_RESOURCE: the limit above does not bind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asks for, and what is known about the tree."""

    mode: Mode = Mode.AUTO
    restore_mode: RestoreMode = RestoreMode.AUTO
    downtime_goal_seconds: float = 0.3
    memory_bytes: int = 0
    """Resident memory of the tree; 0 if unknown."""
    own_bytes: int = 0
    """Anonymous memory of the tree, with what its processes share counted once."""
    forked_bytes: int = 0
    """How much more that would be if they shared nothing since a fork, as after a lazy restore."""
    address_space_bytes: int = 0
    """Private mappings of the process that has most, used or not; 0 if unknown."""
    mapping_bytes: int = 0
    """The largest mapping that the kernel counts where criu makes it writable: all but a stop-copy's eager restore."""
    bandwidth_bytes_per_second: float | None = None
    """Of the path to the destination, measured or limited; None if unknown."""
    allow_postcopy: bool = False
    """Whether `auto` may choose a mode in which the tree depends on both nodes for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do; neither mode is AUTO. Each reason is a sentence for the report."""

    mode: Mode
    restore_mode: RestoreMode
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why it cannot be done, and what would help."""

    code: ProblemCode
    cause: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Everything that stands in the way of what was asked for, not only the first."""

    problems: tuple[Problem, ...]


def choose(wish: Wish, source: NodeCapabilities, destination: NodeCapabilities) -> Choice | Refusal:
    """Choose the mode and the restore mode, or say why what was asked for cannot work."""
    problems = [problem for node in (source, destination) for problem in _criu_problems(node)]
    problems = problems or _stream_problems(source, destination)
    if wish.mode is not Mode.AUTO:
        problems += _mode_problems(wish.mode, wish, source, destination)
    if wish.restore_mode is RestoreMode.LAZY:
        problems += [*_lazy_problems(destination), *_mapping_problems(wish, destination)]
    if wish.restore_mode is RestoreMode.EAGER and wish.mode in (Mode.POST_COPY, Mode.HYBRID):
        problems.append(_eager_postcopy(wish.mode))
    if problems:
        return Refusal(problems=tuple(dict.fromkeys(problems)))
    if wish.mode is Mode.AUTO:
        mode, mode_reasons = _auto_mode(wish, source, destination)
    else:
        mode, mode_reasons = wish.mode, (f"{wish.mode}: asked for",)
    restore_mode, restore_reason = _restore_mode(wish, mode, destination)
    return Choice(mode=mode, restore_mode=restore_mode, reasons=(*mode_reasons, restore_reason))


def stop_copy_pause_seconds(wish: Wish) -> float:
    """A rough pause of moving everything at once."""
    bandwidth = wish.bandwidth_bytes_per_second or ASSUMED_BANDWIDTH_BYTES_PER_SECOND
    return FIXED_PAUSE_SECONDS + wish.memory_bytes / bandwidth


def _auto_mode(wish: Wish, source: NodeCapabilities, destination: NodeCapabilities) -> tuple[Mode, tuple[str, ...]]:
    """Pre-copy wherever the source can; post-copy only where the user allows it and the goal needs it."""
    postcopy_problems = _mode_problems(Mode.POST_COPY, wish, source, destination)
    round_problems = _mode_problems(Mode.PRE_COPY, wish, source, destination)
    may_postcopy = wish.allow_postcopy and wish.restore_mode is not RestoreMode.EAGER and not postcopy_problems
    obstacles = tuple(f"no post-copy: {each.cause}" for each in postcopy_problems) if wish.allow_postcopy else ()
    if not round_problems and may_postcopy:
        return Mode.HYBRID, (
            f"hybrid: {source.name} tracks memory, and post-copy is allowed should rounds not reach the goal",
        )
    if not round_problems:
        return Mode.PRE_COPY, (f"pre-copy: {source.name} tracks memory", *obstacles)
    no_rounds = f"no rounds: {round_problems[0].cause}"
    pause_seconds = stop_copy_pause_seconds(wish)
    figure = f"about {pause_seconds:.2g} s{'' if wish.bandwidth_bytes_per_second else ' at an assumed 1 Gbit/s'}"
    if wish.memory_bytes and pause_seconds <= wish.downtime_goal_seconds:
        return Mode.STOP_COPY, (no_rounds, f"stop-copy: its pause, {figure}, is within the goal")
    if may_postcopy:
        return Mode.POST_COPY, (no_rounds, "post-copy: it is allowed, and stop-copy would not reach the goal")
    reasons = [no_rounds, "stop-copy: the only mode left" + (f"; expect {figure}" if wish.memory_bytes else "")]
    return Mode.STOP_COPY, (*reasons, *obstacles)


def _restore_mode(wish: Wish, mode: Mode, destination: NodeCapabilities) -> tuple[RestoreMode, str]:
    if wish.restore_mode is not RestoreMode.AUTO:
        return wish.restore_mode, f"{wish.restore_mode} restore: asked for"
    if mode in (Mode.POST_COPY, Mode.HYBRID):
        return RestoreMode.LAZY, f"lazy restore: part of {mode}{_and_shares_no_more(wish)}"
    if problems := _mapping_problems(wish, destination):
        return RestoreMode.EAGER, f"eager restore: {problems[0].cause}"
    if not destination.lazy_pages:
        return RestoreMode.EAGER, f"eager restore: {destination.name} has no lazy pages"
    gain_seconds = wish.memory_bytes * EAGER_RESTORE_SECONDS_PER_BYTE
    if wish.memory_bytes and gain_seconds < LAZY_GAIN_SECONDS:
        return RestoreMode.EAGER, f"eager restore: lazy would gain {gain_seconds * 1000:.0f} ms only"
    if shares := _and_shares_no_more(wish):
        return RestoreMode.EAGER, f"eager restore: lazy would gain {gain_seconds:.1g} s{shares}"
    return RestoreMode.LAZY, "lazy restore: the pause does not grow with memory"


def _and_shares_no_more(wish: Wish) -> str:
    """What a lazy restore does to processes that share much of their memory since a fork; "" if they do not."""
    if wish.forked_bytes < max(MUCH_SHARED_BYTES, wish.own_bytes):
        return ""
    then, now = (wish.own_bytes + wish.forked_bytes) >> 20, wish.own_bytes >> 20
    return f", but no memory would be shared since a fork any more: it is {now} MiB now, and would be {then}"


def _criu_problems(node: NodeCapabilities) -> list[Problem]:
    if node.criu_version == 0:
        remedy = "install criu 4.1 or newer there, or run scripts/install-criu"
        return [Problem(code=ProblemCode.CRIU_MISSING, cause=f"{node.name} has no criu", remedy=remedy)]
    if node.criu_version < MIN_CRIU_VERSION:
        cause = f"criu {_version(node)} on {node.name} is older than 4.1"
        return [Problem(code=ProblemCode.CRIU_TOO_OLD, cause=cause, remedy="run scripts/install-criu there")]
    return []


def _stream_problems(source: NodeCapabilities, destination: NodeCapabilities) -> list[Problem]:
    wide = [node.criu_version >= WIDE_STREAM_CRIU_VERSION for node in (source, destination)]
    if wide[0] == wide[1]:
        return []
    cause = f"criu {_version(source)} on {source.name} and {_version(destination)} on {destination.name} cannot talk"
    older = source if wide[1] else destination
    remedy = f"install criu 4.2 or newer on {older.name}, too"
    return [Problem(code=ProblemCode.CRIU_STREAMS_DIFFER, cause=cause, remedy=remedy)]


def _version(node: NodeCapabilities) -> str:
    return f"{node.criu_version // 10000}.{node.criu_version // 100 % 100}"


def _mode_problems(mode: Mode, wish: Wish, source: NodeCapabilities, destination: NodeCapabilities) -> list[Problem]:
    if mode is Mode.STOP_COPY:
        return []
    problems = _mapping_problems(wish, destination)
    if wish.address_space_bytes > MAX_ADDRESS_SPACE_BYTES:
        problems.append(
            Problem(
                code=ProblemCode.ADDRESS_SPACE,
                cause=f"the tree has reserved {wish.address_space_bytes >> 30} GiB, used or not, for which criu needs "
                f"{wish.address_space_bytes >> 38} GiB of memory in this mode",
                remedy="--mode stop-copy, or let the program reserve less",
            )
        )
    if mode in (Mode.PRE_COPY, Mode.HYBRID) and not source.mem_track:
        problems.append(
            Problem(
                code=ProblemCode.NO_MEMORY_TRACKING,
                cause=f"the kernel of {source.name} does not track memory",
                remedy="use a kernel with CONFIG_MEM_SOFT_DIRTY, or mode auto, stop-copy or post-copy",
            )
        )
    if mode in (Mode.POST_COPY, Mode.HYBRID):
        problems += _lazy_problems(destination)
        if source.pipe_max_size_bytes < MIN_PIPE_SIZE_BYTES and not source.may_exceed_pipe_size:
            problems.append(
                Problem(
                    code=ProblemCode.PIPE_SIZE_TOO_SMALL,
                    cause=f"fs.pipe-max-size of {source.name} is {source.pipe_max_size_bytes} bytes, "
                    f"post-copy needs {MIN_PIPE_SIZE_BYTES}",
                    remedy=f"sysctl -w fs.pipe-max-size={MIN_PIPE_SIZE_BYTES} there, or grant CAP_SYS_RESOURCE",
                )
            )
    return problems


def _lazy_problems(destination: NodeCapabilities) -> list[Problem]:
    if destination.lazy_pages:
        return []
    return [
        Problem(
            code=ProblemCode.NO_LAZY_PAGES,
            cause=f"{destination.name} has no lazy pages (userfaultfd)",
            remedy="use a kernel with CONFIG_USERFAULTFD and allow it, or an eager restore without post-copy",
        )
    ]


def _mapping_problems(wish: Wish, destination: NodeCapabilities) -> list[Problem]:
    if not 0 < destination.mapping_limit_bytes < wish.mapping_bytes:
        return []
    return [
        Problem(
            code=ProblemCode.OVERCOMMIT,
            cause=f"the tree has reserved {wish.mapping_bytes >> 30} GiB in one piece, used or not; "
            f"{destination.name} maps {destination.mapping_limit_bytes >> 30} at most",
            remedy="sysctl -w vm.overcommit_memory=1 there, or a stop-copy with an eager restore",
        )
    ]


def _eager_postcopy(mode: Mode) -> Problem:
    return Problem(
        code=ProblemCode.EAGER_POSTCOPY,
        cause=f"{mode} cannot read all memory before the tree runs",
        remedy="ask for a lazy restore, or leave the restore mode to auto",
    )
