"""TLS 1.3 and nothing older, on both sides."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phaul_client.certs import issue
from tests.attacks.target import Kind, Target

pytestmark = pytest.mark.criu
PHAUL = Path(sys.executable).parent / "phaul"


@pytest.mark.parametrize(("version", "is_served"), [("-tls1_1", False), ("-tls1_2", False), ("-tls1_3", True)])
def test_the_daemon_by_openssl(target: Target, version: str, is_served: bool) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    directory = target.certificates / Kind.ADMIN
    argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{target.port}", version, "-alpn", "h2"]
    argv += ["-CAfile", str(directory / "ca.crt")]
    argv += ["-cert", str(directory / "node.crt"), "-key", str(directory / "node.key")]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert (done.returncode == 0) is is_served
    assert (b"Cipher is (NONE)" in done.stdout) is not is_served


async def test_phaul_refuses_an_older_daemon(certificates: Path) -> None:
    """A server that speaks TLS 1.2 only, with the right certificate: the handshake must fail on our side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificates / "target" / "node.crt", certificates / "target" / "node.key")
    context.set_alpn_protocols(["h2"])
    connected: list[str | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer.get_extra_info("ssl_object").version())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        env = {**os.environ, "PHAUL_TLS_DIR": str(certificates / Kind.ADMIN), "PHAUL_TLS_NAME": "target"}
        argv = [str(PHAUL), "--daemon", f"127.0.0.1:{port}", "info"]
        phaul = await asyncio.create_subprocess_exec(*argv, env=env, stderr=asyncio.subprocess.PIPE)
        _, errors = await phaul.communicate()
    assert phaul.returncode == 6, errors
    assert connected == []


async def test_files_that_are_no_certificates_leave_the_old_ones_in_force(certificates: Path, tmp_path: Path) -> None:
    """Half a renewal, seen by a connection in between; the other half counts with the next one."""
    shutil.copytree(certificates / "target", tmp_path / "tls")
    with Target.running(certificates, tls_dir=str(tmp_path / "tls")) as target:
        await answers(target)
        for half in (b"", b"nonsense", (certificates / Kind.STRANGER / "node.crt").read_bytes()):
            (tmp_path / "tls" / "node.crt").write_bytes(half)
            await answers(target)
        issue(certificates / "ca", "target", tmp_path / "new")
        for name in ("node.key", "node.crt"):
            os.replace(tmp_path / "new" / name, tmp_path / "tls" / name)
        await answers(target)
        pem = await asyncio.to_thread(shown, target)
        assert pem == (tmp_path / "tls" / "node.crt").read_text()


async def answers(target: Target) -> None:
    async with target.channel(Kind.ADMIN) as channel:
        ask: Any = channel.unary_unary("/phaul.v1.Node/GetInfo")
        await ask(b"", timeout=20)


def shown(target: Target) -> str:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(target.certificates / "ca" / "ca.crt")
    context.set_alpn_protocols(["h2"])
    with target.connect() as sock, context.wrap_socket(sock) as tls:
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der)
