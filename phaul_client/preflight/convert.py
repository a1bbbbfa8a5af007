"""Between these values and the messages of phaul.v1 (pure).

`TreeFacts` of the API is what travels to the destination: `Requirements` here. CPU flags travel in `required_features`
with the prefix "cpu:". Of sockets only TCP has a place there: a UDP port that is taken is not found beforehand.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from phaul.v1 import types_pb2
from phaul_client.errors import InvalidRequest
from phaul_client.preflight import capabilities
from phaul_client.preflight.limits import NAMES
from phaul_client.preflight.model import NodeFacts
from phaul_client.preflight.problems import Problem, Severity
from phaul_client.preflight.requirements import RequiredFile, RequiredProcess, RequiredSocket, Requirements
from phaul_client.preflight.wishes import TcpPolicy, Wishes

_CPU_PREFIX: Final = "cpu:"
_CAPABILITY_PREFIX: Final = "capability:"
_PINGS: Final = "pings"
_TERMINAL_PREFIX: Final = "terminal:"
_HUGE_PREFIX: Final = "huge-bytes:"
_WATCHED: Final = ("inotify_instances", "inotify_watches", "epoll_watches")
_LIMIT_PREFIX: Final = "limit:"
_MAX_PORT: Final = 65535
_MAX_DIGITS: Final = 20
_SEVERITIES: Final = {
    Severity.INFO: types_pb2.SEVERITY_INFO,
    Severity.WARNING: types_pb2.SEVERITY_WARNING,
    Severity.ERROR: types_pb2.SEVERITY_ERROR,
}
_POLICIES: Final = {
    types_pb2.TCP_POLICY_KEEP: TcpPolicy.KEEP,
    types_pb2.TCP_POLICY_CLOSE: TcpPolicy.CLOSE,
}
_POST_COPY: Final = frozenset({types_pb2.MODE_POST_COPY, types_pb2.MODE_HYBRID})


def problem_messages(problems: Iterable[Problem], node_name: str) -> list[types_pb2.Problem]:
    """The problems as found by the node of that name."""
    return [
        types_pb2.Problem(
            code=problem.code,
            severity=_SEVERITIES[problem.severity],
            subject=problem.subject,
            message=problem.message,
            remedy=problem.remedy,
            node_name=node_name,
        )
        for problem in problems
    ]


def wishes_of(options: types_pb2.Options) -> Wishes:
    """What the options say about preflight; what is not said is left to phaul."""
    return Wishes(
        tcp=_POLICIES.get(options.tcp_policy, TcpPolicy.REFUSE),
        shell_job=options.shell_job if options.HasField("shell_job") else None,
        ext_unix_sk=options.ext_unix_sk if options.HasField("ext_unix_sk") else None,
        file_locks=options.file_locks if options.HasField("file_locks") else None,
        ghost_limit_bytes=options.ghost_limit_bytes if options.HasField("ghost_limit_bytes") else None,
        post_copy=options.mode in _POST_COPY,
    )


def node_facts_of(node: types_pb2.NodeInfo) -> NodeFacts:
    """What another node said about itself. Its CPU's flags come with the tree's requirements."""
    return NodeFacts(
        name=node.node_name,
        architecture=node.architecture,
        kernel_release=node.kernel_release,
        glibc_version=node.glibc_version,
        page_size_bytes=node.page_size_bytes,
        criu_version=node.criu.version,
        lazy_pages=node.criu.lazy_pages,
        memory_available_bytes=node.capacity.memory_available_bytes,
        images_free_bytes=node.capacity.images_free_bytes,
    )


def tree_message(needs: Requirements, cpuinfo_image: bytes = b"") -> types_pb2.TreeFacts:
    """What the destination is asked about."""
    features = [f"{_CPU_PREFIX}{flag}" for flag in sorted(needs.cpu_flags)]
    features += [f"{_CAPABILITY_PREFIX}{name}" for name in capabilities.names_of(needs.capabilities)]
    if needs.huge_bytes:
        features.append(f"{_HUGE_PREFIX}{needs.huge_bytes}")
    if needs.pings:
        features.append(_PINGS)
    features += [f"{name}:{count}" for name in _WATCHED if (count := getattr(needs, name))]
    features += [f"{_LIMIT_PREFIX}{name}:{value}" for name, value in needs.hard_limits]
    features += [f"{_TERMINAL_PREFIX}{number}" for number in needs.terminals]
    return types_pb2.TreeFacts(
        root_pid=needs.root_pid,
        processes=[_process_message(process) for process in needs.processes],
        files=[_file_message(file) for file in needs.files],
        tcp_sockets=[_socket_message(each) for each in needs.sockets if each.protocol == "tcp"],
        required_pids=needs.pids,
        directories=needs.directories,
        memory_bytes=needs.memory_bytes,
        required_features=features,
        cpuinfo_image=cpuinfo_image,
    )


def requirements_of(message: types_pb2.TreeFacts) -> Requirements:
    """The other way round. Features that this version does not know are left out. Raises `InvalidRequest`."""
    features = message.required_features
    flags = (name.removeprefix(_CPU_PREFIX) for name in features if name.startswith(_CPU_PREFIX))
    return Requirements(
        root_pid=message.root_pid,
        processes=tuple(_process(each) for each in message.processes),
        files=tuple(_file(each) for each in message.files),
        sockets=tuple(_socket(each) for each in message.tcp_sockets),
        pids=tuple(message.required_pids),
        directories=tuple(map(_path, message.directories)),
        memory_bytes=message.memory_bytes,
        cpu_flags=frozenset(flags),
        capabilities=_capabilities(features),
        pings=_PINGS in features,
        huge_bytes=sum(_numbers(features, _HUGE_PREFIX)),
        terminals=tuple(_numbers(features, _TERMINAL_PREFIX)),
        **{name: sum(_numbers(features, f"{name}:")) for name in _WATCHED},
        hard_limits=tuple(
            (name, value) for name in NAMES.values() for value in _numbers(features, f"{_LIMIT_PREFIX}{name}:")
        ),
    )


def _numbers(features: Iterable[str], prefix: str) -> list[int]:
    said = (name.removeprefix(prefix) for name in features if name.startswith(prefix))
    return [int(number) for number in said if number.isdecimal() and len(number) <= _MAX_DIGITS]


def _capabilities(features: Iterable[str]) -> int:
    said = {name.removeprefix(_CAPABILITY_PREFIX) for name in features if name.startswith(_CAPABILITY_PREFIX)}
    return sum(1 << number for number, name in enumerate(capabilities.NAMES) if f"CAP_{name}" in said)


def _process_message(process: RequiredProcess) -> types_pb2.ProcessFacts:
    return types_pb2.ProcessFacts(
        pid=process.pid,
        namespace_pid=process.namespace_pid,
        parent_pid=process.parent_pid,
        threads=process.threads,
        name=process.name,
        executable=process.executable,
    )


def _process(message: types_pb2.ProcessFacts) -> RequiredProcess:
    return RequiredProcess(
        pid=message.pid,
        namespace_pid=message.namespace_pid,
        parent_pid=message.parent_pid,
        threads=message.threads,
        name=message.name,
        executable=message.executable,
    )


def _file_message(file: RequiredFile) -> types_pb2.FileFacts:
    return types_pb2.FileFacts(
        path=file.path,
        size_bytes=file.size_bytes,
        mode=file.mode,
        build_id=file.build_id,
        writable=file.writable,
        mapped=file.mapped,
        carried=file.carried,
        locks=file.locks,
        tail_sha256=file.tail_sha256,
    )


def _file(message: types_pb2.FileFacts) -> RequiredFile:
    return RequiredFile(
        path=_path(message.path),
        size_bytes=message.size_bytes,
        mode=message.mode,
        build_id=message.build_id if message.HasField("build_id") else None,
        writable=message.writable,
        mapped=message.mapped,
        carried=message.carried,
        locks=tuple(message.locks),
        tail_sha256=message.tail_sha256 if message.HasField("tail_sha256") else None,
    )


def _socket_message(each: RequiredSocket) -> types_pb2.TcpSocketFacts:
    return types_pb2.TcpSocketFacts(
        pid=each.pid,
        listening=each.listening,
        local_address=each.local_address,
        local_port=each.local_port,
        remote_address=each.remote_address,
        remote_port=each.remote_port,
        own_network_namespace=each.own_network_namespace,
        peer_stays=each.peer_stays,
    )


def _path(text: str) -> str:
    if "\0" in text:
        raise InvalidRequest(f"{text!r} is no path")
    return text


def _socket(message: types_pb2.TcpSocketFacts) -> RequiredSocket:
    try:
        ipaddress.ip_address(message.local_address)
    except ValueError as exc:
        raise InvalidRequest(f"tcp_sockets: {exc}") from exc
    if message.local_port > _MAX_PORT:
        raise InvalidRequest(f"tcp_sockets: {message.local_port} is no port")
    return RequiredSocket(
        protocol="tcp",
        pid=message.pid,
        listening=message.listening,
        local_address=message.local_address,
        local_port=message.local_port,
        remote_address=message.remote_address,
        remote_port=message.remote_port,
        own_network_namespace=message.own_network_namespace,
        peer_stays=message.peer_stays,
    )
