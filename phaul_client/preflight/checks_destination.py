"""Everything that can only be told on the destination (pure)."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterator

from phaul_client.preflight.check_limits import check_limits
from phaul_client.preflight.check_nodes import check_nodes
from phaul_client.preflight.destination_model import DestinationFacts, FoundFile
from phaul_client.preflight.model import NodeFacts
from phaul_client.preflight.problems import Problem, error, info, warning, worst_first
from phaul_client.preflight.proc_text import plain_address
from phaul_client.preflight.requirements import RequiredFile, RequiredSocket, Requirements
from phaul_client.preflight.wishes import TcpPolicy, Wishes


def check_destination(
    needs: Requirements, source: NodeFacts, found: DestinationFacts, wishes: Wishes
) -> tuple[Problem, ...]:
    """The problems, worst first."""
    return worst_first(
        [
            *check_nodes(needs, source, found.node, wishes),
            *_pids(needs, found),
            *_files(needs, found),
            *_directories(needs, found),
            *_sockets(needs, found, wishes),
            *_huge_pages(needs, found),
            *_pings(found),
            *_terminals(found),
            *check_limits(needs, found),
        ]
    )


def _pids(needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    remedy = "start the program in a PID namespace of its own (`phaul run`), or end that process"
    for pid, name in found.taken_pids.items():
        message = f"the id of {_who(needs, pid)} is taken by {name or 'another process'} on {found.node.name}"
        yield error("pid-taken", f"pid {pid}", message, remedy)
    largest = max(needs.pids, default=0)
    if 0 < found.pid_max <= largest:
        message = f"is {found.pid_max} on {found.node.name}, and the tree has pid {largest}"
        yield error("pid-max", "kernel.pid_max", message, f"sysctl -w kernel.pid_max={largest + 1} or more")


def _files(needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    programs = {process.executable for process in needs.processes}
    for file in needs.files:
        if file.carried:
            continue
        code = "executable-missing" if file.path in programs else "file-missing"
        if (there := found.files.get(file.path)) is None:
            what = "mapped" if file.mapped else "open"
            message = f"is {what} in the tree and does not exist on {found.node.name}"
            yield error(code, file.path, message, "install or copy it there")
        else:
            yield from _difference(file, there, found.node.name)
            if there.is_locked:
                message = f"the tree has a lock ({', '.join(file.locks)}) on it, and on {found.node.name} it is held"
                remedy = "on a file system that both share it is the tree's own, held until it is gone: close the file,"
                yield error("file-lock-held", file.path, message, f"{remedy} or give each node its own (--sync)")


def _difference(file: RequiredFile, there: FoundFile, node: str) -> Iterator[Problem]:
    remedy = "install the same version there"
    if stat.S_IFMT(file.mode) != stat.S_IFMT(there.mode):
        yield error("file-type", file.path, f"is a file of another kind on {node}", remedy)
        return
    if file.build_id is not None and file.build_id != there.build_id:
        theirs = there.build_id.hex()[:12] if there.build_id else "none"
        message = f"is another build on {node}: build-id {file.build_id.hex()[:12]} here, {theirs} there"
        yield error("file-build-id", file.path, message, remedy)
    elif stat.S_ISREG(file.mode) and file.size_bytes != there.size_bytes:
        if there.has_grown:
            message = f"has grown from {file.size_bytes} to {there.size_bytes} bytes: taken for one shared file"
            yield info("file-growing", file.path, message, "nothing to do, if both nodes see the same file")
        else:
            message = f"has {file.size_bytes} bytes here and {there.size_bytes} on {node}"
            yield error("file-size", file.path, message, remedy)
    if file.mode != there.mode:
        ours, other = stat.S_IMODE(file.mode), stat.S_IMODE(there.mode)
        yield error(
            "file-mode", file.path, f"has mode {ours:04o} here and {other:04o} on {node}", f"chmod {ours:04o} there"
        )


def _directories(needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    for path in found.missing_directories:
        message = f"is a directory that the tree is in or has open, and does not exist on {found.node.name}"
        yield error("directory-missing", path, message, f"mkdir -p {path} there")


def _sockets(needs: Requirements, found: DestinationFacts, wishes: Wishes) -> Iterator[Problem]:
    named = set()
    for each in needs.sockets:
        if each.own_network_namespace or each.local_address in named:
            continue
        connected = bool(each.remote_port) and each.protocol == "tcp"
        if connected and wishes.tcp is not TcpPolicy.KEEP:
            continue  # told on the source, or closed
        if _is_cut(each, found):
            message = f"the other end of this connection of {_who(needs, each.pid)} stays behind, on this very address"
            remedy = "close connections (--tcp close), or move both ends together"
            yield error("tcp-peer-stays", f"{each.local_address} to {_remote(each)}", message, remedy)
        if each.local_address in found.missing_addresses:
            named.add(each.local_address)
            message = f"{_who(needs, each.pid)} uses this address, which {found.node.name} does not have"
            yield error("address-missing", each.local_address, message, "move the address along, or add it there")
        elif not connected:
            yield from _port(each, needs, found)


def _is_cut(each: RequiredSocket, found: DestinationFacts) -> bool:
    """Whether its other end stays, and cannot be reached from elsewhere: at a loopback address, or at its own."""
    ends = (each.local_address, each.local_port, each.remote_address, each.remote_port)
    if not each.peer_stays or ends not in found.absent_peers:
        return False
    remote = plain_address(each.remote_address)
    return ipaddress.ip_address(remote).is_loopback or remote == plain_address(each.local_address)


def _remote(each: RequiredSocket) -> str:
    return f"{each.remote_address} port {each.remote_port}"


def _port(each: RequiredSocket, needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    owner = found.taken_ports.get((each.protocol, each.local_address, each.local_port))
    if owner is not None:
        subject = f"{each.protocol} port {each.local_port}"
        message = f"{_who(needs, each.pid)} needs it, and {owner} has it on {found.node.name}"
        yield error(
            "port-taken", subject, message, "stop that process, or start the program in its own network namespace"
        )


def _huge_pages(needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    if needs.huge_bytes > found.huge_free_bytes:
        message = f"the tree has {needs.huge_bytes} bytes in huge pages and {found.huge_free_bytes} are free there"
        yield warning("huge-pages", found.node.name, message, "sysctl -w vm.nr_hugepages=… there")


def _pings(found: DestinationFacts) -> Iterator[Problem]:
    if not found.may_ping:
        message = f"does not allow phaul of {found.node.name} to make the ICMP sockets that the tree has"
        remedy = "sysctl -w net.ipv4.ping_group_range='0 2147483647' there"
        yield error("ping-group", "net.ipv4.ping_group_range", message, remedy)


def _terminals(found: DestinationFacts) -> Iterator[Problem]:
    remedy = (
        "end what has it there, or move the tree to a node where it is free: criu gives a terminal the number it had"
    )
    for number, who in found.taken_terminals.items():
        message = f"the tree has the pseudo terminal of this number, and {who} has it on {found.node.name}"
        yield error("terminal-taken", f"/dev/pts/{number}", message, remedy)


def _who(needs: Requirements, pid: int) -> str:
    return next((f"pid {each.pid} ({each.name})" for each in needs.processes if each.pid == pid), f"pid {pid}")
