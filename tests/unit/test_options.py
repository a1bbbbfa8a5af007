"""The options of a migration: defaults, refusals, and what criu is told."""

import pytest
from google.protobuf import duration_pb2

from phaul.v1 import types_pb2
from phaul_client.commit import Event
from phaul_client.errors import InvalidRequest
from phaul_client.modes import Mode, RestoreMode
from phaul_client.preflight import choose_options
from phaul_client.preflight.convert import wishes_of
from phaul_client.preflight.model import InetSocket, TreeFacts
from phaul_criu.requests import NetworkLock, dump_request, restore_request
from phauld.convert import duration
from phauld.costs import Costs
from phauld.options import (
    MODE_VALUES,
    RESTORE_MODE_VALUES,
    decided,
    dump_options,
    limits,
    parse_options,
    restore_options,
)

TIMES = ("downtime_goal", "deadline", "freeze_budget", "in_doubt_timeout", "postcopy_after")


def options(**fields: object) -> types_pb2.Options:
    return types_pb2.Options(**fields)  # type: ignore[arg-type]


def tree_with_connection() -> TreeFacts:
    connection = InetSocket(
        protocol="tcp",
        inode=1,
        pid=42,
        state=1,
        local_address="127.0.0.1",
        local_port=7,
        remote_address="127.0.0.1",
        remote_port=8,
        waiting=0,
        own_network_namespace=False,
    )
    return TreeFacts(root_pid=42, inet_sockets=(connection,))


def test_an_empty_message_has_every_default() -> None:
    parsed = parse_options(options())
    assert (parsed.mode, parsed.restore_mode) == (Mode.AUTO, RestoreMode.AUTO)
    assert (parsed.downtime_goal_seconds, parsed.deadline_seconds) == (0.3, 3600.0)
    assert (parsed.freeze_budget_seconds, parsed.in_doubt_seconds, parsed.max_rounds) == (60.0, 60.0, 30)
    assert parsed.tcp == types_pb2.TCP_POLICY_REFUSE
    assert parsed.postcopy_after_seconds is None
    assert parsed.doubt_event is None
    assert parsed.file_locks
    assert (parsed.shell_job, parsed.ext_unix_sk, parsed.throttle) == (False, False, False)
    assert limits(parsed, RestoreMode.LAZY, Costs(), allow_throttle=False).bandwidth_limit_bytes_per_second is None


def test_what_is_said_is_kept() -> None:
    message = options(
        mode=types_pb2.MODE_STOP_COPY,
        restore_mode=types_pb2.RESTORE_MODE_LAZY,
        downtime_goal=duration(0.05),
        deadline=duration(10),
        freeze_budget=duration(2),
        in_doubt_timeout=duration(3),
        in_doubt_policy=types_pb2.IN_DOUBT_POLICY_KILL,
        postcopy_after=duration(4),
        max_rounds=7,
        file_locks=False,
        bandwidth_limit_bytes_per_second=1000,
    )
    parsed = parse_options(message)
    assert (parsed.mode, parsed.restore_mode) == (Mode.STOP_COPY, RestoreMode.LAZY)
    assert (parsed.downtime_goal_seconds, parsed.deadline_seconds, parsed.freeze_budget_seconds) == (0.05, 10, 2)
    assert (parsed.in_doubt_seconds, parsed.doubt_event) == (3, Event.RESOLVED_KILL)
    assert (parsed.postcopy_after_seconds, parsed.max_rounds, parsed.file_locks) == (4, 7, False)
    assert limits(parsed, RestoreMode.LAZY, Costs(), allow_throttle=False).max_rounds == 7
    assert limits(parsed, RestoreMode.LAZY, Costs(), allow_throttle=False).bandwidth_limit_bytes_per_second == 1000


@pytest.mark.parametrize("name", TIMES)
def test_no_time_may_be_negative(name: str) -> None:
    for negative in (duration_pb2.Duration(seconds=-1), duration_pb2.Duration(nanos=-1000)):
        with pytest.raises(InvalidRequest, match=name):
            parse_options(options(**{name: negative}))


@pytest.mark.parametrize("name", ["mode", "restore_mode", "tcp_policy", "in_doubt_policy"])
def test_a_value_of_a_newer_version_is_refused_and_not_ignored(name: str) -> None:
    with pytest.raises(InvalidRequest, match="unknown"):
        parse_options(options(**{name: 99}))


def test_too_many_rounds_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_rounds = 101 is above 100"):
        parse_options(options(max_rounds=101))


def test_every_mode_has_a_value() -> None:
    assert set(MODE_VALUES) == set(Mode)
    assert set(RESTORE_MODE_VALUES) == set(RestoreMode)
    for mode, value in MODE_VALUES.items():
        assert parse_options(options(mode=value)).mode is mode
    for restore_mode, restore_value in RESTORE_MODE_VALUES.items():
        assert parse_options(options(restore_mode=restore_value)).restore_mode is restore_mode


@pytest.mark.parametrize(
    ("policy", "established", "close", "lock"),
    [
        (types_pb2.TCP_POLICY_UNSPECIFIED, False, False, NetworkLock.SKIP),
        (types_pb2.TCP_POLICY_REFUSE, False, False, NetworkLock.SKIP),
        (types_pb2.TCP_POLICY_CLOSE, False, True, NetworkLock.SKIP),
        (types_pb2.TCP_POLICY_KEEP, True, False, NetworkLock.NFTABLES),
    ],
)
def test_both_ends_are_told_the_same_of_connections(
    policy: types_pb2.TcpPolicy.ValueType, established: bool, close: bool, lock: NetworkLock
) -> None:
    message = options(tcp_policy=policy)
    chosen = choose_options(tree_with_connection(), wishes_of(message))
    parsed = parse_options(decided(message, chosen))
    for request in (dump_request(dump_options(42, chosen)), restore_request(restore_options(parsed))):
        assert (request.opts.tcp_established, request.opts.tcp_close) == (established, close)
        assert request.opts.network_lock == lock.value


def test_both_ends_are_told_the_same_of_the_rest() -> None:
    message = options(shell_job=True, ext_unix_sk=True, file_locks=True, ghost_limit_bytes=5)
    chosen = choose_options(TreeFacts(root_pid=42), wishes_of(message))
    dump, restore = dump_options(42, chosen), restore_options(parse_options(decided(options(), chosen)))
    assert dump.pid == 42
    assert dump.ghost_limit_bytes == 5
    for told in (dump, restore):
        assert told.shell_job
        assert told.ext_unix_sk
        assert told.file_locks


def test_lazy_pages_only_when_decided() -> None:
    assert restore_options(parse_options(options(restore_mode=types_pb2.RESTORE_MODE_LAZY))).lazy_pages
    assert not restore_options(parse_options(options(restore_mode=types_pb2.RESTORE_MODE_EAGER))).lazy_pages
