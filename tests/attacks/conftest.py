"""One phauld with TLS on loopback for all attacks of a module, and certificates of every kind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phaul_client.certs import issue, make_ca
from tests.attacks.target import PAGE, POLICY, Kind, Target, fingerprint, issue_nameless

Tried = Callable[[str, str], None]


@pytest.fixture(scope="session")
def certificates() -> Iterator[Path]:
    """A directory with one directory of certificates for each `Kind` that has one, and the daemon's own."""
    root = Path(tempfile.mkdtemp(prefix="phaul-attacks-"))
    make_ca(root / "ca")
    make_ca(root / "rogue-ca")
    issue(root / "ca", "target", root / "target")
    for kind, name in ((Kind.ADMIN, "admin"), (Kind.NODE, "a"), (Kind.REVOKED, "admin"), (Kind.STRANGER, "stranger")):
        issue(root / "ca", name, root / kind)
    issue(root / "ca", "c", root / "c")  # another node that may send here
    issue(root / "ca", "admin", root / Kind.EXPIRED, days=-1)
    issue(root / "rogue-ca", "admin", root / Kind.ROGUE)
    shutil.copy(root / "ca" / "ca.crt", root / Kind.ROGUE / "ca.crt")
    issue_nameless(root / "ca", root / Kind.NAMELESS)
    policy = POLICY.format(revoked=fingerprint(root / Kind.REVOKED / "node.crt"))
    (root / "target" / "policy.toml").write_text(policy)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def target(certificates: Path) -> Iterator[Target]:
    """A running daemon. At the end it must still be the same process, and have left nothing behind."""
    with Target.running(certificates) as target:
        yield target


@pytest.fixture(scope="session")
def documented() -> str:
    """The page that says what happens to whom."""
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture
def tried(documented: str, json_report: dict[str, Any]) -> Iterator[Tried]:
    """Called with an attack and what happened, once that is sure: the page must say the same."""
    rows: list[str] = []

    def note(attack: str, happened: str) -> None:
        json_report.setdefault("attacks", {})[attack] = happened
        rows.append(f"| {attack} | {happened} |")

    yield note
    assert [row for row in rows if row not in documented] == [], "docs/security.md lacks rows"
