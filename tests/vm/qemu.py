"""One QEMU process: its command line, its death with ours, and QMP for the link."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from dataclasses import dataclass
from typing import Any, Final

from phaul_criu.child import Child, spawn
from tests.vm.image import QEMU, Image

#: KVM runs the host's own processors. What TCG emulates leaves out five-level paging, which only costs time, and is a
#: single one: while one processor patches the kernel's code (a static key, at every breakpoint that criu sets), another
#: may run the half of it and panic.
_PROCESSORS: Final = {"kvm": ("host", 2), "tcg": ("max,la57=off", 1)}
ACCELERATORS: Final = tuple(_PROCESSORS)
_KERNEL_WORDS: Final = (
    "root=/dev/nvme0n1 rootfstype=ext4 rw init=/sbin/lab-init console=ttyS0 quiet panic=-1 mitigations=off"
)
#: SIGKILL when the parent dies; the shell looks whether it died before that was asked for
_DIE_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a guest is made of."""

    name: str
    address: str  #: on the network of the guests
    mac: str
    memory_mib: int
    mtu: int


class QmpFailed(Exception):
    """QEMU refused a command."""


class Qemu:
    """A running QEMU. `connection` leads to the agent's port."""

    def __init__(self, child: Child, console_fd: int, connection: socket.socket, qmp: Qmp) -> None:
        self.child = child
        self.connection = connection
        self.qmp = qmp
        self._console_fd = console_fd

    @property
    def console(self) -> str:
        """What the guest wrote to its serial console so far."""
        size = os.fstat(self._console_fd).st_size
        return os.pread(self._console_fd, size, 0).decode(errors="replace")

    async def aclose(self) -> None:
        """Kill it with -9 and reap it."""
        await self.qmp.aclose()
        await self.child.aclose()


async def start_qemu(machine: Machine, image: Image, tree_fd: int, lan_fd: int, peers: str, accelerator: str) -> Qemu:
    """Start a guest, every channel of it a socket that we already hold. `lan_fd` is its end of the network.

    The process gets SIGKILL from the kernel when we die, and leaves no file behind: its disks
    are written to a temporary file without a name, and its console to memory.
    """
    agent, qemus_agent = socket.socketpair()
    monitor, qemus_monitor = socket.socketpair()
    console_fd = os.memfd_create("console", os.MFD_CLOEXEC)
    with qemus_agent, qemus_monitor:
        fds = {"agent": qemus_agent.fileno(), "qmp": qemus_monitor.fileno(), "lan": lan_fd, "tree": tree_fd}
        fds["console"] = console_fd
        command = _command(machine, image, fds, peers, accelerator)
        try:
            child = await spawn([*_DIE_WITH_US, str(os.getpid()), *command], pass_fds=list(fds.values()))
        except BaseException:
            agent.close()
            monitor.close()
            os.close(console_fd)
            raise
    return Qemu(child, console_fd, agent, Qmp(*await asyncio.open_unix_connection(sock=monitor)))


# The root is the only NVMe disk: the kernel numbers several in the order in which it happens to find them.
def _command(machine: Machine, image: Image, fds: dict[str, int], peers: str, accelerator: str) -> list[str]:
    told = f"lab_name={machine.name} lab_address={machine.address} lab_peers={peers} lab_mtu={machine.mtu}"
    model, count = _PROCESSORS[accelerator]
    words = f"""
        {QEMU} -nodefaults -no-user-config -display none -no-reboot -name {machine.name}
        -machine q35 -accel {accelerator} -cpu {model} -smp {count} -m {machine.memory_mib}
        -chardev file,id=console,path=/proc/self/fd/{fds["console"]} -serial chardev:console
        -chardev socket,id=qmp,fd={fds["qmp"]} -mon chardev=qmp,mode=control
        -chardev socket,id=agent,fd={fds["agent"]} -device virtio-serial-pci -device virtserialport,chardev=agent
        -netdev socket,id=lan,fd={fds["lan"]} -device virtio-net-pci,id=nic,netdev=lan,mac={machine.mac},romfile=
        -drive if=none,id=root,file={image.disk},format=raw,snapshot=on -device nvme,serial=root,drive=root
        -drive if=none,id=tree,file=/proc/self/fd/{fds["tree"]},format=raw,snapshot=on
        -device virtio-blk-pci,drive=tree
        -kernel {image.kernel}
    """
    return [*words.split(), "-append", f"{_KERNEL_WORDS} {told}"]


class Qmp:
    """QEMU's own control socket: one command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()
        self._greeted = False

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Raises QmpFailed, EOFError when QEMU has died."""
        async with self._lock:
            if not self._greeted:
                await self._reader.readline()
                await self._exchange("qmp_capabilities", {})
                self._greeted = True
            return await self._exchange(command, arguments)

    async def aclose(self) -> None:
        """Close the socket."""
        self._writer.close()

    async def _exchange(self, command: str, arguments: dict[str, Any]) -> Any:
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := await self._reader.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise QmpFailed(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise EOFError("QEMU has died")
