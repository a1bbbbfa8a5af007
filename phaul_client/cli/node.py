"""`phaul preflight`, `doctor`, `info`: what a node is and can do."""

from collections.abc import Iterable
from typing import Any, Final

from phaul.v1 import node_pb2, types_pb2
from phaul.v1.node_pb2 import Check
from phaul_client.cli import parameters, render_node
from phaul_client.cli.connection import CALL_SECONDS, LONG_CALL_SECONDS, DaemonUnreachable
from phaul_client.cli.json_output import to_json
from phaul_client.cli.outcomes import ExitCode
from phaul_client.cli.requests import build_options, migration_options, target_field
from phaul_client.cli.session import Session, command
from phaul_criu import features

_SEVERITIES: Final = {
    features.Severity.REQUIRED: types_pb2.SEVERITY_ERROR,
    features.Severity.FEATURE: types_pb2.SEVERITY_WARNING,
    features.Severity.ADVICE: types_pb2.SEVERITY_INFO,
}
UNREACHABLE_CODES: Final = frozenset({"peer-unreachable"})


@command(
    "preflight",
    "phaul preflight redis-server --to node-b",
    "phaul preflight 4242 --to node-b --tcp keep --json",
)
@parameters.target_argument
@migration_options
async def preflight(session: Session, target: int | str, destination: str, **options: Any) -> ExitCode:
    """Tell what would stand in the way.

    Looks at both nodes, names each problem with its remedy, and changes nothing.
    """
    request = node_pb2.PreflightRequest(**target_field(target), destination=destination, options=build_options(options))
    async with session.connect() as daemon:
        answer = await daemon.node.Preflight(request, timeout=LONG_CALL_SECONDS)
    session.show(to_json(answer), render_node.preflight(answer, str(target), destination))
    return preflight_exit_code(answer)


def preflight_exit_code(answer: node_pb2.PreflightResponse) -> ExitCode:
    """As `phaul migrate` would end with these problems."""
    errors = {each.code for each in answer.problems if each.severity == types_pb2.SEVERITY_ERROR}
    if answer.ok:
        return ExitCode.OK
    return ExitCode.UNREACHABLE if errors and errors <= UNREACHABLE_CODES else ExitCode.REFUSED


@command("doctor", "phaul doctor", "phaul doctor --json | jq '.checks[] | select(.ok | not)'")
async def doctor(session: Session) -> ExitCode:
    """Check what migrations need on this node.

    What is missing comes with its remedy. Asks phauld, which knows best what it may do. Without a phauld it looks for
    itself, so it is of use before there is one. Exits with 0 if everything that is required is there, otherwise with 1.
    """
    checks = await _doctor(session)
    ok = all(each.ok or each.severity != types_pb2.SEVERITY_ERROR for each in checks)
    session.show({"ok": ok, "checks": [to_json(each) for each in checks]}, render_node.checks(checks))
    return ExitCode.OK if ok else ExitCode.FAILED


async def _doctor(session: Session) -> list[Check]:
    try:
        async with session.connect() as daemon:
            return list((await daemon.node.Doctor(node_pb2.DoctorRequest(), timeout=LONG_CALL_SECONDS)).checks)
    except DaemonUnreachable as exc:
        if session.daemon_given:
            raise
        absent = Check(
            code="phauld", severity=types_pb2.SEVERITY_WARNING, message=f"{exc}; looked without it", remedy=exc.remedy
        )
    return [*local_checks(await features.findings()), absent]


def local_checks(findings: Iterable[features.Finding]) -> list[Check]:
    """What this process found out by itself, as phauld would tell it."""
    return [
        Check(
            code=each.name,
            ok=each.ok,
            severity=types_pb2.SEVERITY_INFO if each.ok else _SEVERITIES[each.severity],
            message=each.detail,
            remedy=each.remedy,
        )
        for each in findings
    ]


@command("info", "phaul info", "phaul --daemon node-b:7707 info")
async def info(session: Session) -> None:
    """Show what this node is and can do."""
    async with session.connect() as daemon:
        node = (await daemon.node.GetInfo(node_pb2.GetInfoRequest(), timeout=CALL_SECONDS)).node
    session.show(to_json(node), render_node.node_info(node))
