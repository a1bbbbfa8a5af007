"""The guests' disk image: where it is, and whether it must be built. What is in it: image/build.

It is kept outside the checkout, in a directory named by a hash of its recipe.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.need import need

ROOT: Final = Path(__file__).resolve().parents[2]
RECIPE: Final = Path(__file__).resolve().parent / "image"
REQUIREMENTS: Final = ROOT / "requirements.txt"
QEMU: Final = "qemu-system-x86_64"
#: what the guests run of the working tree
TREE: Final = ("phaul_client", "phaul_criu", "phauld", "proto", "tests")
TREE_DISK_SIZE: Final = "128M"  # sparse
KEPT_UNUSED_SECONDS: Final = 7 * 24 * 3600.0
#: command: Debian package
_PROGRAMS: Final = {QEMU: "qemu-system-x86", "mke2fs": "e2fsprogs", "setpriv": "util-linux"}
_BUILD_PROGRAMS: Final = {"debootstrap": "debootstrap"}
_NO_MIRROR_STATUS: Final = 3  #: of image/build
_PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class LabMissing(Exception):
    """This machine cannot run the lab; the message says why."""


class ImageBroken(Exception):
    """The image could not be built; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a guest boots."""

    disk: Path
    kernel: Path
    python: Path  #: the root of the guests' Python for this machine


def cache_directory() -> Path:
    """Where images are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phaul" / "lab"


def recipe_hash() -> str:
    """Changes whenever the image must be built anew."""
    digest = hashlib.sha256()
    for path in (*sorted(RECIPE.iterdir()), REQUIREMENTS):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find(directory: Path) -> Image | None:
    """The image in a directory, if it has been built."""
    image = Image(disk=directory / "root.ext4", kernel=directory / "vmlinuz", python=directory / "python")
    return image if image.disk.exists() and image.kernel.exists() else None


def ensure_image() -> Image:
    """The image, built if need be (about a minute; progress on standard error). Raises LabMissing, ImageBroken."""
    if platform.machine() != "x86_64":
        raise LabMissing(f"the lab's guests are x86_64, and this machine is {platform.machine()}")
    _need(_PROGRAMS)
    cache = cache_directory()
    target = cache / recipe_hash()
    if (image := find(target)) is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _one_builder(cache):
            image = find(target) or _build(target, cache)
    os.utime(target)
    return image


def pack_tree(image: Image) -> int:
    """A disk with the working tree as it is now: a descriptor of a file without a name. Raises ImageBroken."""
    with tempfile.TemporaryDirectory(prefix="phaul-lab.") as scratch:
        tree, disk = Path(scratch, "tree"), Path(scratch, "tree.ext4")
        for name in TREE:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        _compile(image, tree)
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        (tree / "phaul.dist-info").mkdir()
        (tree / "phaul.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: phaul\nVersion: {version}\n")
        make = [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-m",
            "0",
            "-d",
            str(tree),
            str(disk),
            TREE_DISK_SIZE,
        ]
        made = subprocess.run(make, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True)
        if made.returncode != 0:
            raise ImageBroken(f"mke2fs: {made.stderr.strip()}")
        return os.open(disk, os.O_RDONLY | os.O_CLOEXEC)


def _compile(image: Image, tree: Path) -> None:
    """Compile for the guests' Python. A file that cannot be compiled is the business of whoever imports it."""
    libraries = image.python / "usr/lib/x86_64-linux-gnu"
    loader: list[str | Path] = [
        libraries / "ld-linux-x86-64.so.2",
        "--library-path",
        libraries,
        image.python / "usr/bin/python3",
    ]
    environment = {"PYTHONHOME": str(image.python / "usr")}
    compiler: list[str | Path] = ["-m", "compileall", "-qq", "-s", tree, "-p", "/phaul", tree]
    compiled = subprocess.run([*loader, *compiler], env=environment, capture_output=True, text=True)
    if compiled.stderr:
        sys.stderr.write(f"phaul lab: compiling the working tree: {compiled.stderr.splitlines()[-1]}\n")


def _build(target: Path, cache: Path) -> Image:
    if os.geteuid() != 0:
        raise LabMissing("the guests' image must be built once, by root: sudo scripts/lab build")
    _need(_BUILD_PROGRAMS)
    _remove_unused(cache)
    command = [RECIPE / "build", target, REQUIREMENTS, cache]
    built = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable})
    if built.returncode == _NO_MIRROR_STATUS:
        raise LabMissing("no Debian mirror in this machine's apt sources (set PHAUL_DEBIAN_MIRROR)")
    image = find(target)
    if built.returncode != 0 or image is None:
        raise ImageBroken(f"the guests' image could not be built; see standard error and {cache / 'build.log'}")
    return image


def _remove_unused(cache: Path) -> None:
    """Images of other recipes that nobody used lately, and what an interrupted build left."""
    for directory in cache.iterdir():
        unused = time.time() - directory.stat().st_mtime > KEPT_UNUSED_SECONDS
        if directory.name.startswith("build.") or directory.suffix == ".new" or (unused and find(directory)):
            shutil.rmtree(directory, ignore_errors=True)


def forget_unused(pattern: str, used: Path) -> None:
    """Remove the files beside `used` that are called so and that nobody used lately: they are of earlier recipes."""
    os.utime(used)
    for other in used.parent.glob(pattern):
        if other != used and time.time() - other.stat().st_mtime > KEPT_UNUSED_SECONDS and other.is_file():
            other.unlink(missing_ok=True)


@contextmanager
def _one_builder(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _need(programs: dict[str, str]) -> None:
    """Install what is missing, as root. Raises LabMissing."""
    if reason := need(programs):
        raise LabMissing(reason)
