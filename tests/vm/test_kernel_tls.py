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

from tests.vm.lab import Lab
from tests.vm.scenarios import TLS, give_certificates, move_a_writer, ready, restart_phaulds

MIB: Final = 32


@pytest_asyncio.fixture(loop_scope="session")
async def secured(lab: Lab, tmp_path: Path) -> AsyncIterator[Lab]:
    """Both phaulds with certificates."""
    await ready(lab, bytes_per_second=None)
    await give_certificates(lab, tmp_path)
    await restart_phaulds(lab, *TLS, insecure=False)
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
    found = await move_a_writer(secured, MIB, mode, **options)
    after = await kernel_sessions(secured)
    assert found.done, found.record
    assert found.record["page_stream"] == page_stream
    assert [new - old for new, old in zip(after, before, strict=True)] == [sessions] * 4
