"""The choice of a codec, against a link and processors that are made up: it finds the best, and finds it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pytest

from phaul_client.compression_policy import USE_BYTES, WARM_UP_BYTES, CodecChooser
from phaul_client.page_frames import Codec

FRAME: Final = 1 << 18
MB: Final = 1e6
BUFFER_BYTES: Final = 4 << 20
COPY: Final = 3000 * MB


@dataclass
class World:
    """A link with a buffer before it, and processors; `shares`: what is left of the memory, by codec."""

    link: float
    lz4: float = 600 * MB
    zstd: float = 350 * MB
    shares: tuple[float, float] = (0.66, 0.5)
    buffered: float = 0.0
    seconds: float = 0.0

    def send(self, chooser: CodecChooser) -> None:
        packing = {Codec.NONE: 0.0, Codec.LZ4: FRAME / self.lz4, Codec.ZSTD: FRAME / self.zstd}[chooser.codec]
        wire = FRAME * {Codec.NONE: 1.0, Codec.LZ4: self.shares[0], Codec.ZSTD: self.shares[1]}[chooser.codec]
        self._pass(packing + wire / COPY)
        self.buffered += wire
        blocked = max(0.0, self.buffered - BUFFER_BYTES) / self.link
        self._pass(blocked)
        chooser.sent(FRAME, packing_seconds=packing, sending_seconds=wire / COPY + blocked, waited_seconds=0.0)

    def _pass(self, seconds: float) -> None:
        self.seconds += seconds
        self.buffered = max(0.0, self.buffered - seconds * self.link)

    def best(self) -> float:
        """Bytes a second with the codec that is best for it."""
        return max(
            min(self.link, COPY),
            min(self.lz4, self.link / self.shares[0]),
            min(self.zstd, self.link / self.shares[1]),
        )

    def run(self, chooser: CodecChooser, size: float) -> dict[Codec, int]:
        used = dict.fromkeys(Codec, 0)
        for _ in range(int(size) // FRAME):
            used[chooser.codec] += FRAME
            self.send(chooser)
        return used


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        (World(link=5000 * MB), Codec.NONE),
        (World(link=1250 * MB), Codec.NONE),
        (World(link=350 * MB), Codec.LZ4),
        (World(link=125 * MB), Codec.ZSTD),
        (World(link=12 * MB), Codec.ZSTD),
        (World(link=125 * MB, shares=(1.0, 1.0)), Codec.NONE),  # noise
        (World(link=125 * MB, lz4=40 * MB, zstd=20 * MB), Codec.NONE),  # slow processors
    ],
)
def test_the_best_is_found(world: World, expected: Codec) -> None:
    chooser = CodecChooser()
    world.run(chooser, 64 * MB)
    before = world.seconds
    used = world.run(chooser, 2 * USE_BYTES)
    assert max(used, key=lambda each: used[each]) is expected, used
    assert 2 * USE_BYTES / (world.seconds - before) > 0.85 * world.best()


def test_it_goes_with_the_link() -> None:
    world, chooser = World(link=5000 * MB), CodecChooser()
    assert world.run(chooser, 600 * MB)[Codec.NONE] > 500 * MB
    world.link = 60 * MB
    world.run(chooser, USE_BYTES)
    used = world.run(chooser, USE_BYTES)
    assert used[Codec.ZSTD] > 0.8 * USE_BYTES, used
    world.link = 5000 * MB
    world.run(chooser, USE_BYTES)
    used = world.run(chooser, USE_BYTES)
    assert used[Codec.NONE] > 0.8 * USE_BYTES, used


def test_little_is_not_compressed() -> None:
    assert World(link=12 * MB).run(CodecChooser(), WARM_UP_BYTES)[Codec.NONE] == WARM_UP_BYTES


def test_what_was_asked_for_is_kept() -> None:
    used = World(link=5000 * MB).run(CodecChooser((Codec.ZSTD,)), 500 * MB)
    assert used[Codec.NONE] == used[Codec.LZ4] == 0
