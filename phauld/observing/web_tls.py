"""HTTPS of `http_listen`: mutual TLS 1.3 with the certificates of gRPC, and the same policy.

The invariant: certificates and policy that were replaced count for the next connection and the next request.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from typing import Final

from aiohttp import web

from phaul_client.errors import InvalidRequest
from phaul_client.wire import WireError, tls_context
from phauld.access import HTTP_RIGHTS, Right
from phauld.guard import Guard

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 5.0


class Secured:
    """Who may look, by certificate."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._files: tuple[bytes, ...] = ()

    def context(self) -> ssl.SSLContext:
        """For the server. Raises `InvalidRequest`, `WireError`."""
        self._files = self._guard.tls.read()
        first = tls_context(self._guard.tls.directory, server_side=True)
        current = first

        def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            """Called in each handshake: what is in the files now, or, while they cannot be read, what was."""
            nonlocal current
            try:
                if (found := self._guard.tls.read()) != self._files:
                    current, self._files = tls_context(self._guard.tls.directory, server_side=True), found
            except (InvalidRequest, WireError) as exc:
                logger.warning("http certificates not read error=%s", exc)
            connection.context = current

        first.sni_callback = choose
        return first

    def refusal(self, request: web.Request) -> str:
        """Why this request is refused; empty: it is not."""
        connection = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
        if connection is None or (certificate := connection.getpeercert(binary_form=True)) is None:
            return "no certificate"
        facts = connection.getpeercert()
        sans = [str(value) for kind, value in facts.get("subjectAltName", ()) if kind == "URI"]
        right = HTTP_RIGHTS.get(request.path, Right.ADMINISTER)
        try:
            return self._guard.policy().refusal_of(right, sans, hashlib.sha256(certificate).hexdigest())
        except InvalidRequest as exc:
            return str(exc)
