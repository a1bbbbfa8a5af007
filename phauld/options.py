"""The options of a migration: from the message, with defaults, to what criu is told (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf import duration_pb2

from phaul.v1 import types_pb2
from phaul_client.addresses import Address, parse_address
from phaul_client.commit import Event
from phaul_client.errors import InvalidRequest
from phaul_client.hooks import Hook, parse_hook
from phaul_client.modes import EAGER_RESTORE_SECONDS_PER_BYTE, Mode, RestoreMode
from phaul_client.pipe_choice import COMPRESSIONS, Compression
from phaul_client.policy import Limits
from phaul_client.preflight import ChosenOptions
from phaul_client.rsync import parse_directories
from phaul_criu.requests import DumpOptions, RestoreOptions
from phauld.convert import seconds_of
from phauld.costs import Costs

DEFAULT_DOWNTIME_SECONDS: Final = 0.3
DEFAULT_DEADLINE_SECONDS: Final = 3600.0
DEFAULT_FREEZE_SECONDS: Final = 60.0
DEFAULT_DOUBT_SECONDS: Final = 60.0
DEFAULT_ROUNDS: Final = 30
MAX_ROUNDS: Final = 100
DEFAULT_GHOST_BYTES: Final = 64 << 20

_MODES: Final = {
    types_pb2.MODE_UNSPECIFIED: Mode.AUTO,
    types_pb2.MODE_AUTO: Mode.AUTO,
    types_pb2.MODE_STOP_COPY: Mode.STOP_COPY,
    types_pb2.MODE_PRE_COPY: Mode.PRE_COPY,
    types_pb2.MODE_POST_COPY: Mode.POST_COPY,
    types_pb2.MODE_HYBRID: Mode.HYBRID,
}
_RESTORE_MODES: Final = {
    types_pb2.RESTORE_MODE_UNSPECIFIED: RestoreMode.AUTO,
    types_pb2.RESTORE_MODE_AUTO: RestoreMode.AUTO,
    types_pb2.RESTORE_MODE_EAGER: RestoreMode.EAGER,
    types_pb2.RESTORE_MODE_LAZY: RestoreMode.LAZY,
}
_DOUBT_EVENTS: Final = {
    types_pb2.IN_DOUBT_POLICY_RESUME: Event.RESOLVED_RESUME,
    types_pb2.IN_DOUBT_POLICY_KILL: Event.RESOLVED_KILL,
}
#: Values of a newer version are refused: who asks for them would not get what they mean.
_KNOWN_VALUES: Final = {
    "mode": _MODES.keys(),
    "restore_mode": _RESTORE_MODES.keys(),
    "tcp_policy": frozenset(types_pb2.TcpPolicy.values()),
    "in_doubt_policy": frozenset(types_pb2.InDoubtPolicy.values()),
    "compression": COMPRESSIONS.keys(),
}
MODE_VALUES: Final = {mode: value for value, mode in _MODES.items() if value}
RESTORE_MODE_VALUES: Final = {mode: value for value, mode in _RESTORE_MODES.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of `phaul.v1.Options`, with every default filled in."""

    mode: Mode
    restore_mode: RestoreMode
    tcp: types_pb2.TcpPolicy.ValueType
    downtime_goal_seconds: float
    deadline_seconds: float
    freeze_budget_seconds: float
    max_rounds: int
    bandwidth_limit_bytes_per_second: int
    throttle: bool
    postcopy_after_seconds: float | None
    doubt_event: Event | None
    in_doubt_seconds: float
    shell_job: bool
    ext_unix_sk: bool
    file_locks: bool
    ghost_limit_bytes: int
    addresses: tuple[Address, ...] = ()
    checksum: bool | None = None
    compression: Compression | None = None
    hooks: tuple[Hook, ...] = ()
    sync: tuple[str, ...] = ()
    sync_overwrite: bool = False


