"""What there is to say of a node and of a preflight, as text for people. Pure: message in, text out."""

from collections.abc import Iterable

from phaul.v1 import node_pb2, types_pb2
from phaul_client.cli.json_output import enum_word
from phaul_client.cli.render import RESTORE_MODES, SEVERITY_MARKS, mode_word, problem_lines
from phaul_client.cli.text import duration, fact_lines, plural, with_reason
from phaul_client.cli.units import format_bytes


def preflight(answer: node_pb2.PreflightResponse, target: str, address: str) -> str:
    """`phaul preflight`."""
    where = answer.destination.node_name or address
    headline = f"{target} can move to {where}" if answer.ok else f"{target} cannot move to {where}"
    processes = len(answer.tree.processes)
    facts = [
        ("tree", f"{plural(processes, 'process', 'es')}, {format_bytes(answer.tree.memory_bytes)}"),
        ("mode", with_reason(mode_word(answer.mode), answer.mode_reason)),
        ("restore", enum_word(RESTORE_MODES, answer.restore_mode) or ""),
        ("pause", f"about {duration(answer.expected_pause)}" if answer.HasField("expected_pause") else ""),
        ("looked", duration(answer.duration) if answer.HasField("duration") else ""),
    ]
    lines = [headline, *fact_lines(facts if processes else facts[1:])]
    return "\n".join([*lines, problem_lines(answer.problems)] if answer.problems else lines)


def checks(found: Iterable[node_pb2.Check]) -> str:
    """`phaul doctor`: one check a line, the remedy of a failed one below."""
    lines = []
    for each in found:
        mark = "ok" if each.ok else SEVERITY_MARKS.get(each.severity, "?")
        lines.append(f"{mark:<7}  {each.code:<22} {each.message}")
        if each.remedy and not each.ok:
            lines.append(f"{'':<32} remedy: {each.remedy}")
    return "\n".join(lines)


def node_info(node: types_pb2.NodeInfo) -> str:
    """`phaul info`."""
    criu, room = node.criu, node.capacity
    abilities = [
        name
        for name, able in (
            ("memory tracking", criu.mem_track),
            ("lazy pages", criu.lazy_pages),
            ("pidfd", criu.pidfd_store),
        )
        if able
    ]
    facts = [
        ("phauld", node.version + (" (without TLS)" if node.insecure else "")),
        ("page tls", f"by {node.pages_tls}" if node.pages_tls else ""),
        ("node id", node.node_id),
        ("kernel", f"Linux {node.kernel_release} on {node.architecture}, glibc {node.glibc_version or 'unknown'}"),
        ("criu", f"{criu.version_text} ({criu.path})" if criu.version else "none: run phaul doctor"),
        ("can", ", ".join(abilities) if criu.version else ""),
        ("memory", f"{format_bytes(room.memory_available_bytes)} available"),
        ("images", f"{format_bytes(room.images_free_bytes)} free"),
        ("outgoing", f"{room.outgoing} of {room.outgoing_limit}"),
        ("incoming", f"{room.incoming} of {room.incoming_limit}"),
        ("features", ", ".join(node.api_features)),
    ]
    return "\n".join([node.node_name, *fact_lines(facts)])
