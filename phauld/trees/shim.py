"""The parent of one process tree: starts it or lets criu restore it, reaps it, writes down how it ended.

One small process per tree, so that a restart, an upgrade or the death of phauld touches no tree, and no tree's exit
status is lost. It must start in milliseconds and stay small: see `bare.py` (``bare.py shim MODE DIRECTORY …``).

The invariant: a restored tree that was not let go never runs; whatever of it exists is killed here.

Files in DIRECTORY, each written whole or not at all:
  shim.json  {"pid", "start_ticks", "boot_id"}            this process, as soon as it runs
  tree.json  {"pid", "start_ticks", "boot_id"}            the root of the tree, as soon as it runs
  released   empty; made by phauld before it lets a restored tree go
  cgroup.json {"path"}                                    made by phauld before it starts us, if the tree has a cgroup
  exit.json  {"outcome": "exited", "exit_code", "signal", "at"} or {"outcome": "never-ran", "criu_status", "at"}
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time

from phauld.proc import children, descendants, identity, is_zombie
from phauld.trees.let_go import look_at
from phauld.whole_files import insist, write_json

CLONE_NEWTIME = 0x00000080
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 127  # as a shell's exit code for a command that there is not


def libc_call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def fork_exec(argv: list[str], keep: tuple[int, ...], prepare: object = None) -> int:
    """Fork and exec; the child keeps 0, 1, 2 and `keep`. A failure to start is raised here, in the parent."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if callable(prepare):
                prepare()
            for fd in keep:
                os.set_inheritable(fd, True)
            os.execvp(argv[0], argv)
        except BaseException as exc:
            number = exc.errno if isinstance(exc, OSError) and exc.errno else errno.EINVAL
            os.write(write_end, f"{number} {os.strerror(number)}".encode())
        finally:
            os._exit(127)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        failure = pipe.read().decode()
    if failure:
        os.waitpid(pid, 0)
        code, _, message = failure.partition(" ")
        raise OSError(int(code), message)
    return pid


def cgroup_of(directory: str) -> str | None:
    """Where its tree is to be, if there is a cgroup for it."""
    try:
        with open(os.path.join(directory, "cgroup.json"), encoding="utf-8") as file:
            return str(json.load(file)["path"])
    except FileNotFoundError:
        return None


