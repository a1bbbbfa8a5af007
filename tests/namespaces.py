"""The namespaces of the nodes of `nodes.py`, and the links that join them, without a trace on the host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

START_SECONDS: Final = 30.0
MAIN_LINK: Final = "node0"  #: to the other node
LAN_LINK: Final = "lan0"  #: to the bridge at the client
NAMESPACES: Final = ("--pid", "--mount", "--net", "--uts", "--ipc")
ADDRESSES: Final = {"a": "10.77.1.1", "b": "10.77.1.2"}
LAN_ADDRESSES: Final = {"client": "10.77.2.1", "a": "10.77.2.11", "b": "10.77.2.12"}
_HOSTS: Final = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **ADDRESSES}.items())
#: A fresh /run, because criu keeps there what it found out about the kernel, and daemons their sockets; and, as on any
#: node, pseudo terminals of its own.
_INIT: Final = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts /dev/pts
mount --bind /dev/pts/ptmx /dev/ptmx
printf %s "$0" >/proc/sys/kernel/hostname
printf %s "$1" >/run/hosts
mount --bind /run/hosts /etc/hosts
ip link set lo up
echo ready
exec tini -- cat >/dev/null
"""


class NoNamespaces(Exception):
    """They could not be made, or not be joined."""


class Joined(Protocol):
    """A node, as its links see it."""

    address: str  #: on the link between the nodes; "" if it has none
    lan_address: str  #: on the client's network

    @property
    def pid(self) -> int: ...


async def hold(name: str) -> asyncio.subprocess.Process:
    """The parent of an init in namespaces of its own, which end when its standard input does."""
    words = ("unshare", "--fork", "--mount-proc", "--propagation", "private", *NAMESPACES)
    holder = await asyncio.create_subprocess_exec(
        *(*words, "bash", "-c", _INIT, name, _HOSTS),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # an interrupt from the keyboard is ours to answer
    )
    assert holder.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            if await holder.stdout.readline() != b"ready\n":
                raise NoNamespaces(f"none for node {name}; see standard error")
    except BaseException:
        await let_go(holder)
        raise
    return holder


async def let_go(holder: asyncio.subprocess.Process) -> None:
    """Everything in there ends."""
    assert holder.stdin is not None
    holder.stdin.close()
    await holder.wait()


async def join(a: Joined, b: Joined, client: Joined) -> None:
    """Make the links. They are made inside the client's namespace, so that the host never sees them."""
    outside = ["nsenter", "--target", str(client.pid), "--net", "--"]  # keeps our PIDs, which name the namespaces
    commands = [
        f"link add {MAIN_LINK} netns {a.pid} type veth peer name {MAIN_LINK} netns {b.pid}",
        f"link add {LAN_LINK} type bridge",
        f"link add lan-a type veth peer name {LAN_LINK} netns {a.pid}",
        f"link add lan-b type veth peer name {LAN_LINK} netns {b.pid}",
        f"link set lan-a master {LAN_LINK} up",
        f"link set lan-b master {LAN_LINK} up",
    ]
    await _batch(outside, commands)
    for node in (a, b, client):
        links = [(LAN_LINK, node.lan_address), *([(MAIN_LINK, node.address)] if node.address else [])]
        lines = [
            line for link, address in links for line in (f"address add {address}/24 dev {link}", f"link set {link} up")
        ]
        await _batch(["nsenter", "--target", str(node.pid), "--net", "--"], lines)


async def _batch(prefix: Sequence[str], commands: Sequence[str]) -> None:
    ip = await asyncio.create_subprocess_exec(
        *(*prefix, "ip", "-batch", "-"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await ip.communicate("\n".join(commands).encode())
    if ip.returncode != 0:
        raise NoNamespaces(f"ip: {errors.decode()}")
