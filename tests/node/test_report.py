"""`phaul report` of a real migration, its page drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.nodes import two_nodes

pytestmark = pytest.mark.criu

BROWSER: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_SECONDS: Final = 60


async def test_report_of_a_move(tmp_path: Path) -> None:
    """As text, as JSON, as a page with a bar for each step; an id that is none is refused as elsewhere."""
    page = tmp_path / "report.html"
    async with two_nodes(tmp_path / "nodes") as (a, b, _):
        await a.start_phauld()
        await b.start_phauld()
        await a.phaul("run", "--name", "sleeper", "--", "sleep", "1000", check=True)
        moved = await a.phaul("migrate", "sleeper", "--to", b.address, "--json")
        assert moved.returncode == 0, moved.stdout + moved.stderr
        migration_id = moved.events()[-1]["migration_id"]
        shown = await a.phaul("report", migration_id[:8], "--html", page, check=True)
        as_json = (await a.phaul("report", migration_id, "--json", check=True)).json()
        unknown = await a.phaul("report", "ffff", "--html", tmp_path / "none.html")
        unwritable = await a.phaul("report", migration_id, "--html", tmp_path / "none" / "none.html")
    assert (unknown.returncode, unwritable.returncode) == (1, 2), unknown.stderr + unwritable.stderr
    assert not (tmp_path / "none.html").exists()
    steps = [each["name"] for each in as_json["timeline"]]
    assert steps[0] == "freeze and dump"
    assert {each["node_name"] for each in as_json["timeline"]} == {"a", "b"}
    assert all(name in shown.stdout for name in steps)
    assert as_json["images_place"].startswith(("in memory", "on disk"))
    assert as_json["images_place"] in shown.stdout
    assert page.read_text().count("<rect") == len(steps)
    if BROWSER is None:
        pytest.skip("the page was not drawn: no chromium here")
    drawn = _draw(BROWSER, page, tmp_path / "drawn.png")
    assert len(re.findall("<rect", drawn)) == len(steps)


def _draw(browser: str, page: Path, picture: Path) -> str:
    """The document as the browser understood it; the picture is beside it."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile"]
    for option in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run(
            [*command, option, "--window-size=1000,1100", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=BROWSER_SECONDS,
        )
        assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout
