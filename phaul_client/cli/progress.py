"""Showing a migration while it goes on: on a terminal, as plain lines, as JSON, or not at all."""

import sys
import time
from types import TracebackType
from typing import Final, Protocol, Self

import click

from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.json_output import progress_json, to_line
from phaul_client.cli.render import progress_line
from phaul_client.cli.visible import visible

LINE_SECONDS: Final = 5.0


class Progress(Protocol):
    """What a migration that is watched is told to. `with` it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, migration: Migration) -> None:
        """A new snapshot."""

    def tell(self, message: str) -> None:
        """Something about the watching itself."""


class Quiet:
    """Says only what must be said."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    def update(self, migration: Migration) -> None:
        """A new snapshot."""

    def tell(self, message: str) -> None:
        """Something about the watching itself."""
        click.echo(visible(f"phaul: {message}"), err=True)


class Json(Quiet):
    """A line of JSON on stdout for every snapshot."""

    def update(self, migration: Migration) -> None:
        click.echo(to_line(progress_json(migration)))


class Lines(Quiet):
    """A line on stderr for every phase and round, and every few seconds."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._told_at = 0.0

    def update(self, migration: Migration) -> None:
        step = (migration.phase, len(migration.rounds))
        now = time.monotonic()
        if step != self._last or now - self._told_at >= LINE_SECONDS:
            self._last, self._told_at = step, now
            self.tell(progress_line(migration))


def choose(*, json: bool, quiet: bool) -> Progress:
    """The one that suits where the output goes."""
    if quiet:
        return Quiet()
    if json:
        return Json()
    if not sys.stderr.isatty():
        return Lines()
    from phaul_client.cli.live import Live  # rich costs 50 ms, which only a person who watches should pay

    return Live()
