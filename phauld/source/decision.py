"""What is decided before a move, from what both nodes can do and what the user wants (pure)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from phaul.v1 import types_pb2
from phaul_client.compatibility import (
    CGROUP_LIMITS_FEATURE,
    LAZY_TLS_FEATURE,
    PODMAN_FEATURE,
    RESTART_FEATURE,
    SYNC_FEATURE,
)
from phaul_client.errors import PreflightRefused
from phaul_client.modes import Choice, Mode, NodeCapabilities, Refusal, Wish, choose
from phaul_client.pipe_choice import Compression, PipeChoice, choose_pipe
from phaul_client.policy import DowntimePolicy, Policy, PostCopyPolicy, StopCopyPolicy

WITH_ROUNDS: Final = (Mode.PRE_COPY, Mode.HYBRID)
WITH_LAZY_PAGES: Final = (Mode.POST_COPY, Mode.HYBRID)  #: may end with the pages behind the tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Who may read along on the way to the destination."""

    tls: bool  #: between the two phaulds
    kernel_tls: bool  #: this node's kernel can do it
    insecure: bool  #: this node may send in clear
    is_loopback: bool

    @property
    def clear_is_allowed(self) -> bool:
        return self.insecure or self.is_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants."""

    wish: Wish
    checksum: bool | None
    compression: Compression | None
    has_sync: bool  #: directories move along
    is_podmans: bool  #: the tree is a container of podman's
    is_limited: bool  #: the tree is a workload with limits of its cgroup
    is_restarted: bool  #: the tree is a workload that is started again when it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How it is moved."""

    choice: Choice
    pipe: PipeChoice
    lazy_uses_tls: bool  #: the relays

    @property
    def mode(self) -> Mode:
        return self.choice.mode

    @property
    def policy(self) -> Policy:
        """The one of the mode."""
        if self.mode is Mode.POST_COPY:
            return PostCopyPolicy()
        return DowntimePolicy() if self.mode in WITH_ROUNDS else StopCopyPolicy()

    @property
    def mode_reason(self) -> str:
        """Why this mode, for people who see its name beside."""
        return "; ".join(each.removeprefix(f"{self.mode}: ") for each in self.choice.reasons[:-1])

    @property
    def restore_mode_reason(self) -> str:
        return self.choice.reasons[-1].removeprefix(f"{self.choice.restore_mode} restore: ")


def decide(asked: Asked, here: NodeCapabilities, there: types_pb2.NodeInfo, way: Way) -> Decision:
    """Raises `PreflightRefused`, and `PhaulError` as `choose_pipe` does: the two nodes cannot do what must be."""
    features = frozenset(there.api_features)
    _check_features(there.node_name, features, asked)
    choice = _choose_mode(asked.wish, here, there)
    lazy_uses_tls = way.tls and LAZY_TLS_FEATURE in features
    if choice.mode in WITH_LAZY_PAGES and way.tls and not (lazy_uses_tls or way.clear_is_allowed):
        remedy = "a newer phauld there, --mode pre-copy or stop-copy, or insecure = true on both nodes"
        raise _unsupported(f"{choice.mode}: its pages would travel in clear", remedy)
    pipe = choose_pipe(
        mode=choice.mode,
        checksum=asked.checksum,
        compression=asked.compression,
        tls=way.tls,
        clear_is_allowed=way.clear_is_allowed,
        is_loopback=way.is_loopback,
        kernel_tls=way.kernel_tls,
        peer_features=features,
    )
    return Decision(choice=choice, pipe=pipe, lazy_uses_tls=lazy_uses_tls)


def _check_features(name: str, features: Collection[str], asked: Asked) -> None:
    if asked.is_podmans and PODMAN_FEATURE not in features:
        raise _unsupported(f"{name} is too old for containers of podman", "a newer phaul there")
    if asked.is_limited and CGROUP_LIMITS_FEATURE not in features:
        raise _unsupported(f"{name} is too old for --memory, --cpus and --pids", "a newer phaul there")
    if asked.is_restarted and RESTART_FEATURE not in features:
        raise _unsupported(
            f"{name} is too old for --restart: it would not be started again there", "a newer phaul there"
        )
    if asked.has_sync and SYNC_FEATURE not in features:
        raise _unsupported(f"{name} is too old for --sync", "a newer phaul there")


def _choose_mode(wish: Wish, here: NodeCapabilities, there: types_pb2.NodeInfo) -> Choice:
    choice = choose(
        wish,
        here,
        NodeCapabilities(
            name=there.node_name,
            criu_version=there.criu.version,
            mem_track=there.criu.mem_track,
            lazy_pages=there.criu.lazy_pages,
            pipe_max_size_bytes=0,  # only the source's matters
            mapping_limit_bytes=there.capacity.mapping_limit_bytes,
        ),
    )
    if isinstance(choice, Refusal):
        causes = tuple(problem.cause for problem in choice.problems)
        raise PreflightRefused(causes, reason="UNSUPPORTED", remedy=choice.problems[0].remedy)
    return choice


def _unsupported(cause: str, remedy: str) -> PreflightRefused:
    return PreflightRefused((cause,), reason="UNSUPPORTED", remedy=remedy)
