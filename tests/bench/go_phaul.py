"""go-criu's phaul for the benchmark in the lab: built from Debian 13's packages, once, into the user's cache."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Final

from tests.vm.image import ROOT, LabMissing, cache_directory, forget_unused

SOURCE: Final = Path(__file__).parent / "go_criu"
TREE: Final = ROOT / "scripts/debian-tree"
BUILD_SECONDS: Final = 300
#: Without modules, from the packages' sources; for any guest, so without C's library.
_SETTINGS: Final = ("GO111MODULE=off", "GOPATH=/usr/share/gocode", "CGO_ENABLED=0")


def ensure_go_phaul() -> Path:
    """The program, built if need be (a minute, once). Raises LabMissing with the reason if it cannot be had."""
    digest = hashlib.sha256((SOURCE / "main.go").read_bytes()).hexdigest()[:16]
    target = cache_directory() / f"go-phaul-{digest}"
    if target.exists():
        forget_unused("go-phaul-*", target)
        return target
    building = target.with_suffix(".new")
    building.mkdir(parents=True, exist_ok=True)
    settings = [word for setting in _SETTINGS for word in ("--env", setting)]
    binds = ["--bind", f"{SOURCE}:/mnt", "--bind", f"{building}:/opt"]
    build = ["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", "/opt/go-phaul", "/mnt/main.go"]
    try:
        done = subprocess.run(
            [TREE, "run", "go", *settings, *binds, "--", *build], capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise LabMissing(f"go-criu's phaul was not built: {exc}") from exc
    if done.returncode != 0:
        raise LabMissing(f"go-criu's phaul was not built: {' '.join(done.stderr.split())[-300:]}")
    (building / "go-phaul").rename(target)
    building.rmdir()
    return target
