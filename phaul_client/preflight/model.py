"""Facts about a process tree and about a node, as values (pure). PIDs are those of the PID namespace of the reader.
Sizes are bytes. Paths are as the tree's own processes see them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from phaul_client.preflight.address_space_model import NO_SPACE, AddressSpace

#: Kinds of namespaces, as in /proc/PID/ns.
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


class FileKind(enum.Enum):
    """What an open file is."""

    REGULAR = "file"
    DIRECTORY = "directory"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    FIFO = "fifo"
    PIPE = "pipe"
    SOCKET = "socket"
    ANONYMOUS = "anonymous inode"
    MEMFD = "memfd"
    NAMESPACE = "namespace"
    SYMBOLIC_LINK = "symbolic link"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of the tree."""

    pid: int
    parent_pid: int
    name: str
    #: One letter, as in /proc/PID/stat.
    state: str
    #: Its ids in its PID namespaces, from the reader's to its own; empty: unknown.
    namespace_pids: tuple[int, ...]
    #: Process group and session, as seen by the reader; 0: outside the reader's PID namespace.
    group: int
    session: int
    #: The session's leader as seen from the process's own PID namespace; 0: outside of it.
    namespace_session: int
    #: Device number of the controlling terminal; 0: none.
    terminal: int
    is_kernel_thread: bool
    #: Who traces it; 0: nobody.
    tracer_pid: int
    threads: tuple[int, ...]
    #: Threads that did not leave state D while they were watched.
    stuck_threads: tuple[int, ...]
    #: Real, effective and saved ids.
    user_ids: tuple[int, ...]
    group_ids: tuple[int, ...]
    #: "kind" → inode of the namespace; kinds as in NAMESPACES.
    namespaces: dict[str, int]
    #: Inode of the PID namespace of its future children.
    pid_namespace_for_children: int
    executable: str
    working_directory: str
    root_directory: str
    memory_bytes: int
    #: Permitted, inheritable and ambient ones, as bits; 0: none, or unknown.
    capabilities: int = 0
    #: Inode of the time namespace of its future children; 0: unknown.
    time_namespace_for_children: int = 0
    #: Its cgroups, as /proc/PID/cgroup has them.
    cgroups: str = ""
    #: A SIGTRAP waits for it, which it blocks.
    trap_waits: bool = False
    #: The process group in the foreground of its controlling terminal; -1: none.
    foreground: int = -1
    address_space: AddressSpace = NO_SPACE
    #: Whether something could be made in its working directory, which is neither deleted nor of a read-only mount.
    working_directory_writable: bool = True

    @property
    def own_pid(self) -> int:
        """Its id in its own PID namespace."""
        return self.namespace_pids[-1] if self.namespace_pids else self.pid

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """One file descriptor."""

    pid: int
    fd: int
    kind: FileKind
    #: What /proc/PID/fd/N points to, without " (deleted)".
    path: str
    deleted: bool = False
    readable: bool = True
    writable: bool = False
    #: st_mode, st_ino, st_rdev, st_size, st_blocks in bytes, st_nlink; 0 for pipes and sockets but for the inode.
    mode: int = 0
    inode: int = 0
    device_number: int = 0
    size_bytes: int = 0
    allocated_bytes: int = 0
    links: int = 0
    #: Id of its mount; None: not asked for.
    mount_id: int | None = None
    #: Whether the path leads to this very file; None: not asked for.
    reachable: bool | None = None
    #: Locks held through it, such as "FLOCK WRITE 0-EOF" or "POSIX READ 0-99".
    locks: tuple[str, ...] = ()
    #: SHA-256 of its last bytes, see `proc_files.tail_digest`; None: it is not written to, or not asked for.
    tail_sha256: bytes | None = None
    #: For an epoll: what it watches though the process has closed it under that number and any other.
    watches_closed: tuple[int, ...] = ()
    #: For a pidfd: the process; -1: gone.
    target_pid: int | None = None
    #: For a pty master: the number of its slave.
    terminal_index: int | None = None
    #: For a pipe: it keeps the boundaries of what was written (O_DIRECT).
    packets: bool = False
    entries: int = -1  #: how much an inotify or epoll of its own watches; -1: it is none, or its parent's

    def __str__(self) -> str:
        return f"fd {self.fd} of pid {self.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedFile:
    """One mapping of a file, or the first of several alike."""

    pid: int
    path: str
    kind: FileKind
    deleted: bool = False
    shared: bool = False
    writable: bool = False
    executable: bool = False
    mode: int = 0
    inode: int = 0
    device_number: int = 0
    size_bytes: int = 0
    allocated_bytes: int = 0
    links: int = 0
    #: Length of the mapping.
    length_bytes: int = 0
    build_id: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InetSocket:
    """A TCP, UDP, UDP-Lite, ICMP or raw socket of the tree."""

    #: "tcp", "udp", "udplite", "icmp" or "raw".
    protocol: str
    inode: int
    #: Who has it open.
    pid: int
    #: In a network namespace other than the reader's.
    own_network_namespace: bool
    #: Number of the state in /proc/net/tcp; 7: neither bound nor connected.
    state: int = 7
    local_address: str = ""
    local_port: int = 0
    remote_address: str = ""
    remote_port: int = 0
    #: For a listening socket the connections that wait to be accepted, otherwise bytes that wait to be read.
    waiting: int = 0
    #: The other end is a socket of the same network namespace, of a process that is not of the tree.
    peer_outside: bool = False
    #: A UDP socket that collects what is sent (UDP_CORK).
    corked: bool = False

    @property
    def local(self) -> str:
        return _endpoint(self.local_address, self.local_port)

    @property
    def remote(self) -> str:
        return _endpoint(self.remote_address, self.remote_port)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket:
    """A unix socket of the tree."""

    inode: int
    pid: int
    #: 1 stream, 2 datagram, 5 seqpacket.
    type: int
    listening: bool
    #: Path, "@abstract", or empty.
    name: str
    #: Inode of the other end; 0: none.
    peer_inode: int
    #: Name of the other end, if it has one.
    peer_name: str = ""
    #: Inodes of the connections that wait to be accepted; 0 stands for one that was closed already.
    waiting: tuple[int, ...] = ()
    #: Waits in the accept queue of this socket.
    queued_at: int | None = None
    #: Bytes that it has sent and the other end has not read.
    unread_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSocket:
    """A socket that is none of those: netlink, packet, vsock, …"""

    inode: int
    pid: int
    fd: int
    #: As the kernel names it: "NETLINK", "PACKET", "AF_VSOCK", "MPTCP", … Empty: unknown.
    protocol: str
    #: Bytes that wait to be read.
    waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideEnd:
    """The other end of a pipe, fifo or unix socket, in a process that is not of the tree."""

    #: What /proc/PID/fd shows: "pipe:[1]", "socket:[2]", or a fifo's path.
    target: str
    pid: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeFacts:
    """A tree as it was when it was read. `processes` is empty if there was none."""

    root_pid: int
    processes: tuple[Process, ...] = ()
    open_files: tuple[OpenFile, ...] = ()
    mapped_files: tuple[MappedFile, ...] = ()
    #: Special mappings, such as "[uprobes]": (pid, name).
    special_mappings: tuple[tuple[int, str], ...] = ()
    inet_sockets: tuple[InetSocket, ...] = ()
    unix_sockets: tuple[UnixSocket, ...] = ()
    other_sockets: tuple[OtherSocket, ...] = ()
    outside_ends: tuple[OutsideEnd, ...] = ()
    mount_ids: frozenset[int] = frozenset()  #: of all mounts that the tree can see
    #: The reader and its ancestors.
    reader_lineage: tuple[int, ...] = ()
    #: Namespaces of the reader, and its real user and group id.
    reader_namespaces: dict[str, int] = field(default_factory=dict)
    reader_ids: tuple[int, int] = (0, 0)
    hard_limits: tuple[tuple[str, int], ...] = ()  #: the largest of each kind (setrlimit)
    seconds: float = 0.0  #: that reading took

    @property
    def root(self) -> Process | None:
        return self.processes[0] if self.processes else None

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(process.pid for process in self.processes)

    @property
    def own_pid_namespace(self) -> bool:
        """The root is the init of a PID namespace of its own: its ids cannot be taken elsewhere."""
        root = self.root
        return root is not None and len(root.namespace_pids) > 1 and root.own_pid == 1

    def process(self, pid: int) -> str:
        """How a process is called in messages."""
        return next((str(process) for process in self.processes if process.pid == pid), f"pid {pid}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node is. An empty or zero field is unknown, and nothing is concluded from it."""

    name: str = ""
    architecture: str = ""
    kernel_release: str = ""
    glibc_version: str = ""
    page_size_bytes: int = 0
    #: major * 10000 + minor * 100 + sublevel.
    criu_version: int = 0
    #: criu can restore lazily (userfaultfd).
    lazy_pages: bool | None = None
    #: As in /proc/cpuinfo.
    cpu_flags: frozenset[str] = frozenset()
    memory_available_bytes: int = 0
    images_free_bytes: int = 0
    pipe_max_bytes: int = 0
    #: phaul has CAP_SYS_RESOURCE: limits of pipes and of other users' processes do not hold for it. None: unknown.
    sys_resource: bool | None = None
    #: What phaul has, as bits. None: unknown.
    capabilities: int | None = None


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
