"""The options of `phaul migrate` and `phaul preflight`: declared once, and made into `Options` of the API."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import click
from google.protobuf.duration_pb2 import Duration

from phaul.v1 import types_pb2
from phaul.v1.types_pb2 import Options
from phaul_client.cli import parameters

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Name of the option, and the enum of the API whose words it takes.
_CHOICES: Final = {
    "mode": ("mode", "Mode"),
    "restore": ("restore_mode", "RestoreMode"),
    "tcp": ("tcp_policy", "TcpPolicy"),
    "in_doubt": ("in_doubt_policy", "InDoubtPolicy"),
    "compression": ("compression", "Compression"),
}
_TIMES: Final = {
    "downtime": "downtime_goal",
    "deadline": "deadline",
    "freeze_budget": "freeze_budget",
    "postcopy_after": "postcopy_after",
    "in_doubt_timeout": "in_doubt_timeout",
}
_PLAIN: Final = {
    "max_rounds": "max_rounds",
    "bandwidth": "bandwidth_limit_bytes_per_second",
    "throttle": "throttle",
    "shell_job": "shell_job",
    "ext_unix_sk": "ext_unix_sk",
    "file_locks": "file_locks",
    "checksum": "checksum",
    "sync_overwrite": "sync_overwrite",
}
#: Repeatable, and the field that they fill.
_LISTS: Final = {"move_address": "move_addresses", "hook": "hooks", "sync": "sync_directories"}


def to_duration(seconds: float) -> Duration:
    """Seconds as the API wants them, exact to the microsecond."""
    made = Duration()
    made.FromMicroseconds(round(seconds * 1_000_000))
    return made


def words(enum_name: str) -> dict[str, int]:
    """The words of an enum of the API, with their numbers."""
    values = types_pb2.DESCRIPTOR.enum_types_by_name[enum_name].values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix).lower().replace("_", "-"): value.number for value in values[1:]}


def build_options(given: Mapping[str, Any]) -> Options:
    """What was said on the command line; what was not (None, or a flag that is off) stays for phauld to choose."""
    options = Options()
    for name, value in given.items():
        if value is None or (value is False and name in ("throttle", "sync_overwrite")):
            continue
        if name in _LISTS:
            getattr(options, _LISTS[name]).extend(value)
            continue
        if name in _TIMES:
            getattr(options, _TIMES[name]).CopyFrom(to_duration(value))
        elif name in _CHOICES:
            field, enum_name = _CHOICES[name]
            setattr(options, field, words(enum_name)[value])
        else:
            setattr(options, _PLAIN[name], value)
    if options.move_addresses and not options.tcp_policy:
        options.tcp_policy = types_pb2.TCP_POLICY_KEEP
    return options


def target_field(target: int | str) -> dict[str, Any]:
    """The `target` of a request, for its constructor."""
    return {"pid": target} if isinstance(target, int) else {"workload": target}


def _choice(flag: str, enum_name: str, text: str) -> Callable[[_Function], _Function]:
    return click.option(flag, type=click.Choice(list(words(enum_name))), help=text)


def _time(flag: str, text: str) -> Callable[[_Function], _Function]:
    return click.option(flag, type=parameters.DURATION, metavar="TIME", help=text)


_TO: Final = click.option("--to", "destination", type=parameters.DESTINATION, metavar="HOST[:PORT]", required=True,
                          help="The phauld to move it to; port 7707 if not given.")  # fmt: skip
_DECLARATIONS: Final[tuple[Callable[[Any], Any], ...]] = (
    _choice("--mode", "Mode", "How memory gets there; default auto: phaul chooses and says why."),
    _choice("--restore", "RestoreMode", "All memory before it runs there (eager), or filled in while it runs (lazy)."),
    _choice("--tcp", "TcpPolicy", "Established TCP connections: refuse to move (default), move them, or close them. "
                                  "Those over loopback within the tree move along by themselves."),
    click.option("--move-address", multiple=True, type=parameters.ADDRESS, metavar="ADDR[/LEN][@IFACE]",
                 help="Move this address of the node along, to IFACE there; implies --tcp keep. Repeatable."),
    click.option("--hook", multiple=True, type=parameters.HOOK, metavar="PATH|grpc:TARGET",
                 help="Call this program or server on both nodes, see docs/hooks.md. Repeatable."),
    click.option("--sync", multiple=True, type=parameters.DIRECTORY, metavar="DIR",
                 help="Make this directory the same there, with rsync; what changes meanwhile goes in the freeze."
                 " Repeatable."),
    click.option("--sync-overwrite", is_flag=True,
                 help="Let --sync replace and delete what is there, though no earlier move left it behind."),
    _time("--downtime", "The pause that is acceptable, such as 300ms (default): a goal, see --freeze-budget."),
    _time("--deadline", "Roll back if it has not moved by then; default 1h."),
    _time("--freeze-budget", "Roll back if it stands still for longer; default 60s."),
    click.option("--max-rounds", type=click.IntRange(1, 100), metavar="N", help="Pre-copy rounds at most; default 30."),
    _time("--postcopy-after", "In hybrid mode, go over to post-copy after so much pre-copy."),
    click.option("--bandwidth", type=parameters.RATE, metavar="RATE",
                 help="Limit: 100M is MiB a second, 1Gbit is bits; default none."),
    click.option("--checksum/--no-checksum", default=None,
                 help="Notice pages that are damaged on their way; default: with TLS or compression only."),
    _choice("--compression", "Compression", "Of pages; auto measures the link and the processor; default off."),
    click.option("--throttle", is_flag=True, help="Slow it down if it dirties memory faster than the link carries it."),
    click.option("--shell-job/--no-shell-job", default=None,
                 help="Its terminal or session belongs to a process that stays; default: as found."),
    click.option("--ext-unix-sk/--no-ext-unix-sk", default=None,
                 help="Leave the other ends of its unix sockets behind; default: refuse."),
    click.option("--file-locks/--no-file-locks", default=None, help="Move its file locks; default: as found."),
    _choice("--in-doubt", "InDoubtPolicy",
            "If the destination dies in the moment of truth: hold (default) can neither lose nor double it."),
    _time("--in-doubt-timeout", "How long the destination may be silent until --in-doubt applies; default 60s."),
)  # fmt: skip


def migration_options(function: _Function) -> _Function:
    """All of them, and `--to`."""
    return _TO(options_without_destination(function))


def options_without_destination(function: _Function) -> _Function:
    """All of them."""
    for declare in reversed(_DECLARATIONS):
        function = declare(function)
    return function
