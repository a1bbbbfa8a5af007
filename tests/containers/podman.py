"""Nodes with a podman of their own: its storage, its shared memory and its networks; containers that it keeps."""

from __future__ import annotations

import asyncio
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from tests.containers.containers import ADDRESS, BRIDGE, PORT, TREE, VICTIMS, Container
from tests.need import need
from tests.nodes import Node

STANDS_IN: Final = "podman_runtime.py"
IMAGE: Final = "localhost/phaul-test:1"
NETWORK: Final = "lan"
#: Without a pids controller here; CNI, because its bridge needs no iptables.
_CONFIGURATION: Final = """
[containers]
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "{runtime}"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/usr/lib/cni"]
network_config_dir = "/run/networks"
"""
_NETWORK: Final = f"""{{"cniVersion": "0.4.0", "name": "{NETWORK}", "plugins": [
    {{"type": "bridge", "bridge": "{BRIDGE}", "ipam": {{"type": "host-local", "dataDir": "/run/addresses",
     "ranges": [[{{"subnet": "10.77.2.0/24", "rangeStart": "{ADDRESS}", "rangeEnd": "{ADDRESS}"}}]]}}}}]}}"""
_PREPARE: Final = """
set -e
mkdir -p /etc/containers /var/lib/containers /run/networks /run/etc-containers "$1"
printf %s "$2" >/run/etc-containers/containers.conf
printf %s "$3" >/run/networks/lan.conflist
printf %s "$4" >/run/etc-containers/storage.conf
printf '{"default": [{"type": "insecureAcceptAnything"}]}' >/run/etc-containers/policy.json
mount --bind /run/etc-containers /etc/containers
mount --bind "$1" /var/lib/containers
mount -t tmpfs none /dev/shm
podman image exists "$5"
"""
_IMAGES: Final = TREE.parent / "podman-2"
#: Both nodes read the image from the same place; what they make is their own.
_STORAGE: Final = f"""[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
[storage.options]
additionalimagestores = [{str(_IMAGES)!r}]
"""
_BUILD: Final = """
set -eu
[ ! -d "$2" ] || exit 0
work=$(mktemp -d "$2.XXXXXX")
trap 'umount "$work/overlay" 2>/dev/null || true; rm -rf "$work"' EXIT
mount -t tmpfs none /run
tar -C "$1" --exclude=./usr/share --exclude=./var/lib --exclude='*perl*' --exclude='*/gconv' -cf - . |
    podman --root "$work" --runroot /run/containers --storage-driver overlay import - "$3" >&2
umount "$work/overlay" 2>/dev/null || true
chmod 755 "$work"
mv "$work" "$2"
"""


@functools.cache
def _missing() -> str | None:
    wanted = {"podman": "podman", "conmon": "conmon", "/usr/lib/cni/bridge": "containernetworking-plugins"}
    if reason := need(wanted):
        return reason
    words = ["bash", "-c", _BUILD, "bash", str(TREE), str(_IMAGES), IMAGE]
    built = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *words], capture_output=True, text=True, check=False
    )
    return f"no image: {built.stderr[-300:]}" if built.returncode else None


async def lines(node: Node, *words: str) -> list[str]:
    """What podman says."""
    return (await node.run(["podman", *words])).stdout.splitlines()


class PodmanContainer(Container):
    """One that podman keeps."""

    keeper = "podman"
    cgroups = "libpod-*"

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or _missing()

    @classmethod
    async def prepare(cls, node: Node, runtime: str, name: str) -> None:
        """And a podman that knows the image and the network."""
        await super().prepare(node, runtime, name)
        configuration = _CONFIGURATION.format(runtime=runtime)
        storage = str(node.directory / "containers")
        await node.run(["sh", "-c", _PREPARE, "sh", storage, configuration, _NETWORK, _STORAGE, IMAGE])

    @classmethod
    async def start(  # type: ignore[override]
        cls, node: Node, runtime: str, volume: Path, name: str = "web", *, flags: tuple[str, ...] = ()
    ) -> PodmanContainer:
        """Run it, detached, with a volume and a network."""
        container = cls(runtime, name, volume)
        app = volume.parent / "app"
        await asyncio.to_thread(_fill, volume, app)
        words = ["podman", "run", "--detach", "--name", name, "--network", NETWORK, *flags]
        volumes = ["--volume", f"{volume}:/data", "--volume", f"{app}:/app"]
        command = ["/usr/bin/python3", "-IS", "/app/in_container.py", "0.0.0.0", str(PORT)]
        await node.run([*words, *volumes, IMAGE, *command])
        await container.beats()
        return container

    async def state(self, node: Node) -> dict[str, Any]:
        """What podman says of it; empty if it knows none."""
        done = await node.run(["podman", "container", "inspect", self.name], check=False)
        if done.returncode != 0:
            return {}
        (found,) = done.json()
        return {**found["State"], "status": found["State"]["Status"], "id": found["Id"]}

    async def logs(self, node: Node) -> list[list[str]]:
        """podman's, and the file in its root."""
        return [await lines(node, "logs", self.name), await lines(node, "exec", self.name, "cat", "/var/app/log")]

    async def left_at(self, node: Node) -> list[str]:
        found = await super().left_at(node)
        found += await lines(node, "ps", "--all", "--quiet")
        found += (await node.run(["sh", "-c", f"ls /run/{self.runtime} 2>/dev/null || true"])).stdout.split()
        processes = (await node.run(["ps", "-eo", "args"])).stdout.splitlines()
        return found + [line for line in processes if STANDS_IN in line or "conmon" in line]

    async def change(self, node: Node) -> None:
        """In its shared memory, and a file of the image that it deletes."""
        self._id = (await self.state(node))["id"]
        await lines(node, "exec", self.name, "sh", "-c", "echo shared >/dev/shm/here; rm /etc/fstab")

    async def look_inside(self, node: Node, pid: int, beats: int) -> None:
        assert (await self.state(node))["id"] == self._id
        there = "cat /dev/shm/here; ls /etc/fstab 2>&1; cat /proc/1/cmdline"
        shared, gone, program = await lines(node, "exec", self.name, "sh", "-c", there)
        assert shared == "shared"
        assert "No such file" in gone
        assert "in_container.py" in program
        assert any("in_container.py" in line for line in await lines(node, "top", self.name, "args"))

    async def end(self, node: Node) -> None:
        """It ends by itself, and podman hears how."""
        await lines(node, "stop", self.name)
        state = await self.state(node)
        assert (state["status"], state["ExitCode"]) == ("exited", 0)
        await lines(node, "rm", self.name)
        await self.is_gone_from(node)


def _fill(volume: Path, app: Path) -> None:
    for each in (volume, app):
        each.mkdir(exist_ok=True)
    for name in ("in_container.py", "tcp_echo.py"):
        shutil.copy(VICTIMS / name, app)
