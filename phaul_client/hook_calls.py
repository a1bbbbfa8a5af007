"""Calls hooks: programs without a shell, servers by gRPC. The decisions are in `hooks.py`.

The invariant: no call lasts longer than the phase may, and whatever a program started ends with it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from phaul.v1 import hooks_pb2, hooks_pb2_grpc
from phaul_client.errors import PhaulError
from phaul_client.hooks import Facts, Hook, HookPhase, Side, environment, is_hidden
from phaul_client.tls import Tls
from phaul_criu import child

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = (0.5, 2.0)
LEFT_ALONE_SECONDS: Final = 1.0
_SHOWN: Final = 500  #: characters of what a failed hook said
_SIDES: Final = {
    Side.SOURCE: hooks_pb2.HOOK_SIDE_SOURCE,
    Side.DESTINATION: hooks_pb2.HOOK_SIDE_DESTINATION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSettings:
    """What a node says about hooks."""

    directory: Path | None = None  #: every program in it is a hook
    phase_seconds: float = 4.0  #: all hooks of a phase together
    tls: Tls | None = None  #: for servers at HOST:PORT


class Hooks:
    """The hooks of one migration at this node; `Hooks()` has none and does nothing."""

    def __init__(
        self,
        settings: HookSettings | None = None,
        asked: Sequence[Hook] = (),
        facts: Facts | None = None,
        *,
        pid: Callable[[], int] = lambda: 0,
        is_recovered: bool = False,
    ) -> None:
        self._settings = settings or HookSettings()
        self._asked = tuple(asked)
        self._facts = facts
        self._pid = pid
        self._begun: list[Hook] = list(self._all()) if is_recovered else []  # `prepare` was called
        #: their `commit` was not answered; `None`: it was not called
        self._pending: list[Hook] | None = list(self._begun) if is_recovered else None

    @property
    def may_be_committed(self) -> bool:
        """Whether `commit` was called, here."""
        return self._pending is not None

    async def prepare(self) -> None:
        """Call each in turn, up to the first that fails. Raises `PhaulError` HOOK_FAILED."""
        ends = time.monotonic() + self._settings.phase_seconds
        for hook in self._all():
            self._begun.append(hook)
            await self._call(hook, HookPhase.PREPARE, ends - time.monotonic())

    async def commit(self) -> None:
        """Call those that have not answered yet; what fails is logged, and left to `commit_again`."""
        ends = time.monotonic() + self._settings.phase_seconds
        self._pending = await self._each(self._begun if self._pending is None else self._pending, 1, ends)

    async def commit_again(self) -> list[str]:
        """As `commit`, where there is time: a few attempts. Those that failed for good, for people."""
        if self._pending is None:
            await self.commit()
        for attempt, seconds in enumerate(RETRY_SECONDS, 2):
            if self._pending:
                await asyncio.sleep(seconds)
                self._pending = await self._each(self._pending, attempt)
        return [str(hook) for hook in self._pending or ()]

    async def abort(self) -> None:
        """Undo what was begun, the last one first; what fails is logged."""
        begun, self._begun, self._pending = self._begun, [], None
        for hook in reversed(begun):
            try:
                await self._call(hook, HookPhase.ABORT, self._settings.phase_seconds)
            except PhaulError as exc:
                logger.error("hook failed migration_id=%s error=%s", self._migration_id, exc)

    async def _each(self, hooks: Sequence[Hook], attempt: int, ends: float | None = None) -> list[Hook]:
        """Commit each; those that failed, or had no time."""
        failed = []
        for hook in hooks:
            seconds = self._settings.phase_seconds if ends is None else ends - time.monotonic()
            try:
                await self._call(hook, HookPhase.COMMIT, seconds, attempt)
            except PhaulError as exc:
                logger.error("hook failed migration_id=%s attempt=%d error=%s", self._migration_id, attempt, exc)
                failed.append(hook)
        return failed

    @property
    def _migration_id(self) -> str:
        return self._facts.migration_id if self._facts is not None else ""

    def _all(self) -> tuple[Hook, ...]:
        directory = self._settings.directory
        found: list[Path] = []
        if directory is not None and self._facts is not None and directory.is_dir():
            found = sorted(each for each in directory.iterdir() if each.is_file() and not is_hidden(each.name))
        return (*(Hook(str(each)) for each in found), *self._asked)

    async def _call(self, hook: Hook, phase: HookPhase, seconds: float, attempt: int = 1) -> None:
        """Raises `PhaulError` HOOK_FAILED."""
        assert self._facts is not None
        pid, started = self._pid(), time.monotonic()
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                if hook.is_grpc:
                    await self._ask(hook, phase, pid, attempt)
                else:
                    await _run(hook, environment(self._facts, phase, pid, attempt), seconds)
        except TimeoutError:
            why = f"no end after {time.monotonic() - started:.1f} s"
            raise _failed(hook, phase, why, "a larger hook_seconds, or a quicker hook") from None
        except grpc.aio.AioRpcError as exc:
            raise _failed(hook, phase, f"{exc.code().name}: {exc.details()}") from exc.with_traceback(None)
        except OSError as exc:
            remedy = f"chmod +x {hook}" if isinstance(exc, PermissionError) else ""
            raise _failed(hook, phase, exc.strerror or str(exc), remedy) from exc
        logger.info(
            "hook migration_id=%s hook=%s phase=%s ms=%.0f",
            self._migration_id,
            hook,
            phase,
            (time.monotonic() - started) * 1000,
        )

    async def _ask(self, hook: Hook, phase: HookPhase, pid: int, attempt: int) -> None:
        assert self._facts is not None
        call = hooks_pb2.HookCall(
            migration_id=self._facts.migration_id,
            side=_SIDES[self._facts.side],
            node_name=self._facts.node_name,
            peer=self._facts.peer,
            workload=self._facts.workload,
            pid=pid,
            addresses=self._facts.addresses,
            attempt=attempt,
        )
        async with self._channel(hook) as channel:
            stub: hooks_pb2_grpc.HooksAsyncStub = hooks_pb2_grpc.HooksStub(channel)
            match phase:
                case HookPhase.PREPARE:
                    await stub.Prepare(hooks_pb2.HooksPrepareRequest(call=call))
                case HookPhase.COMMIT:
                    await stub.Commit(hooks_pb2.HooksCommitRequest(call=call))
                case HookPhase.ABORT:
                    await stub.Abort(hooks_pb2.HooksAbortRequest(call=call))

    def _channel(self, hook: Hook) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self._settings.tls is not None and not hook.is_local:
            return grpc.aio.secure_channel(hook.target, self._settings.tls.channel_credentials(), options=options)
        return grpc.aio.insecure_channel(hook.target, options=options)


async def _run(hook: Hook, variables: Mapping[str, str], seconds: float) -> None:
    """Raises `PhaulError` if it ends with anything but 0, `OSError` if it cannot be started.

    A phauld that is killed meanwhile leaves it to `timeout`, which ends it then.
    """
    if not stat.S_ISREG(os.stat(hook.target).st_mode) or not os.access(hook.target, os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), hook.target)
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        env = {**child.scrubbed_environment(), **variables}
        argv = ["timeout", "--signal=KILL", f"{seconds + LEFT_ALONE_SECONDS:.1f}", hook.target]
        async with await child.spawn(
            argv, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as running:
            status = await running.wait()
        if status != 0:
            size = os.fstat(output).st_size
            said = os.pread(output, _SHOWN, max(0, size - _SHOWN)).decode(errors="replace").strip()
            how = f"status {status}" if status > 0 else f"signal {-status}"
            raise _failed(hook, HookPhase(variables["PHAUL_PHASE"]), f"{how}{': ' if said else ''}{said}")
    finally:
        os.close(output)


def _failed(hook: Hook, phase: HookPhase, why: str, remedy: str = "") -> PhaulError:
    return PhaulError(f"hook {hook}, {phase}: {why}", reason="HOOK_FAILED", remedy=remedy)
