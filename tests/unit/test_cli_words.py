"""Addresses, names, options: what the command line takes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.v1 import types_pb2
from phaul_client.cli.app import main
from phaul_client.cli.connection import parse_daemon, parse_host_port, tls_directory
from phaul_client.cli.migrations import matching
from phaul_client.cli.outcomes import ExitCode
from phaul_client.cli.parameters import parse_grace, parse_signal, parse_target, parse_variable
from phaul_client.cli.requests import build_options, words
from phaul_client.cli.workloads import build_spec, free_name
from phaul_client.errors import InvalidRequest, MigrationNotFound


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("node-b", "node-b:7707"),
        ("node-b:99", "node-b:99"),
        ("10.0.0.2", "10.0.0.2:7707"),
        ("a.b.example.:1", "a.b.example.:1"),
        ("::1", "[::1]:7707"),
        ("fe80::1%eth0", "[fe80::1%eth0]:7707"),
        ("[::1]", "[::1]:7707"),
        ("[::1]:8", "[::1]:8"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert parse_host_port(text) == address
    assert parse_daemon(text) == address
    assert parse_host_port(address) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7707",
        "node-b:",
        "node-b:0",
        "node-b:65536",
        "node-b:x",
        "http://b",
        "a b",
        "[x]:1",
        "a:b:c",
        "[a:b:c]:1",
        "[::1",
        "-b",
        "b-",
        "a/b",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST|no port"):
        parse_host_port(text)


@pytest.mark.parametrize(("text", "target"), [("unix:/a/b", "unix:/a/b"), ("/a/b", "unix:/a/b"), ("b", "b:7707")])
def test_daemons(text: str, target: str) -> None:
    assert parse_daemon(text) == target


@pytest.mark.parametrize("text", ["unix:a/b", "unix:", ""])
def test_daemons_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"absolute|is not HOST"):
        parse_daemon(text)


@pytest.mark.parametrize(
    ("text", "target"), [("4242", 4242), ("redis-server", "redis-server"), ("podman:web", "podman:web")]
)
def test_targets(text: str, target: int | str) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", "0", "1", "4194305", "a b"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"PID"):
        parse_target(text)


@pytest.mark.parametrize(("text", "number"), [("TERM", 15), ("sigint", 2), ("9", 9), ("USR1", 10)])
def test_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "FOO", "-9"])
def test_signals_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no signal"):
        parse_signal(text)


def test_grace() -> None:
    assert [parse_grace(text) for text in ("10", "0", "1.5", "300ms", "2m")] == [10, 0, 1.5, 0.3, 120]
    for wrong in ("-1", "nan", "inf", "x"):
        with pytest.raises(ValueError, match=r"between|no time"):
            parse_grace(wrong)


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "x=y")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert parse_variable("A=1=2") == ("A", "1=2")
    assert parse_variable("A=") == ("A", "")
    assert parse_variable("HERE") == ("HERE", "x=y")
    for wrong in ("NOWHERE", "=1", "1A=2", "A B=1"):
        with pytest.raises(ValueError, match=r"is not NAME=VALUE|has no value"):
            parse_variable(wrong)


@pytest.mark.parametrize(
    ("program", "taken", "name"),
    [
        ("redis-server", set(), "redis-server"),
        ("/usr/bin/redis-server", {"redis-server"}, "redis-server-2"),
        ("sleep", {"sleep", "sleep-2", "sleep-4"}, "sleep-3"),
        ("./my prog (1)", set(), "my-prog-1-"),
        ("/", set(), "workload"),
        ("...", set(), "workload"),
    ],
)
def test_names_made_up(program: str, taken: set[str], name: str) -> None:
    assert free_name(program, taken) == name


@given(st.text(max_size=100), st.integers(0, 30))
def test_a_made_up_name_is_always_a_name(program: str, takers: int) -> None:
    taken: set[str] = set()
    for _ in range(takers + 1):
        name = free_name(program, taken)
        assert name not in taken
        assert name[0].isalnum()
        assert name[0].isascii()
        assert len(name) <= 63
        taken.add(name)


def test_spec_takes_a_relative_program_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.setenv("SECRET", "x")
    spec = build_spec(("./a", "./b"), name="n", env=(("HOME", "/h"),), cwd=None, pid_namespace=False)
    assert list(spec.argv) == [f"{tmp_path}/a", "./b"]
    assert (spec.working_directory, spec.own_pid_namespace) == ("/", False)
    assert (spec.env["PATH"], spec.env["HOME"]) == ("/somewhere", "/h")
    assert "SECRET" not in spec.env
    inside = build_spec(("./a",), name="", env=(), cwd="sub", pid_namespace=True)
    assert (list(inside.argv), inside.working_directory) == (["./a"], f"{tmp_path}/sub")


def test_options_that_were_not_said_stay_open() -> None:
    said_nothing = {"mode": None, "downtime": None, "throttle": False, "shell_job": None, "bandwidth": None}
    assert build_options(said_nothing) == types_pb2.Options()


def test_options() -> None:
    options = build_options(
        {
            "mode": "post-copy",
            "restore": "lazy",
            "tcp": "keep",
            "in_doubt": "resume",
            "downtime": 0.3,
            "deadline": 300.0,
            "bandwidth": 1000,
            "max_rounds": 4,
            "throttle": True,
            "shell_job": False,
        }
    )
    assert options.mode == types_pb2.MODE_POST_COPY
    assert options.restore_mode == types_pb2.RESTORE_MODE_LAZY
    assert options.tcp_policy == types_pb2.TCP_POLICY_KEEP
    assert options.in_doubt_policy == types_pb2.IN_DOUBT_POLICY_RESUME
    assert options.downtime_goal.ToMilliseconds() == 300
    assert options.deadline.ToSeconds() == 300
    assert (options.bandwidth_limit_bytes_per_second, options.max_rounds, options.throttle) == (1000, 4, True)
    assert options.HasField("shell_job")
    assert not options.shell_job
    assert not options.HasField("file_locks")


def test_words_are_those_of_the_api() -> None:
    assert list(words("Mode")) == ["stop-copy", "pre-copy", "post-copy", "hybrid", "auto"]
    assert words("TcpPolicy") == {"refuse": 1, "keep": 2, "close": 3}


@pytest.mark.parametrize(("prefix", "found"), [("a", "abc"), ("b1", "b1"), ("b12", "b12"), ("abc", "abc")])
def test_the_beginning_of_an_id(prefix: str, found: str) -> None:
    assert matching(["abc", "b1", "b12"], prefix) == found


def test_the_beginning_of_no_id_or_of_several() -> None:
    with pytest.raises(MigrationNotFound, match="no migration x"):
        matching(["abc"], "x")
    with pytest.raises(InvalidRequest, match="beginning of 2") as caught:
        matching(["abc", "abd", "abd"], "ab")
    assert "abc, abd" in caught.value.remedy


def test_where_certificates_are(tmp_path: Path) -> None:
    """A word counts; without one the first standard directory that has some, and only for what is not this machine."""
    empty, own, system = (tmp_path / name for name in ("empty", "own", "system"))
    for each in (empty, own, system):
        each.mkdir()
    for each in (own, system):
        (each / "node.crt").touch()
    standard = (empty, own, system)
    assert tls_directory("node-b:7707", "", standard) == own
    assert tls_directory("node-b:7707", "/elsewhere", standard) == Path("/elsewhere")
    assert tls_directory("node-b:7707", "none", standard) is None
    assert tls_directory("node-b:7707", "", (empty,)) is None
    assert tls_directory("127.0.0.1:7707", "", standard) is None
    assert tls_directory("127.0.0.1:7707", "/elsewhere", standard) == Path("/elsewhere")
    assert tls_directory("unix:/run/x.sock", "/elsewhere", standard) is None


def test_an_option_without_its_value_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "x", "--html"]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "'--html' requires an argument" in told
    assert "remedy: phaul --help" in told
