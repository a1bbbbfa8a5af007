"""What a real criu says about itself, this kernel and this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_criu import features, install
from phaul_criu.criu import Criu
from phaul_criu.errors import CheckFailed
from phaul_criu.version import OLDEST
from tests.node.criu_victims import no_leaks, opened

pytestmark = pytest.mark.criu


@pytest.fixture
def criu() -> Iterator[Criu]:
    with no_leaks():
        yield Criu(install.find_binary())


async def test_the_installed_criu_is_found_and_new_enough(criu: Criu) -> None:
    found = await install.find()
    assert found.binary == criu.binary
    assert found.version >= OLDEST


async def test_both_ways_of_asking_for_the_version_agree(criu: Criu) -> None:
    assert await criu.version() == await install.ask_version(criu.binary)


async def test_criu_says_that_the_kernel_will_do(criu: Criu) -> None:
    await criu.check()


async def test_the_features_over_rpc_are_those_of_the_findings(criu: Criu) -> None:
    found = {finding.name: finding.ok for finding in await features.findings()}
    rpc = await criu.features()
    assert rpc.mem_track == found["mem-dirty-track"]
    assert rpc.lazy_pages == found["uffd-noncoop"]
    assert rpc.pidfd_store == found["pidfd-store"]


async def test_nothing_required_is_missing_here() -> None:
    assert features.missing(await features.findings()) == []


async def test_this_cpu_is_like_itself(criu: Criu, tmp_path: Path) -> None:
    with opened(tmp_path) as directory_fd:
        await criu.cpuinfo_dump(directory_fd)
        await criu.cpuinfo_check(directory_fd)


async def test_a_missing_cpu_image_is_an_error(criu: Criu, tmp_path: Path) -> None:
    with opened(tmp_path) as directory_fd, pytest.raises(CheckFailed) as caught:
        await criu.cpuinfo_check(directory_fd)
    assert caught.value.op == "cpuinfo-check"
    assert caught.value.cause
