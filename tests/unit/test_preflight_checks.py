"""Preflight's checks that need two nodes or a rare machine: facts in, problems out."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

import phaul_client.preflight
from phaul.v1 import types_pb2
from phaul_client.preflight.capabilities import mask
from phaul_client.preflight.check_devices import DEVICES, UNSUPPORTED
from phaul_client.preflight.check_limits import check_limits
from phaul_client.preflight.check_nodes import check_nodes
from phaul_client.preflight.check_sysctls import check_source_node
from phaul_client.preflight.checks_destination import check_destination
from phaul_client.preflight.checks_source import check_source
from phaul_client.preflight.convert import node_facts_of, problem_messages, requirements_of, tree_message, wishes_of
from phaul_client.preflight.destination_model import DestinationFacts
from phaul_client.preflight.limits import UNLIMITED, parse_hard
from phaul_client.preflight.model import InetSocket, NodeFacts, Process, TreeFacts
from phaul_client.preflight.options import choose_options
from phaul_client.preflight.problems import Problem, Severity, blocks, error, info, warning, worst_first
from phaul_client.preflight.requirements import (
    RequiredFile,
    RequiredProcess,
    RequiredSocket,
    Requirements,
    carried,
    requirements,
)
from phaul_client.preflight.wishes import TcpPolicy, Wishes

SOURCE: Final = NodeFacts(
    name="a",
    architecture="x86_64",
    kernel_release="6.12.3-amd64",
    glibc_version="2.41",
    page_size_bytes=4096,
    criu_version=40201,
    lazy_pages=True,
    cpu_flags=frozenset({"fpu", "tsc", "avx2", "avx512f", "erms", "smep"}),
    memory_available_bytes=1 << 30,
    images_free_bytes=1 << 30,
    pipe_max_bytes=4 << 20,
    sys_resource=True,
)
HERE: Final = replace(SOURCE, name="b")
NEEDS: Final = Requirements(root_pid=7, memory_bytes=1 << 20, cpu_flags=SOURCE.cpu_flags - {"smep"})
PROCESS: Final = Process(
    pid=7,
    parent_pid=1,
    name="program",
    state="S",
    namespace_pids=(7,),
    group=7,
    session=7,
    namespace_session=7,
    terminal=0,
    is_kernel_thread=False,
    tracer_pid=0,
    threads=(7, 8),
    stuck_threads=(),
    user_ids=(0, 0, 0),
    group_ids=(0, 0, 0),
    namespaces={},
    pid_namespace_for_children=0,
    executable="/bin/program",
    working_directory="/",
    root_directory="/",
    memory_bytes=4096,
)


def codes(problems: tuple[Problem, ...] | list[Problem]) -> list[str]:
    return [problem.code for problem in problems]


def node_problems(here: NodeFacts, wishes: Wishes | None = None, needs: Requirements = NEEDS) -> list[Problem]:
    return list(check_nodes(needs, SOURCE, here, wishes or Wishes()))


def test_two_equal_nodes_have_no_problem() -> None:
    assert node_problems(HERE) == []


@pytest.mark.parametrize(
    ("change", "code", "severity"),
    [
        ({"architecture": "aarch64"}, "architecture", Severity.ERROR),
        ({"page_size_bytes": 65536}, "page-size", Severity.ERROR),
        ({"criu_version": 40101}, "criu-older", Severity.ERROR),
        ({"kernel_release": "6.1.0"}, "kernel-older", Severity.WARNING),
        ({"kernel_release": "5.10.0"}, "rseq", Severity.ERROR),
        ({"memory_available_bytes": 1000}, "memory", Severity.ERROR),
        ({"images_free_bytes": 1000}, "disk", Severity.ERROR),
        ({"cpu_flags": SOURCE.cpu_flags - {"avx512f"}}, "cpu-flags", Severity.ERROR),
        ({"cpu_flags": SOURCE.cpu_flags - {"erms"}}, "cpu-speed", Severity.INFO),
        ({"cpu_flags": SOURCE.cpu_flags | {"amx_tile"}}, "cpu-way-back", Severity.INFO),
    ],
)
def test_a_node_that_does_not_fit(change: dict[str, object], code: str, severity: Severity) -> None:
    found = node_problems(replace(HERE, **change))  # type: ignore[arg-type]
    assert [(problem.code, problem.severity) for problem in found if problem.code == code] == [(code, severity)]
    assert all(problem.remedy for problem in found)


@pytest.mark.parametrize(
    "change",
    [
        {"criu_version": 40300},
        {"criu_version": 40200},  # another sublevel
        {"kernel_release": "7.1.0"},
        {"cpu_flags": SOURCE.cpu_flags - {"smep"}},  # the kernel's own
        {"cpu_flags": frozenset()},  # unknown
        {"memory_available_bytes": 0},
        {"architecture": ""},
    ],
)
def test_a_node_that_fits(change: dict[str, object]) -> None:
    assert node_problems(replace(HERE, **change)) == []  # type: ignore[arg-type]


def test_the_missing_cpu_flags_and_the_direction_are_named() -> None:
    (problem,) = node_problems(replace(HERE, cpu_flags=SOURCE.cpu_flags - {"avx512f", "avx2"}))
    assert problem.subject == "avx2 avx512f"
    assert "from a to b" in problem.message


def test_post_copy_needs_large_pipes_and_lazy_pages() -> None:
    small = replace(HERE, pipe_max_bytes=1 << 20, sys_resource=False, lazy_pages=False)
    assert codes(node_problems(small, Wishes(post_copy=True))) == ["lazy-pages", "pipe-size"]
    assert node_problems(small) == []
    assert codes(list(check_source_node(small, Wishes(post_copy=True)))) == ["pipe-size"]
    assert list(check_source_node(replace(small, sys_resource=True), Wishes(post_copy=True))) == []


@pytest.mark.parametrize("namespace_pids", [(7,), (70, 7)], ids=["our PID namespace", "one below"])
def test_a_session_without_a_leader_in_its_pid_namespace(namespace_pids: tuple[int, ...]) -> None:
    process = replace(PROCESS, session=0, namespace_session=0, namespace_pids=namespace_pids)
    found = codes(check_source(TreeFacts(root_pid=7, processes=(process,)), SOURCE, Wishes()))
    assert "session-outside-namespace" in found
    assert "session-outside" not in found


def test_the_source_names_the_terminal_less_session() -> None:
    tree = TreeFacts(root_pid=7, processes=(replace(PROCESS, session=3, namespace_session=3),))
    assert codes(check_source(tree, SOURCE, Wishes())) == ["clock-jump", "session-outside"]
    assert choose_options(tree, Wishes()).shell_job
    assert not choose_options(tree, Wishes(shell_job=False)).shell_job


@pytest.mark.parametrize(("state", "found"), [("S", True), ("Z", False)])
def test_several_cgroups_become_one(state: str, found: bool) -> None:
    """What has ended is in the root's, whatever it was in."""
    other = replace(PROCESS, pid=9, state=state, cgroups="0::/b\n")
    tree = TreeFacts(root_pid=7, processes=(replace(PROCESS, cgroups="0::/a\n"), other))
    assert ("cgroups" in codes(check_source(tree, SOURCE, Wishes()))) is found


