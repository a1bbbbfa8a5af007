"""A container of podman's: what podman knows of it, whether it can move, an archive by which another podman takes it.

podman itself writes and reads that archive (`podman container checkpoint --export`, `restore --import`); only the
runtime that it calls meanwhile is a stand-in of phaul's (phauld/containers/podman_runtime.py), so criu's part is
left to phaul.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phaul_client.containers.programs import command
from phaul_client.errors import PhaulError, WorkloadNotFound
from phaul_criu import child

PODMAN_SECONDS: Final = 60.0
INSPECT_SECONDS: Final = 20.0
#: The key of an OCI annotation by which podman marks what is its own.
MANAGER: Final = ("io.container.manager", "libpod")
NETWORK_KEY: Final = "phaul-network"  #: criu's name for a network namespace that podman makes
_RUNTIMES: Final = ("runc", "crun")
_CONFIGURATIONS: Final = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
#: What of podman's archive is needed; its log comes apart, its pages and files by phaul.
_MEMBERS: Final = ("config.dump", "spec.dump", "network.status")
_EMPTY: Final = ("ctr.log", "checkpoint/inventory.img")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodmanFacts:
    """What podman says of a container."""

    id: str
    name: str
    runtime: str
    image: str
    static_dir: str
    run_dir: str
    log_path: Path | None
    networks: tuple[str, ...]
    has_network: bool  #: in a namespace that podman makes
    why_not: tuple[str, str] | None  #: what forbids that it moves, and the remedy


#: What cannot move: what is so, the remedy, and whether it is.
_REFUSALS: Final[tuple[tuple[str, str, Callable[[Mapping[str, Any]], bool]], ...]] = (
    (
        "has a restart policy: podman would start it anew wherever phaul ends a copy of it",
        "create it without --restart",
        lambda it: it["HostConfig"]["RestartPolicy"]["Name"] not in ("", "no"),
    ),
    (
        "is removed by podman when it ends (--rm), which podman would do with a copy that phaul ends, too",
        "create it without --rm",
        lambda it: bool(it["HostConfig"]["AutoRemove"]),
    ),
    ("is part of a pod, whose other containers stay", "run it without --pod", lambda it: bool(it["Pod"])),
    (
        "depends on another container, which stays",
        "run it without namespaces of others",
        lambda it: bool(it["Dependencies"]),
    ),
    (
        "has a standard input or a terminal, whose other end stays behind",
        "create it without --interactive and --tty",
        lambda it: bool(it["Config"]["OpenStdin"] or it["Config"]["Tty"]),
    ),
    (
        "has a health check, which a timer of this node does",
        "create it with --no-healthcheck",
        lambda it: bool((it["Config"].get("Healthcheck") or {}).get("Test")),
    ),
    (
        "has a volume that podman keeps, and the other node's podman would make an empty one",
        "use a directory (--volume /PATH:/PATH) that is on both nodes",
        lambda it: any(each["Type"] not in ("bind", "tmpfs") for each in it["Mounts"]),
    ),
    (
        "is being looked into: processes of `podman exec` run in it, which are no children of its init",
        "end them",
        lambda it: bool(it["ExecIDs"]),
    ),
    (
        "shares memory with others (--ipc)",
        "create it without --ipc",
        lambda it: it["HostConfig"]["IpcMode"] not in ("shareable", "private", "none", ""),
    ),
    (
        "writes its log where phaul cannot take it along (--log-driver)",
        "--log-driver k8s-file, journald or none",
        lambda it: it["HostConfig"]["LogConfig"]["Type"] not in ("k8s-file", "json-file", "journald", "none"),
    ),
    (
        "has a network that is neither podman's own, nor the node's, nor none",
        "--network NAME, host or none",
        lambda it: not _networks(it) and it["HostConfig"]["NetworkMode"] not in ("host", "none"),
    ),
    (
        "has a runtime other than runc and crun",
        "create it with --runtime runc or crun",
        lambda it: it["OCIRuntime"] not in _RUNTIMES,
    ),
)


def _networks(inspected: Mapping[str, Any]) -> tuple[str, ...]:
    settings = inspected["NetworkSettings"]
    return tuple(sorted(settings.get("Networks") or ())) if settings.get("SandboxKey") else ()


def facts(inspected: Mapping[str, Any]) -> PodmanFacts:
    """What `podman container inspect` says (pure). Raises `KeyError`, `TypeError` for what no podman says."""
    log = inspected["HostConfig"]["LogConfig"]
    networks = _networks(inspected)
    return PodmanFacts(
        id=inspected["Id"],
        name=inspected["Name"],
        runtime=inspected["OCIRuntime"],
        image=inspected["ImageName"],
        static_dir=inspected["StaticDir"],
        run_dir=os.path.dirname(inspected["PidFile"]),
        log_path=Path(log["Path"]) if log["Type"] in ("k8s-file", "json-file") and log["Path"] else None,
        networks=networks,
        has_network=bool(networks),
        why_not=next(((why, remedy) for why, remedy, is_so in _REFUSALS if is_so(inspected)), None),
    )


async def inspect_podman(name: str) -> PodmanFacts:
    """Ask podman. Raises `WorkloadNotFound`; `PhaulError` UNSUPPORTED, or WRONG_PHASE for one that does not run."""
    try:
        said = await podman(("container", "inspect", name), timeout_seconds=INSPECT_SECONDS, reason="UNSUPPORTED")
    except PhaulError as exc:
        if "no such container" in exc.message:
            raise WorkloadNotFound(f"podman:{name}") from exc
        raise
    try:
        (inspected,) = json.loads(said)
        status = inspected["State"]["Status"]
        found = facts(inspected)
    except (ValueError, KeyError, TypeError) as exc:
        raise PhaulError(f"podman:{name}: podman says what phaul does not know: {exc}", reason="UNSUPPORTED") from exc
    if status != "running":
        message = f"podman:{name} does not run here: it is {status}"
        raise PhaulError(message, reason="WRONG_PHASE", remedy="podman ps --all")
    return found


def is_podmans(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that podman wrote."""
    return bool((config.get("annotations") or {}).get(MANAGER[0]) == MANAGER[1])


