"""Keeps the journal from growing: what is over for long goes, a few records at a time, between the writes of others."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from phauld.journal import Journal

logger = logging.getLogger(__name__)

EVERY_SECONDS: Final = 3600.0
AT_MOST: Final = 50  #: records in one write: a few milliseconds
BETWEEN_SECONDS: Final = 0.05


async def prune(journal: Journal, keep: int) -> int:
    """Keep so many finished migrations of each side; how many others were seen to. Raises `OSError`."""
    dropped = 0
    while number := await journal.drop_oldest(keep, AT_MOST):
        dropped += number
        await asyncio.sleep(BETWEEN_SECONDS)
    if dropped:
        logger.info("journal pruned records=%d kept=%d", dropped, keep)
    return dropped


async def prune_regularly(journal: Journal, keep: int) -> None:
    """Now and every hour, until it is cancelled."""
    while True:
        try:
            await prune(journal, keep)
        except OSError as exc:
            logger.error("journal not pruned error=%s", exc)
        await asyncio.sleep(EVERY_SECONDS)
