"""The options of criu's operations, and the rpc requests made of them.

Descriptors: criu opens `images_dir_fd` and `work_dir_fd` through /proc of the process that made the swrk socket pair,
so these are numbers in *our* process. `page_server_fd` and the descriptors of `inherit_fds` are numbers in *criu's*
process: they must be passed on when criu is started, which keeps the numbers (`passed_fds` lists them).

A field left at None or at its empty value is not sent: criu's own default, or its configuration file, holds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from phaul_criu.rpc import rpc_pb2

#: pycriu's messages are untyped.
CriuRequest: TypeAlias = Any
CriuResponse: TypeAlias = Any


class NetworkLock(enum.Enum):
    """How criu keeps packets from the frozen tree's TCP connections; both ends must use the same."""

    IPTABLES = rpc_pb2.IPTABLES
    NFTABLES = rpc_pb2.NFTABLES
    SKIP = rpc_pb2.SKIP


class CgroupMode(enum.Enum):
    """What criu does about the cgroups of the tree."""

    IGNORE = rpc_pb2.IGNORE
    NONE = rpc_pb2.CG_NONE
    PROPS = rpc_pb2.PROPS
    SOFT = rpc_pb2.SOFT
    FULL = rpc_pb2.FULL
    STRICT = rpc_pb2.STRICT


class PreDumpMode(enum.Enum):
    """SPLICE freezes longer; READ copies the memory of the running tree with process_vm_readv."""

    SPLICE = rpc_pb2.SPLICE
    READ = rpc_pb2.VM_READ


@dataclass(frozen=True, slots=True, kw_only=True)
class InheritFd:
    """On restore, the file that criu knows as `key` ("pipe:[123]", "socket:[123]", …) is our descriptor `fd`."""

    key: str
    fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryOptions:
    """Where an operation keeps its files. `images_dir_fd` and `work_dir_fd` must stay open until it has ended."""

    #: Directory of the images.
    images_dir_fd: int
    #: Directory of the log, the statistics and the lazy-pages socket; None: the images directory.
    work_dir_fd: int | None = None
    #: Name of the log file in the work directory.
    log_file: str = "criu.log"
    #: 1 errors, 2 warnings, 3 information, 4 debugging. phaul reads the first two; the others cost the pause a line,
    #: and so a system call, for each descriptor of each task.
    log_level: int = 2

    @property
    def log_dir_fd(self) -> int:
        """The directory into which criu writes its log and its statistics."""
        return self.images_dir_fd if self.work_dir_fd is None else self.work_dir_fd

    @property
    def passed_fds(self) -> tuple[int, ...]:
        """The descriptors that criu must be started with."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeOptions(DirectoryOptions):
    """What dump and restore have in common."""

    #: Ask for notifications. Without them the tree cannot be held.
    notify: bool = True
    #: The tree has a terminal, or its session leader is outside.
    shell_job: bool = False
    #: Carry established TCP connections; needs the same IP address on the other side.
    tcp_established: bool = False
    #: Close established TCP connections: the program sees a reset.
    tcp_close: bool = False
    #: Leave out TCP connections that the program has not accepted yet.
    tcp_skip_in_flight: bool = False
    #: Allow unix sockets whose other end is outside the tree.
    ext_unix_sk: bool = False
    file_locks: bool = False
    #: Allow files whose name is gone but for another hard link.
    link_remap: bool = False
    #: Open any path of a device file that is not the one it was opened by.
    evasive_devices: bool = False
    skip_file_rwx_check: bool = False
    manage_cgroups_mode: CgroupMode = CgroupMode.IGNORE
    #: None: NFTABLES if `tcp_established`, else SKIP. The lock costs 45 ms of the freeze, and 0.13 ms for each
    #: connection (`connection_lock` costs less); it must be removed after a migration, see `network_lock`.
    #: Without established connections there is nothing to lock.
    network_lock: NetworkLock | None = None
    #: What criu shall leave to the caller: "mnt[/data]:data", "unix[123]", "net[123]:name", "file[…]", …
    external: tuple[str, ...] = ()
    inherit_fds: tuple[InheritFd, ...] = ()
    #: Root directory of the tree's mount namespace.
    root: str | None = None
    lsm_profile: str | None = None
    #: criu's own time limit for collecting (freezing) the tree; 10 s if None.
    collect_timeout_seconds: int | None = None
    #: Delete pages from parent images as soon as they are superseded (dump) or restored (restore).
    auto_dedup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpOptions(TreeOptions):
    """Options of a dump and of a pre-dump."""

    log_file: str = "dump.log"
    #: Root of the tree.
    pid: int
    #: Path of the previous round's images, relative to the images directory (or absolute).
    parent_img: str | None = None
    #: Note which pages are written from now on; needs a kernel with soft-dirty tracking.
    track_mem: bool = False
    leave_running: bool = False
    #: A connected socket to a page server; without it the pages go to the images directory.
    page_server_fd: int | None = None
    #: Leave the pages in the tree and serve them, after `post-dump`, to the other end of this connected stream socket.
    lazy_pages_fd: int | None = None
    #: Deleted but open files up to this size are put into the images.
    ghost_limit_bytes: int | None = None
    pre_dump_mode: PreDumpMode = PreDumpMode.SPLICE
    #: Path of the freezer cgroup that holds the tree and nothing else.
    freeze_cgroup: str | None = None
    #: Descriptor of ours into which criu writes one zero byte when the lazy pages are being served.
    status_fd: int | None = None
    #: Descriptors that criu shall have open until its end, without knowing of them.
    kept_fds: tuple[int, ...] = ()

    @property
    def passed_fds(self) -> tuple[int, ...]:
        inherited = tuple(item.fd for item in self.inherit_fds)
        sockets = (self.page_server_fd, self.lazy_pages_fd)
        return (*inherited, *(fd for fd in sockets if fd is not None), *self.kept_fds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions(TreeOptions):
    """Options of a restore."""

    log_file: str = "restore.log"
    #: Memory comes from a `criu lazy-pages` child in the same work directory.
    lazy_pages: bool = False
    #: Make the tree a child of criu's parent instead of criu's orphan.
    sibling: bool = False

    @property
    def passed_fds(self) -> tuple[int, ...]:
        return tuple(item.fd for item in self.inherit_fds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageServerOptions(DirectoryOptions):
    """Options of a page server. Its socket is an argument of its own: a page server is good for one connection."""

    log_file: str = "page-server.log"
    #: Path of the previous round's images, relative to the images directory (or absolute).
    parent_img: str | None = None
    #: Delete pages from parent images as soon as they are superseded.
    auto_dedup: bool = False


#: Fields that have another name in criu_opts.
_CRIU_NAMES: Final[Mapping[str, str]] = {
    "notify": "notify_scripts",
    "collect_timeout_seconds": "timeout",
    "ghost_limit_bytes": "ghost_limit",
    "sibling": "rst_sibling",
}
#: Fields that have another form in criu_opts.
_FORMED_BY_HAND: Final = frozenset({"inherit_fds", "page_server_fd", "lazy_pages_fd", "network_lock", "kept_fds"})


def dump_request(options: DumpOptions, config_file: str | None = None) -> CriuRequest:
    """Dump the tree. `config_file` is the path of a file that holds `dump_config`, needed unless that is empty."""
    request = _request(rpc_pb2.DUMP, options)
    if config_file is not None:
        request.opts.config_file = config_file
    return request


def dump_config(options: DumpOptions) -> str:
    """What criu takes from a configuration file only.

    A dump with lazy pages ignores `ps.fd` and listens for the first stranger on every address; `ps-socket` of a file
    is not ignored (criu/cr-service.c, setup_opts_from_req; criu/page-xfer.c, cr_page_server).
    """
    return "" if options.lazy_pages_fd is None else f"ps-socket {options.lazy_pages_fd}\n"


def pre_dump_request(options: DumpOptions) -> CriuRequest:
    """Copy the memory of the tree, which runs on."""
    return _request(rpc_pb2.SINGLE_PRE_DUMP, options)


def restore_request(options: RestoreOptions) -> CriuRequest:
    """Restore the tree."""
    return _request(rpc_pb2.RESTORE, options)


def page_server_request(options: PageServerOptions, socket_fd: int) -> CriuRequest:
    """Receive pages from the connected socket that is number `socket_fd` in criu; WAIT_PID may follow."""
    request = _request(rpc_pb2.PAGE_SERVER_CHLD, options, keep_open=True)
    request.opts.ps.fd = socket_fd
    return request


def wait_pid_request(pid: int) -> CriuRequest:
    """Wait for the page server that criu reported as `pid`."""
    return rpc_pb2.criu_req(type=rpc_pb2.WAIT_PID, pid=pid)


def version_request() -> CriuRequest:
    """Ask for criu's version."""
    return rpc_pb2.criu_req(type=rpc_pb2.VERSION)


