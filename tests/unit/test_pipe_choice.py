"""When a page pipe is in the way, and when a peer that has none is refused."""

from typing import Any

import pytest

from phaul_client.errors import PhaulError
from phaul_client.modes import Mode
from phaul_client.pipe_choice import (
    API_FEATURE,
    CHECKSUMS_BY_DEFAULT,
    KERNEL_TLS_FEATURE,
    LAZY_PIPE_FEATURE,
    Compression,
    PipeChoice,
    choose_pipe,
    is_loopback,
)

ABLE = frozenset({API_FEATURE})
OLD: frozenset[str] = frozenset()


def choose(**changed: Any) -> PipeChoice:
    values = {
        "mode": Mode.STOP_COPY,
        "checksum": None,
        "compression": None,
        "tls": False,
        "clear_is_allowed": True,
        "is_loopback": True,
        "kernel_tls": False,
        "peer_features": ABLE,
    }
    return choose_pipe(**{**values, **changed})


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, ""),
        ({"checksum": False}, ""),
        ({"checksum": False, "is_loopback": False}, ""),
        ({"is_loopback": False}, "checksums" if CHECKSUMS_BY_DEFAULT else ""),
        ({"compression": Compression.OFF}, ""),
        ({"checksum": True}, "checksums"),
        ({"compression": Compression.LZ4}, "checksums, lz4"),
        ({"compression": Compression.AUTO, "checksum": False}, "checksums, auto"),
        ({"tls": True, "checksum": False}, "checksums, TLS"),
        ({"tls": True, "compression": Compression.ZSTD}, "checksums, TLS, zstd"),
    ],
)
def test_a_pipe_only_where_it_has_something_to_do(changed: dict[str, Any], text: str) -> None:
    choice = choose(**changed)
    assert choice.uses_pipe is bool(text)
    assert choice.text == (text or "as criu sends them")
    assert choice.tls is bool(changed.get("tls"))


@pytest.mark.parametrize(
    ("changed", "uses_pipe", "text"),
    [
        ({"mode": Mode.POST_COPY}, False, "lazy pages as criu sends them"),
        ({"mode": Mode.POST_COPY, "checksum": True}, False, "lazy pages as criu sends them"),
        ({"mode": Mode.POST_COPY, "tls": True}, True, "checksums, TLS; lazy pages under TLS"),
        ({"mode": Mode.HYBRID}, False, "as criu sends them; lazy pages as criu sends them"),
        ({"mode": Mode.HYBRID, "checksum": True}, True, "checksums; lazy pages as criu sends them"),
        ({"mode": Mode.HYBRID, "tls": True}, True, "checksums, TLS; lazy pages under TLS"),
    ],
)
def test_lazy_pages_go_by_relays(changed: dict[str, Any], uses_pipe: bool, text: str) -> None:
    choice = choose(**changed)
    assert (choice.uses_pipe, choice.text) == (uses_pipe, text)


@pytest.mark.parametrize(
    ("changed", "packing", "text"),
    [
        ({}, None, "lazy pages as criu sends them"),
        ({"checksum": True}, Compression.OFF, "lazy pages with checksums"),
        ({"compression": Compression.AUTO}, Compression.AUTO, "lazy pages with checksums, auto"),
        (
            {"compression": Compression.ZSTD, "tls": True},
            Compression.ZSTD,
            "checksums, TLS, zstd; lazy pages with checksums, TLS, zstd",
        ),
        ({"mode": Mode.HYBRID, "checksum": True}, Compression.OFF, "checksums; lazy pages with checksums"),
        ({"mode": Mode.STOP_COPY, "checksum": True}, None, "checksums"),
    ],
)
def test_relays_do_what_was_asked_for(changed: dict[str, Any], packing: Compression | None, text: str) -> None:
    able = {"mode": Mode.POST_COPY, "peer_features": ABLE | {LAZY_PIPE_FEATURE}}
    choice = choose(**{**able, **changed})
    assert (choice.lazy_packing, choice.text) == (packing, text)


@pytest.mark.parametrize("is_loopback", [True, False])
def test_an_older_peer_gets_pages_as_before(is_loopback: bool) -> None:
    assert not choose(peer_features=OLD, is_loopback=is_loopback).uses_pipe
    assert not choose(peer_features=OLD, is_loopback=is_loopback, checksum=False).uses_pipe


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"checksum": True}, "UNSUPPORTED"),
        ({"compression": Compression.AUTO}, "UNSUPPORTED"),
        ({"tls": True, "clear_is_allowed": False}, "PEER_INCOMPATIBLE"),
    ],
)
def test_an_older_peer_is_refused_what_it_cannot_do(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(PhaulError) as refused:
        choose(peer_features=OLD, **changed)
    assert refused.value.reason == reason
    assert refused.value.remedy


def test_tls_by_the_kernels_where_both_can_and_nothing_else_is_asked_for() -> None:
    able = {"tls": True, "kernel_tls": True, "peer_features": ABLE | {KERNEL_TLS_FEATURE}}
    assert choose(**able).kernel_tls
    assert choose(**able).text == "TLS by the kernels"
    assert choose(**able, mode=Mode.POST_COPY).text == "TLS by the kernels; lazy pages under TLS"
    for changed in (
        {"checksum": True},
        {"compression": Compression.ZSTD},
        {"kernel_tls": False},
        {"peer_features": ABLE},
        {"tls": False},
    ):
        assert not choose(**{**able, **changed}).kernel_tls


def test_pages_in_clear_to_an_older_peer_need_consent() -> None:
    assert not choose(peer_features=OLD, tls=True).tls


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:7707", True),
        ("[::1]:7707", True),
        ("localhost:7707", True),
        ("10.0.0.2:7707", False),
        ("node-b:7707", False),
    ],
)
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
