"""One guest of the lab, as a test sees it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.started import CommandFailed, Completed
from tests.vm.channel import Channel, GuestDied, RequestFailed, Started, decode, encode
from tests.vm.image import Image
from tests.vm.qemu import Machine, Qemu, start_qemu

BOOT_SECONDS: Final = 90.0
RUN_SECONDS: Final = 60.0
END_SECONDS: Final = 15.0
PHAULD_READY_SECONDS: Final = 60.0
PHAULD_SOCKET: Final = Path("/run/phaul/phauld.sock")
PHAULD_LOG: Final = Path("/var/log/phauld.log")
PORT: Final = 7707
LINK: Final = "eth0"


class Process:
    """A process that was started in a guest. `pid` is the guest's number for it."""

    def __init__(self, channel: Channel, started: Started, log: Path) -> None:
        self.pid = started.pid
        self.log = log  #: a path in the guest
        self._channel = channel
        self._started = started

    @property
    def returncode(self) -> int | None:
        """None while it runs, then its exit status, negative after a signal. Raises GuestDied."""
        return self._started.end.result()["returncode"] if self._started.end.done() else None

    async def send_signal(self, number: int, *, session: bool = False) -> None:
        """Signal it, or it and its whole session; nothing happens if it has ended. Raises GuestDied."""
        await self._channel.request("signal", process=self._started.number, number=number, session=session)

    async def wait(self, timeout_seconds: float = RUN_SECONDS) -> int:
        """Wait for its end; the exit status, negative after a signal. Raises TimeoutError, GuestDied."""
        async with asyncio.timeout(timeout_seconds):
            end = await asyncio.shield(self._started.end)
        returncode: int = end["returncode"]
        return returncode

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; the exit status. Raises TimeoutError, GuestDied."""
        await self.send_signal(number)
        return await self.wait(END_SECONDS)


class Guest:
    """A guest. It is booted with `boot`; after `kill` it can be booted again, with fresh disks."""

    def __init__(self, machine: Machine, image: Image, tree_fd: int, lan_fd: int, peers: str, accelerator: str) -> None:
        self.machine = machine
        self.name = machine.name
        self.address = machine.address  #: on the network of the guests
        self.kernel = ""  #: its release; empty before the first boot
        self.boot_id = ""
        self.boot_seconds = 0.0  #: how long the last boot took
        self.phauld: Process | None = None  #: the last one that was started
        self._disks = (image, tree_fd)
        self._lan_fd = lan_fd
        self._peers = peers
        self._accelerator = accelerator
        self._qemu: Qemu | None = None
        self._channel: Channel | None = None

    @property
    def running(self) -> bool:
        """Whether its QEMU runs."""
        return self._qemu is not None and self._qemu.child.returncode is None

    @property
    def pid(self) -> int:
        """The PID of its QEMU on this machine. Raises GuestDied."""
        return self._running_qemu().child.pid

    @property
    def console(self) -> str:
        """What its kernel said since the last boot."""
        return self._qemu.console if self._qemu is not None else ""

    async def boot(self, timeout_seconds: float = BOOT_SECONDS) -> None:
        """Boot it, with fresh disks. Raises GuestDied with the end of its console, TimeoutError."""
        await self.kill()
        loop = asyncio.get_running_loop()
        began = loop.time()
        image, tree_fd = self._disks
        self._qemu = await start_qemu(self.machine, image, tree_fd, self._lan_fd, self._peers, self._accelerator)
        self._channel = await Channel.open(self._qemu.connection)
        try:
            async with asyncio.timeout(timeout_seconds):
                hello = await self._channel.hello
        except GuestDied:
            await self._qemu.child.wait()
            said = f"{self._qemu.child.stderr_tail}\n{self.console[-2000:]}".strip()
            await self.kill()
            raise GuestDied(f"guest {self.name} did not boot ({self._accelerator}): {said}") from None
        except BaseException:
            await self.kill()
            raise
        self.boot_id, self.kernel = hello["hello"], hello["kernel"]
        self.boot_seconds = loop.time() - began

    async def kill(self) -> None:
        """Kill its QEMU with -9, as if its power failed. What waits for the guest gets GuestDied."""
        if self._qemu is not None:
            await self._qemu.aclose()
        if self._channel is not None:
            await self._channel.aclose()

    async def wait_dead(self) -> None:
        """Wait until its QEMU has ended."""
        if self._qemu is not None:
            await self._qemu.child.wait()

    async def run(
        self,
        argv: Sequence[str | Path],
        *,
        check: bool = True,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout_seconds: float = RUN_SECONDS,
    ) -> Completed:
        """Run a command to its end; what it leaves running in the background is not waited for.

        Raises CommandFailed if `check` and it fails or it cannot be started, TimeoutError (it and its session are
        killed then), GuestDied.
        """
        started = await self._start(argv, None, stdin, env, cwd)
        try:
            async with asyncio.timeout(timeout_seconds):
                end = await started.end
        except (TimeoutError, asyncio.CancelledError):
            self._running_channel().kill(started.number)
            raise
        output, errors = (decode(end[stream]).decode(errors="replace") for stream in ("stdout", "stderr"))
        done = Completed(tuple(map(str, argv)), end["returncode"], output, errors)
        if check and done.returncode != 0:
            raise CommandFailed(f"{self.name}: {done.argv} ended with {done.returncode}: {errors or output}")
        return done

    async def start(
        self,
        argv: Sequence[str | Path],
        *,
        log: str | Path | None = None,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Process:
        """Start a command in the background. Its output goes to a file in the guest, by default /var/log/NAME.log.

        Raises CommandFailed if it cannot be started, GuestDied.
        """
        log = Path(log or f"/var/log/{Path(argv[0]).name}.log")
        return Process(self._running_channel(), await self._start(argv, log, stdin, env, cwd), log)

    async def put(self, path: str | Path, data: bytes | str, mode: int = 0o644) -> None:
        """Write a file, making its directory. Raises CommandFailed, GuestDied."""
        content = data.encode() if isinstance(data, str) else data
        await self._request("put", path=str(path), data=encode(content), mode=mode)

    async def get(self, path: str | Path) -> bytes:
        """Read a file. Raises CommandFailed, GuestDied."""
        return decode(await self._request("get", path=str(path)))

    async def link(self, up: bool) -> None:
        """Plug the network cable in or out; the guest sees the carrier go, and packets are lost. Raises GuestDied."""
        await self._running_qemu().qmp.execute("set_link", name="nic", up=up)

    async def bandwidth(self, bits_per_second: int | None) -> None:
        """Let no more than this out to the other guest; None undoes it. Raises CommandFailed, GuestDied."""
        if bits_per_second is None:
            await self.run(["tc", "qdisc", "delete", "dev", LINK, "root"], check=False)
            return
        burst_bytes = max(bits_per_second // 8 // 50, 128 * 1024)  # 20 ms, and no less than two large packets
        shape = ["tbf", "rate", f"{bits_per_second}bit", "burst", str(burst_bytes), "latency", "50ms"]
        await self.run(["tc", "qdisc", "replace", "dev", LINK, "root", *shape])

    async def phaul(
        self, *arguments: str | Path, check: bool = False, timeout_seconds: float = RUN_SECONDS
    ) -> Completed:
        """Run the `phaul` command of the working tree here. Raises as `run`."""
        return await self.run(["phaul", *arguments], check=check, timeout_seconds=timeout_seconds)

    async def start_phauld(self, *arguments: str | Path, insecure: bool = True) -> Process:
        """Start phauld of the working tree on this guest's address and wait for its unix socket.

        Raises CommandFailed with its log if it ends instead, TimeoutError, GuestDied.
        """
        await self.run(["rm", "-f", PHAULD_SOCKET, PHAULD_LOG])
        command = ["phauld", "--listen", f"{self.address}:{PORT}", "--unix", PHAULD_SOCKET, *arguments]
        command += ["--insecure"] if insecure else []
        self.phauld = process = await self.start(command, log=PHAULD_LOG)
        async with asyncio.timeout(PHAULD_READY_SECONDS):
            while (await self.run(["test", "-S", PHAULD_SOCKET], check=False)).returncode != 0:
                if process.returncode is not None:
                    log = (await self.get(PHAULD_LOG)).decode(errors="replace")
                    raise CommandFailed(f"{self.name}: phauld ended with {process.returncode}: {log}")
                await asyncio.sleep(0.1)
        return process

    async def kill_phauld(self, number: int = signal.SIGKILL) -> int:
        """Signal phauld and wait for its end; its exit status."""
        assert self.phauld is not None, "phauld was not started"
        return await self.phauld.stop(number)

    async def _start(
        self,
        argv: Sequence[str | Path],
        log: Path | None,
        stdin: bytes,
        env: Mapping[str, str] | None,
        cwd: str | Path | None,
    ) -> Started:
        try:
            return await self._running_channel().start(
                argv=[str(word) for word in argv],
                log=str(log) if log else None,
                stdin=encode(stdin),
                env=dict(env or {}),
                cwd=str(cwd) if cwd else None,
            )
        except RequestFailed as exc:
            raise CommandFailed(f"{self.name}: {argv} did not start: {exc}") from exc

    async def _request(self, do: str, **fields: Any) -> Any:
        try:
            return await self._running_channel().request(do, **fields)
        except RequestFailed as exc:
            raise CommandFailed(f"{self.name}: {do} {fields['path']}: {exc}") from exc

    def _running_qemu(self) -> Qemu:
        if self._qemu is None or self._qemu.child.returncode is not None:
            raise GuestDied(f"guest {self.name} is not running")
        return self._qemu

    def _running_channel(self) -> Channel:
        self._running_qemu()
        assert self._channel is not None
        return self._channel
