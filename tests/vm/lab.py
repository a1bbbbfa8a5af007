"""Two guests with kernels, clocks and boot ids of their own, joined by a cable.

    async with open_lab() as lab:
        await lab.a.run(["uname", "-r"])
        await lab.link(False)

The guests reach nothing but each other. The cable is a pair of datagram sockets of which this process holds both
ends as well: a guest can die and be booted again without the other one noticing more than lost packets. Everything
ends with the block, and when this process is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Final

from tests.vm.channel import GuestDied
from tests.vm.guest import Guest
from tests.vm.image import Image, ensure_image, pack_tree
from tests.vm.qemu import ACCELERATORS, Machine

MEMORY_MIB: Final = 2048
MTU: Final = 9000  # an emulated processor pays by the packet
ACCELERATOR_VARIABLE: Final = "PHAUL_LAB_ACCELERATOR"
#: a KVM guest is up in two; where KVM only pretends to work, it ends at once or spins
_KVM_BOOT_SECONDS: Final = 15.0
_PACKET_BYTES: Final = 1 << 17


class Lab:
    """The two guests."""

    def __init__(self, a: Guest, b: Guest, accelerator: str) -> None:
        self.a = a
        self.b = b
        self.accelerator = accelerator

    @property
    def guests(self) -> tuple[Guest, Guest]:
        """Both."""
        return (self.a, self.b)

    async def boot(self) -> None:
        """Boot those that do not run, at the same time. Raises GuestDied, TimeoutError."""
        try:
            async with asyncio.TaskGroup() as boots:
                for guest in self.guests:
                    if not guest.running:
                        boots.create_task(guest.boot())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def restore(self) -> None:
        """Make it as in the beginning: both run, the cable is in, nothing is slowed. Files and processes stay."""
        await self.boot()
        await self.link(True)
        await self.bandwidth(None)

    async def link(self, up: bool) -> None:
        """Plug the cable in or out, at both ends."""
        for guest in self.guests:
            await guest.link(up)

    async def bandwidth(self, bits_per_second: int | None) -> None:
        """Limit the cable in both directions; None undoes it."""
        async with asyncio.TaskGroup() as limits:
            for guest in self.guests:
                limits.create_task(guest.bandwidth(bits_per_second))

    async def aclose(self) -> None:
        """Kill both."""
        for guest in self.guests:
            await guest.kill()


@contextlib.asynccontextmanager
async def open_lab(*, memory_mib: int = MEMORY_MIB, mtu: int = MTU) -> AsyncIterator[Lab]:
    """Two booted guests that run this working tree; an image is built if there is none. Raises LabMissing, GuestDied.

    KVM is used where it works, TCG otherwise; PHAUL_LAB_ACCELERATOR=tcg or =kvm decides instead.
    """
    image = ensure_image()
    with contextlib.ExitStack() as stack:
        tree_fd = pack_tree(image)
        stack.callback(os.close, tree_fd)
        lan = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in lan:
            stack.enter_context(end)
        machines = [
            Machine(
                name=name,
                address=f"10.77.3.{number}",
                mac=f"52:54:00:77:03:{number:02x}",
                memory_mib=memory_mib,
                mtu=mtu,
            )
            for number, name in enumerate(("a", "b"), 1)
        ]
        accelerator = await choose_accelerator(machines[0], image, tree_fd)
        peers = ",".join(f"{machine.address}={machine.name}" for machine in machines)
        guests = [
            Guest(machine, image, tree_fd, end.fileno(), peers, accelerator)
            for machine, end in zip(machines, lan, strict=True)
        ]
        lab = Lab(guests[0], guests[1], accelerator)
        try:
            with _packets_to_the_dead_are_lost(lab, lan):
                await lab.boot()
                yield lab
        finally:
            await lab.aclose()


async def choose_accelerator(machine: Machine, image: Image, tree_fd: int) -> str:
    """KVM if a guest really boots with it: that /dev/kvm exists and opens says little. Raises ValueError."""
    if wanted := os.environ.get(ACCELERATOR_VARIABLE):
        if wanted not in ACCELERATORS:
            raise ValueError(f"{ACCELERATOR_VARIABLE}={wanted} is neither kvm nor tcg")
        return wanted
    kvm, tcg = ACCELERATORS
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return tcg
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, its:
        guest = Guest(machine, image, tree_fd, its.fileno(), "", kvm)
        try:
            await guest.boot(_KVM_BOOT_SECONDS)
        except (GuestDied, TimeoutError) as exc:
            reason = (str(exc) or f"no boot in {_KVM_BOOT_SECONDS:g} s").splitlines()[0]
            sys.stderr.write(f"phaul lab: KVM does not work here, so TCG is used: {reason}\n")
            return tcg
        finally:
            await guest.kill()
    return kvm


@contextlib.contextmanager
def _packets_to_the_dead_are_lost(lab: Lab, lan: tuple[socket.socket, socket.socket]) -> Iterator[None]:
    """Read what is sent to a guest that does not run, as a switch would; else the sender's queue would fill."""
    loop = asyncio.get_running_loop()

    async def drain() -> None:
        while True:
            for guest, end in zip(lab.guests, lan, strict=True):
                with contextlib.suppress(BlockingIOError):
                    while not guest.running:
                        end.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
            await asyncio.sleep(0.05)

    task = loop.create_task(drain())
    try:
        yield
    finally:
        task.cancel()
