"""The policy file: a change counts with the next call, and a file that did not change is not parsed again."""

import os
import time
from pathlib import Path

import pytest

from phaul_client.errors import InvalidRequest
from phaul_client.tls import Tls
from phauld import guard
from phauld.guard import Guard


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text("[peers.a]\n")
    return path


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is past the time in which a second write leaves no trace."""
    now = time.time() + 2 * guard.SETTLED_SECONDS
    monkeypatch.setattr(time, "time", lambda: now)


def test_a_file_that_did_not_change_is_parsed_once(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    asked = Guard(Tls(policy.parent))
    assert asked.policy() is asked.policy()


@pytest.mark.parametrize("how", ["written", "replaced", "replaced, with the times of the old one"])
def test_a_change_counts_at_once(policy: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    settle(monkeypatch)
    asked = Guard(Tls(policy.parent))
    assert set(asked.policy().peers) == {"a"}
    before = policy.stat()
    if how != "written":
        (policy.parent / "new").write_text("[peers.b]\n")
        os.replace(policy.parent / "new", policy)
    else:
        policy.write_text("[peers.b]\n")
    if how.endswith("old one"):
        os.utime(policy, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert set(asked.policy().peers) == {"b"}


def test_two_writes_within_a_tick_of_the_clock_both_count(policy: Path) -> None:
    """The kernel's times of files are coarse: what was written just now is not remembered."""
    asked = Guard(Tls(policy.parent))
    for name in "abcabc" * 20:
        policy.write_text(f"[peers.{name}]\n")
        assert set(asked.policy().peers) == {name}


def test_a_file_that_cannot_be_read_allows_nothing(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    asked = Guard(Tls(policy.parent))
    asked.policy()
    policy.unlink()
    with pytest.raises(InvalidRequest) as caught:
        asked.policy()
    assert caught.value.reason == "UNAUTHORIZED"
    policy.write_text("nonsense")
    with pytest.raises(InvalidRequest):
        asked.policy()
