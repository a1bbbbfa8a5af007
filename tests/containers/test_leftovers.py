"""What an abort could not remove at the destination is removed later: by the same phauld, or by the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.containers.containers import Kind
from tests.containers.moves import runs_only_at, stop_at, told
from tests.containers.test_containers import PODMAN, RUNC, SELDOM
from tests.node.test_daemons import ROLLED_BACK
from tests.node.test_hooks import Script
from tests.nodes import Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]
#: How its keeper is kept from deleting a record, and how that ends.
SPOILED: Final = {
    RUNC: ("mount -o remount,bind,ro /run/runc", "mount -o remount,bind,rw /run/runc"),
    PODMAN: ("mount -t tmpfs -o ro none /var/lib/containers/storage", "umount /var/lib/containers/storage"),
}


@pytest.mark.parametrize(
    ("kind", "restarted"),
    [
        pytest.param(RUNC, True, id="runc-next"),
        pytest.param(RUNC, False, id="runc-same", marks=SELDOM),
        pytest.param(PODMAN, True, id="podman-next", marks=SELDOM),
        pytest.param(PODMAN, False, id="podman-same", marks=SELDOM),
    ],
)
async def test_what_cannot_be_deleted_is_deleted_later(
    nodes: Nodes, tmp_path: Path, kind: Kind, restarted: bool
) -> None:
    a, b, _ = nodes
    spoil, mend = (command.split() for command in SPOILED[kind])
    await b.run(["sh", "-c", "mkdir /run/runc && mount -t tmpfs none /run/runc"])  # of its own
    container = await kind.start(a, tmp_path / "volume")
    migration = await stop_at(a, container, b, Script(tmp_path / "hooks/hook"), "commit-source")
    await b.run(spoil)
    await b.kill_phauld()
    await b.start_phauld()
    log = b.directory / "phauld.log"
    await until(lambda: "container not discarded" in log.read_text(), 60)
    status, report = await migration
    assert status == ROLLED_BACK, told(report)
    if restarted:
        assert await b.kill_phauld(15) == 0
        log.write_text("")
        await b.start_phauld()
        await until(lambda: "container not discarded" in log.read_text(), 60)
    await b.run(mend)
    await runs_only_at(nodes, container, a)
