"""Which codec gets the most pages across (pure): it is tried and measured, again and again.

What the link carries and what the processors can do beside criu show in one figure, the speed at which pages leave.
While the link is slow, what does not fit waits in the socket's buffer, so that a sender who compresses better is let go
on sooner: each codec's own speed is known after a few MiB. The best one is used for a while, then the others are tried
again, for the memory and the link may have become others; not those whose compressing alone takes longer than the best
one takes altogether.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phaul_client.page_frames import Codec

#: What a socket's buffers swallow at memory speed; nothing is learnt from it.
WARM_UP_BYTES: Final = 8 << 20
TRIAL_BYTES: Final = 4 << 20
#: After a change of codec a buffer first empties or fills, which says nothing about the link.
SETTLE_BYTES: Final = 6 << 20
SETTLE_SECONDS: Final = 0.2
#: A trial over a slow link ends after this long.
TRIAL_SECONDS: Final = 0.3
TRIAL_FRAMES: Final = 2
#: The best codec is used for so many bytes, or so long, between two rounds of trials.
USE_BYTES: Final = 256 << 20
USE_SECONDS: Final = 5.0
#: Another codec must be better than the one in use by this.
BETTER: Final = 1.05
#: criu waits for other things, too: longer than this it did not wait for processors that we kept from it.
WAIT_SECONDS: Final = 0.02


@dataclass(slots=True)
class _Trial:
    """What one codec did, the last time that it was used."""

    raw_bytes: int = 0
    seconds: float = 0.0
    packing_seconds: float = 0.0
    frames: int = 0

    @property
    def speed(self) -> float:
        return self.raw_bytes / self.seconds if self.seconds else 0.0

    @property
    def ceiling(self) -> float:
        """What it could reach on a link without limits."""
        return self.raw_bytes / self.packing_seconds if self.packing_seconds else float("inf")

    @property
    def is_over(self) -> bool:
        return self.frames >= TRIAL_FRAMES and (self.raw_bytes >= TRIAL_BYTES or self.seconds >= TRIAL_SECONDS)


class CodecChooser:
    """Tells the `codec` of the next frame; is told what each frame took."""

    def __init__(self, codecs: tuple[Codec, ...] = (Codec.NONE, Codec.LZ4, Codec.ZSTD)) -> None:
        self._codecs = codecs
        self._known: dict[Codec, _Trial] = {}
        self._trial = _Trial()
        self._to_try: list[Codec] = []
        self._warm_up_bytes = WARM_UP_BYTES
        self._settling = (0, 0.0)
        self._best = codecs[0]
        self.codec = codecs[0]

    def sent(self, raw_bytes: int, *, packing_seconds: float, sending_seconds: float, waited_seconds: float) -> None:
        """A frame has left: this long it was compressed, sent, and before that waited for from criu."""
        if self._warm_up_bytes > 0:
            self._warm_up_bytes -= raw_bytes
            if self._warm_up_bytes <= 0:
                self._start(list(self._codecs))
            return
        seconds = packing_seconds + sending_seconds + min(waited_seconds, WAIT_SECONDS)
        settled_bytes, settled_seconds = self._settling
        if settled_bytes < SETTLE_BYTES and settled_seconds < SETTLE_SECONDS:
            self._settling = (settled_bytes + raw_bytes, settled_seconds + seconds)
            return
        trial = self._trial
        trial.raw_bytes += raw_bytes
        trial.frames += 1
        trial.packing_seconds += packing_seconds
        trial.seconds += seconds
        if self._to_try:
            if trial.is_over:
                self._known[self.codec] = trial
                self._start(self._to_try[1:])
        elif trial.raw_bytes >= USE_BYTES or trial.seconds >= USE_SECONDS:
            self._known[self.codec] = trial
            others = [each for each in self._codecs if each is not self.codec]
            self._start([each for each in others if self._known[each].ceiling > trial.speed])

    def _start(self, to_try: list[Codec]) -> None:
        self._to_try = to_try
        self._trial = _Trial()
        self._settling = (0, 0.0)
        if to_try:
            self.codec = to_try[0]
            return
        leader = max(self._codecs, key=lambda each: self._known[each].speed)
        if self._known[leader].speed > self._known[self._best].speed * BETTER:
            self._best = leader
        self.codec = self._best
