"""A container as it is on this node: its record, its configuration, its mounts and its links."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from phaul.v1 import types_pb2
from phaul_client.containers.mounts import outside, parse_mounts
from phaul_client.containers.podman import NETWORK_KEY, PodmanFacts, inspect_podman, is_podmans
from phaul_client.containers.programs import ip
from phaul_client.containers.runtimes import RUNTIMES, ContainerName, Init, Record, Runtime, runtime_of
from phaul_client.errors import PhaulError, WorkloadNotFound
from phaul_client.tree import identity, shares_namespace

#: Network devices that criu makes anew by itself.
_MADE_BY_CRIU: Final = frozenset({"loopback"})


class LogFile(NamedTuple):
    """The file that a container's output goes to, in the directory where phaul keeps logs."""

    path: Path
    key: str  #: what criu calls it


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A container that runs here."""

    name: ContainerName
    runtime: Runtime
    init: Init
    config: dict[str, Any]
    log: LogFile | None = None
    podman: PodmanFacts | None = None  #: if podman called the runtime

    @property
    def record_name(self) -> ContainerName:
        """What the runtime calls it."""
        return self.name if self.podman is None else ContainerName(self.runtime.name, self.podman.id)

    @property
    def rootfs(self) -> Path:
        return Path(self.init.bundle) / self.init.rootfs


async def find_container(name: ContainerName) -> Found:
    """Raises `PhaulError`: UNSUPPORTED, WORKLOAD_NOT_FOUND, or WRONG_PHASE for one that does not run."""
    if name.runtime == "podman":
        return await _find_podman(name)
    found = _find(name, name, runtime_of(name))
    return await _find_podman(ContainerName("podman", name.id)) if is_podmans(found.config) else found


async def _find_podman(name: ContainerName) -> Found:
    facts = await inspect_podman(name.id)
    if facts.why_not is not None:
        why, remedy = facts.why_not
        raise PhaulError(f"podman:{facts.name} {why}", reason="UNSUPPORTED", remedy=remedy)
    record = ContainerName(facts.runtime, facts.id)
    found = _find(ContainerName(name.runtime, facts.name), record, RUNTIMES[facts.runtime])
    return dataclasses.replace(found, podman=facts)


def _find(name: ContainerName, record: ContainerName, runtime: Runtime) -> Found:
    try:
        init = read_init(runtime, record)
    except FileNotFoundError:
        raise WorkloadNotFound(str(name)) from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise PhaulError(f"{name}: its record cannot be read: {exc}", reason="UNSUPPORTED") from exc
    if not runs(init):
        raise PhaulError(f"{name} does not run here", reason="WRONG_PHASE", remedy=f"{runtime.name} list")
    try:
        config = json.loads((Path(init.bundle) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise PhaulError(f"{name}: no config.json in its bundle: {exc}", reason="UNSUPPORTED") from exc
    return Found(name=name, runtime=runtime, init=init, config=config)


def with_log(found: Found, directory: Path) -> Found:
    """The same, knowing which file of the directory its init writes to."""
    descriptors = Path(f"/proc/{found.init.pid}/fd")
    for number in ("1", "2"):
        with contextlib.suppress(OSError):
            path = (descriptors / number).readlink()
            if path.parent == directory and stat.S_ISREG((descriptors / number).stat().st_mode):
                info = (descriptors.parent / "fdinfo" / number).read_text()
                mount = re.search(r"^mnt_id:\s*(\d+)", info, re.MULTILINE)
                assert mount is not None
                key = f"file[{int(mount[1]):x}:{(descriptors / number).stat().st_ino:x}]"
                return dataclasses.replace(found, log=LogFile(path, key))
    return found


async def container_of(pid: int) -> Found | None:
    """The container whose init this is, if it is one that moves by name."""
    name = _record_of(pid)
    with contextlib.suppress(PhaulError):
        return await find_container(name) if name is not None else None
    return None


def _record_of(pid: int) -> ContainerName | None:
    """What a runtime calls the container whose init this is."""
    try:
        if shares_namespace(pid, "mnt"):
            return None
    except OSError:
        return None
    for runtime in RUNTIMES.values():
        for record in Path(runtime.state_root).glob(f"*/{runtime.record}") if runtime.state_root else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                name = ContainerName(runtime.name, record.parent.name)
                if read_init(runtime, name).pid == pid:
                    return name
    return None


def record_path(runtime: Runtime, container_id: str) -> Path:
    """Where the runtime keeps what it knows of a container."""
    return Path(runtime.state_root) / container_id / runtime.record


def read_record(runtime: Runtime, container_id: str) -> Record:
    """Raises `OSError`, `ValueError`."""
    record: Record = json.loads(record_path(runtime, container_id).read_text(encoding="utf-8"))
    return record


def read_init(runtime: Runtime, name: ContainerName) -> Init:
    """Raises `OSError`, `ValueError`, `KeyError`."""
    assert runtime.init is not None
    return runtime.init(read_record(runtime, name.id))


def runs(init: Init) -> bool:
    """Whether the process that a record names is the one that it was, and more than a zombie."""
    try:
        state = Path(f"/proc/{init.pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return bool(identity(init.pid)["start_ticks"] == init.start_ticks) and state != b"Z"
    except OSError:
        return False


async def describe(found: Found) -> types_pb2.Container:
    """What the destination must know. Raises `PhaulError` UNSUPPORTED for what cannot move."""
    _check_config(found)
    try:
        text = await asyncio.to_thread(Path(f"/proc/{found.init.pid}/mountinfo").read_text)
    except OSError as exc:
        raise PhaulError(f"{found.name} has ended", reason="PROCESS_ENDED") from exc
    mounts = outside(found.config, parse_mounts(text))
    return types_pb2.Container(
        runtime=found.record_name.runtime,
        id=found.record_name.id,
        config=json.dumps(found.config).encode(),
        cgroup_manager=found.init.cgroup_manager,
        mounts=mounts if found.podman is None else _podmans_own(found.podman, mounts),
        links=await _links(found),
        log=found.log.key if found.log is not None else "",
        podman=_podman(found, found.podman) if found.podman is not None else None,
    )


def _podmans_own(facts: PodmanFacts, mounts: Iterable[types_pb2.ContainerMount]) -> Iterable[types_pb2.ContainerMount]:
    """Without a source what podman makes for each container, anew at the destination; criu takes the shared memory."""
    for each in mounts:
        if each.source == f"{facts.static_dir}/shm":
            continue
        if each.source.startswith((f"{facts.static_dir}/", f"{facts.run_dir}/")):
            each.source = ""
        yield each


def _podman(found: Found, facts: PodmanFacts) -> types_pb2.Podman:
    process = Path(f"/proc/{found.init.pid}")
    network = f"net[{(process / 'ns/net').stat().st_ino}]:{NETWORK_KEY}" if facts.has_network else ""
    return types_pb2.Podman(
        name=facts.name,
        image=facts.image,
        networks=facts.networks,
        static_dir=facts.static_dir,
        pipes=pipes_of(found.init.pid),
        network=network,
    )


def pipes_of(pid: int) -> list[str]:
    """The pipes at the first three descriptors of a process; empty for what is none."""
    found = []
    for number in range(3):
        link = ""
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/{pid}/fd/{number}")
        found.append(link if link.startswith("pipe:") else "")
    return found


def is_to_its_monitor(found: Found, pipe: str) -> bool:
    """Whether the other end of a pipe is held by podman's monitor; the destination's has one, too."""
    return found.podman is not None and pipe in pipes_of(found.init.pid)


def _check_config(found: Found) -> None:
    namespaces = {each["type"]: each.get("path", "") for each in found.config.get("linux", {}).get("namespaces", ())}
    for kind in ("pid", "mount"):
        if kind not in namespaces:
            raise _unsupported(found, f"has no {kind} namespace of its own", f"a {kind} namespace in config.json")
    if "user" in namespaces:
        raise _unsupported(found, "has a user namespace of its own", "a container without")
    for kind, path in namespaces.items():
        if path and not (kind == "network" and found.podman is not None and found.podman.has_network):
            what = f"lives in a {kind} namespace that something else made ({path})"
            raise _unsupported(found, what, f"let {found.name.runtime} make it: no path in config.json")
    if found.config.get("process", {}).get("terminal"):
        raise _unsupported(found, "has a terminal, whose other end stays behind", '"terminal": false in config.json')


async def _links(found: Found) -> list[types_pb2.ContainerLink]:
    if shares_namespace(found.init.pid, "net"):
        return []
    inside = await ip(["-details", "address", "show"], ("nsenter", "--net", "--target", str(found.init.pid), "--"))
    here = {each["ifindex"]: each for each in await ip(["-details", "link", "show"])}
    links = []
    for each in inside:
        if each.get("link_type") in _MADE_BY_CRIU:
            continue
        kind = each.get("linkinfo", {}).get("info_kind", "")
        peer = here.get(each.get("link_index", 0))
        if kind != "veth" or peer is None or peer.get("linkinfo", {}).get("info_kind") != "veth":
            if each["ifname"] in ("tunl0", "sit0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6tnl0"):
                continue  # the kernel makes them in every namespace
            what = (
                f"its interface {each['ifname']} ({kind or each.get('link_type', 'unknown')}) is no veth of this node"
            )
            raise _unsupported(found, what, "connect it by a veth and a bridge")
        links.append(
            types_pb2.ContainerLink(
                name=each["ifname"],
                outer=peer["ifname"],
                bridge=peer.get("master", ""),
                mac=each.get("address", ""),
                addresses=[
                    f"{info['local']}/{info['prefixlen']}"
                    for info in each.get("addr_info", ())
                    if info.get("scope") == "global"
                ],
            )
        )
    return links


def _unsupported(found: Found, what: str, remedy: str) -> PhaulError:
    return PhaulError(f"{found.name} {what}", reason="UNSUPPORTED", remedy=remedy)