def feature_request() -> CriuRequest:
    """Ask for the features that criu tells of over rpc."""
    features = rpc_pb2.criu_features(mem_track=True, lazy_pages=True, pidfd_store=True)
    return rpc_pb2.criu_req(type=rpc_pb2.FEATURE_CHECK, features=features)


def check_request(options: DirectoryOptions) -> CriuRequest:
    """Ask whether the kernel has what criu needs."""
    return _request(rpc_pb2.CHECK, options)


def cpuinfo_dump_request(options: DirectoryOptions) -> CriuRequest:
    """Write cpuinfo.img into the images directory."""
    return _request(rpc_pb2.CPUINFO_DUMP, options)


def cpuinfo_check_request(options: DirectoryOptions) -> CriuRequest:
    """Compare this CPU with the cpuinfo.img in the images directory."""
    return _request(rpc_pb2.CPUINFO_CHECK, options)


def notify_answer(success: bool) -> CriuRequest:
    """The answer to a notification."""
    return rpc_pb2.criu_req(type=rpc_pb2.NOTIFY, notify_success=success)


def _request(kind: int, options: DirectoryOptions, *, keep_open: bool = False) -> CriuRequest:
    request = rpc_pb2.criu_req(type=kind, opts=_criu_opts(options))
    if keep_open:
        request.keep_open = True
    return request


def _criu_opts(options: DirectoryOptions) -> Any:
    opts = rpc_pb2.criu_opts()
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _FORMED_BY_HAND or value is None or value is False or value == ():
            continue
        name = _CRIU_NAMES.get(field.name, field.name)
        if isinstance(value, tuple):
            getattr(opts, name).extend(value)
        else:
            setattr(opts, name, value.value if isinstance(value, enum.Enum) else value)
    if isinstance(options, TreeOptions):
        for item in options.inherit_fds:
            opts.inherit_fd.add(key=item.key, fd=item.fd)
        default_lock = NetworkLock.NFTABLES if options.tcp_established else NetworkLock.SKIP
        opts.network_lock = (options.network_lock or default_lock).value
    if isinstance(options, DumpOptions):
        if options.page_server_fd is not None:
            opts.ps.fd = options.page_server_fd
        if options.lazy_pages_fd is not None:
            opts.lazy_pages = True
    return opts