def test_another_user_without_sys_resource() -> None:
    tree = TreeFacts(root_pid=7, processes=(replace(PROCESS, user_ids=(0, 33, 33)),))
    limited = replace(SOURCE, sys_resource=False)
    assert codes(check_source(tree, limited, Wishes()))[0] == "other-user"
    assert "other-user" not in codes(check_source(tree, SOURCE, Wishes()))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"capabilities": 0}, ["no-proc"]),
        ({"working_directory_writable": False}, ["no-proc"]),
        ({"capabilities": 0, "namespaces": {"pid": 1, "mnt": 3}}, []),
        ({"capabilities": 0, "namespaces": {"pid": 1, "mnt": 2}, "namespace_pids": (7,)}, []),
    ],
    ids=["as phaul run starts it", "of another user", "a read-only directory", "its own mounts", "our PID namespace"],
)
def test_who_may_mount_a_proc(change: dict[str, object], found: list[str]) -> None:
    namespaces = {"pid": 9, "mnt": 2}
    process = replace(PROCESS, namespace_pids=(7, 1), namespaces=namespaces, capabilities=mask("SYS_ADMIN"))
    tree = TreeFacts(
        root_pid=7,
        processes=(replace(process, **change),),  # type: ignore[arg-type]
        reader_namespaces={"pid": 1, "mnt": 2},
    )
    assert [code for code in codes(check_source(tree, SOURCE, Wishes())) if code == "no-proc"] == found


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (TcpPolicy.REFUSE, (False, False, "skip")),
        (TcpPolicy.KEEP, (True, False, "nftables")),
        (TcpPolicy.CLOSE, (False, True, "skip")),
    ],
)
def test_the_tcp_policy_sets_the_options_of_criu(policy: TcpPolicy, options: tuple[bool, bool, str]) -> None:
    tree = TreeFacts(root_pid=7, processes=(PROCESS,), inet_sockets=(socket(state=1),))
    chosen = choose_options(tree, Wishes(tcp=policy))
    assert (chosen.tcp_established, chosen.tcp_close, chosen.network_lock) == options
    idle = choose_options(replace(tree, inet_sockets=()), Wishes(tcp=policy))
    assert (idle.tcp_established, idle.tcp_close, idle.network_lock) == (False, False, "skip")


