"""`phaul report` of a real migration, its page drawn by a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import browser, browser_missing
from tests.nodes import two_nodes

pytestmark = pytest.mark.criu


async def test_report_of_a_move(tmp_path: Path) -> None:
    """As text, as JSON, as a page with a bar for each step; an id that is none is refused as elsewhere."""
    page = tmp_path / "report.html"
    async with two_nodes(tmp_path / "nodes") as (a, b, _):
        await a.start_phauld()
        await b.start_phauld()
        await a.phaul("run", "--name", "sleeper", "--", "sleep", "1000", check=True)
        moved = await a.phaul("migrate", "sleeper", "--to", b.address, "--json")
        assert moved.returncode == 0, moved.stdout + moved.stderr
        *told, last = moved.events()
        migration_id = last["migration_id"]
        shown = await a.phaul("report", migration_id[:8], "--html", page, check=True)
        as_json = (await a.phaul("report", migration_id, "--json", check=True)).json()
        unknown = await a.phaul("report", "ffff", "--html", tmp_path / "none.html")
        unwritable = await a.phaul("report", migration_id, "--html", tmp_path / "none" / "none.html")
    assert (unknown.returncode, unwritable.returncode) == (1, 2), unknown.stderr + unwritable.stderr
    assert not (tmp_path / "none.html").exists()
    at = {each["phase"]: each["bytes"] for each in told}  # each is told with what was sent by then
    after_the_dump = [at[phase] for phase in ("copying-images", "restoring", "committed", "confirmed") if phase in at]
    assert after_the_dump != []
    assert all(1000 < sent <= last["bytes"] for sent in after_the_dump)
    steps = [each["name"] for each in as_json["timeline"]]
    assert steps[0] == "freeze and dump"
    assert {each["node_name"] for each in as_json["timeline"]} == {"a", "b"}
    assert all(name in shown.stdout for name in steps)
    assert as_json["wire_bytes"] >= as_json["rounds"][-1]["bytes_sent"], "counted to the end, however short it was"
    assert as_json["images_place"].startswith(("in memory", "on disk"))
    assert as_json["images_place"] in shown.stdout
    assert page.read_text().count("<rect") == len(steps)
    if reason := browser_missing():
        pytest.skip(f"the page was not drawn: {reason}")
    async with two_nodes(tmp_path / "browser") as (a, _, _), browser(a, tmp_path) as drawn:
        for width in (1000, 400):
            await drawn.open(page.as_uri(), width=width, height=800)
            assert await drawn.value("document.querySelectorAll('rect').length") == len(steps)
            assert await drawn.value("document.documentElement.scrollWidth <= innerWidth")
        assert drawn.problems == []
