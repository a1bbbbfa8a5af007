"""The HTTP side of phauld, read-only: a page for people, `/metrics` for Prometheus, `/healthz` for probes.

On loopback it is HTTP; beyond it, with `tls_dir`, HTTPS for those whom the policy names.
The invariant: nothing that is asked here changes anything, and nothing in the page comes from elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from aiohttp import hdrs, web

from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.json_output import migration_json, progress_json
from phaul_client.cli.report import report_page
from phauld import session, start_checks
from phauld.config import Config, is_loopback, split_address
from phauld.destination.incoming import Session
from phauld.destination.remote_service import RemoteService
from phauld.node import Node
from phauld.observing.metrics import Metrics
from phauld.observing.web_tls import HANDSHAKE_SECONDS, Secured
from phauld.source.migrations_service import MigrationsService

PAGES: Final = Path(__file__).parent / "pages"
SHOWN: Final = 100
FILES: Final = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css"}
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REPORT_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Web:
    """Serves HTTP on `http_listen` from `start` to `stop`."""

    def __init__(
        self, config: Config, node: Node, migrations: MigrationsService, remote: RemoteService, metrics: Metrics
    ) -> None:
        self._config = config
        self._node = node
        self._migrations = migrations
        self._remote = remote
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        host = split_address("http_listen", config.http_listen)[0]
        self._secured = Secured(node.guard) if node.guard is not None and not is_loopback(host) else None
        self.health = "starting"  #: then "serving", then "stopping"

    async def start(self) -> None:
        """Raises `InvalidRequest` when the port is taken."""
        app = web.Application(middlewares=[self._only_local_names, self._authorise], client_max_size=1024)
        for path in FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/healthz", self._get_health)
        app.router.add_get("/api/state", self._get_state)
        app.router.add_get("/api/migrations/{id}", self._get_migration)
        app.router.add_get("/migrations/{id}/report", self._get_report)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=30.0, shutdown_timeout=1.0)
        await self._runner.setup()
        host, port = split_address("http_listen", self._config.http_listen)
        secured = self._secured.context() if self._secured is not None else None
        assert self._runner.server is not None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._runner.server,
                host,
                port,
                backlog=64,
                ssl=secured,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if secured is not None else None,
            )
        except OSError as exc:
            raise start_checks.cannot_listen("http_listen", self._config.http_listen, exc) from exc

    async def stop(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Beyond loopback with TLS: for whom the policy allows it. Raises `HTTPForbidden`."""
        if self._secured is not None and (why := self._secured.refusal(request)):
            raise web.HTTPForbidden(text=f"{why}\n")
        return await handler(request)

    @web.middleware
    async def _only_local_names(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """On loopback, only for those who mean loopback: a page from elsewhere may have its name point here."""
        host = split_address("http_listen", self._config.http_listen)[0]
        if host in _LOCAL and (request.url.host or "") not in _LOCAL:
            return web.Response(status=421, text="ask for localhost\n")
        try:
            response = await handler(request)
        except web.HTTPException as exc:
            exc.headers.update(_HEADERS)
            raise
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    async def _get_metrics(self, request: web.Request) -> web.Response:
        headers = {hdrs.CONTENT_TYPE: "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._metrics.text(), headers=headers)

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.health == "serving" else 503, text=f"{self.health}\n")

    async def _get_state(self, request: web.Request) -> web.Response:
        info = self._node.info(incoming=self._remote.active, outgoing=self._migrations.active)
        state = {
            "node": {
                "name": info.node_name,
                "version": info.version,
                "kernel": info.kernel_release,
                "architecture": info.architecture,
                "criu": info.criu.version_text,
                "insecure": info.insecure,
                "memory_available_bytes": info.capacity.memory_available_bytes,
                "images_free_bytes": info.capacity.images_free_bytes,
                "outgoing": info.capacity.outgoing,
                "outgoing_limit": info.capacity.outgoing_limit,
                "incoming": info.capacity.incoming,
                "incoming_limit": info.capacity.incoming_limit,
                "draining": self.health == "stopping",
            },
            "migrations": [_brief(each) for each in self._migrations.newest(SHOWN)],
            "sessions": [_session(each) for each in self._remote.sessions if each.phase is not session.Phase.ABORTED],
        }
        return web.json_response(state)

    async def _get_migration(self, request: web.Request) -> web.Response:
        return web.json_response(migration_json(self._find(request)))

    async def _get_report(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": _REPORT_POLICY}
        return web.Response(text=report_page(self._find(request)), content_type="text/html", headers=headers)

    def _find(self, request: web.Request) -> Migration:
        found = self._migrations.find(request.match_info["id"])
        if found is None:
            raise web.HTTPNotFound(text="no such migration\n")
        return found


async def _file(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(PAGES / FILES[request.path])


def _brief(migration: Migration) -> dict[str, Any]:
    """What a row of the list needs."""
    known = migration_json(migration)
    kept = ("outcome", "mode", "workload", "process_name", "source_pid", "destination", "destination_name")
    return {
        **progress_json(migration),
        **{key: known[key] for key in (*kept, "created_at", "finished_at")},
        "error": known["error"] and known["error"]["message"],
    }


def _session(found: Session) -> dict[str, Any]:
    return {
        "migration_id": found.incoming.migration_id,
        "phase": found.phase.lower(),
        "workload": found.incoming.spec.name,
        "bytes_received": found.bytes_received,
        "rounds": found.rounds,
        "pages_missing": found.pages_missing,
        "filling": found.is_filling,
    }