def enter_cgroup(directory: str) -> None:
    """In the child: what it starts is in there, too."""
    path = cgroup_of(directory)
    if path is not None:
        with open(os.path.join(path, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write("0")


def enter_workload(directory: str, spec: dict[str, object]) -> None:
    """In the child: an own session without a terminal, output to the log, and nothing else inherited."""
    enter_cgroup(directory)
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    log = os.open(str(spec["log_path"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    for number, value in spec["rlimits"]:  # type: ignore[attr-defined]
        resource.setrlimit(number, (value, value))
    if spec["ids"] is not None:
        user, group, groups = spec["ids"]  # type: ignore[misc]
        os.setgroups(groups)  # type: ignore[has-type]
        os.setresgid(group, group, group)  # type: ignore[has-type]
        os.setresuid(user, user, user)  # type: ignore[has-type]
    os.chdir(str(spec["cwd"]))
    environment = spec["env"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def reap_until_empty(directory: str, root: int) -> None:
    """Wait for every child; write down how the root ended as soon as it has."""
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return
        if pid == root:
            code = os.waitstatus_to_exitcode(status)
            ending = {"exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None}
            insist(directory, "exit.json", {"outcome": "exited", **ending, "at": time.time()})


def record_or_kill(directory: str, root: int) -> None:
    """What cannot be written down does not run."""
    try:
        write_json(directory, "tree.json", identity(root))
    except OSError:
        os.kill(root, signal.SIGKILL)
        os.waitpid(root, 0)
        raise


def run(directory: str, ready_fd: int) -> None:
    """Start the workload of DIRECTORY/spec.json; report its PID, or why it did not start, on `ready_fd`."""
    with open(os.path.join(directory, "spec.json"), encoding="utf-8") as file:
        spec = json.load(file)
    try:
        namespaces = CLONE_NEWPID * spec["new_pid_namespace"] | CLONE_NEWTIME * spec["new_time_namespace"]
        namespaces |= CLONE_NEWIPC * spec["new_ipc_namespace"]
        if namespaces:
            libc_call("unshare", namespaces)
        root = fork_exec(spec["argv"], (), lambda: enter_workload(directory, spec))
        record_or_kill(directory, root)
        answer: dict[str, object] = {"pid": root}
    except OSError as exc:
        answer = {"error": exc.strerror or str(exc)}
        say_not_started(directory)
    with open(ready_fd, "wb", buffering=0) as pipe:
        try:  # noqa: SIM105 - contextlib is not worth its import
            pipe.write(json.dumps(answer).encode())
        except OSError:
            pass  # phauld was killed meanwhile; the next one reads the files
    if "pid" in answer:
        reap_until_empty(directory, root)


def say_not_started(directory: str) -> None:
    """Write down that nothing runs. If not even that can be written, phauld says so when it hears of it."""
    ending = {"outcome": "exited", "exit_code": NOT_STARTED, "signal": None, "at": time.time()}
    try:  # noqa: SIM105 - contextlib is not worth its import
        write_json(directory, "exit.json", ending)
    except OSError:
        pass


def prepare_criu(directory: str) -> None:
    """In the child: criu ends its own helper for cgroups by SIGTERM, and waits for its end for ever.

    It goes first (see phaul_criu/urgency.py): a tree stands still. What it restores gets its own policy back.
    """
    enter_cgroup(directory)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:  # noqa: SIM105 - contextlib is not worth its import
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        pass


def enter_container(directory: str, go_fd: int) -> None:
    """In the child: once phauld has put it into the container's cgroups, it makes them the root of what the tree sees.

    The end of the pipe without a word is the end of the restore: it was given up, or phauld was killed.
    """
    prepare_criu(directory)
    if not os.read(go_fd, 1):
        os._exit(127)
    libc_call("unshare", CLONE_NEWCGROUP)


def restore(directory: str, swrk_fd: int, criu: str, go_fd: int | None, inherited: tuple[int, ...]) -> None:
    """Be the parent of the criu that restores a tree, then of the tree."""
    prepare = (lambda: prepare_criu(directory)) if go_fd is None else lambda: enter_container(directory, go_fd)
    criu_pid = fork_exec([criu, "swrk", str(swrk_fd)], (swrk_fd, *inherited), prepare)
    for fd in (swrk_fd, *inherited):
        os.close(fd)
    _, status = os.waitpid(criu_pid, 0)  # of no other: a tree that has ended by now is to be told of like any other
    roots = children()
    if roots and (status == 0 or look_at(directory, roots, criu)):
        root = min(roots, key=is_zombie)  # the eldest that lives
        insist(directory, "tree.json", identity(root))
        reap_until_empty(directory, root)
        return
    for pid in descendants(roots):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    reap_until_empty(directory, -1)
    code = os.waitstatus_to_exitcode(status)
    outcome = "exited" if status == 0 else "never-ran"
    insist(directory, "exit.json", {"outcome": outcome, "criu_status": code, "at": time.time()})


def main() -> None:
    mode, directory, fd = sys.argv[2], sys.argv[3], int(sys.argv[4])
    os.set_inheritable(fd, False)  # ours, not the tree's
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    write_json(directory, "shim.json", identity(os.getpid()))
    if mode == "run":
        run(directory, fd)
    else:
        go_fd = None if sys.argv[6] == "-" else int(sys.argv[6])
        inherited = tuple(map(int, sys.argv[7:]))
        for each in (*inherited, *([go_fd] if go_fd is not None else [])):
            os.set_inheritable(each, False)
        restore(directory, fd, sys.argv[5], go_fd, inherited)
