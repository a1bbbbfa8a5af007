"""Programs without an obstacle: preflight must not stand in their way, and criu must move them."""

from __future__ import annotations

from typing import Final

from tests.preflight.arranged import may_ping
from tests.preflight.truth import Case

CLEAN: Final = (
    Case(name="sleeps"),
    Case(name="reads-a-file", program='kept = open("/etc/passwd"); kept.read(10)'),
    Case(name="appends-to-a-log", program='log = open(path("log"), "ab", 0); log.write(b"hello\\n")'),
    Case(name="has-a-directory-open", program="kept = os.open(directory, os.O_RDONLY)"),
    Case(
        name="read-lease",
        program="""
open(path("f"), "w").write("content"); kept = open(path("f")); fcntl.fcntl(kept, fcntl.F_SETLEASE, fcntl.F_RDLCK)
""",
    ),
    Case(
        name="ping-socket-where-allowed",
        around=may_ping,
        program="kept = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
    ),
    Case(
        name="blocks-other-signals",
        program="signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); os.kill(os.getpid(), signal.SIGUSR1)",
    ),
    Case(name="has-a-path-only", program='kept = os.open("/etc/passwd", os.O_PATH)'),
    Case(name="pipe-of-its-own", program='ends = os.pipe(); os.write(ends[1], b"unread")'),
    Case(
        name="ten-children-with-pipes",
        program="""
ends = os.pipe()
for number in range(10):
    child(lambda: (os.write(ends[1], b"x"), sleep()))
for number in range(10):
    os.read(ends[0], 1)
""",
    ),
    Case(name="unix-socketpair", program='kept = socket.socketpair(); kept[0].send(b"unread")'),
    Case(
        name="unix-datagram-pair",
        program='kept = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); kept[0].send(b"unread")',
    ),
    Case(
        name="unix-server-and-client",
        program="""
server = socket.socket(socket.AF_UNIX); server.bind(path("socket")); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect(path("socket"))
accepted = server.accept()
""",
    ),
    Case(
        name="unix-client-not-accepted",
        program="""
server = socket.socket(socket.AF_UNIX); server.bind(path("socket")); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect(path("socket"))
""",
    ),
    Case(
        name="unix-abstract-listener",
        program='kept = socket.socket(socket.AF_UNIX); kept.bind("\\0phaul-" + directory); kept.listen()',
    ),
    Case(
        name="unix-descriptor-in-flight",
        program="""
kept = socket.socketpair()
with open("/etc/passwd") as file:
    socket.send_fds(kept[0], [b"x"], [file.fileno()])
""",
    ),
    Case(name="unix-unbound", program="kept = socket.socket(socket.AF_UNIX)"),
    Case(name="eventfd", program="kept = os.eventfd(3)"),
    Case(
        name="epoll",
        program="""
kept = select.epoll(); ends = os.pipe(); event = os.eventfd(0)
kept.register(ends[0], select.EPOLLIN); kept.register(event, select.EPOLLIN)
""",
    ),
    Case(
        name="epoll-shared-with-a-child",
        program="kept = select.epoll(); ends = os.pipe(); kept.register(ends[0], 1); child(sleep)",
    ),
    Case(name="timerfd", program="kept = check(libc.timerfd_create(1, 0))"),
    Case(
        name="signalfd",
        program="mask = (ctypes.c_ulong * 16)(1 << 9); kept = check(libc.signalfd(-1, mask, 0))",
    ),
    Case(
        name="inotify",
        program="kept = check(libc.inotify_init()); check(libc.inotify_add_watch(kept, directory.encode(), 0xfff))",
    ),
    Case(
        name="fanotify",
        program="""
kept = check(libc.fanotify_init(0, 0))
check(libc.fanotify_mark(kept, 1, ctypes.c_ulong(0x20), -100, directory.encode()))
""",
    ),
    Case(name="memfd", program='kept = os.memfd_create("memory"); os.write(kept, bytes(9000))'),
    Case(
        name="memfd-mapped",
        program='kept = os.memfd_create("m"); os.ftruncate(kept, 8192); memory = mmap.mmap(kept, 8192)',
    ),
    Case(name="shared-anonymous-memory", program="kept = mmap.mmap(-1, 65536); kept[0] = 1; child(sleep)"),
    Case(
        name="file-mapped-private",
        program='file = open("/etc/passwd"); kept = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)',
    ),
    Case(
        name="file-mapped-shared",
        program="""
file = open(path("data"), "wb+"); file.truncate(8192)
kept = mmap.mmap(file.fileno(), 8192); kept[0] = 7
""",
    ),
    Case(
        name="posix-shared-memory",
        program="""
file = open("/dev/shm/" + os.path.basename(directory), "wb+"); file.truncate(8192)
kept = mmap.mmap(file.fileno(), 8192); os.unlink(file.name)
""",
        codes=frozenset({"ghost-file"}),
    ),
    Case(name="tcp-listener", program='kept = socket.create_server(("127.0.0.1", 0))'),
    Case(name="tcp-listener-any", program='kept = socket.create_server(("", 0))'),
    Case(name="tcp6-listener", program='kept = socket.create_server(("::1", 0), family=socket.AF_INET6)'),
    Case(
        name="tcp6-listener-for-both",
        program='kept = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)',
    ),
    Case(name="tcp-unbound", program="kept = socket.socket()"),
    Case(name="tcp-bound-only", program='kept = socket.socket(); kept.bind(("127.0.0.1", 0))'),
    Case(name="udp-bound", program='kept = socket.socket(type=socket.SOCK_DGRAM); kept.bind(("127.0.0.1", 0))'),
    Case(name="udp-unbound", program="kept = socket.socket(type=socket.SOCK_DGRAM)"),
    Case(
        name="udp-connected",
        program='kept = socket.socket(type=socket.SOCK_DGRAM); kept.connect(("127.0.0.1", 9))',
    ),
    Case(name="netlink-idle", program="kept = socket.socket(16, socket.SOCK_RAW, 0); kept.bind((0, 0))"),
    Case(name="packet-socket", program="kept = socket.socket(17, socket.SOCK_DGRAM, 0)"),
    Case(name="raw-socket", program="kept = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    Case(
        name="fifty-threads",
        program="for number in range(50): threading.Thread(target=sleep, daemon=True).start()",
    ),
    Case(
        name="interval-timer", program="signal.signal(14, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 5, 5)"
    ),
    Case(
        name="pending-signals",
        program="signal.pthread_sigmask(0, [10, 12]); os.kill(os.getpid(), 10); os.kill(os.getpid(), 12)",
    ),
    Case(
        name="seccomp-filter",
        program="""
check(libc.prctl(38, 1, 0, 0, 0))
allow = struct.pack("HBBI", 6, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(allow)
program = struct.pack("HxxxxxxP", 1, ctypes.addressof(buffer))
check(libc.prctl(22, 2, program, 0, 0))
""",
    ),
    Case(name="another-directory", program='os.mkdir(path("work")); os.chdir(path("work"))'),
    Case(name="nice-and-limits", program="os.nice(3); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"),
    Case(name="locked-memory", program="memory = mmap.mmap(-1, 65536); check(libc.mlockall(1))"),
    Case(name="zombie-child", program="os.waitid(os.P_PID, child(lambda: None), os.WEXITED | os.WNOWAIT)"),
    Case(
        name="stopped-child",
        program="pid = child(sleep); os.kill(pid, 19); os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)",
        codes=frozenset({"stopped"}),
    ),
    Case(
        name="fifo-with-both-ends",
        program='os.mkfifo(path("fifo")); reader = os.open(path("fifo"), os.O_RDWR)',
    ),
    Case(name="proc-self-open", program='kept = open("/proc/self/status"); kept.read(10)'),
    Case(name="proc-file-open", program='kept = open("/proc/meminfo"); kept.read(10)'),
    Case(name="sys-file-open", program='kept = open("/sys/kernel/mm/transparent_hugepage/enabled"); kept.read(1)'),
    Case(
        name="memory-devices",
        program='kept = [open(f"/dev/{name}", "rb", 0) for name in ("null", "zero", "full", "random", "urandom")]',
    ),
    Case(
        name="dev-zero-mapped",
        program='file = open("/dev/zero", "rb+", 0); kept = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE)',
    ),
    Case(
        name="reserves-address-space",  # without MAP_NORESERVE
        program="kept = mmap.mmap(-1, 8 << 40, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)",
    ),
    Case(
        name="pseudo-terminal-of-its-own",
        program="master, slave = os.openpty(); os.write(slave, b'unread')",
    ),
    Case(name="pidfd-of-its-child", program="kept = os.pidfd_open(child(sleep))"),
    Case(name="child-in-a-session-of-its-own", program="busy(os.setsid)"),
    Case(
        name="session-leader-has-ended",
        program="""
libc.prctl(36, 1, 0, 0, 0)
def leader():
    os.setsid()
    child(sleep)
os.waitpid(child(leader), 0)
""",
    ),
    Case(
        name="aio-context",
        program="kept = ctypes.c_ulong(0); syscall(206, 64, ctypes.byref(kept))",
    ),
    Case(name="nothing-on-standard-input", program="os.close(0); os.close(1); os.close(2)"),
    Case(
        name="guarded-and-forbidden-memory",
        program="memory = mmap.mmap(-1, 65536); check(libc.mprotect(ctypes.c_void_p(0), 0, 0)); memory.madvise(10)",
    ),
    Case(name="own-pid-namespace", wrapper=("unshare", "--pid", "--fork", "setsid")),
    Case(
        name="own-pid-namespace-with-children",
        wrapper=("unshare", "--pid", "--fork", "setsid"),
        program="for number in range(3): child(sleep)",
    ),
    Case(name="own-uts-namespace", wrapper=("unshare", "--uts")),
    Case(
        name="own-ipc-namespace-with-shared-memory",
        wrapper=("unshare", "--ipc"),
        program="""
libc.shmat.restype = ctypes.c_void_p
kept = libc.shmat(check(libc.shmget(0, 65536, 0o1600)), None, 0)
""",
    ),
    Case(name="deleted-directory", program='os.mkdir(path("gone")); os.chdir(path("gone")); os.rmdir(path("gone"))'),
    Case(
        name="seccomp-strict",
        program="""
ends = os.pipe(); open(path("ready"), "w").close()
check(libc.prctl(22, 1, 0, 0, 0)); os.read(ends[0], 1)
""",
    ),
    Case(
        name="unix-listener-without-its-path",
        program='kept = socket.socket(socket.AF_UNIX); kept.bind(path("s")); kept.listen(); os.unlink(path("s"))',
    ),
    Case(name="unix-seqpacket-pair", program="kept = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)"),
    Case(name="own-root-directory", program='os.mkdir(path("proc")); os.chroot(directory); directory = "/"'),
    Case(
        name="own-root-directory-and-a-file-in-it",
        program='os.mkdir(path("proc")); os.chroot(directory); directory = "/"; kept = open(path("kept"), "w")',
    ),
    Case(name="own-network-namespace", wrapper=("unshare", "--net")),
    Case(
        name="own-network-namespace-with-a-listener",
        wrapper=("unshare", "--net"),
        program='kept = socket.create_server(("", 7))',
    ),
    Case(name="own-cgroup-namespace", wrapper=("unshare", "--cgroup")),
    Case(name="system-v-semaphores", program="kept = check(libc.semget(0, 1, 0o1600)); check(libc.semctl(kept, 0, 0))"),
    Case(name="guard-pages", program="memory = mmap.mmap(-1, 65536); memory.madvise(102)"),
    Case(name="vfork-that-has-ended", program="import subprocess; subprocess.run(['/bin/true'])"),
    Case(name="io-uring-closed", program="os.close(syscall(425, 4, ctypes.create_string_buffer(120)))"),
    Case(
        name="file-renamed",
        program='kept = open(path("a"), "wb"); os.rename(path("a"), path("b"))',
    ),
    Case(name="own-time-namespace", wrapper=("unshare", "--time", "--fork", "--pid", "setsid")),
)
