"""Nodes with a container runtime, a bridge and cgroups of their own; containers whose files come from debootstrap."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.daemon import LOG_DIR
from tests.need import need
from tests.nodes import Node, until

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phaul" / "trees"
TREE: Final = CACHE / "container-1"
VICTIMS: Final = ROOT / "tests" / "victims"
BRIDGE: Final = "cbr0"
ADDRESS: Final = "10.77.2.100"
PORT: Final = 9000
LOG: Final = LOG_DIR / "web.log"
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


@functools.cache
def _missing() -> str | None:
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


async def mounts_at(node: Node) -> list[str]:
    """Those that a restore needs, and nobody else."""
    mounts = (await node.run(["cat", "/proc/self/mountinfo"])).stdout
    return [line for line in mounts.splitlines() if "/phaul/state/" in line]


def whole(lines: list[str], at_least: int) -> bool:
    """Whether every beat is there once, in order."""
    return len(lines) >= at_least and lines == [str(number) for number in range(len(lines))]


class Container:
    """A container that was started on one node, and may have moved to another."""

    keeper = ""  #: what keeps it, if that is not its runtime
    cgroups = "{}"  #: how its cgroups are called

    def __init__(self, runtime: str, name: str, volume: Path) -> None:
        self.runtime = runtime
        self.name = name
        self.volume = volume
        self.logged = False  #: to LOG

    def __str__(self) -> str:
        return f"{self.keeper or self.runtime}:{self.name}"

    @property
    def workload(self) -> str:
        """How one is called that has come by phaul: so in `phaul ps`, and by `phaul drain`."""
        return str(self).replace(":", "-")

    @classmethod
    def missing(cls) -> str | None:
        """Why there can be none here, after what is missing was installed; `None` if there can."""
        return _missing()

    @classmethod
    async def prepare(cls, node: Node, runtime: str, name: str) -> None:
        """Give a node cgroups of the version that is tried with this runtime, and a bridge to the client."""
        version = "v1" if runtime == "crun" else "v2"
        await node.run(["sh", "-c", _CGROUPS, "sh", name, version, " ".join(CONTROLLERS)])

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
        container.logged = output == str(LOG)
        bundle = node.root / "run/bundle" / name
        inside = f"/run/bundle/{name}"
        await node.run(["mkdir", "-p", inside])
        await node.run(["runc", "spec", "--bundle", inside])  # it looks which cgroups the node has
        await asyncio.to_thread(_fill_bundle, bundle, volume, network)
        words = [runtime, "run", "--detach", "--bundle", inside, name]
        await node.run(["bash", "-c", f'exec "$@" >{output} 2>/dev/null', "bash", *words])
        pid = (await container.state(node))["pid"]
        if network:
            await node.run(["sh", "-c", _CONNECT, "sh", str(pid), BRIDGE, f"{ADDRESS}/24"])
        await container.beats()
        return container

    async def state(self, node: Node) -> dict[str, Any]:
        """What the runtime says of it; empty if it knows none."""
        done = await node.run([self.runtime, "state", self.name], check=False)
        found: dict[str, Any] = done.json() if done.returncode == 0 else {}
        return found

    async def logs(self, node: Node) -> list[list[str]]:
        """What it has written, wherever that is: each a line for each beat."""
        config = await self.state(node)
        root = Path(config["bundle"]) / config["rootfs"]
        log: Path = node.root / root.relative_to("/") / "var/app/log"
        return [log.read_text().splitlines()]  # noqa: ASYNC240 - small

    async def left_at(self, node: Node) -> list[str]:
        """What there is of it at a node where it does not run."""
        found = [] if await self.state(node) == {} else ["a record"]
        found += await mounts_at(node)
        bundles = node.root / "run/phaul/state/containers"
        found += [str(each) for each in bundles.iterdir()] if bundles.exists() else []
        cgroups = ["-name", self.cgroups.format(self.name), "-not", "-name", "*conmon*"]
        found += (await node.run(["find", "/sys/fs/cgroup", *cgroups])).stdout.split()
        links = (await node.run(["ip", "-brief", "link", "show", "master", BRIDGE])).stdout.splitlines()
        found += [line for line in links if not line.startswith("lan0")]
        processes = (await node.run(["ps", "-eo", "args"])).stdout.splitlines()
        return found + [line for line in processes if "in_container" in line]

    async def is_gone_from(self, node: Node) -> None:
        """Wait until nothing of it is left there. Raises TimeoutError."""
        async with asyncio.timeout(20):
            while left := await self.left_at(node):
                await asyncio.sleep(0.1)
                print(left)

    async def change(self, node: Node) -> None:
        """Something in it that is to move along."""

    async def look_inside(self, node: Node, pid: int, beats: int) -> None:
        """It has moved there, with its process and at least these beats; what changed in it is there."""
        assert (await self.state(node))["pid"] == pid
        if self.logged:
            logged = (node.root / LOG.relative_to("/")).read_text().splitlines()
            assert whole(logged, beats - 20)
            last = await node.phaul("logs", self.workload, "-n", "1", check=True)
            assert last.stdout.strip().isdigit()
        if self.runtime == "runc":  # cgroups of version 2: a namespace of its own
            lines = (await node.run(["runc", "exec", self.name, "cat", "/proc/1/cgroup"])).stdout.splitlines()
            assert lines[-1] == "0::/"
        done = await node.run([self.runtime, "exec", self.name, "cat", "/proc/1/cmdline"])
        assert "in_container.py" in done.stdout

    async def end(self, node: Node) -> None:
        """By its runtime, as ever."""
        await node.run([self.runtime, "kill", self.name, "KILL"])
        await node.run([self.runtime, "delete", "--force", self.name])

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


@dataclass(frozen=True)
class Kind:
    """Of containers: who keeps it, which runtime it has, and how it is started."""

    container: type[Container]
    runtime: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.container.keeper, self.runtime)))

    async def start(self, node: Node, volume: Path, name: str = "web", **options: Any) -> Container:
        """One, detached, with a volume and a network."""
        return await self.container.start(node, self.runtime, volume, name, **self.options, **options)
