"""What a test needs of this machine: installed with apt by scripts/need, the one way in which this project does it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SCRIPT: Final = Path(__file__).resolve().parents[1] / "scripts/need"


def need(programs: Mapping[str, str]) -> str | None:
    """Install the Debian package of each program that is missing; why that cannot be done. `{program: package}`."""
    if not programs:
        return None
    words = [str(SCRIPT), " ".join(programs), *programs.values()]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return next((line for line in done.stderr.splitlines() if "error: " in line), done.stderr.strip())
