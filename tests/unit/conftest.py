"""A journal that a test writes to."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phauld.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    opened = await Journal.open(path)
    yield opened
    await opened.aclose()
