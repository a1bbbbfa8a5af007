"""Mutual TLS of gRPC from one directory: `ca.crt`, `node.crt`, `node.key`.

The invariant: files are read anew for each connection, so that replaced certificates count without a restart.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from phaul_client.errors import InvalidRequest

CA_FILE: Final = "ca.crt"
CERTIFICATE_FILE: Final = "node.crt"
KEY_FILE: Final = "node.key"


@dataclass(frozen=True, slots=True)
class Tls:
    """Where the certificates of this node, or of a person, are."""

    directory: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """CA, certificate and key. Raises `InvalidRequest` naming the file."""
        return self._read(CA_FILE), self._read(CERTIFICATE_FILE), self._read(KEY_FILE)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one connection. Raises `InvalidRequest`."""
        ca, certificate, key = self.read()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """A client certificate is required; files that are not there for a moment leave the old ones in force.

        gRPC asks for each connection. It must not be given what it has already: it would drop what it uses, perhaps in
        the middle of another connection's handshake, which was seen to crash it (1.85.1, some hundred strangers).
        """

        current = self.read()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            with contextlib.suppress(InvalidRequest):
                found = self.read()
                if found != current:
                    current = found
                    return _configuration(*current)
            return None

        return grpc.dynamic_ssl_server_credentials(
            _configuration(*current),
            fetch,  # type: ignore[arg-type]  # None, for "no change", is not in its types
            require_client_authentication=True,
        )

    def _read(self, name: str) -> bytes:
        path = self.directory / name
        try:
            return path.read_bytes()
        except OSError as exc:
            remedy = "phaul certs init makes a CA, phaul certs issue the certificate of a node"
            raise InvalidRequest(f"TLS: {path}: {exc.strerror}", remedy=remedy) from exc


def _configuration(ca: bytes, certificate: bytes, key: bytes) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)
