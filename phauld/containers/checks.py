"""What stands in the way of a container that would come here, before anything is made for it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable
from typing import Final, Protocol

from phaul.v1 import types_pb2
from phaul_client.containers.inspect import record_path
from phaul_client.containers.mounts import no_hierarchy
from phaul_client.containers.podman import podman
from phaul_client.containers.programs import ip
from phaul_client.containers.runtimes import ContainerName, Runtime
from phaul_client.errors import PhaulError, WorkloadExists
from phauld.containers.cgroups import hierarchies

_INTERFACE_BYTES: Final = 15


class Place(Protocol):
    """See `ContainerPlace`."""

    name: ContainerName

    async def check(self) -> None: ...


def called(container: types_pb2.Container) -> str:
    """How people call one that podman keeps."""
    return f"podman:{container.podman.name}"


async def check_container(runtime: Runtime, name: ContainerName, container: types_pb2.Container) -> None:
    """Of a runtime's own; a link whose name is taken here gets another. Raises `PhaulError`."""
    _check_programs(runtime.name)
    if record_path(runtime, name.id).parent.exists():
        raise WorkloadExists(str(name))
    await _check_mounts(name, container.mounts)
    if container.links:
        await _check_links(name, container)


async def check_podman(runtime: Runtime, name: ContainerName, container: types_pb2.Container) -> None:
    """Of podman's. Raises `PhaulError`."""
    known = container.podman
    _check_programs(runtime.name, "podman", "conmon")
    if record_path(runtime, name.id).parent.exists():
        raise WorkloadExists(called(container))
    names = (await podman(("container", "ls", "--all", "--no-trunc", "--format", "{{.ID}} {{.Names}}"))).split()
    if known.name in names or name.id in names:
        raise WorkloadExists(called(container))
    roots = (await podman(("info", "--format", "{{.Store.GraphRoot}}"))).strip()
    if not known.static_dir.startswith(f"{roots}/"):
        message = f"podman keeps its containers in {roots} here, and {called(container)} is in {known.static_dir}"
        raise PhaulError(message, reason="PREFLIGHT_FAILED", remedy="the same storage root on both nodes")
    if not await _is_there("image", known.image):
        message = f"podman has no image {known.image} here"
        remedy = f"podman save {known.image} | ssh NODE podman load"
        raise PhaulError(message, reason="PREFLIGHT_FAILED", remedy=remedy)
    for network in known.networks:
        if not await _is_there("network", network):
            message = f"podman has no network {network} here, in which {called(container)} is"
            raise PhaulError(message, reason="PREFLIGHT_FAILED", remedy=f"podman network create {network}")
    await _check_mounts(name, [each for each in container.mounts if each.source])


def _check_programs(*programs: str) -> None:
    for each in programs:
        if shutil.which(each) is None:
            remedy = f"apt-get install {each}"
            raise PhaulError(f"{each} is not installed here", reason="UNSUPPORTED", remedy=remedy)


async def _is_there(kind: str, name: str) -> bool:
    try:
        await podman((kind, "exists", "--", name))
    except PhaulError as exc:
        if exc.reason == "UNSUPPORTED":
            raise
        return False
    return True


async def _check_mounts(name: ContainerName, wanted: Iterable[types_pb2.ContainerMount]) -> None:
    here = hierarchies()
    for each in wanted:
        if each.kind == types_pb2.CONTAINER_MOUNT_KIND_CGROUP and each.source not in here:
            raise no_hierarchy(each.source)
        if each.kind == types_pb2.CONTAINER_MOUNT_KIND_VOLUME and not await asyncio.to_thread(
            os.path.exists, each.source
        ):
            message = f"the volume {each.source}, at {each.mountpoint} in {name}, is not here"
            raise PhaulError(message, reason="PREFLIGHT_FAILED", remedy="shared storage, or a copy made beforehand")


async def _check_links(name: ContainerName, container: types_pb2.Container) -> None:
    here = {each["ifname"] for each in await ip(["link", "show"])}
    for link in container.links:
        if link.bridge and link.bridge not in here:
            message = f"{name} is connected to the bridge {link.bridge}, which this node has not"
            remedy = f"ip link add {link.bridge} type bridge"
            raise PhaulError(message, reason="PREFLIGHT_FAILED", remedy=remedy)
        if link.outer in here:
            link.outer = f"p{os.urandom(6).hex()}"[:_INTERFACE_BYTES]


async def check_place(place: Place, node_name: str) -> list[types_pb2.Problem]:
    """What stands in its way here."""
    try:
        await place.check()
    except PhaulError as exc:
        return [container_problem(str(place.name), exc, node_name)]
    return []


def container_problem(subject: str, error: PhaulError, node_name: str) -> types_pb2.Problem:
    """For the preflight."""
    return types_pb2.Problem(
        code="container",
        severity=types_pb2.SEVERITY_ERROR,
        subject=subject,
        message=error.message.removeprefix(f"{subject}: ").removeprefix(f"{subject} "),
        remedy=error.remedy,
        node_name=node_name,
    )
