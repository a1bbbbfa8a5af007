"""A real headless Chromium in a node, steered by the DevTools protocol over a pair of pipes.

    async with browser(node, tmp_path) as page:
        await page.open("http://127.0.0.1:7709/", width=1000, height=800)
        await page.until("document.querySelector('.card')")
        picture = await page.picture()

The pipes need no port and no network: the browser is in the node's namespaces, and is steered from here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from tests.namespaces import NAMESPACES
from tests.need import need
from tests.nodes import Node

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_LARGEST_BYTES: Final = 64 << 20
_SECONDS: Final = 30.0
_FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
#: The browser expects its two pipes as descriptors 3 and 4, whatever they are here.
_PIPES: Final = 'from=$1 to=$2; shift 2; exec "$@" 3<&"$from" 4>&"$to"'


def find_browser() -> str | None:
    """A Chromium of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def browser_missing() -> str | None:
    """Why there is no browser, though it was tried to install one; `None` if there is."""
    if find_browser() is None:
        return need({"chromium": "chromium"})
    return None


class BrowserFailed(Exception):
    """It answered with an error, or ended."""


class Page:
    """The one page of a browser. `problems`: errors of scripts, and what the page's own policy blocked."""

    def __init__(self, reader: asyncio.StreamReader, writer: int) -> None:
        self._reader = reader
        self._writer = writer
        self._number = 0
        self._session = ""
        self.problems: list[str] = []

    async def attach(self) -> None:
        """Take the browser's first page."""
        targets = (await self.ask("Target.getTargets"))["targetInfos"]
        (target,) = [each["targetId"] for each in targets if each["type"] == "page"]
        answer = await self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")

    async def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """A command and its answer. Raises `BrowserFailed`."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(_SECONDS):
            while True:
                try:
                    answer = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                except asyncio.IncompleteReadError as exc:
                    raise BrowserFailed("it ended") from exc
                if answer.get("id") == self._number:
                    if "error" in answer:
                        raise BrowserFailed(f"{method}: {answer['error']}")
                    result: dict[str, Any] = answer["result"]
                    return result
                self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(event["params"]["exceptionDetails"]))
            case "Log.entryAdded" if event["params"]["entry"]["level"] == "error":
                self.problems.append(event["params"]["entry"]["text"])

    async def open(self, url: str, *, width: int, height: int, dark: bool = False) -> None:
        """Go to a page, in a window of this size."""
        await self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        await self.ask("Page.navigate", url="about:blank")
        await self.ask("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives. Raises `BrowserFailed`."""
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserFailed(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait for an expression to be true. Raises TimeoutError."""
        async with asyncio.timeout(_SECONDS):
            while not await self.value(f"Boolean({expression})"):  # noqa: ASYNC110 - it is in another process
                await asyncio.sleep(0.05)

    async def picture(self) -> bytes:
        """The whole page as PNG, in a window as wide as it was opened and as high as the page."""
        width, height = await self.value("[innerWidth, document.documentElement.scrollHeight]")
        await self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        return base64.b64decode((await self.ask("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def browser(node: Node, directory: Path) -> AsyncIterator[Page]:
    """A browser in the node; it ends with the block."""
    program = find_browser()
    assert program is not None, "no chromium; see browser_missing"
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    words = ["bash", "-c", _PIPES, "bash", str(their_input), str(their_output), program, *_FLAGS]
    process = await asyncio.create_subprocess_exec(
        *("nsenter", "--target", str(node.pid), *NAMESPACES, "--", *words, f"--user-data-dir={directory}/profile"),
        "about:blank",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(their_input, their_output),
        start_new_session=True,
    )
    for descriptor in (their_input, their_output):
        os.close(descriptor)
    reader = asyncio.StreamReader(limit=_LARGEST_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_input, "rb")
    )
    try:
        page = Page(reader, our_output)
        await page.attach()
        yield page
    finally:
        os.close(our_output)  # it ends when the pipe does
        try:
            await asyncio.wait_for(process.wait(), _SECONDS)
        finally:
            transport.close()
            if process.returncode is None:
                process.kill()
                await process.wait()
