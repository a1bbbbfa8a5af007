"""Asks the policy (`access.py`) before each call that comes by TLS; the policy file is read anew for each.

The invariant: a policy that cannot be read allows nothing. The unix socket is guarded by its mode.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence
from typing import Any, Final

import grpc

from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.tls import Tls
from phauld.access import Policy, parse_policy

POLICY_FILE: Final = "policy.toml"


class Guard:
    """The policy of one daemon."""

    def __init__(self, tls: Tls) -> None:
        self.tls = tls
        self._path = tls.directory / POLICY_FILE

    def policy(self) -> Policy:
        """As it stands in the file. Raises `InvalidRequest`."""
        try:
            return parse_policy(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as exc:
            remedy = "it needs [peers.NAME] with receive_from, send_to or administer = true"
            raise InvalidRequest(f"policy {self._path}: {exc}", reason="UNAUTHORIZED", remedy=remedy) from exc

    def check(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Raises `PhaulError` UNAUTHORIZED."""
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
            raise PhaulError(f"{method} is not allowed: {why}", reason="UNAUTHORIZED", remedy=f"{POLICY_FILE} there")

    def open_channel(
        self, address: str, options: Sequence[tuple[str, Any]], interceptors: Sequence[grpc.aio.ClientInterceptor]
    ) -> grpc.aio.Channel:
        """A connection to the node that the policy knows at this address. Raises `InvalidRequest`."""
        name = self.policy().destination(address.rpartition(":")[0].strip("[]"))
        options = [*options, ("grpc.ssl_target_name_override", name)]
        credentials = self.tls.channel_credentials()
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)
