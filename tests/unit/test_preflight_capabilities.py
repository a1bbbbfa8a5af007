"""What phauld at the destination must be allowed to do, for criu and for the tree; and that it is told once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phaul_client.preflight.capabilities import KNOWN, mask, needed
from phaul_client.preflight.model import TreeFacts
from tests.unit.test_preflight_checks import HERE, NEEDS, PROCESS, node_problems


@pytest.mark.parametrize(
    ("lacking", "criu_version", "own", "found"),
    [
        ((), 40201, 0, []),
        (("SYS_CHROOT",), 40201, 0, ["CAP_SYS_CHROOT"]),
        (("NET_ADMIN",), 40200, 0, ["CAP_NET_ADMIN"]),
        (("NET_ADMIN",), 40200, mask("NET_ADMIN"), ["CAP_NET_ADMIN"]),
        (("SYS_TIME", "SETUID"), 40201, mask("SYS_TIME"), ["CAP_SETUID", "CAP_SYS_TIME"]),
        (("MKNOD",), 40201, mask("MKNOD", "CHOWN"), ["CAP_MKNOD"]),
        (("MKNOD",), 40201, 0, []),
    ],
)
def test_what_phauld_lacks_is_told_once(
    lacking: tuple[str, ...], criu_version: int, own: int, found: list[str]
) -> None:
    here = replace(HERE, criu_version=criu_version, capabilities=KNOWN & ~mask(*lacking))
    problems = node_problems(here, needs=replace(NEEDS, capabilities=own))
    assert [each.subject for each in problems if each.code == "capabilities"] == found


def test_criu_41_restores_without_net_admin() -> None:
    here = replace(HERE, criu_version=40101, capabilities=KNOWN & ~mask("NET_ADMIN"))
    assert "capabilities" not in [each.code for each in node_problems(here)]


def test_a_tree_with_clocks_of_its_own_needs_to_set_them() -> None:
    for clocks, bits in ((1, 0), (2, mask("SYS_TIME"))):
        process = replace(PROCESS, namespaces={"time": clocks}, capabilities=0)
        tree = TreeFacts(root_pid=PROCESS.pid, processes=(process,), reader_namespaces={"time": 1})
        assert needed(tree) == bits
