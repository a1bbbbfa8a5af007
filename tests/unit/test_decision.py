"""What is decided before a move: by what the other node can do, and by who may read along."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phaul.v1 import types_pb2
from phaul_client.compatibility import LAZY_TLS_FEATURE, PODMAN_FEATURE, SYNC_FEATURE
from phaul_client.errors import PhaulError, PreflightRefused
from phaul_client.modes import Mode, NodeCapabilities, RestoreMode, Wish
from phaul_client.pipe_choice import API_FEATURE, Compression
from phaul_client.policy import DowntimePolicy, Policy, PostCopyPolicy, StopCopyPolicy
from phauld.source.decision import Asked, Way, decide

HERE = NodeCapabilities(name="a", criu_version=4_02_00, mem_track=True, lazy_pages=True, pipe_max_size_bytes=4 << 20)
CLEAR = Way(tls=False, kernel_tls=False, insecure=True, is_loopback=False)
TLS = Way(tls=True, kernel_tls=False, insecure=False, is_loopback=False)
EVERYTHING = (API_FEATURE, LAZY_TLS_FEATURE, PODMAN_FEATURE, SYNC_FEATURE)


def there(*features: str, lazy_pages: bool = True) -> types_pb2.NodeInfo:
    criu = types_pb2.CriuInfo(version=4_02_00, mem_track=True, lazy_pages=lazy_pages)
    return types_pb2.NodeInfo(node_name="b", api_features=features, criu=criu)


def asked(mode: Mode = Mode.AUTO, *, compression: Compression | None = None) -> Asked:
    return Asked(
        wish=Wish(mode=mode),
        checksum=None,
        compression=compression,
        has_sync=False,
        is_podmans=False,
        is_limited=False,
        is_restarted=False,
    )


@pytest.mark.parametrize(
    ("mode", "policy", "restore_mode"),
    [
        (Mode.STOP_COPY, StopCopyPolicy, RestoreMode.LAZY),
        (Mode.PRE_COPY, DowntimePolicy, RestoreMode.LAZY),
        (Mode.HYBRID, DowntimePolicy, RestoreMode.LAZY),
        (Mode.POST_COPY, PostCopyPolicy, RestoreMode.LAZY),
    ],
)
def test_a_mode_has_its_policy(mode: Mode, policy: type[Policy], restore_mode: RestoreMode) -> None:
    decision = decide(asked(mode), HERE, there(*EVERYTHING), CLEAR)
    assert (decision.mode, type(decision.policy)) == (mode, policy)
    assert decision.choice.restore_mode is restore_mode


def test_reasons_do_not_repeat_what_they_are_of() -> None:
    decision = decide(asked(), HERE, there(*EVERYTHING, lazy_pages=False), CLEAR)
    assert decision.mode is Mode.PRE_COPY
    assert decision.mode_reason == "a tracks memory"
    assert decision.restore_mode_reason == "b has no lazy pages"


@pytest.mark.parametrize(
    ("wishes", "missing", "why"),
    [
        (replace(asked(), is_podmans=True), PODMAN_FEATURE, "b is too old for containers of podman"),
        (replace(asked(), has_sync=True), SYNC_FEATURE, "b is too old for --sync"),
    ],
)
def test_a_node_that_is_too_old_is_refused_only_what_it_lacks(wishes: Asked, missing: str, why: str) -> None:
    decide(wishes, HERE, there(missing), CLEAR)
    decide(asked(), HERE, there(), CLEAR)
    with pytest.raises(PreflightRefused) as refused:
        decide(wishes, HERE, there(*(each for each in EVERYTHING if each != missing)), CLEAR)
    assert (str(refused.value), refused.value.reason) == (why, "UNSUPPORTED")


def test_what_neither_node_can_do_is_refused() -> None:
    with pytest.raises(PreflightRefused) as refused:
        decide(asked(Mode.POST_COPY), HERE, there(*EVERYTHING, lazy_pages=False), CLEAR)
    assert "no lazy pages" in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize("mode", [Mode.POST_COPY, Mode.HYBRID])
def test_lazy_pages_travel_under_tls_where_the_rest_does(mode: Mode) -> None:
    assert decide(asked(mode), HERE, there(*EVERYTHING), TLS).lazy_uses_tls
    assert not decide(asked(mode), HERE, there(*EVERYTHING), CLEAR).lazy_uses_tls
    with pytest.raises(PreflightRefused) as refused:
        decide(asked(mode), HERE, there(API_FEATURE), TLS)
    assert str(refused.value) == f"{mode}: its pages would travel in clear"
    for allowed in (replace(TLS, insecure=True), replace(TLS, is_loopback=True)):
        assert not decide(asked(mode), HERE, there(API_FEATURE), allowed).lazy_uses_tls
    decide(asked(Mode.PRE_COPY), HERE, there(API_FEATURE), TLS)  # none of them there


def test_the_page_stream_is_what_was_asked_for_or_nothing() -> None:
    decision = decide(asked(compression=Compression.ZSTD), HERE, there(*EVERYTHING), TLS)
    assert (decision.pipe.uses_pipe, decision.pipe.tls, decision.pipe.compression) == (True, True, Compression.ZSTD)
    with pytest.raises(PhaulError, match="can neither check nor compress"):
        decide(asked(compression=Compression.ZSTD), HERE, there(), CLEAR)