def environment(**more: str) -> dict[str, str]:
    """podman's: where its configuration is may be said to phauld as to podman."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("CONTAINERS_")}
    return {**child.scrubbed_environment(), **ours, **more}


async def podman(
    arguments: Iterable[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = PODMAN_SECONDS,
    reason: str = "RESTORE_FAILED",
) -> str:
    """What it says, if it ends with 0. Raises `PhaulError`, as `command` does."""
    return await command(("podman", *arguments), timeout_seconds, env=env or environment(), reason=reason)


def prepare_stand_in(directory: Path, runtime: str, criu: Path, script: Path) -> dict[str, str]:
    """Make what podman takes for its runtime; the environment for podman. Raises `OSError`, `PhaulError`."""
    real = shutil.which(runtime)
    if real is None:
        raise PhaulError(f"{runtime} is not installed here", reason="UNSUPPORTED", remedy=f"apt-get install {runtime}")
    program = directory / "runtime"
    words = (sys.executable, "-I", "-S", str(script), str(directory), real)
    quoted = " ".join("'" + each.replace("'", "'\\''") + "'" for each in words)
    program.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    with contextlib.suppress(FileExistsError):
        (directory / "criu").symlink_to(criu)  # podman looks for its version
    configuration = _configuration()
    configuration.setdefault("engine", {}).setdefault("runtimes", {})[runtime] = [str(program)]
    (directory / "containers.conf").write_text("\n".join(toml(configuration)) + "\n", encoding="utf-8")
    path = f"{directory}:{environment()['PATH']}"
    return environment(PATH=path, CONTAINERS_CONF=str(directory / "containers.conf"))


STAND_IN_FILES: Final = ("runtime", "criu", "containers.conf")


def _configuration() -> dict[str, Any]:
    """podman's, as it would read it."""
    if named := os.environ.get("CONTAINERS_CONF"):
        paths = [Path(named)]
    else:
        more = sorted(Path("/etc/containers/containers.conf.d").glob("*.conf"))
        paths = [*map(Path, _CONFIGURATIONS), *more]
    merged: dict[str, Any] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            _merge(merged, tomllib.loads(path.read_text(encoding="utf-8")))
    return merged


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def toml(table: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Lines of a table and of those in it (pure)."""
    if prefix:
        yield f"[{prefix}]"
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    for key, value in table.items():
        if key not in tables:
            yield f"{json.dumps(key)} = {json.dumps(value)}"
    for key, value in tables.items():
        yield from toml(value, f"{prefix}.{json.dumps(key)}".removeprefix("."))


async def make_archive(found: PodmanFacts, criu: Path, script: Path) -> bytes:
    """What another podman needs to know of it. The container runs on. Raises `PhaulError`, `OSError`."""
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="phaul-podman-"))
    try:
        env = prepare_stand_in(directory, found.runtime, criu, script)
        exported = directory / "exported.tar"
        flags = ("--leave-running", "--ignore-rootfs", "--ignore-volumes", "--compress=none", "--tcp-established")
        await podman(("container", "checkpoint", *flags, "--export", str(exported), found.id), env=env)
        return await asyncio.to_thread(_reduced, exported)
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def _reduced(exported: Path) -> bytes:
    output = io.BytesIO()
    with tarfile.open(exported) as whole, tarfile.open(fileobj=output, mode="w") as small:
        for member in whole:
            if member.name.removeprefix("./") in _MEMBERS:
                small.addfile(member, whole.extractfile(member))
        directory = tarfile.TarInfo("checkpoint")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o700
        small.addfile(directory)
        for name in _EMPTY:
            empty = tarfile.TarInfo(name)
            empty.mode = 0o600
            small.addfile(empty)
    return output.getvalue()
