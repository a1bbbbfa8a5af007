"""Programs with one obstacle each, on the source or on the destination: one table, as long as it is."""

from __future__ import annotations

import os
from typing import Final

from phaul_client.preflight import TcpPolicy, Wishes, read_node
from tests.preflight.arranged import (
    absent,
    added_address,
    another_program,
    client_of_ours,
    copied_program,
    covered,
    data_gone,
    data_longer,
    data_with_another_mode,
    datagram_server,
    datagrams_to_us,
    ended,
    few_inotifies,
    few_watches,
    fifo_of_ours,
    file_from_another_mount_namespace,
    lower_limit,
    may_not_ping,
    may_ping,
    pid_taken,
    pipe_to_us,
    port_taken,
    program_gone,
    stream_server,
    stream_to_us,
    tcp_server,
    terminal_of_ours,
    terminal_taken,
    without_address,
)
from tests.preflight.truth import Case

_SHARED_MEMORY: Final = """
libc.shmat.restype = ctypes.c_void_p
identity = check(libc.shmget(0, 65536, 0o1600))
kept = libc.shmat(identity, None, 0)
check(libc.shmctl(identity, 0, None))
"""
#: Opens the standard streams anew, in the program's own mount namespace.
_STREAMS: Final = """
null = os.open("/dev/null", os.O_RDWR)
for number in range(3): os.dup2(null, number)
os.close(null)
"""
_WATCHES: Final = """
watch = check(libc.inotify_init())
for number in range({count}):
    os.mkdir(path(str(number)))
    check(libc.inotify_add_watch(watch, path(str(number)).encode(), 0x100))
"""
#: A shell leads the session and waits for its child, the program; its $0 tells that the root is a child.
_LED_BY_A_SHELL: Final = ("sh", "-c", '"$@" & wait', "--fork")
_CONNECTION: Final = """
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted = server.accept()
"""


def codes(*names: str) -> frozenset[str]:
    return frozenset(names)


#: Whether criu may read the limits of another user's process here.
_MAY_READ_LIMITS: Final = bool(read_node().sys_resource)

_OWN_PIDS: Final = ("unshare", "--pid", "--fork", "setsid")

