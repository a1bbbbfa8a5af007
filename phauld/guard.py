"""Asks the policy (`access.py`) before each call that comes by TLS; a policy file that changed counts at once.

The invariant: a policy that cannot be read allows nothing. The unix socket is guarded by its mode.
"""

from __future__ import annotations

import contextvars
import hashlib
import os
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.kernel_tls import NOT_TRIED, Taken
from phaul_client.pipe import PipeTls
from phaul_client.tls import Tls
from phauld.access import Policy, parse_policy, peer_name

POLICY_FILE: Final = "policy.toml"
POLICY_REMEDY: Final = (
    "it needs [peers.NAME] with receive_from, send_to or administer = true, such as the line "
    "peers.node-b = {receive_from = true, send_to = true}, see docs/security.md"
)
#: A file that was written less than this ago may be written again without a trace in its times.
SETTLED_SECONDS: Final = 2.0
#: The name in the certificate of whoever makes the call that runs; empty on the unix socket and without TLS.
CALLER: Final = contextvars.ContextVar("caller", default="")


class Guard:
    """The policy of one daemon."""

    def __init__(self, tls: Tls, *, kernel_tls: Taken = NOT_TRIED) -> None:
        self.tls = tls
        self.kernel_tls = kernel_tls.works  #: pages' TLS may be the kernel's, which can do it
        self.kernel_tls_found = kernel_tls
        self._path = tls.directory / POLICY_FILE
        self._known: tuple[tuple[int, ...], Policy] | None = None  # what the file looked like, and said

    def policy(self) -> Policy:
        """As it stands in the file. Raises `InvalidRequest`."""
        try:
            looks = _looks(self._path)
            if self._known is not None and self._known[0] == looks:
                return self._known[1]
            policy = self._parse()
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise InvalidRequest(f"policy {self._path}: {why}", reason="UNAUTHORIZED", remedy=POLICY_REMEDY) from exc
        is_settled = time.time() - looks[0] / 1e9 > SETTLED_SECONDS
        self._known = (looks, policy) if is_settled else None
        return policy

    def _parse(self) -> Policy:
        """Raises `InvalidRequest` naming the file, `OSError`, `UnicodeDecodeError`."""
        try:
            return parse_policy(self._path.read_text(encoding="utf-8"))
        except InvalidRequest as exc:
            raise InvalidRequest(f"{self._path}: {exc.message}", reason=exc.reason, remedy=POLICY_REMEDY) from exc

    def check(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Let the call through and name its `CALLER`. Raises `PhaulError` UNAUTHORIZED."""
        if context.peer().startswith("unix:"):
            return
        facts = context.auth_context()
        pem = next(iter(facts.get("x509_pem_cert", ())), b"")
        sans = [each.decode(errors="replace") for each in facts.get("x509_subject_alternative_name", ())]
        why = "it has no certificate"
        if pem:
            fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest()
            why = self.policy().refusal(method, sans, fingerprint)
        if why:
            raise PhaulError(
                f"{method} is not allowed: {why}", reason="UNAUTHORIZED", remedy=f"{POLICY_FILE} there says who may"
            )
        CALLER.set(peer_name(sans) or "")

    def pipe_tls(self, peer: str) -> PipeTls:
        """For pages to or from this node, and nobody else. Raises `InvalidRequest`."""
        revoked = tuple(self.policy().revoked)
        return PipeTls(directory=self.tls.directory, peer=peer, revoked=revoked, kernel=self.kernel_tls)

    def peer_at(self, address: str) -> str:
        """The node that the policy knows at HOST:PORT. Raises `InvalidRequest`."""
        return self.policy().destination(address.rpartition(":")[0].strip("[]"))

    def pipe_tls_to(self, address: str) -> PipeTls:
        """For pages to HOST:PORT. Raises `InvalidRequest`."""
        return self.pipe_tls(self.peer_at(address))

    def open_channel(
        self, address: str, options: Sequence[tuple[str, Any]], interceptors: Sequence[grpc.aio.ClientInterceptor]
    ) -> grpc.aio.Channel:
        """A connection to the node that the policy knows at this address. Raises `InvalidRequest`."""
        name = self.peer_at(address)
        options = [*options, ("grpc.ssl_target_name_override", name)]
        credentials = self.tls.channel_credentials()
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


def _looks(path: Path) -> tuple[int, ...]:
    """Different once the file was written or replaced: times in ns, the later one first. Raises `OSError`."""
    found = os.stat(path)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (max(times), *times, found.st_ino, found.st_dev, found.st_size)


def open_channel(
    address: str, interceptors: Sequence[grpc.aio.ClientInterceptor], guard: Guard | None
) -> grpc.aio.Channel:
    """A connection of its own: what a cut did to another migration's (a back-off, a dead socket) is not ours."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if guard is not None:
        return guard.open_channel(address, options, interceptors)
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
