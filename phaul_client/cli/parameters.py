"""Values on the command line: times, rates, addresses, names, with completion of the names of workloads."""

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.types_pb2 import RestartPolicy
from phaul_client.addresses import parse_address
from phaul_client.cli.connection import Daemon, parse_daemon, parse_host_port
from phaul_client.cli.session import Session
from phaul_client.cli.units import parse_duration, parse_rate, parse_size
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.hooks import parse_hook
from phaul_client.rsync import parse_directory

COMPLETION_SECONDS: Final = 0.5
COMPLETED_MIGRATIONS: Final = 50
MAX_PID: Final = 2**22
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESTART_MODES: Final = {
    "no": types_pb2.RESTART_MODE_NO,
    "on-failure": types_pb2.RESTART_MODE_ON_FAILURE,
    "always": types_pb2.RESTART_MODE_ALWAYS,
}
_Value = TypeVar("_Value")


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A value that a function makes of the text; its `ValueError` is the usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of the text; anything but text is a default already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def parse_sync_directory(text: str) -> str:
    """An absolute path of a directory. Raises `ValueError`."""
    try:
        return parse_directory(text)
    except InvalidRequest as exc:
        raise ValueError(exc.message) from exc


def parse_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME for the value that it has here. Raises `ValueError`."""
    name, separator, value = text.partition("=")
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f"{text!r} is not NAME=VALUE")
    if not separator and name not in os.environ:
        raise ValueError(f"{name} has no value here: say {name}=VALUE")
    return name, value if separator else os.environ[name]


def parse_limit(text: str) -> tuple[str, int]:
    """NAME=N or NAME=unlimited. Raises `ValueError`."""
    name, _, value = text.partition("=")
    if value == "unlimited":
        return name.lower(), 2**64 - 1
    if not name or not (value.isascii() and value.isdigit()) or int(value) >= 2**64:
        raise ValueError(f"{text!r} is not NAME=N, such as nofile=1024 or core=unlimited")
    return name.lower(), int(value)


def parse_memory(text: str) -> int:
    """A size of at least a MiB. Raises `ValueError`."""
    if (size := parse_size(text)) < 1 << 20:
        raise ValueError(f"{text!r} is less than 1 MiB, in which nothing runs")
    return size


def parse_cpus(text: str) -> int:
    """Thousandths of a processor, of "0.5" or "2". Raises `ValueError`."""
    try:
        millis = round(float(text) * 1000)
    except (ValueError, OverflowError):
        millis = 0
    if not 10 <= millis < 2**31:
        raise ValueError(f"{text!r} is no number of processors, such as 2 or 0.5, and at least 0.01")
    return millis


def parse_restart(text: str) -> RestartPolicy:
    """no, on-failure, on-failure:N, always. Raises `ValueError`."""
    word, colon, number = text.partition(":")
    mode = _RESTART_MODES.get(word)
    is_number = number.isascii() and number.isdigit() and 0 < int(number) < 2**32
    if mode is None or (colon and not (is_number and word == "on-failure")):
        raise ValueError(f"{text!r} is none of no, on-failure, on-failure:N, always")
    return RestartPolicy(mode=mode, max_restarts=int(number or 0))


def parse_signal(text: str) -> int:
    """Number of a signal by its name, with or without SIG, or by number. Raises `ValueError`."""
    if text.isdigit() and 1 <= int(text) <= 64:
        return int(text)
    name = text.upper()
    try:
        return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    except KeyError:
        raise ValueError(f"{text!r} is no signal, such as TERM, SIGUSR1 or 9") from None


def parse_target(text: str) -> int | str:
    """A PID if it is a number, otherwise a workload's name. Raises `ValueError`."""
    if not text or any(character.isspace() for character in text):
        raise ValueError(f"{text!r} is neither a PID nor a workload's name")
    if not text.isdigit():
        return text
    if not 1 < int(text) <= MAX_PID:
        raise ValueError(f"{text} is no PID that can be moved: more than 1, at most {MAX_PID}")
    return int(text)


