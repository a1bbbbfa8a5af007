"""Programs that the guests' image lacks, and few tests want: an archive of Debian's packages, unpacked into a guest.

So the image stays as small as the other tests want it. The archive is made once, in a tree of scripts/debian-tree, and
again when its recipe changes; it is kept beside the images.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.vm.guest import Guest
from tests.vm.image import ROOT, LabMissing, cache_directory, forget_unused

PACKAGES: Final = ("postgresql-17", "nginx-light", "memcached", "rsync")
RECIPE: Final = Path(__file__).with_name("pack_programs")
USER: Final = "postgres"
USER_ID: Final = 4242
DATA: Final = "/srv/postgres"  #: the cluster is "main" in it
ARCHIVE: Final = "programs.tar.gz"
_TREES: Final = ROOT / "scripts/debian-tree"
_PACK_SECONDS: Final = 400


def archive() -> bytes:
    """The archive, made if need be (half a minute). Raises LabMissing."""
    recipe = RECIPE.read_bytes() + repr((PACKAGES, USER_ID, DATA)).encode()
    path = cache_directory() / f"programs-{hashlib.sha256(recipe).hexdigest()[:16]}.tar.gz"
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="phaul-lab.") as scratch:
            out = Path(scratch)
            binds = ["--bind", f"{out}:/out", "--bind", f"{RECIPE}:/pack"]
            words: list[str | Path] = [_TREES, "run", "base", *binds, "--", "/pack", str(USER_ID), DATA, *PACKAGES]
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=_PACK_SECONDS)
            except subprocess.TimeoutExpired:
                raise LabMissing(f"packing programs for the guests took more than {_PACK_SECONDS} s") from None
            if done.returncode != 0:
                raise LabMissing(f"programs for the guests could not be packed: {done.stderr.strip()[-500:]}")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / ARCHIVE, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
    forget_unused("programs-*.tar.gz", path)
    return path.read_bytes()


async def unpack(guest: Guest, packed: bytes) -> None:
    """Into the root of a guest, once for each boot. Raises CommandFailed, GuestDied."""
    if (await guest.run(["test", "-e", f"/run/{ARCHIVE}.done"], check=False)).returncode == 0:
        return
    await guest.put(f"/tmp/{ARCHIVE}", packed)
    passwd, group = f"{USER}:x:{USER_ID}:{USER_ID}::/tmp:/bin/sh", f"{USER}:x:{USER_ID}:"
    script = f"""
        tar -xzf /tmp/{ARCHIVE} -C /
        rm /tmp/{ARCHIVE}
        ldconfig
        echo {passwd} >>/etc/passwd
        echo {group} >>/etc/group
        touch /run/{ARCHIVE}.done
    """
    await guest.run(["sh", "-ec", script], timeout_seconds=120)


async def unpack_all(*guests: Guest) -> None:
    """Into each of them at once. Raises LabMissing, CommandFailed, GuestDied."""
    packed = await asyncio.to_thread(archive)
    await asyncio.gather(*(unpack(guest, packed) for guest in guests))