def parse_options(message: types_pb2.Options) -> Options:
    """Read and check. Raises `InvalidRequest`."""
    max_rounds = message.max_rounds or DEFAULT_ROUNDS
    if max_rounds > MAX_ROUNDS:
        raise InvalidRequest(f"max_rounds = {max_rounds} is above {MAX_ROUNDS}")
    for name, known in _KNOWN_VALUES.items():
        if getattr(message, name) not in known:
            raise InvalidRequest(f"{name} = {getattr(message, name)} is unknown to this version of phaul")
    return Options(
        mode=_MODES[message.mode],
        restore_mode=_RESTORE_MODES[message.restore_mode],
        tcp=message.tcp_policy or types_pb2.TCP_POLICY_REFUSE,
        downtime_goal_seconds=_positive("downtime_goal", message.downtime_goal, DEFAULT_DOWNTIME_SECONDS),
        deadline_seconds=_positive("deadline", message.deadline, DEFAULT_DEADLINE_SECONDS),
        freeze_budget_seconds=_positive("freeze_budget", message.freeze_budget, DEFAULT_FREEZE_SECONDS),
        max_rounds=max_rounds,
        bandwidth_limit_bytes_per_second=message.bandwidth_limit_bytes_per_second,
        throttle=message.throttle,
        postcopy_after_seconds=(
            _positive("postcopy_after", message.postcopy_after, 0.0) if message.HasField("postcopy_after") else None
        ),
        doubt_event=_DOUBT_EVENTS.get(message.in_doubt_policy),
        in_doubt_seconds=_positive("in_doubt_timeout", message.in_doubt_timeout, DEFAULT_DOUBT_SECONDS),
        shell_job=message.shell_job,
        ext_unix_sk=message.ext_unix_sk,
        file_locks=message.file_locks if message.HasField("file_locks") else True,
        ghost_limit_bytes=message.ghost_limit_bytes or DEFAULT_GHOST_BYTES,
        addresses=tuple(map(parse_address, message.move_addresses)),
        checksum=message.checksum if message.HasField("checksum") else None,
        compression=COMPRESSIONS[message.compression] if message.compression else None,
        hooks=tuple(map(parse_hook, message.hooks)),
        sync=parse_directories(message.sync_directories),
        sync_overwrite=message.sync_overwrite,
    )


def limits(options: Options, restore_mode: RestoreMode, costs: Costs, *, allow_throttle: bool) -> Limits:
    """The policy's limits, with what is known of the way to the destination."""
    return Limits(
        downtime_goal_seconds=options.downtime_goal_seconds,
        deadline_seconds=options.deadline_seconds,
        max_rounds=options.max_rounds,
        bandwidth_limit_bytes_per_second=options.bandwidth_limit_bytes_per_second or None,
        switch_cost_seconds=costs.switch_seconds,
        image_bytes=costs.image_bytes,
        restore_seconds_per_byte=EAGER_RESTORE_SECONDS_PER_BYTE if restore_mode is RestoreMode.EAGER else 0.0,
        allow_throttle=allow_throttle,
        allow_postcopy=options.mode is Mode.HYBRID or options.postcopy_after_seconds is not None,
        postcopy_after_seconds=options.postcopy_after_seconds,
    )


def dump_options(pid: int, chosen: ChosenOptions) -> DumpOptions:
    """What criu's dump is told, without its directory and page stream."""
    return DumpOptions(
        images_dir_fd=-1,
        pid=pid,
        shell_job=chosen.shell_job,
        tcp_established=chosen.tcp_established,
        tcp_close=chosen.tcp_close,
        tcp_skip_in_flight=chosen.tcp_skip_in_flight,
        ext_unix_sk=chosen.ext_unix_sk,
        file_locks=chosen.file_locks,
        link_remap=chosen.link_remap,
        evasive_devices=chosen.evasive_devices,
        ghost_limit_bytes=chosen.ghost_limit_bytes,
    )


def decided(options: types_pb2.Options, chosen: ChosenOptions) -> types_pb2.Options:
    """The options with what phaul chose by itself filled in, as the destination needs them."""
    message = types_pb2.Options()
    message.CopyFrom(options)
    if chosen.tcp_established:
        message.tcp_policy = types_pb2.TCP_POLICY_KEEP
    message.shell_job = chosen.shell_job
    message.ext_unix_sk = chosen.ext_unix_sk
    message.file_locks = chosen.file_locks
    message.ghost_limit_bytes = chosen.ghost_limit_bytes
    return message


def restore_options(options: Options) -> RestoreOptions:
    """What criu's restore is told, without its directory."""
    return RestoreOptions(
        images_dir_fd=-1,
        shell_job=options.shell_job,
        tcp_established=options.tcp == types_pb2.TCP_POLICY_KEEP,
        tcp_close=options.tcp == types_pb2.TCP_POLICY_CLOSE,
        ext_unix_sk=options.ext_unix_sk,
        file_locks=options.file_locks,
        link_remap=True,
        evasive_devices=True,
        lazy_pages=options.restore_mode is RestoreMode.LAZY,
    )


def _positive(name: str, message: duration_pb2.Duration, default: float) -> float:
    seconds = seconds_of(message)
    if seconds < 0:
        raise InvalidRequest(f"{name} is negative")
    return seconds or default
