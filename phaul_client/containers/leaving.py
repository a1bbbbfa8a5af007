"""What is left of a container at its source once it runs elsewhere: the runtime's record, and a bundle of phaul's own.

The invariant: only the record that the container had when it left is deleted, and only once nothing of it runs; a
bundle that phaul did not make is not touched.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phaul_client.containers.inspect import Found, read_init, runs
from phaul_client.containers.podman import podman
from phaul_client.containers.programs import command
from phaul_client.containers.runtimes import RUNTIMES, ContainerName
from phaul_client.errors import PhaulError

logger = logging.getLogger(__name__)

ATTEMPTS: Final = 5
RETRY_SECONDS: Final = 0.2
PROGRAM_SECONDS: Final = 30.0


def leaving(found: Found, links: tuple[str, ...]) -> dict[str, Any]:
    """For the journal."""
    return {
        "runtime": found.record_name.runtime,
        "id": found.record_name.id,
        "podman": found.podman is not None,
        "created": found.init.created,
        "bundle": found.init.bundle,
        "manager": found.init.cgroup_manager,
        "links": list(links),
    }


async def clear(left: Mapping[str, Any], ours: Path | None) -> str:
    """Delete the record of a container that has left; why that failed, for people, or "". `ours`: where bundles are."""
    runtime, name = RUNTIMES[left["runtime"]], ContainerName(left["runtime"], left["id"])
    why = ""
    for _ in range(ATTEMPTS):
        try:
            init = read_init(runtime, name)
        except (OSError, ValueError, KeyError):
            why = await _forget_podmans(name.id) if left.get("podman") else ""
            if not why:
                break  # it is gone
            await asyncio.sleep(RETRY_SECONDS)
            continue
        if init.created != left["created"]:
            return ""  # another one has its name
        why = f"its init, PID {init.pid}, has not ended"
        if not runs(init):
            try:
                if left.get("podman"):
                    why = await _forget_podmans(name.id)
                else:
                    await command([runtime.name, *runtime.manager(left["manager"]), "delete", name.id], PROGRAM_SECONDS)
                    why = ""
                if not why:
                    break
            except PhaulError as exc:
                why = exc.message
        await asyncio.sleep(RETRY_SECONDS)
    bundle = Path(left["bundle"])
    if not why and ours is not None and bundle.parent == ours:
        await asyncio.to_thread(shutil.rmtree, bundle, ignore_errors=True)
    if why:
        logger.error("container not deleted name=%s error=%s", name, why)
    return why


async def _forget_podmans(container_id: str) -> str:
    """podman's own record, which outlives the runtime's; why that failed, or ""."""
    try:
        await podman(("container", "rm", "--force", "--ignore", "--time", "0", container_id))
    except PhaulError as exc:
        return exc.message
    return ""
