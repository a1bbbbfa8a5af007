"""Pages and images that arrive damaged: what is noticed, and that the process runs on.

criu's page stream carries no checksum. What phaul can notice of it alone is its end: too early, or not what the images
say. A flipped bit inside a page is noticed by the page pipe.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul.v1 import types_pb2
from phaul.v1.types_pb2 import Options
from phaul_client.stream import PREAMBLE_BYTES
from tests.faults.bench import Bench, bench
from tests.faults.gates import Verdict
from tests.faults.judge import Judgement, judge

pytestmark = pytest.mark.criu

MIB = 1 << 20


async def _move(made: Bench, name: str, *, mib: int = 4, checksum: bool = False) -> Judgement:
    await made.start()
    victim = await made.run_victim(mib=mib)
    options = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER, checksum=checksum)
    options.freeze_budget.FromMilliseconds(5000)
    await made.migrate(victim, migration_id=name, options=options)
    await made.settle(name)
    return await judge(made, victim, name)


async def test_a_page_stream_that_ends_early_is_noticed(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.link.pages.truncate_at = MIB
        judgement = await _move(made, "truncated")
    assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("resumed", 1, ()), judgement
    assert judgement.data_intact
    assert judgement.reason in ("PAGE_SERVER_FAILED", "DUMP_FAILED", "IMAGE_CORRUPT"), judgement


async def test_a_damaged_header_of_the_page_stream_is_noticed(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.link.pages.flip_at = PREAMBLE_BYTES + 1  # the upper half of the first command
        judgement = await _move(made, "header")
    assert (judgement.alive, judgement.data_intact, judgement.leftovers) == (1, True, ()), judgement
    assert judgement.outcome == "resumed", judgement


@pytest.mark.parametrize("flip_at_mib", [1, 20])  # in the first pages, and in the noise, which is most of it
async def test_a_flipped_bit_in_a_page_is_noticed(tmp_path: Path, flip_at_mib: int) -> None:
    async with bench(tmp_path) as made:
        made.link.pages.flip_at = flip_at_mib * MIB
        judgement = await _move(made, "page", mib=32, checksum=True)
    assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("resumed", 1, ()), judgement
    assert judgement.data_intact, judgement
    assert judgement.reason == "IMAGE_CORRUPT", judgement


async def test_a_flipped_bit_in_a_lazy_page_is_asked_for_again(tmp_path: Path) -> None:
    """The tree waits for it, and gets it by another connection."""
    async with bench(tmp_path) as made:

        async def damage() -> Verdict | None:
            made.link.pages.flip_at = 20 * MIB  # of the connection that comes next, the relays'
            return None

        made.gates.plan("a>b:OpenStream:request", damage)
        await made.start()
        victim = await made.run_victim(mib=32)
        options = Options(mode=types_pb2.MODE_POST_COPY, checksum=True)
        await made.migrate(victim, migration_id="lazy", options=options)
        await made.settle("lazy")
        judgement = await judge(made, victim, "lazy")
        assert "page link made" in (made.nodes["a"].directory / "phauld.log").read_text()
    assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("moved", 1, ()), judgement
    assert judgement.data_intact, judgement


@pytest.mark.parametrize("truncate_at", [PREAMBLE_BYTES + 7, MIB])
async def test_a_page_pipe_that_is_cut_is_noticed(tmp_path: Path, truncate_at: int) -> None:
    async with bench(tmp_path) as made:
        made.link.pages.truncate_at = truncate_at
        judgement = await _move(made, "cut", checksum=True)
    assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("resumed", 1, ()), judgement
    assert judgement.data_intact, judgement
    assert judgement.reason in ("PEER_UNREACHABLE", "PAGE_SERVER_FAILED"), judgement


async def test_a_flipped_bit_in_an_image_is_noticed(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        spoilt: list[str] = []

        async def spoil() -> Verdict | None:
            for name in ("images", "memory"):
                for image in (made.nodes["b"].root / "run/phaul" / name).glob("in-*/*/core-*.img"):
                    data = bytearray(image.read_bytes())
                    data[len(data) // 2] ^= 0xFF
                    image.write_bytes(data)
                    spoilt.append(image.name)
            return None

        made.gates.plan("a>b:Restore:request", spoil)
        judgement = await _move(made, "image")
    assert spoilt
    assert judgement.alive == 1, judgement
    assert not judgement.leftovers, judgement
