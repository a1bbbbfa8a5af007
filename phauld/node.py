"""What this node is and can do, as others are told."""

import dataclasses
import os
import platform
import shutil
import socket
import sys
from pathlib import Path
from typing import Final

from phaul.v1 import types_pb2
from phaul_client import pipe_choice
from phaul_client.compatibility import (
    CGROUP_LIMITS_FEATURE,
    LAZY_TLS_FEATURE,
    NEEDED,
    PODMAN_FEATURE,
    RESTART_FEATURE,
    SAME_PAGES_FEATURE,
    SYNC_FEATURE,
)
from phaul_client.hook_calls import HookSettings
from phaul_client.preflight.address_space import mapping_limit_bytes
from phaul_client.tree import descendants
from phaul_criu.criu import Criu, Features
from phaul_criu.version import Version
from phauld.guard import Guard
from phauld.sync_records import SyncRecords
from phauld.version import phaul_version

API_FEATURES: Final = (
    *NEEDED,
    pipe_choice.API_FEATURE,
    SYNC_FEATURE,
    LAZY_TLS_FEATURE,
    pipe_choice.LAZY_PIPE_FEATURE,
    PODMAN_FEATURE,
    RESTART_FEATURE,
    CGROUP_LIMITS_FEATURE,
    SAME_PAGES_FEATURE,
)
_CAP_SYS_RESOURCE: Final = 24  # linux/capability.h
_TCP_INFO_BYTES: Final = 128
_BYTES_ACKED_OFFSET: Final = 120  # linux/tcp.h, struct tcp_info, tcpi_bytes_acked


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Facts that hold while phauld runs."""

    node_id: str
    name: str
    criu: Criu
    criu_version: Version
    features: Features
    images_dir: Path
    insecure: bool
    incoming_limit: int
    outgoing_limit: int
    guard: Guard | None = None  #: of TLS, if there is TLS
    containers_dir: Path | None = None  #: bundles of containers that came here
    hooks: HookSettings = dataclasses.field(default_factory=HookSettings)
    sync: SyncRecords = dataclasses.field(
        default_factory=lambda: SyncRecords(Path("/nowhere"), ())
    )  #: directories that `--sync` brought here or took away

    @classmethod
    async def discover(
        cls,
        criu: Criu,
        *,
        node_id: str,
        name: str,
        images_dir: Path,
        insecure: bool,
        incoming_limit: int,
        outgoing_limit: int,
        sync: SyncRecords,
        guard: Guard | None = None,
        containers_dir: Path | None = None,
        hooks: HookSettings = HookSettings(),  # noqa: B008 - frozen
    ) -> "Node":
        """Ask criu and the kernel. Raises `CriuError`."""
        return cls(
            node_id=node_id,
            name=name,
            criu=criu,
            criu_version=await criu.version(),
            features=await criu.features(),
            images_dir=images_dir,
            insecure=insecure,
            incoming_limit=incoming_limit,
            outgoing_limit=outgoing_limit,
            guard=guard,
            containers_dir=containers_dir,
            hooks=hooks,
            sync=sync,
        )

    @property
    def api_features(self) -> tuple[str, ...]:
        """What its phauld can do beyond the oldest version of the API."""
        kernel_tls = self.guard is not None and self.guard.kernel_tls
        return (*API_FEATURES, pipe_choice.KERNEL_TLS_FEATURE) if kernel_tls else API_FEATURES

    def info(self, *, incoming: int = 0, outgoing: int = 0) -> types_pb2.NodeInfo:
        """The message that describes this node now."""
        return types_pb2.NodeInfo(
            node_id=self.node_id,
            node_name=self.name,
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            version=phaul_version(),
            api_features=self.api_features,
            kernel_release=platform.release(),
            architecture=platform.machine(),
            glibc_version=platform.libc_ver()[1],
            page_size_bytes=os.sysconf("SC_PAGE_SIZE"),
            criu=types_pb2.CriuInfo(
                version=self.criu_version.number,
                version_text=str(self.criu_version),
                path=str(self.criu.binary),
                mem_track=self.features.mem_track,
                lazy_pages=self.features.lazy_pages,
                pidfd_store=self.features.pidfd_store,
            ),
            capacity=types_pb2.Capacity(
                memory_available_bytes=memory_available_bytes(),
                images_free_bytes=shutil.disk_usage(self.images_dir).free,
                mapping_limit_bytes=mapping_limit_bytes(),
                incoming=incoming,
                incoming_limit=self.incoming_limit,
                outgoing=outgoing,
                outgoing_limit=self.outgoing_limit,
            ),
            insecure=self.insecure,
            pages_tls=self._pages_tls(),
        )

    def _pages_tls(self) -> str:
        if self.guard is None:
            return ""
        found = self.guard.kernel_tls_found
        return "the kernel" if found.works else f"phaul: {found.why}"


def memory_available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def pipe_max_size_bytes() -> int:
    """fs.pipe-max-size: the largest pipe without CAP_SYS_RESOURCE."""
    return int(Path("/proc/sys/fs/pipe-max-size").read_text(encoding="ascii"))


def may_exceed_pipe_size() -> bool:
    """Whether this process has CAP_SYS_RESOURCE."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)
    return False


def resident_bytes(pid: int) -> int:
    """Memory of a tree in RAM; 0 for one that is gone."""
    total = 0
    for each in descendants(pid):
        try:
            total += int(Path(f"/proc/{each}/statm").read_text(encoding="ascii").split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def bytes_acked(sock: socket.socket) -> int:
    """Bytes that the other end of a TCP connection has acknowledged; 0 for another kind of socket."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return 0
    return int.from_bytes(info[_BYTES_ACKED_OFFSET : _BYTES_ACKED_OFFSET + 8], sys.byteorder)
