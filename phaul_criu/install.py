"""Where criu is: the variable PHAUL_CRIU, else beside pycriu (where scripts/setup put both), else on the PATH.

Works without criu and without pycriu.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul_criu import child
from phaul_criu.errors import CriuMissing, CriuTooOld
from phaul_criu.version import OLDEST, Version, parse_version

ENVIRONMENT_VARIABLE: Final = "PHAUL_CRIU"
_REMEDY: Final = f"run scripts/setup, or install criu {OLDEST} or newer, or set {ENVIRONMENT_VARIABLE} to its path"
_VERSION_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A criu that is new enough."""

    binary: Path
    version: Version


def find_binary(environment: Mapping[str, str] = os.environ) -> Path:
    """The criu binary to use. Raises CriuMissing; does not run it."""
    if chosen := environment.get(ENVIRONMENT_VARIABLE):
        return _executable(Path(chosen))
    beside = _beside_pycriu()
    if beside is not None and os.access(beside, os.X_OK):
        return beside
    if on_path := shutil.which("criu", path=environment.get("PATH")):
        return Path(on_path)
    raise CriuMissing("start", "there is no criu", code="criu-missing", remedy=_REMEDY)


async def find(environment: Mapping[str, str] = os.environ) -> Installation:
    """The criu to use, having asked it for its version. Raises CriuMissing, CriuTooOld."""
    binary = find_binary(environment)
    version = await ask_version(binary)
    if version < OLDEST:
        message = f"{binary} is criu {version}, older than {OLDEST}"
        raise CriuTooOld("start", message, code="criu-too-old", remedy=_REMEDY)
    return Installation(binary=binary, version=version)


async def ask_version(binary: Path) -> Version:
    """The version of a criu binary, without pycriu. Raises CriuMissing if it does not start."""
    try:
        ended = await child.run([binary, "--version"], timeout_seconds=_VERSION_SECONDS)
    except (OSError, TimeoutError) as exc:
        message = f"{binary} does not start: {exc}"
        raise CriuMissing("start", message, code="criu-missing", remedy=_REMEDY) from exc
    version = parse_version(ended.output)
    if ended.returncode != 0 or version is None:
        message = f"{binary} is no criu, or does not start: {ended.output}"
        raise CriuMissing("start", message, code="criu-missing", remedy=_REMEDY)
    return version


def _beside_pycriu() -> Path | None:
    spec = importlib.util.find_spec("pycriu")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parents[2] / "bin" / "criu"  # PREFIX/python/pycriu/__init__.py


def _executable(path: Path) -> Path:
    if not os.access(path, os.X_OK):
        message = f"{ENVIRONMENT_VARIABLE} names {path}, which is no program"
        raise CriuMissing("start", message, code="criu-missing", remedy=_REMEDY)
    return path
