"""The loop of a migration: rounds of pre-dump while the policy wants them, then the last dump, copy and restore.

The seed's `Client`, with the decision of its loop in a policy. It knows no daemon and no gRPC: `local` and `remote`
may be the caller's own.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from phaul_client.config import Config
from phaul_client.cork import uncorked
from phaul_client.guarding import Guard, guarded
from phaul_client.images import ImageChain, open_directory, relative_parent
from phaul_client.local import LetsGo, Local, ServesPages
from phaul_client.policy import (
    DowntimePolicy,
    Iterate,
    IterStats,
    Limits,
    Policy,
    StopCopyPolicy,
    SwitchToPostcopy,
    Verdict,
)
from phaul_client.remote import Remote
from phaul_client.rounds import PAGE_SIZE_BYTES
from phaul_criu.criu import Criu
from phaul_criu.install import find_binary
from phaul_criu.requests import DumpOptions, PreDumpMode
from phaul_criu.stats import DumpStats

logger = logging.getLogger(__name__)

#: A destination that does not answer will see for itself that a round has failed.
FAILED_ROUND_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A pre-dump has ended; `verdict` is what the policy made of all rounds so far."""

    stats: IterStats
    verdict: Verdict


class Client:
    """Moves one tree, once.

    `criu` is, if not given, the one that is found here (which raises `CriuMissing` if there is none).
    `policy` decides after every round; by default the downtime policy where the kernel can track memory, and no round
    at all where it cannot. `on_round` is called after every round. `throttle` is called before a round with the share
    of time, in percent, for which the tree shall be held back from then on, and with 0 right before the last dump.
    `guard` mends the tree if the criu of a round is killed.
    """

    def __init__(
        self,
        local: Local,
        remote: Remote,
        config: Config,
        *,
        criu: Criu | None = None,
        policy: Policy | None = None,
        limits: Limits | None = None,
        pre_dump_mode: PreDumpMode = PreDumpMode.SPLICE,
        on_round: Callable[[RoundEnded], None] = lambda _: None,
        throttle: Callable[[int], Awaitable[None]] | None = None,
        external: tuple[str, ...] = (),
        guard: Guard | None = None,
    ) -> None:
        self._local = local
        self._remote = remote
        self._config = config
        self._criu = criu or Criu(find_binary())
        self._policy = policy
        self.limits = limits or Limits()  #: may be changed between rounds
        self._pre_dump_mode = pre_dump_mode
        self._on_round = on_round
        self._throttle = throttle
        self._external = external
        self._guard = guard
        self._chain = ImageChain(config.wdir)

    async def migrate(self) -> tuple[IterStats, ...]:
        """Move the tree; the statistics of the rounds before its last dump.

        Raises what `local`, `remote` and criu raise. Then the tree runs here, unless the error is `OutcomeUnknown`, and
        the page stream is shut down.
        """
        policy = self._policy or await self._default_policy()
        history: tuple[IterStats, ...] = ()
        verdict = policy.decide(history, self.limits)
        while isinstance(verdict, Iterate):
            stats = await self._round(verdict.throttle_percent)
            history = (*history, stats)
            verdict = policy.decide(history, self.limits)
            self._on_round(RoundEnded(stats, verdict))
        logger.info("last round after=%d verdict=%s", len(history), type(verdict).__name__)
        if self._throttle is not None:
            let_go = partial(self._throttle, 0)
            if isinstance(self._local, LetsGo):
                self._local.let_go = let_go
            else:
                await let_go()
        if isinstance(verdict, SwitchToPostcopy):
            if not isinstance(self._local, ServesPages):
                raise TypeError(f"{type(self._local).__name__} cannot do post-copy, which the policy wants")
            await self._local.dump_copy_serve(self._criu, self._config, self._chain.last)
        else:
            await self._last_round()
        return history

    async def _default_policy(self) -> Policy:
        if (await self._criu.features()).mem_track:
            return DowntimePolicy()
        logger.info("this kernel does not track written memory: no round before the last dump")
        return StopCopyPolicy()

    async def _last_round(self) -> None:
        moved = False
        try:
            async with self._iteration():
                await self._local.dump_copy_restore(self._criu, self._config, self._chain.last)
                moved = True
        except Exception as exc:
            if not moved:
                raise
            logger.warning("the tree has moved, but the destination did not end its last round: %s", exc)

    @contextlib.asynccontextmanager
    async def _iteration(self) -> AsyncIterator[None]:
        """One round on the destination; always ended there, and its own error is never hidden by that."""
        await self._remote.start_iter()
        try:
            yield
        except BaseException:
            self._cut_page_stream()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(FAILED_ROUND_SECONDS):
                    await self._remote.stop_iter()
            raise
        await self._remote.stop_iter()

    def _cut_page_stream(self) -> None:
        """A page server that got no page, or not every one, would wait for ever."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._config.memfd)) as stream:
            stream.shutdown(socket.SHUT_RDWR)

    async def _round(self, throttle_percent: int) -> IterStats:
        parent = self._chain.last
        directory = self._chain.open_next()
        if self._throttle is not None:
            await self._throttle(throttle_percent)
        started_at_seconds = time.monotonic()
        async with self._iteration():
            stats = await self._pre_dump(directory, parent)
        duration_seconds = time.monotonic() - started_at_seconds
        if parent is not None:  # criu looks at the round before (its inventory), never further back
            shutil.rmtree(parent, ignore_errors=True)
        return _iter_stats(stats, started_at_seconds, duration_seconds, throttle_percent)

    async def _pre_dump(self, directory: Path, parent: Path | None) -> DumpStats:
        with open_directory(directory) as descriptor:
            options = DumpOptions(
                images_dir_fd=descriptor,
                pid=self._config.pid,
                page_server_fd=self._config.memfd,
                parent_img=relative_parent(directory, parent),
                track_mem=True,
                pre_dump_mode=self._pre_dump_mode,
                external=self._external,
                log_file="pre-dump.log",
            )
            async with uncorked(self._config.memfd), guarded(self._guard, self._criu, options) as swrk:
                return await self._criu.pre_dump(options, swrk=swrk)


def _iter_stats(
    stats: DumpStats, started_at_seconds: float, duration_seconds: float, throttle_percent: int
) -> IterStats:
    return IterStats(
        started_at_seconds=started_at_seconds,
        duration_seconds=duration_seconds,
        frozen_seconds=(stats.freezing_microseconds + stats.frozen_microseconds) / 1e6,
        pages_scanned=stats.pages_scanned,
        pages_written=stats.pages_written,
        pages_skipped_parent=stats.pages_skipped_parent,
        bytes_sent=stats.pages_written * PAGE_SIZE_BYTES,
        transfer_seconds=stats.memwrite_microseconds / 1e6,
        throttle_percent=throttle_percent,
    )