def parse_grace(text: str) -> float:
    """Seconds, with or without a unit; 0 is allowed. Raises `ValueError`."""
    try:
        seconds = float(text)
    except ValueError:
        return parse_duration(text)
    if not 0 <= seconds <= 86400:
        raise ValueError(f"{text!r} is not between 0 and 86400 seconds")
    return seconds


def parse_destinations(text: str) -> tuple[str, ...]:
    """Addresses with commas between them. Raises `ValueError`."""
    return tuple(parse_host_port(each) for each in text.split(","))


def parse_hook_text(text: str) -> str:
    """A hook, as it was written. Raises `ValueError`."""
    try:
        return str(parse_hook(text))
    except InvalidRequest as exc:
        raise ValueError(exc.message) from None


def parse_moved_address(text: str) -> str:
    """An address that moves along, as it was written. Raises `ValueError`."""
    try:
        parse_address(text)
    except InvalidRequest as exc:
        raise ValueError(exc.message) from None
    return text


ADDRESS: Final = Parsed("ADDR[/LEN][@IFACE]", parse_moved_address)
DURATION: Final = Parsed("TIME", parse_duration)
GRACE: Final = Parsed("SECONDS", parse_grace)
RATE: Final = Parsed("RATE", parse_rate)
DESTINATION: Final = Parsed("HOST[:PORT]", parse_host_port)
DESTINATIONS: Final = Parsed("HOST[:PORT],…", parse_destinations)
DAEMON: Final = Parsed("ADDRESS", parse_daemon)
HOOK: Final = Parsed("PATH|grpc:TARGET", parse_hook_text)
DIRECTORY: Final = Parsed("DIR", parse_sync_directory)
VARIABLE: Final = Parsed("NAME=VALUE", parse_variable)
LIMIT: Final = Parsed("NAME=N", parse_limit)
MEMORY: Final = Parsed("SIZE", parse_memory)
CPUS: Final = Parsed("N", parse_cpus)
RESTART: Final = Parsed("WHEN", parse_restart)
SIGNAL: Final = Parsed("SIGNAL", parse_signal)
TARGET: Final = Parsed("PID|NAME", parse_target)


async def _workloads(daemon: Daemon) -> list[CompletionItem]:
    listed = await daemon.node.ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=COMPLETION_SECONDS)
    return [CompletionItem(each.name, help=" ".join(" ".join(each.spec.argv).split())) for each in listed.workloads]


async def _migrations(daemon: Daemon) -> list[CompletionItem]:
    request = migrations_pb2.ListMigrationsRequest(page_size=COMPLETED_MIGRATIONS)
    listed = await daemon.migrations.ListMigrations(request, timeout=COMPLETION_SECONDS)
    return [
        CompletionItem(each.migration_id, help=f"{each.workload or each.pid} to {each.destination_address}")
        for each in listed.migrations
    ]


def _complete(find: Callable[[Daemon], Awaitable[list[CompletionItem]]]) -> Callable[..., list[CompletionItem]]:
    """What begins as the word does; nothing if the daemon does not answer at once."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        session = context.find_object(Session) or Session()

        async def found() -> list[CompletionItem]:
            async with asyncio.timeout(COMPLETION_SECONDS), session.connect() as daemon:
                return [each for each in await find(daemon) if each.value.startswith(incomplete)]

        try:
            return asyncio.run(found())
        except (PhaulError, OSError):  # a TimeoutError is an OSError
            return []

    return complete


complete_workloads: Final = _complete(_workloads)
complete_migrations: Final = _complete(_migrations)


def name_argument(function: Callable[..., _Value]) -> Callable[..., _Value]:
    """The argument NAME of a workload."""
    return click.argument("name", metavar="NAME", shell_complete=complete_workloads)(function)


def target_argument(function: Callable[..., _Value]) -> Callable[..., _Value]:
    """The argument PID|NAME."""
    return click.argument("target", metavar="PID|NAME", type=TARGET, shell_complete=complete_workloads)(function)
