"""Nodes with a container runtime, a bridge and cgroups of their own; containers whose files come from debootstrap."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.need import need
from tests.nodes import Node, until

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phaul" / "trees"
TREE: Final = CACHE / "container-1"
VICTIMS: Final = ROOT / "tests" / "victims"
BRIDGE: Final = "cbr0"
ADDRESS: Final = "10.77.2.100"
PORT: Final = 9000
CONTROLLERS: Final = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")

_BUILD: Final = """
set -eu
[ ! -d "$1" ] || exit 0
scripts/need debootstrap debootstrap
site=$(scripts/debian-mirror)
mkdir -p "${1%/*}/debs"
work=$(mktemp -d "$1.XXXXXX")
unshare --mount --pid --fork --kill-child --mount-proc debootstrap --variant=minbase --cache-dir="${1%/*}/debs" \
    --include=python3 trixie "$work" "$site"
rm -rf "$work"/var/cache/apt/* "$work"/var/lib/apt/lists/* "$work"/usr/share/{doc,locale,man}
mv "$work" "$1"
"""
#: Whether this machine has hierarchies of version 1 is seen by trying.
_CGROUPS: Final = """
set -e
case $2 in
v2)
    mkdir -p /run/cgroup && mount -t cgroup2 none /run/cgroup
    mkdir -p "/run/cgroup/$1" && mount --bind "/run/cgroup/$1" /sys/fs/cgroup
    ;;
v1)
    mount -t tmpfs none /sys/fs/cgroup
    mkdir /run/cgroup
    for each in $3; do
        mkdir "/run/cgroup/$each" "/sys/fs/cgroup/$each"
        mount -t cgroup -o "$each" none "/run/cgroup/$each"
        mkdir -p "/run/cgroup/$each/$1"
        if [ "$each" = cpuset ]; then
            for file in cpus mems; do cat "/run/cgroup/cpuset/cpuset.$file" >"/run/cgroup/cpuset/$1/cpuset.$file"; done
        fi
        mount --bind "/run/cgroup/$each/$1" "/sys/fs/cgroup/$each"
    done
    ;;
esac
for each in /run/cgroup/* /run/cgroup; do umount "$each" 2>/dev/null || true; done
ip link add cbr0 type bridge
ip link set lan0 master cbr0
ip link set cbr0 up
"""
_SWEEP: Final = """
mkdir -p "$2/cg"
for each in $3; do
    case $each in
    v2) mount -t cgroup2 none "$2/cg" ;;
    *) mount -t cgroup -o "$each" none "$2/cg" 2>/dev/null || continue ;;
    esac
    for name in $1; do
        [ ! -d "$2/cg/$name" ] || find "$2/cg/$name" -depth -type d -exec rmdir {} + 2>/dev/null
    done
    umount "$2/cg"
done
"""


def missing() -> str | None:
    """Why these tests cannot run here, after what is missing was installed; `None` if they can."""
    if reason := need({"runc": "runc", "crun": "crun", "nsenter": "util-linux"}):
        return reason
    built = subprocess.run(
        ["bash", "-c", _BUILD, "bash", str(TREE)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"no root file system: {[*built.stderr.splitlines(), built.stdout[-200:]][0]}" if built.returncode else None


@contextlib.contextmanager
def cgroups_swept(names: list[str], directory: Path) -> Iterator[None]:
    """Afterwards no cgroup of these names is left."""
    yield
    kinds = " ".join(("v2", *CONTROLLERS))
    subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _SWEEP,
            "sh",
            " ".join(names),
            str(directory),
            kinds,
        ],
        check=False,
    )


async def prepare(node: Node, version: str, name: str) -> None:
    """Give it cgroups of that version, and a bridge into the client's network."""
    await node.run(["sh", "-c", _CGROUPS, "sh", name, version, " ".join(CONTROLLERS)])


class Container:
    """A container that was started on one node, and may have moved to another."""

    def __init__(self, runtime: str, name: str, volume: Path) -> None:
        self.runtime = runtime
        self.name = name
        self.volume = volume

    def __str__(self) -> str:
        return f"{self.runtime}:{self.name}"

    @classmethod
    async def start(
        cls,
        node: Node,
        runtime: str,
        volume: Path,
        name: str = "web",
        *,
        network: bool = True,
        output: str = "/dev/null",
    ) -> Container:
        """Run it, detached, with a volume and a network."""
        container = cls(runtime, name, volume)
        bundle = node.root / "run/bundle" / name
        inside = f"/run/bundle/{name}"
        await node.run(["mkdir", "-p", inside])
        await node.run(["runc", "spec", "--bundle", inside])  # it looks which cgroups the node has
        await asyncio.to_thread(_fill_bundle, bundle, volume, network)
        words = [runtime, *container.flags, "run", "--detach", "--bundle", inside, name]
        await node.run(["bash", "-c", f'exec "$@" >{output} 2>/dev/null', "bash", *words])
        pid = (await container.state(node))["pid"]
        if network:
            await node.run(["sh", "-c", _CONNECT, "sh", str(pid), BRIDGE, f"{ADDRESS}/24"])
        await container.beats()
        return container

    @property
    def flags(self) -> list[str]:
        return []

    async def state(self, node: Node) -> dict[str, Any]:
        """What the runtime says of it; empty if it knows none."""
        done = await node.run([self.runtime, *self.flags, "state", self.name], check=False)
        found: dict[str, Any] = done.json() if done.returncode == 0 else {}
        return found

    async def beats(self) -> int:
        """Wait for ten more; the number of the last. Raises TimeoutError."""
        count = self.count
        await until(lambda: self.count > count + 10, 30)
        return self.count

    @property
    def count(self) -> int:
        try:
            return int((self.volume / "beats").read_text())
        except (FileNotFoundError, ValueError):
            return -1


#: The other end is put into the bridge last: the container never has an address that nobody else knows of.
_CONNECT: Final = """
set -e
ip link add vweb type veth peer name eth0 netns "$1"
in="nsenter --net --target $1 --"
$in ip link set lo up
$in ip address add "$3" dev eth0
$in ip link set eth0 up
ip link set vweb master "$2" up
"""


def _fill_bundle(bundle: Path, volume: Path, network: bool) -> None:
    volume.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", TREE, bundle / "rootfs"], check=True)
    app = bundle / "rootfs" / "app"
    app.mkdir()
    for name in ("in_container.py", "tcp_echo.py"):
        shutil.copy(VICTIMS / name, app)
    file = bundle / "config.json"
    config = json.loads(file.read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = [
        "/usr/bin/python3",
        "-IS",
        "/app/in_container.py",
        *(["0.0.0.0", str(PORT)] if network else []),
    ]
    config["root"]["readonly"] = False
    config["mounts"].append({"destination": "/data", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]})
    file.write_text(json.dumps(config))


def log_of(node: Node, config: dict[str, Any]) -> list[str]:
    """What the container has written into its root, which a state of the runtime names."""
    root = Path(config["bundle"]) / config["rootfs"]
    log: Path = node.root / root.relative_to("/") / "var/app/log"
    return log.read_text().splitlines()