def test_connections_of_the_tree_to_itself_are_kept_unless_they_are_to_be_closed() -> None:
    one = replace(socket(state=1), local_address="127.0.0.1", remote_address="127.0.0.1")
    other = replace(one, inode=2, local_address="::ffff:127.0.0.1", local_port=5000, remote_port=80)
    other = replace(other, remote_address="::ffff:127.0.0.1")
    tree = TreeFacts(root_pid=7, processes=(PROCESS,), inet_sockets=(one, other))
    chosen = choose_options(tree, Wishes())
    assert (chosen.tcp_established, chosen.tcp_close, chosen.network_lock) == (True, False, "nftables")
    closed = choose_options(tree, Wishes(tcp=TcpPolicy.CLOSE))
    assert (closed.tcp_established, closed.tcp_close) == (False, True)
    for outside in (one, replace(other, local_port=5001), socket(state=1)):  # its other end is nowhere in the tree
        beside = replace(tree, inet_sockets=(one, other, replace(outside, inode=3, remote_port=5002)))
        assert not choose_options(beside, Wishes()).tcp_established


def socket(state: int) -> InetSocket:
    return InetSocket(
        protocol="tcp",
        inode=1,
        pid=7,
        state=state,
        local_address="10.0.0.1",
        local_port=80,
        remote_address="10.0.0.2",
        remote_port=5000,
        waiting=0,
        own_network_namespace=False,
    )


def test_what_is_missing_at_the_destination_is_named() -> None:
    needs = replace(
        NEEDS,
        processes=(RequiredProcess(pid=7, namespace_pid=7, parent_pid=1, threads=1, name="p", executable="/bin/p"),),
        files=(
            RequiredFile(path="/bin/p", size_bytes=1, mode=0o100755),
            RequiredFile(path="/log", size_bytes=1, mode=0),
        ),
        pids=(7, 40000),
        huge_bytes=1 << 21,
        terminals=(3,),
    )
    found = DestinationFacts(
        node=HERE,
        taken_pids={7: "cat"},
        pid_max=32768,
        missing_directories=("/data",),
        taken_terminals={3: "pid 9 (bash)"},
    )
    problems = check_destination(needs, SOURCE, found, Wishes())
    assert {(problem.code, problem.subject) for problem in problems} == {
        ("pid-taken", "pid 7"),
        ("pid-max", "kernel.pid_max"),
        ("executable-missing", "/bin/p"),
        ("file-missing", "/log"),
        ("directory-missing", "/data"),
        ("huge-pages", "b"),
        ("terminal-taken", "/dev/pts/3"),
    }
    assert "file-missing" not in codes(check_destination(carried(needs, {"/log"}), SOURCE, found, Wishes()))


def test_addresses_matter_only_to_connections_that_are_kept() -> None:
    connection = RequiredSocket(
        protocol="tcp",
        pid=7,
        listening=False,
        local_address="10.0.0.1",
        local_port=80,
        remote_address="10.0.0.2",
        remote_port=5000,
    )
    needs = replace(NEEDS, sockets=(connection,))
    found = DestinationFacts(node=HERE, missing_addresses=frozenset({"10.0.0.1"}))
    assert codes(check_destination(needs, SOURCE, found, Wishes(tcp=TcpPolicy.KEEP))) == ["address-missing"]
    assert codes(check_destination(needs, SOURCE, found, Wishes(tcp=TcpPolicy.CLOSE))) == []
    moved_along = replace(needs, sockets=(replace(connection, own_network_namespace=True),))
    assert codes(check_destination(moved_along, SOURCE, found, Wishes(tcp=TcpPolicy.KEEP))) == []


def test_no_pid_is_required_of_a_tree_with_a_namespace_of_its_own() -> None:
    assert requirements(TreeFacts(root_pid=7, processes=(PROCESS,)), SOURCE).pids == (7, 8)
    inside = replace(PROCESS, namespace_pids=(7, 1))
    assert requirements(TreeFacts(root_pid=7, processes=(inside,)), SOURCE).pids == ()


def test_the_worst_comes_first_and_many_alike_are_counted() -> None:
    many = [error("tcp-established", f"connection {number}", "is open", "close it") for number in range(1000)]
    found = worst_first([info("a", "x", "m", "r"), warning("b", "x", "m", "r"), *many, *many])
    assert [problem.severity for problem in found] == [Severity.ERROR] * 11 + [Severity.WARNING, Severity.INFO]
    assert found[10].subject == "990 more"
    assert blocks(found)
    assert not blocks(found[11:])


