"""Checks of the processes themselves (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from phaul_client.preflight.model import NodeFacts, Process, TreeFacts
from phaul_client.preflight.problems import Problem, error, info
from phaul_client.preflight.wishes import Wishes


def check_existence(tree: TreeFacts) -> Iterator[Problem]:
    """Nothing else can be checked if one of these is found."""
    root, subject = tree.root, f"pid {tree.root_pid}"
    if root is None:
        yield error("no-such-process", subject, "no process has this id", "check the id: `phaul ps`, or ps -e")
    elif root.is_kernel_thread:
        yield error("kernel-thread", str(root), "is a thread of the kernel, which nothing can move", "choose a process")
    elif root.state in ("Z", "X") and len(root.threads) <= 1:
        yield error("zombie", str(root), "has ended and only waits to be reaped", "there is nothing left to move")
    elif tree.reader_lineage[:1] == (root.pid,):
        yield error("is-phaul", str(root), "is phaul itself", "choose another process")
    elif tree.pids & set(tree.reader_lineage):
        message = "is an ancestor of phaul, which cannot move the ground it stands on"
        yield error("ancestor-of-phaul", str(root), message, "move one of its other descendants")


def check_processes(tree: TreeFacts, node: NodeFacts, wishes: Wishes) -> Iterator[Problem]:
    """Who holds the processes, and to which session they belong."""
    for process in tree.processes:
        yield from _process(process)
        yield from _owner(process, tree, node)
    yield from _session(tree, wishes)


def _process(process: Process) -> Iterator[Problem]:
    if process.tracer_pid:
        message = f"is traced by pid {process.tracer_pid}, and only one can trace a process"
        yield error("traced", str(process), message, "end the debugger or strace")
    if process.trap_waits:
        message = "blocks a SIGTRAP that waits for it, which criu needs itself"
        yield error("trap-pending", str(process), message, "the program must take it, or not block it")
    if process.state == "Z" and len(process.threads) > 1:
        message = "its first thread has ended while others run on, which criu cannot dump"
        yield error("first-thread-ended", str(process), message, "the program must keep its first thread")
    for thread in process.stuck_threads:
        message = "is in uninterruptible sleep and cannot be frozen"
        yield error(
            "uninterruptible", f"thread {thread} of {process}", message, "wait until its disk or network answers"
        )
    if process.state in ("T", "t") and not process.tracer_pid:
        yield info("stopped", str(process), "is stopped, and will be at the destination", "nothing to do")


def _owner(process: Process, tree: TreeFacts, node: NodeFacts) -> Iterator[Problem]:
    """Without CAP_SYS_RESOURCE criu may not read the limits of a process of another user."""
    user, group = tree.reader_ids
    if node.sys_resource is not False or ({*process.user_ids} <= {user} and {*process.group_ids} <= {group}):
        return
    message = f"runs as user {process.user_ids[1]}, and phauld lacks CAP_SYS_RESOURCE to read its limits"
    yield error(
        "other-user", str(process), message, "give phauld CAP_SYS_RESOURCE, or run the program as phauld's user"
    )


def _session(tree: TreeFacts, wishes: Wishes) -> Iterator[Problem]:
    root = tree.root
    assert root is not None
    for process in tree.processes:
        same = process.namespaces.get("pid") == root.namespaces.get("pid")
        if process.namespace_session == 0 and same:
            message = "its session is led from outside its PID namespace, which criu cannot dump"
            yield error("session-outside-namespace", str(process), message, "start it with setsid")
    if root.namespace_session in (root.own_pid, 0) or root.terminal:
        return
    subject, leader = str(root), f"pid {root.session}"
    if wishes.shell_job is False:
        message = f"belongs to the session of {leader}, outside the tree"
        yield error("session-outside", subject, message, "start it with setsid, or allow shell_job")
    else:
        message = f"belongs to the session of {leader}, outside the tree; at the destination it joins another"
        yield info("session-outside", subject, message, "phaul sets shell_job; to keep a session start it with setsid")
