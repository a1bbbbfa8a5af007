"""The pictures of docs/pictures: what phauld and phaul show of real migrations, as a browser and a terminal draw it.

Two nodes of this machine, the link between them slow enough to look at what moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from tests.browser import Page, browser
from tests.nodes import PROGRAMS, ROOT, Nodes, two_nodes, until
from tests.terminal import Terminal, terminal

HTTP: Final = "127.0.0.1:7709"
LINK_BYTES_PER_SECOND: Final = 24 << 20
LARGEST_BYTES: Final = 150 << 10
HEARTBEAT: Final = (sys.executable, "-I", "-S", str(ROOT / "tests/victims/heartbeat.py"))
LONG_NAME: Final = "a-workload-with-quite-a-long-name-of-its-own"


class Pictures:
    """Takes them into a directory. What moves is started here."""

    def __init__(self, nodes: Nodes, directory: Path, work: Path) -> None:
        self._nodes = nodes
        self._directory = directory
        self._work = work

    def keep(self, name: str, png: bytes) -> None:
        """A picture, as small as it can be. Raises ValueError if that is not small."""
        words = ["pngquant", "--force", "--strip", "--speed", "1", "64", "-"]
        small = subprocess.run(words, input=png, stdout=subprocess.PIPE, check=True).stdout
        if len(small) > LARGEST_BYTES:
            raise ValueError(f"{name} has {len(small)} bytes")
        (self._directory / f"{name}.png").write_bytes(small)
        print(f"{name}.png: {len(small) >> 10} KiB")

    async def start(self, name: str, mib: int) -> None:
        """A workload that is ready to move."""
        beats = self._work / f"{name}.beats"
        directory = self._work / name  # two dumps from one directory would wait for each other
        directory.mkdir()
        words = ["--name", name, "--cwd", directory, "--", *HEARTBEAT, beats, "--mib", str(mib)]
        await self._nodes.a.phaul("run", *words, check=True)
        await until(lambda: beats.exists() and beats.stat().st_size > 0)

    async def migrate(self, name: str, *options: str) -> str:
        """Move it; its migration's id."""
        done = await self._nodes.a.phaul("migrate", name, "--to", self._nodes.b.address, "--json", *options)
        return str(done.events()[-1]["migration_id"])

    async def until_idle(self) -> None:
        """Wait until nothing moves any more."""
        while True:
            seen = (await self._nodes.a.phaul("top", "--once", "--json", check=True)).json()
            if all(each["outcome"] for each in seen["migrations"]):
                return
            await asyncio.sleep(0.2)

    async def page(self, page: Page, name: str, *, width: int = 1100, dark: bool = False, of: str = "") -> None:
        """The page of node a, when it shows what it is to show."""
        await page.open(f"http://{HTTP}/{'#' if of else ''}{of}", width=width, height=300, dark=dark)
        await page.until("document.querySelector('#facts').textContent")
        await page.until("document.querySelector('#detail svg')" if of else "document.querySelector('.card progress')")
        self.keep(name, await page.picture())

    @contextlib.asynccontextmanager
    async def moving(self, *names: str) -> AsyncIterator[None]:
        """While these move, slowly."""
        await self._nodes.a.limit_bandwidth(LINK_BYTES_PER_SECOND)
        for name in names:
            await self.migrate(name, "--detach")
        yield
        await self._nodes.a.limit_bandwidth(None)
        await self.until_idle()

    async def on_terminal(self, page: Page, screen: Terminal, name: str) -> None:
        """What a terminal shows, drawn by the browser."""
        file = self._work / f"{name}.html"
        file.write_text(screen.page)
        await page.open(file.as_uri(), width=1100, height=100)
        wide, high = await page.value("[document.body.offsetWidth, document.body.offsetHeight]")
        await page.open(file.as_uri(), width=wide, height=high)
        self.keep(name, await page.picture())


async def take(directory: Path, work: Path) -> None:
    """All of them."""
    async with two_nodes(work / "nodes") as nodes, browser(nodes.a, work) as page:
        for node in (nodes.a, nodes.b):
            await node.start_phauld(http_listen=HTTP)
        pictures = Pictures(nodes, directory, work)
        for name, mib in (("web", 24), ("cache", 96), (LONG_NAME, 4), ("database", 200), ("queue", 140)):
            await pictures.start(name, mib)
        await pictures.migrate("nobody")
        moved = await pictures.migrate("web")
        await pictures.migrate(LONG_NAME, "--deadline", "1ms")
        await pictures.migrate("cache")
        async with pictures.moving("database", "queue"):
            await asyncio.sleep(2)  # so that there is something to see
            await pictures.page(page, "page-during")
            top = [PROGRAMS / "phaul", "top", "--interval", "200ms"]
            async with terminal(nodes.a, top, columns=130, lines=14) as screen:
                await screen.until("freezing")
                await pictures.on_terminal(page, screen, "top")
        await pictures.page(page, "page-after", of=moved)
        await pictures.page(page, "page-dark", dark=True, of=moved)
        await pictures.page(page, "page-narrow", width=400, of=moved)
        report = work / "report.html"
        await nodes.a.phaul("report", moved, "--html", report, check=True)
        await page.open(report.as_uri(), width=960, height=300)
        pictures.keep("report", await page.picture())


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="phaul-pictures.") as work:
        asyncio.run(take(directory, Path(work)))


if __name__ == "__main__":
    main()
