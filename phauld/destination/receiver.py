"""`Server`, the seed's server side: the page server of each round and the chain of image directories.

It needs no daemon and no gRPC: `Remote.start_iter` and `stop_iter` of a source may be these very methods.
"""

import os
from pathlib import Path

from phaul_client.config import Config
from phaul_client.images import ImageChain, relative_parent
from phaul_criu.criu import Criu
from phaul_criu.install import find_binary
from phaul_criu.page_server import PageServer
from phaul_criu.requests import PageServerOptions


class Server:
    """Receives the rounds of one migration from `config.memfd` into `config.wdir`. Close it at the end.

    `criu` is, if not given, the one that is found here (which raises `CriuMissing` if there is none).
    """

    def __init__(self, config: Config, criu: Criu | None = None) -> None:
        self._config = config
        self._criu = criu or Criu(find_binary())
        self._chain = ImageChain(config.wdir)
        self._page_server: PageServer | None = None
        self._ending: PageServer | None = None  # the one that `stop_iter` waits for
        self._directory_fd = -1  # of the running round; criu opens and phaul reads through it

    @property
    def criu(self) -> Criu:
        """The criu that receives pages, for the caller's own restore."""
        return self._criu

    @property
    def last_images_dir(self) -> Path | None:
        """Where the newest round is, absolute; `None` before the first."""
        return self._chain.last

    def next_images_dir(self) -> Path:
        """Make the directory of a round that brings no pages, as post-copy's."""
        return self._chain.open_next()

    async def start_iter(self, *, in_a_hurry: bool = False) -> None:
        """Begin a round: criu reads pages from `memfd`; `in_a_hurry` if the tree stands still.

        Raises `PageServerFailed`, `CriuDied`, `CriuMissing`.
        """
        parent = self._chain.last
        directory = self._chain.open_next()
        self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            options = PageServerOptions(
                images_dir_fd=self._directory_fd,
                parent_img=relative_parent(directory, parent),
                auto_dedup=True,  # a page is kept once: what a round brings anew is punched out of those before
            )
            self._page_server = await self._criu.page_server(options, self._config.memfd)
            if in_a_hurry:
                self._page_server.hurry()
        except BaseException:
            self._close_directory()
            raise

    async def stop_iter(self, *, timeout_seconds: float | None = None) -> None:
        """Wait until every page of the round is on disk; a round that has ended already is no error.

        Raises `PageServerFailed` if the stream ended early, `CriuDied`, `CriuTimeout`; then the round is worthless.
        """
        if self._page_server is not None:
            self._ending, self._page_server = self._page_server, None
            try:
                await self._ending.wait(timeout_seconds=timeout_seconds)
            finally:
                self._ending = None
                self._close_directory()

    async def aclose(self) -> None:
        """Kill a page server that still runs; a `stop_iter` that waits for it fails. `memfd` stays the caller's."""
        if self._ending is not None:
            self._ending.kill()
        if self._page_server is not None:
            page_server, self._page_server = self._page_server, None
            try:
                await page_server.aclose()
            finally:
                self._close_directory()

    def _close_directory(self) -> None:
        os.close(self._directory_fd)
        self._directory_fd = -1
