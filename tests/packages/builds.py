"""Packages of this checkout, environments that have them, and the tools that look at them."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = ROOT / "scripts" / "package"
TREES: Final = ROOT / "scripts" / "debian-tree"
VICTIM: Final = ROOT / "tests" / "victims" / "heartbeat.py"
TOOLS: Final = Path(__file__).with_name("requirements.txt")
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phaul"
#: What pip is told by its user stays; what Python is told of this checkout does not.
_ENVIRONMENT: Final = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


class Failed(Exception):
    """A command failed; what it wrote."""


def run(*argv: str | Path, cwd: Path | None = None, check: bool = True, timeout_seconds: float = 300.0) -> str:
    """A command outside of the checkout; what it wrote. Raises Failed if `check` and it fails."""
    done = subprocess.run(
        list(map(str, argv)),
        cwd=cwd or tempfile.gettempdir(),
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
    )
    if check and done.returncode != 0:
        raise Failed(f"{argv} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def build(kind: str, dist: Path, pattern: str) -> Path:
    """`scripts/package KIND`; the one file that it made in `dist`, or where `./check` keeps it for all parts."""
    if kept := os.environ.get("PHAUL_CHECK_DIST"):
        dist = Path(kept) / kind
        if found := list(dist.glob(pattern)):
            return found[0]
    run("env", f"PHAUL_DIST={dist}", PACKAGE, kind, timeout_seconds=600)
    (made,) = dist.glob(pattern)
    return made


def environment(directory: Path, *install: str | Path) -> Path:
    """A new virtual environment with what pip is told to install; the directory of its programs."""
    run(sys.executable, "-m", "venv", directory)
    run(directory / "bin/pip", "install", "--disable-pip-version-check", "--no-input", *install)
    return directory / "bin"


def with_criu(programs: Path) -> None:
    """Let an environment find the criu and pycriu that scripts/install-criu provides, as docs/packaging.md says."""
    prefix = run("env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}", ROOT / "scripts/install-criu")
    site = run(programs / "python", "-c", 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    Path(site, "phaul-criu.pth").write_text(f"{prefix.strip().splitlines()[-1]}/python\n")


@functools.cache
def tools() -> Path:
    """The programs of requirements.txt, in an environment that is kept."""
    target = CACHE / f"package-tools-{hashlib.sha256(TOOLS.read_bytes() + sys.version.encode()).hexdigest()[:12]}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="package-tools.", dir=CACHE))
        try:
            environment(work, "--requirement", TOOLS)
            for old in CACHE.glob("package-tools-*"):
                shutil.rmtree(old, ignore_errors=True)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target / "bin"


def tool(module: str, *arguments: str | Path, check: bool = True) -> str:
    """Run a tool. As a module: the environment was moved after it was made. Raises Failed."""
    return run(tools() / "python", "-m", module, *arguments, check=check)


def files_of_the_project() -> Sequence[str]:
    """What git has, and what is new and not ignored."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.splitlines() if (ROOT / name).exists()]
