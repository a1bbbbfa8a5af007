"""phauld's side of a relay (`relay.py`): starts it, speaks to it, finds it again after a restart.

The invariant: a relay and its criu outlive this object; only `kill`, or the end of its criu, ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from phaul_client.errors import PeerUnavailable
from phaul_client.modes import WIDE_STREAM_CRIU_VERSION
from phaul_client.pipe import LinkTerms
from phaul_client.relay_frames import CRIU_BYTES, NARROW_MESSAGE
from phaul_client.serving import RelayGone, RelaySilent, RelayStatus
from phaul_client.tree import Tree, identity, is_alive, wait_until_gone
from phaul_criu.child import Child, spawn
from phaul_criu.version import Version
from phauld.bare import bare_python
from phauld.scope import in_scope

_ANSWER_BYTES: Final = 1 << 16
COMMAND_SECONDS: Final = 10.0
LINK_SECONDS: Final = 30.0  #: a handshake is given up before
START_SECONDS: Final = 40.0
POLL_SECONDS: Final = 0.02
#: Relays are children of phauld: whoever started one reaps it.
_reapers: set[asyncio.Task[int]] = set()


class Relay:
    """A relay in `directory`, which it has for itself. Calls raise `RelayGone` (`RelaySilent`: it lives)."""

    def __init__(self, directory: Path, process: Mapping[str, Any]) -> None:
        self.directory = directory
        self.process = process  #: see `identity`

    @classmethod
    async def serve(
        cls, directory: Path, criu: Path, version: Version, kept_fds: tuple[int, ...] = ()
    ) -> tuple[Self, socket.socket]:
        """Start the relay of a source; also our end of the connection to the `criu swrk` below it.

        That criu, and not the relay, has `kept_fds` until it ends. Raises `OSError`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                number = theirs.fileno()
                arguments = [_message_bytes(version), str(number), str(criu), *map(str, kept_fds)]
                relay = await cls._start("serve", directory, (number, *kept_fds), *arguments)
        except BaseException:
            ours.close()
            raise
        return relay, ours

    @classmethod
    async def fetch(cls, directory: Path, version: Version) -> Self:
        """Start the relay of a destination whose criu has that version. Raises `OSError`."""
        return await cls._start("fetch", directory, (), _message_bytes(version))

    @classmethod
    async def _start(cls, mode: str, directory: Path, keep: tuple[int, ...], *arguments: str) -> Self:
        os.makedirs(directory, mode=0o700)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            open(directory / "relay.log", "ab") as log,  # noqa: ASYNC230
        ):
            with _short(directory) as path:
                listener.bind(path)
            listener.listen()
            number = listener.fileno()
            argv = [*bare_python("lazy_pages.relay"), mode, str(directory), str(number), *arguments]
            scope = in_scope("pages", f"{directory.parent.name}-{mode}")
            child = await spawn([*scope, *argv], pass_fds=(number, *keep), stderr=log)
        relay = cls(directory, identity(child.pid))
        _reap(child)
        return relay

    @property
    def exit_status(self) -> int | None:
        """How criu below it ended, as `returncode`; `None` while it runs, or if nobody knows."""
        with contextlib.suppress(FileNotFoundError):
            return int(json.loads((self.directory / "exit.json").read_text(encoding="utf-8"))["status"])
        return None

    async def status(self) -> RelayStatus:
        """What it does now."""
        answer = await self._command({"do": "status"})
        return RelayStatus(
            criu_pid=answer["criu_pid"],
            page_fd=answer["page_fd"],
            is_linked=answer["linked"],
            page_bytes=answer["bytes"],
            wire_bytes=answer["wire_bytes"],
            pages=answer["pages"],
        )

    async def link(self, sock: socket.socket, terms: LinkTerms) -> None:
        """Hand over a connection to the other node; our copy of it is closed.

        With TLS the two relays first make sure of each other. Raises `PeerUnavailable` if that fails.
        """
        message = {"do": "link", **terms.told()}
        with sock:
            try:
                await self._command(message, (sock.fileno(),), LINK_SECONDS)
            except OSError as exc:
                raise PeerUnavailable("page link", str(exc)) from exc

    async def start(self, argv: list[str], pages: int) -> None:
        """At a destination: start `criu lazy-pages`, which is to bring so many pages, and wait until it listens.

        Raises `OSError` if it does not.
        """
        await self._command({"do": "start", "argv": argv, "pages": pages}, (), START_SECONDS)

    async def criu_ended(self) -> int | None:
        """Wait until `criu lazy-pages`, or the relay, has ended; see `exit_status`."""
        while self.exit_status is None and is_alive(self.process):  # noqa: ASYNC110 (it may be no child of ours)
            await asyncio.sleep(POLL_SECONDS)
        return self.exit_status

    async def finish(self) -> None:
        """At a source: the destination has every page. criu kills the tree and ends."""
        await self._command({"do": "finish"})

    async def abort(self) -> None:
        """At a source: criu lets the tree run on and ends."""
        await self._command({"do": "abort"})

    async def limit(self, bytes_per_second: int) -> None:
        """At a source: send no more than this from now on; 0: as much as the link takes."""
        await self._command({"do": "limit", "bytes_per_second": bytes_per_second})

    async def kill(self) -> None:
        """Kill it and its criu; on return both are gone."""
        if is_alive(self.process):
            with contextlib.suppress(ProcessLookupError), Tree.below(self.process["pid"]) as tree:
                await tree.kill()

    async def wait(self) -> int | None:
        """Wait until criu has ended; see `exit_status`."""
        if is_alive(self.process):
            await wait_until_gone(self.process["pid"])
        return self.exit_status

    async def _command(
        self, message: Mapping[str, object], descriptors: tuple[int, ...] = (), timeout_seconds: float = COMMAND_SECONDS
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            try:
                async with asyncio.timeout(timeout_seconds):
                    with _short(self.directory) as path:
                        await loop.sock_connect(sock, path)
                    socket.send_fds(sock, [json.dumps(message).encode()], descriptors)
                    data = await loop.sock_recv(sock, _ANSWER_BYTES)
            except TimeoutError as exc:
                error = RelaySilent if is_alive(self.process) else RelayGone
                raise error(f"the relay of {self.directory.parent.name} does not answer in time") from exc
            except OSError as exc:
                raise RelayGone(f"the relay of {self.directory.parent.name} does not answer: {exc!r}") from exc
        if not data:
            raise RelayGone(f"the relay of {self.directory.parent.name} has ended")
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise OSError(f"relay: {answer['error']}")
        return answer


def _message_bytes(version: Version) -> str:
    """Of this criu's page messages."""
    return str(CRIU_BYTES if version.number >= WIDE_STREAM_CRIU_VERSION else NARROW_MESSAGE.size)


def _reap(child: Child) -> None:
    task = asyncio.create_task(child.wait(), name=f"relay-{child.pid}")
    _reapers.add(task)
    task.add_done_callback(_reapers.discard)


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """The path of the socket, however long that of the directory is: such a path has at most 108 bytes."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/relay.sock"
    finally:
        os.close(descriptor)
