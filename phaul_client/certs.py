"""Makes a CA and certificates of nodes, for those who have none. `phaul certs` writes them to files.

The invariant: a key is written with mode 0600, and nothing that exists is overwritten.
"""

import datetime
import os
import re
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from phaul_client.errors import InvalidRequest
from phaul_client.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE

CA_KEY_FILE: Final = "ca.key"
CA_DAYS: Final = 3650
NODE_DAYS: Final = 365
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")


def make_ca(directory: Path, days: int = CA_DAYS) -> None:
    """`ca.crt` and `ca.key` in `directory`. Raises `InvalidRequest`, `OSError`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "phaul CA")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _builder(name, name, key.public_key(), days, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    _write(directory, builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), CA_FILE, key, CA_KEY_FILE)


def issue(ca_directory: Path, name: str, directory: Path, days: int = NODE_DAYS) -> None:
    """`node.crt`, `node.key` and a copy of `ca.crt` in `directory`. Raises `InvalidRequest`, `OSError`."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is not a node's name: letters, digits, dots and dashes")
    try:
        ca_pem = (ca_directory / CA_FILE).read_bytes()
        ca_key = serialization.load_pem_private_key((ca_directory / CA_KEY_FILE).read_bytes(), None)
        ca = x509.load_pem_x509_certificate(ca_pem)
    except (OSError, ValueError, TypeError) as exc:
        why = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) else str(exc)
        raise InvalidRequest(f"no usable CA in {ca_directory}: {why}", remedy="phaul certs init makes one") from exc
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [x509.UniformResourceIdentifier(f"phaul://node/{name}"), x509.DNSName(name)]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(directory, certificate, CERTIFICATE_FILE, key, KEY_FILE)
    if not (directory / CA_FILE).exists():
        (directory / CA_FILE).write_bytes(ca_pem)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    issuer_key: ec.EllipticCurvePublicKey,
) -> x509.CertificateBuilder:
    """The keys' identifiers tell CAs of the same name apart, while an old and a new one both count."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + datetime.timedelta(days=days)) - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _write(
    directory: Path, certificate: x509.Certificate, name: str, key: ec.EllipticCurvePrivateKey, key_name: str
) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if found := [each for each in (name, key_name) if (directory / each).exists()]:
        raise InvalidRequest(
            f"{directory / found[0]} is there already", remedy="choose another directory, or remove it"
        )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    descriptor = os.open(directory / key_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(*form))
    (directory / name).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
