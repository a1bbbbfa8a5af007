"""Versions of criu."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_VERSION_LINE: Final = re.compile(r"^Version:\s*(\d+)\.(\d+)(?:\.(\d+))?", re.MULTILINE)


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A version of criu; versions compare as expected."""

    major: int
    minor: int
    sublevel: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + (f".{self.sublevel}" if self.sublevel else "")

    @property
    def number(self) -> int:
        """The version as criu's own libraries write it: 4.1.1 is 40101."""
        return self.major * 10000 + self.minor * 100 + self.sublevel


#: The oldest criu that works: kernel >= 6.13's vDSO, rseq, pidfd_store.
OLDEST: Final = Version(4, 1)


def parse_version(text: str) -> Version | None:
    """The version in the output of `criu --version`; None if there is none."""
    match = _VERSION_LINE.search(text)
    return Version(*(int(part or 0) for part in match.groups())) if match else None
