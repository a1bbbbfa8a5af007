"""TLS by the kernels, between two of Debian's: what this machine's own kernel may be built without.

The kernels count the connections whose records they make and read (/proc/net/tls_stat), so that
nobody is taken at his word.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from phaul_client.certs import issue, make_ca
from tests.vm.lab import Lab
from tests.vm.scenarios import Moved, ask, move, ready, take, writer

DIRECTORY: Final = Path("/run/phaul-tls")
POLICY: Final = '[peers.{peer}]\nreceive_from = true\nsend_to = true\naddresses = ["{address}", "{peer}"]\n'
MIB: Final = 32


@pytest_asyncio.fixture(loop_scope="session")
async def secured(lab: Lab, tmp_path: Path) -> AsyncIterator[Lab]:
    """Both phaulds with certificates."""
    await ready(lab, bytes_per_second=None)
    make_ca(tmp_path / "ca")
    for guest, peer in (lab.guests, lab.guests[::-1]):
        issue(tmp_path / "ca", guest.name, tmp_path / guest.name)
        await guest.run(["mkdir", "-p", DIRECTORY])
        for file in (tmp_path / guest.name).iterdir():
            await guest.put(DIRECTORY / file.name, file.read_bytes(), 0o600)
        await guest.put(DIRECTORY / "policy.toml", POLICY.format(peer=peer.name, address=peer.address))
        await guest.kill_phauld()
        await guest.start_phauld("--tls-dir", DIRECTORY)
    yield lab
    for guest in lab.guests:
        await guest.kill_phauld()


async def kernel_sessions(lab: Lab) -> list[int]:
    """Of each guest: how many connections its kernel has made records for, and read records of."""
    found = []
    for guest in lab.guests:
        words = (await guest.run(["cat", "/proc/net/tls_stat"])).stdout.split()
        counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        found += [counts["TlsTxSw"], counts["TlsRxSw"]]
    return found


async def moved(lab: Lab, mode: str, **options: Any) -> Moved:
    """A writer goes from a to b, whose data are intact there."""
    steps = [
        {"run": "writer", "argv": writer(MIB), "on": "a"},
        ask("writer", "a", "reset"),
        move("writer", "a", "b", mode, **options),
        ask("writer", "b", "check"),
    ]
    answers = await take(lab, steps)
    await take(lab, [{"stop": "writer", "on": "b"}], on=lab.b)
    assert answers[3]["intact"]
    return Moved(answers[2])


@pytest.mark.parametrize(
    ("mode", "options", "page_stream", "sessions", "only_if_all"),
    [
        ("STOP_COPY", {}, "TLS by the kernels", 1, False),
        ("POST_COPY", {}, "TLS by the kernels; lazy pages under TLS", 2, False),
        ("PRE_COPY", {}, "TLS by the kernels", 1, True),
        ("STOP_COPY", {"compression": "COMPRESSION_LZ4"}, "checksums, TLS, lz4", 1, True),
    ],
    ids=["stop-copy", "post-copy", "pre-copy", "a pipe"],
)
async def test_a_move(
    mode: str,
    options: dict[str, Any],
    page_stream: str,
    sessions: int,
    only_if_all: bool,
    secured: Lab,
    pytestconfig: pytest.Config,
) -> None:
    if only_if_all and not pytestconfig.getoption("--all"):
        pytest.skip("stop-copy and post-copy; the others with --all")
    await secured.a.run(["sh", "-c", "echo 4194304 >/proc/sys/fs/pipe-max-size"])
    before = await kernel_sessions(secured)
    found = await moved(secured, mode, **options)
    after = await kernel_sessions(secured)
    assert found.done, found.record
    assert found.record["page_stream"] == page_stream
    assert [new - old for new, old in zip(after, before, strict=True)] == [sessions] * 4