OBSTACLES: Final = (
    Case(name="no-such-process", pid=absent, codes=codes("no-such-process"), moves=False),
    Case(name="kernel-thread", pid=lambda _stage: 2, codes=codes("kernel-thread"), moves=False),
    Case(name="zombie", pid=ended, codes=codes("zombie"), moves=False),
    Case(name="phaul-itself", pid=lambda _stage: os.getpid(), codes=codes("is-phaul"), ask_criu=False, moves=False),
    Case(
        name="ancestor-of-phaul",
        pid=lambda _stage: os.getppid(),
        codes=codes("ancestor-of-phaul"),
        ask_criu=False,
        moves=False,
    ),
    Case(
        name="traced",
        program="""
tracee = os.getpid()
def trace():
    check(libc.ptrace(0x4206, tracee, 0, 0))
    open(path("traced"), "w").close()
    sleep()
child(trace)
while not os.path.exists(path("traced")):
    time.sleep(0.01)
""",
        codes=codes("traced"),
        moves=False,
    ),
    Case(name="session-of-another", wrapper=_LED_BY_A_SHELL, codes=codes("session-outside")),
    Case(
        name="session-of-another-and-no-shell-job",
        wrapper=_LED_BY_A_SHELL,
        codes=codes("session-outside"),
        wishes=Wishes(shell_job=False),
        moves=False,
    ),
    Case(name="terminal-of-another", around=terminal_of_ours, codes=codes("terminal"), moves=False),
    Case(
        name="controlling-terminal-only",
        around=terminal_of_ours,
        program="""
kept = os.open(sys.argv[2], os.O_RDWR)
null = os.open("/dev/null", os.O_RDWR)
for number in range(3): os.dup2(null, number)
fcntl.ioctl(kept, 0x540e, 1)
os.close(kept)
""",
        codes=codes("controlling-terminal"),
    ),
    Case(
        name="controlling-terminal-open",
        around=terminal_of_ours,
        program="""
kept = os.open(sys.argv[2], os.O_RDWR); fcntl.ioctl(kept, 0x540e, 1); tty = os.open("/dev/tty", os.O_RDWR)
null = os.open("/dev/null", os.O_RDWR)
for number in range(3): os.dup2(null, number)
os.close(kept)
""",
        codes=codes("terminal"),
        moves=False,
    ),
    Case(
        name="tcp-connection-refused",
        around=tcp_server,
        program='kept = socket.create_connection(("127.0.0.1", int(open(path("port")).read())))',
        codes=codes("tcp-established"),
        moves=False,
    ),
    Case(name="tcp-connection-to-itself", program=_CONNECTION, codes=codes("tcp-kept")),
    Case(
        name="tcp-connection-to-itself-and-another",
        around=tcp_server,
        program=_CONNECTION + 'kept = socket.create_connection(("127.0.0.1", int(open(path("port")).read())))',
        codes=codes("tcp-established", "tcp-kept"),
        moves=False,
    ),
    Case(
        name="tcp-connection-kept",
        program=_CONNECTION,
        codes=codes("tcp-kept"),
        wishes=Wishes(tcp=TcpPolicy.KEEP),
    ),
    Case(
        name="tcp-connection-closed",
        program=_CONNECTION,
        codes=codes("tcp-closed"),
        wishes=Wishes(tcp=TcpPolicy.CLOSE),
    ),
    Case(
        name="tcp-half-closed",
        program=_CONNECTION + "accepted[0].close()\nwhile client.getsockopt(6, 11, 1) != b'\\x08': time.sleep(0.01)",
        codes=codes("tcp-established"),
        moves=False,
    ),
    Case(
        name="tcp-not-accepted",
        program='server = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(server.getsockname())',
        codes=codes("tcp-established", "tcp-in-flight"),
        moves=False,
    ),
    Case(
        name="tcp-not-accepted-closed",
        program='server = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(server.getsockname())',
        codes=codes("tcp-closed", "tcp-in-flight"),
        wishes=Wishes(tcp=TcpPolicy.CLOSE),
    ),
    Case(
        name="address-missing",
        around=added_address,
        destination=without_address,
        program='kept = socket.create_server(("198.51.100.7", 0))',
        codes=codes("address-missing"),
        moves=False,
    ),
    Case(
        name="udp-address-missing",
        around=added_address,
        destination=without_address,
        program='kept = socket.socket(type=socket.SOCK_DGRAM); kept.bind(("198.51.100.7", 0))',
        codes=codes("address-missing"),
        moves=False,
    ),
    Case(
        name="port-taken",
        destination=port_taken,
        program="""
kept = socket.create_server(("127.0.0.1", 0))
open(path("port"), "w").write(str(kept.getsockname()[1]))
""",
        codes=codes("port-taken"),
        moves=False,
    ),
    Case(name="mptcp", program="kept = socket.socket(2, 1, 262)", codes=codes("mptcp"), moves=False),
    Case(name="vsock", program="kept = socket.socket(40, 1, 0)", codes=codes("unsupported-socket"), moves=False),
    Case(
        name="netlink-unread",
        program="""
kept = socket.socket(16, socket.SOCK_RAW, 0); kept.bind((0, 0))
kept.send(struct.pack("=IHHIIBxHiII", 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0))
select.select([kept], [], [])
""",
        codes=codes("netlink-unread"),
        moves=False,
    ),
    Case(name="unix-stream-to-another", around=stream_to_us, codes=codes("unix-peer-outside"), moves=False),
    Case(name="unix-datagram-pair-to-another", around=datagrams_to_us, codes=codes("unix-peer-outside"), moves=False),
    Case(
        name="unix-connected-to-a-server",
        around=stream_server,
        program='kept = socket.socket(socket.AF_UNIX); kept.connect(path("server"))',
        codes=codes("unix-peer-outside"),
        moves=False,
    ),
    Case(
        name="unix-datagrams-to-a-server",
        around=datagram_server,
        program='kept = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); kept.connect(path("server"))',
        codes=codes("unix-datagram-outside"),
    ),
    Case(
        name="unix-client-of-another-waits",
        around=client_of_ours,
        program="""
server = socket.socket(socket.AF_UNIX); server.bind(path("server")); server.listen()
while not os.path.exists(path("connected")): time.sleep(0.01)
""",
        codes=codes("unix-in-flight"),
    ),
    Case(
        name="unix-client-that-has-gone-waits",
        program="""
server = socket.socket(socket.AF_UNIX); server.bind(path("server")); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect(path("server")); client.close()
""",
        codes=codes("unix-in-flight"),
        moves=False,
    ),
    Case(
        name="unix-client-not-accepted-that-has-sent",
        program="""
server = socket.socket(socket.AF_UNIX); server.bind(path("server")); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect(path("server")); client.send(b"x")
""",
        codes=codes("unix-in-flight"),
        moves=False,
    ),
    Case(
        name="blocks-a-trap",
        program="signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTRAP]); os.kill(os.getpid(), signal.SIGTRAP)",
        codes=codes("trap-pending"),
        moves=False,
    ),
    Case(
        name="time-namespace-for-children",
        program="check(libc.unshare(0x80))",
        codes=codes("nested-namespace"),
        moves=False,
    ),
    Case(
        name="ping-socket",
        around=may_ping,
        destination=may_not_ping,
        program="kept = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
        codes=codes("ping-group"),
        moves=False,
    ),
    Case(
        name="inotifies-above-the-limit",
        destination=few_inotifies,
        program="for _ in range(500): check(libc.inotify_init())",
        codes=codes("inotify-limit"),
        moves=False,
    ),
    Case(
        name="inotify-watches-above-the-limit",
        destination=few_watches,
        program=_WATCHES.format(count=1500),
        codes=codes("inotify-limit"),
        moves=False,
    ),
    Case(
        name="hard-limit-above-ours",
        destination=lower_limit,
        codes=frozenset() if _MAY_READ_LIMITS else codes("resource-limit"),
    ),
    Case(name="inotifies", destination=few_inotifies, program=_WATCHES.format(count=20)),
    Case(
        name="unix-waits-to-be-accepted-by-another",
        around=stream_server,
        program='kept = socket.socket(socket.AF_UNIX); kept.setblocking(False); kept.connect(path("server"))',
        codes=codes("unix-peer-outside"),
        moves=False,
    ),
    Case(
        name="epoll-of-a-duplicated-descriptor",
        program="""
kept = select.epoll(); ends = os.pipe(); copy = os.dup(ends[0])
kept.register(ends[0], select.EPOLLIN); os.close(ends[0])
""",
    ),
    # its parent stands still until the child ends, which goes on from here in the same memory
    Case(name="waits-for-a-child-of-vfork", program="libc.vfork()", codes=codes("uninterruptible"), moves=False),
    Case(
        name="another-user",
        program="os.setgroups([]); os.setgid(65534); os.setuid(65534)",
        codes=codes() if _MAY_READ_LIMITS else codes("other-user"),
        moves=_MAY_READ_LIMITS,
    ),
    Case(
        name="user-namespace",
        wrapper=("unshare", "--user", "--map-root-user"),
        codes=codes("user-namespace"),
        moves=False,
    ),
    Case(
        name="user-namespace-with-mounts",
        wrapper=("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "setsid"),
        program=_STREAMS,
        codes=codes("mount-namespace"),
        moves=False,
    ),
    Case(
        name="mount-namespace",
        wrapper=("unshare", "--mount"),
        program=_STREAMS,
        codes=codes("mount-namespace"),
        moves=False,
    ),
    Case(
        name="message-queue",
        program='kept = check(libc.mq_open(b"/phaul", 0o102, 0o600, None)); libc.mq_unlink(b"/phaul")',
        codes=codes("mount-outside"),
        moves=False,
    ),
    Case(
        name="streams-of-another-mount-namespace",
        wrapper=("unshare", "--mount"),
        codes=codes("mount-outside", "mount-namespace"),
        moves=False,
    ),
    Case(
        name="mapped-performance-counter",
        program="""
a = struct.pack("IIQ", 1, 112, 0) + bytes(96); fd = syscall(298, a, 0, -1, -1, 0)
kept = mmap.mmap(fd, 8192)
""",
        codes=codes("device-mapping", "perf-event"),
        moves=False,
    ),
    Case(
        name="secret-memory",
        program="fd = syscall(447, 0); os.ftruncate(fd, 4096); kept = mmap.mmap(fd, 4096)",
        codes=codes("secret-memory", "device-mapping"),
        moves=False,
    ),
    Case(
        name="tun-in-a-network-namespace-of-its-own",
        wrapper=("unshare", "--net"),
        program="""
kept = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(kept, 0x400454ca, struct.pack("16sH22x", b"phaul", 0x1001))
""",
    ),
    Case(name="output-to-a-pipe", around=pipe_to_us, codes=codes("pipe-outside")),
    Case(
        name="output-to-a-fifo",
        around=fifo_of_ours,
        program='kept = os.open(path("fifo"), os.O_WRONLY)',
        codes=codes("pipe-outside"),
    ),
    Case(
        name="io-uring",
        program="kept = syscall(425, 4, ctypes.create_string_buffer(120))",
        codes=codes("io-uring"),
        moves=False,
    ),
    Case(name="userfaultfd", program="kept = syscall(323, 0)", codes=codes("userfaultfd"), moves=False),
    Case(
        name="perf-event",
        program='a = struct.pack("IIQ", 1, 112, 0) + bytes(96); kept = syscall(298, a, 0, -1, -1, 0)',
        codes=codes("perf-event"),
        moves=False,
    ),
    Case(
        name="bpf-map",
        program='kept = syscall(321, 0, struct.pack("IIII", 2, 4, 4, 1) + bytes(56), 72)',
        codes=codes("bpf"),
        moves=False,
    ),
    Case(
        name="landlock",
        program='kept = syscall(444, struct.pack("Q", 1), 8, 0)',
        codes=codes("landlock"),
        moves=False,
    ),
    Case(name="kvm", program='kept = open("/dev/kvm", "rb+", 0)', codes=codes("kvm"), moves=False),
    Case(name="fuse", program='kept = open("/dev/fuse", "rb+", 0)', codes=codes("fuse"), moves=False),
    Case(
        name="tun-device",
        program="""
kept = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(kept, 0x400454ca, struct.pack("16sH22x", b"phaul-%d", 0x1001))
""",
        codes=codes("tun"),
        moves=False,
    ),
    Case(name="block-device", program='kept = open("/dev/loop0", "rb", 0)', codes=codes("device"), moves=False),
    Case(
        name="control-device", program='kept = open("/dev/loop-control", "rb", 0)', codes=codes("device"), moves=False
    ),
    Case(name="kernel-log", program='kept = open("/dev/kmsg", "rb", 0)'),
    Case(
        name="init-without-proc-that-may-not-mount-one",
        wrapper=(*_OWN_PIDS, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"),
        codes=codes("no-proc"),
        moves=False,
    ),
    Case(
        name="file-of-its-own-process-in-the-proc-of-the-node",
        wrapper=_OWN_PIDS,
        program='kept = open("/proc/self/stat")',
        codes=codes("process-file"),
        moves=False,
    ),
    Case(
        name="init-without-proc-in-a-deleted-directory",
        wrapper=_OWN_PIDS,
        program='os.mkdir(path("gone")); os.chdir(path("gone")); os.rmdir(path("gone"))',
        codes=codes("no-proc"),
        moves=False,
    ),
    Case(name="system-v-shared-memory", program=_SHARED_MEMORY, codes=codes("sysv-shared-memory"), moves=False),
    Case(
        name="deleted-file",
        program='kept = open(path("gone"), "wb"); kept.write(bytes(100)); kept.flush(); os.unlink(path("gone"))',
        codes=codes("ghost-file"),
    ),
    Case(
        name="deleted-file-of-3-megabytes",
        program='kept = open(path("gone"), "wb"); kept.write(bytes(3 << 20)); kept.flush(); os.unlink(path("gone"))',
        codes=codes("ghost-file"),
    ),
    Case(
        name="deleted-file-over-the-limit",
        program='kept = open(path("gone"), "wb"); kept.write(bytes(3 << 20)); kept.flush(); os.unlink(path("gone"))',
        codes=codes("ghost-file-too-large"),
        wishes=Wishes(ghost_limit_bytes=1 << 20),
        moves=False,
    ),
    Case(
        name="temporary-file",
        program="kept = tempfile.TemporaryFile(dir=directory); kept.write(bytes(5000)); kept.flush()",
        codes=codes("ghost-file"),
    ),
    Case(
        name="deleted-mapped-file",
        program="""
file = open(path("gone"), "wb+"); file.truncate(8192); kept = mmap.mmap(file.fileno(), 8192)
kept[5] = 1; os.unlink(path("gone")); file.close()
""",
        codes=codes("ghost-file"),
    ),
    Case(
        name="deleted-mapped-file-over-the-limit",
        program="""
file = open(path("gone"), "wb+"); file.write(bytes(3 << 20)); file.flush(); kept = mmap.mmap(file.fileno(), 3 << 20)
os.unlink(path("gone")); file.close()
""",
        codes=codes("ghost-file-too-large"),
        wishes=Wishes(ghost_limit_bytes=1 << 20),
        moves=False,
    ),
    Case(
        name="name-lost-but-linked",
        program="""
kept = open(path("name"), "wb"); kept.write(b"x"); kept.flush()
os.link(path("name"), path("other")); os.unlink(path("name"))
""",
        codes=codes("link-remap"),
    ),
    Case(
        name="flock",
        program='kept = open(path("lock"), "wb"); fcntl.flock(kept, fcntl.LOCK_EX)',
        codes=codes("file-lock"),
    ),
    Case(
        name="posix-lock",
        program='kept = open(path("lock"), "wb"); fcntl.lockf(kept, fcntl.LOCK_EX)',
        codes=codes("file-lock"),
    ),
    Case(
        name="lock-of-an-open-file",
        program='kept = open(path("lock"), "wb"); fcntl.fcntl(kept, 37, struct.pack("hhqqi4x", 1, 0, 0, 0, 0))',
        codes=codes("file-lock"),
    ),
    Case(
        name="lease",
        program='kept = open(path("lock"), "wb"); fcntl.fcntl(kept, fcntl.F_SETLEASE, fcntl.F_WRLCK)',
        codes=codes("file-lease"),
        moves=False,
        ask_criu=False,  # which can, as the file is empty and it has killed the tree before it restores it
    ),
    Case(
        name="lease-that-is-being-broken",  # criu moves it, and it gets its signal twice
        program="""
signal.signal(signal.SIGIO, signal.SIG_IGN)
open(path("f"), "w").write("content"); kept = open(path("f")); fcntl.fcntl(kept, fcntl.F_SETLEASE, fcntl.F_RDLCK)
try:
    os.open(path("f"), os.O_WRONLY | os.O_NONBLOCK)
except BlockingIOError:
    pass
""",
        codes=codes("file-lease"),
        moves=False,
        ask_criu=False,
    ),
    Case(
        name="flock-not-allowed",
        program='kept = open(path("lock"), "wb"); fcntl.flock(kept, fcntl.LOCK_EX)',
        codes=codes("file-lock"),
        wishes=Wishes(file_locks=False),
        moves=False,
    ),
    Case(
        name="epoll-of-a-closed-descriptor",
        program="""
kept = select.epoll(); ends = os.pipe(); kept.register(ends[0], select.EPOLLIN)
child(sleep); os.close(ends[0])
""",
        codes=codes("epoll-closed"),
        moves=False,
    ),
    Case(
        name="pidfd-of-another", program="kept = os.pidfd_open(os.getppid())", codes=codes("pidfd-outside"), moves=False
    ),
    Case(
        name="mount-of-another",
        around=file_from_another_mount_namespace,
        codes=codes("mount-outside"),
        moves=False,
    ),
    Case(
        name="covered-by-a-mount",
        around=covered,
        program="""
kept = open(path("data/file"), "wb")
check(libc.mount(b"none", path("data").encode(), b"tmpfs", 0, None))
""",
        codes=codes("file-covered"),
        moves=False,
    ),
    Case(
        name="init-of-its-namespace-is-outside",
        wrapper=("unshare", "--pid", "--fork", "--kill-child", "setsid"),
        program="busy(os.setsid)",
        move_child=True,
        codes=codes("pid-namespace-part"),
        moves=False,
    ),
    Case(
        name="nested-pid-namespace",
        program="""
check(libc.unshare(0x20000000))
child(sleep)
""",
        codes=codes("nested-namespace"),
        moves=False,
    ),
    Case(
        name="nested-uts-namespace",
        program="busy(lambda: check(libc.unshare(0x04000000)))",
        codes=codes("nested-namespace"),
        moves=False,
    ),
    Case(
        name="session-from-outside-its-namespace",
        wrapper=("unshare", "--pid", "--fork"),
        codes=codes("session-outside-namespace"),
        moves=False,
    ),
    Case(
        name="first-thread-has-ended",
        program="""
def others():
    while " (zombie)" not in open(f"/proc/self/task/{os.getpid()}/status").read(): time.sleep(0.01)
    open(path("ready"), "w").close(); sleep()
threading.Thread(target=others).start()
libc.pthread_exit(None)
""",
        codes=codes("first-thread-ended"),
        moves=False,
    ),
    Case(
        name="program-missing-there",
        argv=("{directory}/program", "1000"),
        around=copied_program,
        destination=program_gone,
        codes=codes("executable-missing"),
        moves=False,
    ),
    Case(
        name="program-of-another-build-there",
        argv=("{directory}/program", "1000"),
        around=copied_program,
        destination=another_program,
        codes=codes("file-build-id"),
        moves=False,
    ),
    Case(
        name="file-missing-there",
        program='kept = open(path("data"), "wb"); kept.write(b"data"); kept.flush()',
        destination=data_gone,
        codes=codes("file-missing"),
        moves=False,
    ),
    Case(
        name="file-longer-there",  # open for reading only: one that is written to may be shared, and grow
        program='open(path("data"), "wb").write(b"data"); kept = open(path("data"), "rb")',
        destination=data_longer,
        codes=codes("file-size"),
        moves=False,
    ),
    Case(
        name="file-mode-differs-there",
        program='kept = open(path("data"), "wb"); kept.write(b"data"); kept.flush()',
        destination=data_with_another_mode,
        codes=codes("file-mode"),
        moves=False,
    ),
    Case(
        name="directory-missing-there",
        program='os.mkdir(path("data")); os.chdir(path("data"))',
        destination=data_gone,
        codes=codes("directory-missing"),
        moves=False,
    ),
    Case(
        name="terminal-taken-there",
        program="master, slave = os.openpty()",
        destination=terminal_taken,
        codes=codes("terminal-taken"),
        moves=False,
    ),
    Case(name="pid-taken-there", destination=pid_taken, codes=codes("pid-taken"), moves=False),
)
