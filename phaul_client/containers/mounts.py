"""Which mounts of a container criu must be told of, and what they are at the destination (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from phaul.v1 import types_pb2
from phaul_client.errors import PhaulError

_CGROUPS: Final = ("cgroup", "cgroup2")
_OWN: Final = frozenset({"proc", "sysfs", "tmpfs", "devpts", "mqueue", "overlay", "ramfs"})  #: criu makes them anew
_NULL: Final = "/dev/null"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A line of /proc/PID/mountinfo."""

    id: int
    device: str
    root: str
    point: str
    kind: str
    options: str  #: of the file system

    @property
    def hierarchy(self) -> str:
        """Which cgroups these are: cgroup2, or the controllers of version 1."""
        if self.kind == "cgroup2":
            return self.kind
        return ",".join(sorted(set(self.options.split(",")) - {"rw", "ro", "clone_children", "xattr", "noprefix"}))


def parse_mounts(mountinfo: str) -> tuple[Mount, ...]:
    """The text of /proc/PID/mountinfo."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, rest = before.split(), after.split()
        if len(words) >= 6 and rest:
            found.append(
                Mount(
                    id=int(words[0]),
                    device=words[2],
                    root=_plain(words[3]),
                    point=_plain(words[4]),
                    kind=rest[0],
                    options=rest[-1],
                )
            )
    return tuple(found)


def outside(config: Mapping[str, Any], mounts: Iterable[Mount]) -> list[types_pb2.ContainerMount]:
    """The mounts that come from outside. Raises `PhaulError` UNSUPPORTED for one that nobody could make there."""
    mounts = tuple(mounts)
    wanted = {each["destination"].rstrip("/"): each for each in config.get("mounts", ()) if _is_bind(each)}
    declared = {each["destination"].rstrip("/") for each in config.get("mounts", ())}
    inside = {(each.device, "/") for each in mounts if each.root == "/" and each.kind in _OWN}
    found = []
    for each in mounts:
        if each.point == "/":
            continue
        if each.kind in _CGROUPS:
            kind, source = types_pb2.CONTAINER_MOUNT_KIND_CGROUP, each.hierarchy
        elif each.point in wanted:
            kind, source = types_pb2.CONTAINER_MOUNT_KIND_VOLUME, wanted[each.point]["source"]
        elif (each.device, "/") in inside and not _is_below_a_volume(each, wanted, declared):
            continue
        elif each.kind == "devtmpfs":  # a masked file, or a device of the node
            source = f"{_NULL[:4]}{each.root}"
            kind = types_pb2.CONTAINER_MOUNT_KIND_VOLUME
        else:
            raise PhaulError(
                f"its mount {each.point} ({each.kind}) is not in its config.json: it cannot be made on another node",
                reason="UNSUPPORTED",
                remedy="unmount it, or put it into config.json",
            )
        found.append(types_pb2.ContainerMount(name=f"phaul{each.id}", mountpoint=each.point, kind=kind, source=source))
    return found


def dump_externals(container: types_pb2.Container) -> Iterator[str]:
    """What criu's dump is told of: mounts, and the file that its output goes to."""
    for each in container.mounts:
        yield f"mnt[{each.mountpoint}]:{each.name}"
    if container.log:
        yield container.log
    if container.podman.network:
        yield container.podman.network


def restore_externals(container: types_pb2.Container, cgroup_paths: Mapping[str, str]) -> Iterator[str]:
    """What criu's restore is told: mounts, and the outer ends of links. Raises `PhaulError` for cgroups it lacks."""
    for each in container.mounts:
        if each.kind == types_pb2.CONTAINER_MOUNT_KIND_CGROUP:
            if each.source not in cgroup_paths:
                raise no_hierarchy(each.source)
            yield f"mnt[{each.name}]:{cgroup_paths[each.source]}"
        else:
            yield f"mnt[{each.name}]:{each.source}"
    for link in () if container.podman.network else container.links:
        yield f"veth[{link.name}]:{link.outer}"


def no_hierarchy(hierarchy: str) -> PhaulError:
    """The two nodes have different cgroups."""
    return PhaulError(
        f"the container sees cgroups ({hierarchy}) that this node has not mounted",
        reason="PREFLIGHT_FAILED",
        remedy="nodes with the same version of cgroups",
    )


def _is_bind(mount: Mapping[str, Any]) -> bool:
    return mount.get("type") == "bind" or bool({"bind", "rbind"} & set(mount.get("options") or ()))


def _is_below_a_volume(mount: Mount, volumes: Iterable[str], declared: Iterable[str]) -> bool:
    """It came along with a volume (rbind), and is the node's."""
    return mount.point not in declared and any(mount.point.startswith(f"{volume}/") for volume in volumes)


def _plain(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
