"""Errors for people: one line with the cause, one with the remedy, on stderr."""

from typing import Final

import click

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.outcomes import failure_of
from phaul_client.cli.render import problem_lines
from phaul_client.cli.visible import visible

LOG_LINES_SHOWN: Final = 5


def tell_error(message: str, remedy: str = "", log_tail: str = "") -> None:
    """The cause, the end of criu's log, and the remedy."""
    click.echo(visible("\n".join(error_lines(message, remedy, log_tail))), err=True)


def error_lines(message: str, remedy: str, log_tail: str) -> list[str]:
    """The lines of `tell_error`. Pure."""
    cause = " ".join(message.split())
    log = [f"  criu: {line}" for line in log_tail.splitlines()[-LOG_LINES_SHOWN:]]
    return [f"phaul: error: {cause}", *log, *([f"  remedy: {' '.join(remedy.split())}"] if remedy else [])]


def tell_failure(migration: Migration) -> None:
    """Why a migration did not move the process; nothing if it did, or goes on."""
    failure = failure_of(migration)
    if failure is None:
        return
    tell_error(failure.message, failure.remedy, "\n".join(failure.log_tail))
    others = [
        each
        for each in migration.problems
        if each.severity == types_pb2.SEVERITY_ERROR and each.message not in failure.message
    ]
    if others:
        click.echo(visible(problem_lines(others)), err=True)
