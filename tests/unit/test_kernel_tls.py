"""TLS by this machine's kernel, if it can; that it cannot is found out, and told by nobody's guess."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phaul_client import kernel_tls
from phaul_client.certs import issue, make_ca
from phaul_client.kernel_tls import is_in_kernel, try_it, works
from phaul_client.wire import PlainWire, TlsWire, WireError, make_tls, receive_exactly


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("certificates")
    make_ca(root / "ca")
    for name in ("a", "b"):
        issue(root / "ca", name, root / name)
    return root


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        yield near, far


def kernel_has_tls(sock: socket.socket) -> bool:
    """Asked another way than `works` asks. TCP_ULP is 31 (linux/tcp.h)."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    except OSError:
        return False
    return True


def test_it_works_nowhere_without_the_kernel(
    certificates: Path, connected: tuple[socket.socket, socket.socket]
) -> None:
    if kernel_has_tls(connected[0]):
        pytest.skip("this kernel has TLS; OpenSSL may have, or not")
    assert not works(certificates / "a")


def test_a_directory_without_a_certificate(tmp_path: Path) -> None:
    assert not works(tmp_path)


def test_what_keeps_the_kernel_from_it_is_told(certificates: Path) -> None:
    found = try_it(certificates / "a")
    assert found.works or (found.is_certain and ("kernel" in found.why))


def test_a_trial_that_came_to_no_end_is_not_taken_for_an_answer(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine; the next phauld may find another answer, so the log warns."""
    monkeypatch.setattr(kernel_tls, "_kernel_has_tls", lambda: True)
    monkeypatch.setattr(kernel_tls, "_shake", lambda handshake, seconds: None)  # the other end does not go on
    found = try_it(certificates / "a", seconds=0.05)
    assert not found.works
    assert not found.is_certain
    assert "does not go on with the handshake" in found.why


@pytest.mark.parametrize("by_kernel", ["client", "server"])
def test_either_end_may_leave_it_to_its_kernel(
    certificates: Path, connected: tuple[socket.socket, socket.socket], by_kernel: str
) -> None:
    if not works(certificates / "a"):
        pytest.skip("this kernel, or this OpenSSL, has no TLS for the kernel; tests/vm/test_kernel_tls.py has")
    near, far = connected
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(make_tls, far, certificates / "b", "a", server_side=True, kernel=by_kernel == "server")
        client = make_tls(near, certificates / "a", "b", server_side=False, kernel=by_kernel == "client")
        server = accepted.result(10)
    assert [isinstance(each, PlainWire) for each in (client, server)] == [by_kernel == "client", by_kernel == "server"]
    assert [is_in_kernel(each) for each in connected] == [by_kernel == "client", by_kernel == "server"]
    buffer = memoryview(bytearray(100_000))
    client.send([b"x" * 100_000])
    assert receive_exactly(server, buffer) == 100_000
    server.send([buffer])
    assert receive_exactly(client, buffer) == 100_000


def test_a_kernel_that_cannot_after_all(certificates: Path, connected: tuple[socket.socket, socket.socket]) -> None:
    near, far = connected
    if kernel_has_tls(near):
        pytest.skip("this kernel has TLS")
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(make_tls, far, certificates / "b", "a", server_side=True)
        with pytest.raises(WireError, match="did not take it over"):
            make_tls(near, certificates / "a", "b", server_side=False, kernel=True)
        assert isinstance(accepted.result(10), TlsWire)
