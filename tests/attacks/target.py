"""The daemon that is attacked: its start, its certificates, how to reach it, and what it costs it."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from phaul.v1 import remote_pb2_grpc
from phaul_client import certs
from phaul_client.tls import Tls

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "security.md"
PHAULD: Final = Path(sys.executable).parent / "phauld"
START_SECONDS: Final = 20.0
POLICY: Final = """
revoked = ["{revoked}"]
[peers.a]
receive_from = true
[peers.c]
receive_from = true
[peers.admin]
administer = true
"""


class Kind(enum.StrEnum):
    """Who comes, by the certificate that is shown."""

    ADMIN = "administrator"
    NODE = "node"
    STRANGER = "not in the policy"
    REVOKED = "revoked"
    NAMELESS = "without a name"
    EXPIRED = "expired"
    ROGUE = "of another CA"
    NONE = "none"
    CLEAR = "no TLS"


@dataclass
class Target:
    """A phauld."""

    directory: Path
    certificates: Path
    argv: list[str]
    process: subprocess.Popen[bytes]
    port: int = 0
    data_port: int = 0

    @classmethod
    @contextlib.contextmanager
    def running(cls, certificates: Path, **settings: str) -> Iterator[Self]:
        """Start it with these settings over those of the tests, end it."""
        directory = Path(tempfile.mkdtemp(prefix="phaul-target-"))
        flags = {"listen": "127.0.0.1:0", "data-port": "0", "unix": directory / "phauld.sock", "node-name": "target"}
        flags |= {f"{name}-dir": directory / name for name in ("state", "images", "log", "memory-images")}
        flags["tls-dir"] = certificates / "target"
        flags |= {name.replace("_", "-"): value for name, value in settings.items()}
        argv = [str(PHAULD), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        target = cls(directory, certificates, argv, _start(argv, directory))
        try:
            target._find_ports()
            yield target
            assert target.process.poll() is None, f"phauld ended with {target.process.returncode}: {target.log[-4000:]}"
            assert "Traceback" not in target.log, target.log
        finally:
            target._end()
        left = [path.name for name in ("images", "memory-images") for path in (directory / name).iterdir()]
        assert left == []
        shutil.rmtree(directory)

    def restart(self) -> None:
        """Kill it, start it again, at other ports; the journal is the same."""
        self.process.kill()
        self.process.wait(30)
        self.process = _start(self.argv, self.directory)
        self._find_ports()

    def _end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0

    def _find_ports(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := re.search(r"serving listen=[^ ]*:(\d+) .*data_port=(\d+)", self.log):
                self.port, self.data_port = int(found[1]), int(found[2])
                return
            time.sleep(0.02)
        raise AssertionError(f"phauld does not serve: {self.log}")

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.directory / "phauld.log").read_text(encoding="utf-8", errors="replace")

    def descriptors(self) -> int:
        """Open descriptors of it."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def open_files(self) -> list[str]:
        """What its descriptors are."""
        directory = f"/proc/{self.process.pid}/fd"
        return sorted(os.readlink(f"{directory}/{each}") for each in os.listdir(directory))

    def memory_bytes(self) -> int:
        """Its resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise ValueError("no VmRSS")

    def channel(self, kind: str) -> grpc.aio.Channel:
        """gRPC to it as this kind of caller."""
        address = f"127.0.0.1:{self.port}"
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if kind == Kind.CLEAR:
            return grpc.aio.insecure_channel(address, options=options)
        if kind == Kind.NONE:
            credentials = grpc.ssl_channel_credentials((self.certificates / "ca" / "ca.crt").read_bytes())
        else:
            credentials = Tls(self.certificates / kind).channel_credentials()
        options.append(("grpc.ssl_target_name_override", "target"))
        return grpc.aio.secure_channel(address, credentials, options=options)

    def local(self) -> grpc.aio.Channel:
        """gRPC to it as root on this node."""
        return grpc.aio.insecure_channel(f"unix:{self.directory / 'phauld.sock'}")

    def connect(self, *, to_data: bool = False) -> socket.socket:
        """A TCP connection to gRPC's port or the data port."""
        return socket.create_connection(("127.0.0.1", self.data_port if to_data else self.port), timeout=10)


def _start(argv: list[str], directory: Path) -> subprocess.Popen[bytes]:
    with (directory / "phauld.log").open("wb") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def remote(channel: grpc.aio.Channel) -> remote_pb2_grpc.RemoteAsyncStub:
    """The stub of Remote, typed."""
    made: remote_pb2_grpc.RemoteAsyncStub = remote_pb2_grpc.RemoteStub(channel)
    return made


async def raw_call(
    channel: grpc.aio.Channel, path: str, method: Any, sent: Sequence[bytes], timeout_seconds: float
) -> tuple[Any, grpc.aio.AioRpcError | None]:
    """The call of that path with these bytes for messages, up to its first answer; and how it was refused."""
    words = ["stream" if each else "unary" for each in (method.client_streaming, method.server_streaming)]
    request = iter(sent) if method.client_streaming else sent[0]
    call = getattr(channel, "_".join(words))(path)(request, timeout=timeout_seconds)
    try:
        if method.server_streaming:
            await anext(aiter(call), None)
        else:
            await call
    except grpc.aio.AioRpcError as exc:
        return call, exc
    finally:
        call.cancel()
    return call, None


def fingerprint(certificate: Path) -> str:
    """As the policy has it."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest()


def issue_nameless(ca: Path, directory: Path) -> None:
    """A certificate of the CA that names no node, as another user of the same CA may have."""
    certs.issue(ca, "nameless", directory)
    ca_key = serialization.load_pem_private_key((ca / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    old = x509.load_pem_x509_certificate((directory / "node.crt").read_bytes())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")]))
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("admin")]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    (directory / "node.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
