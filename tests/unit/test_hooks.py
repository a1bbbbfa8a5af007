"""Names of hooks, and what they are told."""

from __future__ import annotations

import pytest

from phaul_client.errors import InvalidRequest
from phaul_client.hooks import Facts, Hook, HookPhase, Side, environment, is_hidden, parse_hook


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/etc/move-route", Hook("/etc/move-route")),
        ("grpc:unix:/run/router.sock", Hook("unix:/run/router.sock", is_grpc=True)),
        ("grpc:router:9000", Hook("router:9000", is_grpc=True)),
        ("grpc:[::1]:9000", Hook("[::1]:9000", is_grpc=True)),
    ],
)
def test_a_hook_is_written_as_it_was_read(text: str, expected: Hook) -> None:
    assert parse_hook(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "move-route", "./x", "/a\0b", "grpc:", "grpc:/x", "grpc:unix:x", "grpc:host", "grpc:h:0", "grpc:h:65536"],
)
def test_what_is_no_hook(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_hook(text)


def test_local_ones_need_no_tls() -> None:
    assert [parse_hook(each).is_local for each in ("/x", "grpc:unix:/x", "grpc:h:1")] == [True, True, False]


def test_environment() -> None:
    facts = Facts(
        migration_id="m", side=Side.SOURCE, node_name="a", peer="b:7707", addresses=("10.0.0.9/24@e", "::1/64")
    )
    told = environment(facts, HookPhase.COMMIT, 0, 2)
    assert told["PHAUL_PHASE"] == "commit"
    assert told["PHAUL_PID"] == ""
    assert told["PHAUL_ADDRESSES"] == "10.0.0.9/24@e ::1/64"
    assert told["PHAUL_ATTEMPT"] == "2"
    assert all(name.startswith("PHAUL_") for name in told)


def test_names_that_are_switched_off() -> None:
    assert [name for name in ("10-a", ".x", "a~", "a.off", "a.dpkg-old", "a.sh") if not is_hidden(name)] == [
        "10-a",
        "a.sh",
    ]
