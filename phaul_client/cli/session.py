"""What every command shares: the options that are valid for all of them, and how a command is declared.

`--json`, `--daemon` and the flags of TLS are understood before and after the name of the command.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

import click

from phaul_client.cli.connection import DEFAULT_DAEMON, Daemon, connect, parse_daemon
from phaul_client.cli.json_output import to_line
from phaul_client.cli.outcomes import ExitCode
from phaul_client.cli.visible import visible

_Parameters = ParamSpec("_Parameters")
Implementation = Callable[Concatenate["Session", _Parameters], Coroutine[Any, Any, ExitCode | int | None]]


@dataclass(slots=True)
class Session:
    """What one run of `phaul` was told about all commands."""

    daemon: str = DEFAULT_DAEMON
    daemon_given: bool = False  #: by option or environment
    json: bool = False
    tls_dir: str = ""
    tls_name: str = ""

    def connect(self) -> AbstractAsyncContextManager[Daemon]:
        """The daemon to ask. Errors of gRPC inside become `PhaulError`."""
        return self.connect_to(self.daemon)

    def connect_to(self, address: str) -> AbstractAsyncContextManager[Daemon]:
        """Another daemon, with the same certificates."""
        return connect(address, self.tls_dir, self.tls_name)

    def show(self, value: dict[str, Any], text: str) -> None:
        """The result on stdout, for programs or for people."""
        if self.json or text:
            click.echo(to_line(value) if self.json else visible(text))


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and (session := context.find_object(Session)):
        session.json = True


def _set_daemon(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value and (session := context.find_object(Session)):
        try:
            session.daemon, session.daemon_given = parse_daemon(value), True
        except ValueError as exc:
            raise click.BadParameter(str(exc)) from None


def _set_tls(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value and parameter.name and (session := context.find_object(Session)):
        setattr(session, parameter.name, value)


def shared_options(*, on_group: bool) -> list[click.Option]:
    """`--daemon`, `--json` and those of TLS. The environment counts once, before the name of the command."""
    return [
        click.Option(
            ["--daemon"],
            metavar="ADDRESS",
            envvar="PHAUL_DAEMON" if on_group else None,
            help=f"phauld to ask: unix:/PATH or HOST[:PORT]; default $PHAUL_DAEMON or {DEFAULT_DAEMON}.",
            expose_value=False,
            callback=_set_daemon,
        ),
        click.Option(
            ["--tls-dir"],
            metavar="DIR",
            help="Certificates for a HOST: ca.crt, node.crt, node.key; none: in clear. Default $PHAUL_TLS_DIR, "
            "else ~/.config/phaul/tls or /etc/phaul/tls if it is there.",
            expose_value=False,
            callback=_set_tls,
        ),
        click.Option(
            ["--tls-name"],
            metavar="NAME",
            help="Node whose certificate HOST must show; default $PHAUL_TLS_NAME or HOST.",
            expose_value=False,
            callback=_set_tls,
        ),
        click.Option(["--json"], is_flag=True, help="Output for programs.", expose_value=False, callback=_set_json),
    ]


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def command(
    name: str, *example_lines: str, interspersed: bool = True
) -> Callable[[Implementation[_Parameters]], click.Command]:
    """Make a coroutine function a command; its docstring is the help, its value the exit code (None: 0)."""

    def decorate(implementation: Implementation[_Parameters]) -> click.Command:
        @functools.wraps(implementation)
        def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> int:
            session = click.get_current_context().find_object(Session)
            assert session is not None
            return int(asyncio.run(implementation(session, *args, **kwargs)) or ExitCode.OK)

        made = click.command(
            name,
            help=inspect.getdoc(implementation),
            epilog=examples(*example_lines),
            context_settings={"allow_interspersed_args": interspersed},
        )(run)
        made.params.extend(shared_options(on_group=False))
        return made

    return decorate
