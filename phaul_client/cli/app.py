"""The command `phaul` as a whole: its commands, its help, and the exit code of every error."""

import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from phaul_client.cli import certs, completion, drain, migrate, migrations, node, top, workloads
from phaul_client.cli.connection import DaemonError
from phaul_client.cli.errors import tell_error
from phaul_client.cli.json_output import error_json, to_line
from phaul_client.cli.outcomes import MEANINGS, ExitCode, exit_code_of_error
from phaul_client.cli.session import Session, examples, shared_options
from phaul_client.errors import PhaulError

_EXIT_CODES: Final = "\b\nExit codes:\n" + "\n".join(f"  {code:3d}  {text}" for code, text in MEANINGS.items())
_EXAMPLES: Final = examples(
    "phaul doctor                                  is this node fit?",
    "phaul run --name db -- redis-server           start something that can be moved",
    "phaul preflight db --to node-b                what would stand in the way?",
    "phaul migrate db --to node-b                  move it",
    "phaul --daemon node-b:7707 ps                 it runs there now",
    'eval "$(phaul completion bash)"               completion in bash (or zsh, fish)',
)


class _Commands(click.Group):
    """In the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


@click.group(
    cls=_Commands,
    params=shared_options(on_group=True),
    epilog=f"{_EXAMPLES}\n\n{_EXIT_CODES}",
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="phaul", prog_name="phaul")
def phaul() -> None:
    """Move running process trees between nodes, with their memory, files and sockets."""


for each in (
    *(workloads.run, workloads.ps, workloads.wait, workloads.stop, workloads.rm, workloads.logs),
    *(migrate.migrate, drain.drain, migrations.status, migrations.report, migrations.cancel, migrations.resolve),
    *(top.top, node.preflight, node.doctor, node.info, certs.certs, completion.completion),
):
    phaul.add_command(each)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `phaul` with these arguments, by default those of the process. The exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    session = Session()
    try:
        return _as_int(phaul.main(given, prog_name="phaul", standalone_mode=False, obj=session))
    except click.ClickException as exc:
        return _tell(_usage_error(exc), as_json=session.json or "--json" in given, exit_code=ExitCode.USAGE)
    except click.Abort:
        return ExitCode.INTERRUPTED
    except PhaulError as exc:
        return _tell(exc, as_json=session.json, exit_code=exit_code_of_error(exc))


def _as_int(value: Any) -> int:
    return value if isinstance(value, int) else ExitCode.OK


def _usage_error(error: click.ClickException) -> PhaulError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    # an option without its value is told by the parser, which knows no command
    remedy = f"{context.command_path if context is not None else 'phaul'} --help"
    return PhaulError(error.format_message(), reason="INVALID_ARGUMENT", remedy=remedy)


def _tell(error: PhaulError, *, as_json: bool, exit_code: ExitCode) -> int:
    if as_json:
        click.echo(to_line(error_json(error)))
    else:
        tell_error(error.message, error.remedy, error.log_tail if isinstance(error, DaemonError) else "")
    return exit_code