def test_requirements_survive_the_wire() -> None:
    needs = replace(
        NEEDS,
        processes=(RequiredProcess(pid=7, namespace_pid=1, parent_pid=1, threads=2, name="p", executable="/bin/p"),),
        files=(
            RequiredFile(path="/bin/p", size_bytes=1, mode=0o100755, build_id=b"\1\2", mapped=True),
            RequiredFile(path="/log", size_bytes=0, mode=0o100644, writable=True, carried=True),
        ),
        sockets=(RequiredSocket(protocol="tcp", pid=7, listening=True, local_address="::", local_port=80),),
        pids=(7, 8),
        directories=("/", "/data"),
        huge_bytes=1 << 21,
    )
    message = types_pb2.TreeFacts.FromString(tree_message(needs, b"cpu").SerializeToString())
    assert requirements_of(message) == needs
    assert message.cpuinfo_image == b"cpu"


def test_options_of_the_api_become_wishes() -> None:
    assert wishes_of(types_pb2.Options()) == Wishes()
    options = types_pb2.Options(
        tcp_policy=types_pb2.TCP_POLICY_KEEP, shell_job=False, ghost_limit_bytes=0, mode=types_pb2.MODE_HYBRID
    )
    assert wishes_of(options) == Wishes(tcp=TcpPolicy.KEEP, shell_job=False, ghost_limit_bytes=0, post_copy=True)


def test_limits_of_the_destination() -> None:
    needs = Requirements(root_pid=7, inotify_watches=9, epoll_watches=20, hard_limits=(("NOFILE", 4096),))
    enough = {"fs.inotify.max_user_watches": 9, "fs.epoll.max_user_watches": 20, "fs.nr_open": 4096}
    node = NodeFacts(name="b", sys_resource=False)
    assert list(check_limits(needs, DestinationFacts(node=node, limits=enough))) == []
    assert list(check_limits(needs, DestinationFacts(node=node))) == []  # nothing is known of them
    found = DestinationFacts(
        node=node,
        limits={name: value - 1 for name, value in enough.items()},
        lacks_inotify=True,
        lower_limits={"NOFILE": 1024},
    )
    refused = list(check_limits(needs, found))
    assert [problem.code for problem in refused] == [
        "inotify-limit",
        "epoll-limit",
        "inotify-limit",
        "resource-limit",
        "resource-limit",
    ]
    assert [problem.severity for problem in refused] == [Severity.ERROR] * 3 + [Severity.WARNING] * 2
    assert all(problem.remedy for problem in refused)
    may = DestinationFacts(node=replace(node, sys_resource=True), limits=enough, lower_limits={"NOFILE": 1024})
    assert list(check_limits(needs, may)) == []


def test_needs_of_limits_cross_the_wire() -> None:
    limits = (("FSIZE", UNLIMITED), ("NOFILE", 20000))
    needs = Requirements(root_pid=7, inotify_instances=2, inotify_watches=9, epoll_watches=20, hard_limits=limits)
    assert requirements_of(tree_message(needs)) == needs


def test_hard_limits_are_read() -> None:
    text = """Limit                     Soft Limit           Hard Limit           Units
Max file size             unlimited            unlimited            bytes
Max open files            1024                 20000                files
Max nice priority         0                    0
Max file locks            unlimited            unlimited            locks
"""
    assert parse_hard(text) == {"FSIZE": UNLIMITED, "NOFILE": 20000, "NICE": 0}


def test_problems_and_nodes_cross_the_wire() -> None:
    (message,) = problem_messages([error("code", "subject", "message", "remedy")], "a")
    assert (message.code, message.severity, message.node_name) == ("code", types_pb2.SEVERITY_ERROR, "a")
    info_message = types_pb2.NodeInfo(node_name="n", kernel_release="6.1", criu=types_pb2.CriuInfo(version=40201))
    assert node_facts_of(info_message).criu_version == 40201


IMPURE: Final = frozenset(
    {"asyncio", "ctypes", "os", "pathlib", "platform", "shutil", "socket", "subprocess", "threading", "time"}
)
READERS: Final = frozenset(
    """address_space destination_facts epoll facts limits mappings network_namespace node_facts open_files proc_files
    processes sockets udp_cork unix_diag __init__""".split()  # noqa: SIM905
)


def test_only_the_readers_touch_the_machine() -> None:
    for path in Path(phaul_client.preflight.__file__).parent.glob("*.py"):
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        }
        if path.stem not in READERS:
            assert names & IMPURE == set(), path.name


def test_every_code_is_explained() -> None:
    package = Path(phaul_client.preflight.__file__).parent
    documented = (package.parents[1] / "docs" / "preflight.md").read_text()
    used: set[str] = {code for code, *_rest in UNSUPPORTED.values()} | {code for _prefix, code, _what in DEVICES}
    for path in package.glob("check*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("error", "warning", "info")
            ):
                first = node.args[0]
                used |= {str(each.value) for each in ast.walk(first) if isinstance(each, ast.Constant)}
    assert len(used) > 40
    assert {code for code in used if f"`{code}`" not in documented} == set()
