"""Runs the programs that know a container: runtimes, podman, ip, nft. None of them holds up the event loop."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from phaul_client.errors import PhaulError
from phaul_criu import child

COMMAND_SECONDS: Final = 10.0
_SHOWN: Final = 100  #: characters of a command line in a message
_SAID: Final = 500


async def command(
    argv: Iterable[str],
    timeout_seconds: float = COMMAND_SECONDS,
    *,
    env: Mapping[str, str] | None = None,
    reason: str = "",
) -> str:
    """Its standard output, if it ends with 0 in time; else it is killed.

    Raises `PhaulError`: `reason` for another status, UNSUPPORTED for a program that is not here or does not end.
    """
    words = list(argv)
    shown = " ".join(words).partition("\n")[0][:_SHOWN]
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        async with asyncio.timeout(timeout_seconds), await child.spawn(words, stdout=output, env=env) as running:
            status = await running.wait()
        text = os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace")
    except (OSError, TimeoutError) as exc:
        remedy = f"apt-get install {words[0]}" if isinstance(exc, FileNotFoundError) else ""
        why = "no end in time" if isinstance(exc, TimeoutError) else exc.strerror or str(exc)
        raise PhaulError(f"{shown}: {why}", reason="UNSUPPORTED", remedy=remedy) from exc
    finally:
        os.close(output)
    if status != 0:
        raise PhaulError(f"{shown}: {cause(running.stderr_tail or text) or f'status {status}'}", reason=reason)
    return text


def cause(said: str) -> str:
    """The line that tells why, of what a program said (pure): the last that speaks of an error, or the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][-_SAID:]


async def ip(arguments: Iterable[str], prefix: Iterable[str] = ()) -> list[dict[str, Any]]:
    """`ip -json …`. Raises `PhaulError`."""
    output = await command([*prefix, "ip", "-json", *arguments])
    found: list[dict[str, Any]] = json.loads(output or "[]")
    return [each for each in found if "ifname" in each]
