"""phauld's side of `dump_guard.py`."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Final

from phaul_criu.child import Child, finish, spawn
from phaul_criu.urgency import hurry
from phauld.bare import bare_python
from phauld.guarding.one_processor import give_back

logger = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 5.0
CURE_SECONDS: Final = 60.0
_ANSWER_BYTES: Final = 256


class DumpGuard:
    """A `dump_guard.py`, which outlives phauld while it watches; see `phaul_client.guarding.Guard`."""

    def __init__(self, record: Path) -> None:
        """`record` is for `one_processor.py`; its directory is there when the watch begins."""
        self._record = str(record)
        self._child: Child | None = None
        self._told: socket.socket | None = None
        self._watches = False
        self._is_over = False  # what is watched has ended
        self._is_lost = False  # it did not answer in time: what it says now belongs to another question

    async def start(self) -> None:
        if self._child is not None and (self._child.returncode is not None or self._is_lost):
            await self.aclose()
            self._child, self._is_lost = None, False
        if self._child is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._told = ours
        with theirs:
            try:
                argv = [*bare_python("guarding.dump_guard"), str(theirs.fileno()), self._record]
                self._child = await spawn(argv, pass_fds=(theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        hurry(self._child.pid)

    async def watch(self, criu_pid: int, root_pid: int, *, is_told: bool = True) -> None:
        await self.start()
        answer = await self._ask(f"{criu_pid} {root_pid} {int(is_told)}")
        if answer != "ok":
            raise OSError(answer or "the guard has ended")
        self._watches, self._is_over = True, False

    async def note_frozen(self) -> None:
        if self._watches:
            try:
                await self._ask("frozen")
            except OSError as exc:
                logger.warning("the guard of criu does not answer: %s", exc)

    async def note_whole(self) -> bool:
        if not self._watches:
            return True
        try:
            return await self._ask("whole") in ("ok", "")  # a guard that is gone makes nobody run
        except OSError as exc:
            logger.warning("the guard of criu does not answer: %s", exc)
            return False

    async def settled(self) -> None:
        if not self._watches:
            return
        self._watches = False
        try:
            self._tell("over")
            while not self._is_over:
                await self._hear(CURE_SECONDS)
            self._tell("bye")
        except OSError as exc:
            logger.warning("the guard of criu does not end: %s", exc)
        give_back(self._record)  # should it have been killed

    async def aclose(self) -> None:
        if self._told is not None:
            self._told.close()
        if self._child is not None and not self._watches:
            await finish(self._child.aclose(patience_seconds=0 if self._is_lost else ANSWER_SECONDS))

    async def _ask(self, word: str) -> str:
        """Raises `OSError`; "": it has ended."""
        try:
            self._tell(word)
        except ConnectionError:
            return ""
        return await self._hear(ANSWER_SECONDS)

    def _tell(self, word: str) -> None:
        assert self._told is not None
        if self._is_lost:
            raise TimeoutError("it does not answer")
        self._told.send(word.encode())

    async def _hear(self, seconds: float) -> str:
        assert self._told is not None
        try:
            async with asyncio.timeout(seconds):
                word = (await asyncio.get_running_loop().sock_recv(self._told, _ANSWER_BYTES)).decode()
        except ConnectionError:
            word = ""
        except TimeoutError:
            self._is_lost = True
            raise TimeoutError(f"no answer after {seconds:g} s") from None
        self._is_over |= word in ("end", "")
        return word
