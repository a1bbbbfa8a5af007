"""The same move with nothing but the criu command, as its documentation tells: what phaul is measured against."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul_criu.install import find_binary
from tests.nodes import Node, until

PORT: Final = 7799
IMAGES: Final = Path("/run/by-hand")  #: in each node's own memory, as phaul's

#: As phaul's: on a busy machine it is most of the pause.
HURRIED: Final = ("chrt", "--rr", "1")

_WARM_FACTOR: Final = 2.5  #: the source, the images and the restored tree, less what is there already


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedByHand:
    """How long the steps took."""

    dump_seconds: float
    copy_seconds: float
    restore_seconds: float


async def start_tree(node: Node, argv: Sequence[str | Path], log: Path) -> int:
    """Start a program in a PID namespace of its own, with a reaping init, a session and no terminal; its PID there."""
    tree = shlex.join(["setsid", "tini", "--", *map(str, argv)])
    inside = f"exec {tree} </dev/null >{shlex.quote(str(log))} 2>&1"
    # In the background: its parent then is the node's init, which reaps it. criu wants a log file of the size that it
    # had, so nobody else writes to it.
    script = f"unshare --pid --fork sh -c {shlex.quote(inside)} </dev/null >/dev/null 2>&1 & echo $!"
    unshare = int((await node.run(["sh", "-c", script])).stdout)
    children = node.root / f"proc/{unshare}/task/{unshare}/children"
    return int((await until(lambda: children.read_text().split()))[0])


async def move_by_hand(source: Node, destination: Node, pid: int, *options: str) -> MovedByHand:
    """Move a tree: page server at the destination, dump to it, copy the images, restore. Raises CommandFailed.

    `options` are given to the dump and the restore. The images are copied as quickly as can be, by this process from
    one tmpfs to the other; a person would have to start an scp, so this flatters the move by hand.
    """
    criu = find_binary()
    for node in (source, destination):
        await node.run(["mkdir", IMAGES])
    server = await destination.start(
        [*HURRIED, criu, "page-server", "--images-dir", IMAGES, "--address", destination.address, "--port", str(PORT)]
    )
    await _until_listening(destination)
    images = ["--images-dir", str(IMAGES)]
    where = ["--page-server", "--address", destination.address, "--port", str(PORT)]
    started = time.monotonic()
    await source.run([*HURRIED, criu, "dump", "--tree", str(pid), *images, *where, *options])
    dumped = time.monotonic()
    await server.wait()
    shutil.copytree(_inside(source, IMAGES), _inside(destination, IMAGES), dirs_exist_ok=True)
    copied = time.monotonic()
    await destination.run([*HURRIED, criu, "restore", "--restore-detached", *images, *options])
    restored = time.monotonic()
    for node in (source, destination):
        await node.run(["rm", "-r", IMAGES])
    return MovedByHand(dump_seconds=dumped - started, copy_seconds=copied - dumped, restore_seconds=restored - copied)


async def warm_memory(node: Node, size_bytes: int) -> None:
    """Touch as much free memory as a move of so many bytes will need.

    Virtual machines give free pages back to their host, and the first touch after that takes several times as long; a
    comparison is fair only if every variant finds warm memory.
    """
    size_bytes = min(int(size_bytes * _WARM_FACTOR), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    await node.run(["sh", "-c", f"head -c {size_bytes} /dev/zero >/run/warm; rm /run/warm"])


def _inside(node: Node, path: Path) -> Path:
    return node.root / path.relative_to("/")


async def _until_listening(node: Node) -> None:
    """Without connecting: the page server takes the first connection for the dump's."""
    sockets = Path(f"/proc/{node.pid}/net/tcp")
    await until(lambda: f":{PORT:04X} 00000000:0000 0A" in sockets.read_text())
