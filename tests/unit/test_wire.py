"""The seam between pages and the network: one suite for plain TCP and for TLS, and who is let in by TLS."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_client.certs import issue, make_ca
from phaul_client.packed_wire import PackedWire
from phaul_client.page_frames import HEAD_BYTES
from phaul_client.wire import PlainWire, TlsWire, Wire, WireError, make_tls, receive_exactly

MIB: Final = 1 << 20
MakePair = Callable[[], tuple[Wire, Wire]]


_MADE: Final[list[socket.socket]] = []


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    _MADE.extend((near, far))
    return near, far


@pytest.fixture(autouse=True)
def close_sockets() -> Iterator[None]:
    """A wire leaves its socket to the last reference, in a process that soon ends."""
    yield
    while _MADE:
        _MADE.pop().close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nodes a and b, of a rogue CA's node a, and of an expired one."""
    root = tmp_path_factory.mktemp("certificates")
    for ca in ("ca", "rogue-ca"):
        make_ca(root / ca)
    for name in ("a", "b"):
        issue(root / "ca", name, root / name)
    issue(root / "rogue-ca", "a", root / "rogue")
    issue(root / "ca", "a", root / "expired", days=-1)
    return root


def tls_pair(certificates: Path, client: str = "a", **server: object) -> tuple[Wire, Future[Wire]]:
    near, far = connected()
    with ThreadPoolExecutor(1) as pool:
        server_name = str(server.get("name", "a"))
        revoked = server.get("revoked", ())
        accepted = pool.submit(make_tls, far, certificates / "b", server_name, revoked, server_side=True)  # type: ignore[arg-type]
        return make_tls(near, certificates / client, str(server.get("expects", "b")), server_side=False), accepted


@pytest.fixture(params=["plain", "tls", "packed", "packed-zstd-tls"])
def pair(request: pytest.FixtureRequest, certificates: Path) -> Iterator[tuple[Wire, Wire]]:
    near: Wire
    far: Wire
    if request.param.endswith("tls"):
        near, accepted = tls_pair(certificates)
        far = accepted.result()
    else:
        near, far = map(PlainWire, connected())
    if request.param.startswith("packed"):
        compression = "zstd" if "zstd" in request.param else "off"
        near, far = PackedWire(near, compression), PackedWire(far, "off")
    yield near, far
    near.close()
    far.close()


def test_pieces_arrive_in_order_and_nothing_is_held_back(pair: tuple[Wire, Wire]) -> None:
    near, far = pair
    buffer = memoryview(bytearray(100))
    for size in (1, 32, 5):  # half duplex, as criu's page stream
        assert near.send([b"", b"x" * size]) >= size
        assert receive_exactly(far, buffer[:size]) == size
        far.send([buffer[:size]])
        assert receive_exactly(near, buffer[:size]) == size
    near.send([b"ab", bytearray(b"cd"), memoryview(b"ef")])
    assert receive_exactly(far, buffer[:6]) == 6
    assert bytes(buffer[:6]) == b"abcdef"


def test_both_directions_at_once(pair: tuple[Wire, Wire]) -> None:
    content = os.urandom(4 * MIB + 17)
    received: dict[int, bytes] = {}

    def receive(which: int) -> None:
        buffer = bytearray(len(content))
        receive_exactly(pair[which], memoryview(buffer))
        received[which] = bytes(buffer)

    threads = [threading.Thread(target=receive, args=(which,)) for which in (0, 1)]
    threads += [threading.Thread(target=wire.send, args=([content],)) for wire in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert received == {0: content, 1: content}


@settings(max_examples=60, deadline=None)
@given(where=st.integers(0, HEAD_BYTES + 999), bit=st.integers(0, 7))
def test_a_frame_with_a_flipped_bit_is_an_error(where: int, bit: int) -> None:
    near, far = connected()
    sent: list[bytes] = []
    tap = PackedWire(PlainWire(near), "off")
    tap._wire.send = lambda pieces: sent.append(b"".join(pieces)) or 0  # type: ignore[method-assign, func-returns-value]
    tap.send([b"x" * 1000])
    damaged = bytearray(sent[0])
    damaged[where] ^= 1 << bit
    near.sendall(damaged)
    near.close()
    with pytest.raises(WireError), far:
        PackedWire(PlainWire(far), "off").receive_into(memoryview(bytearray(1000)))


def test_a_frame_that_comes_again_is_an_error() -> None:
    near, far = connected()
    receiver = PackedWire(PlainWire(far), "off")
    PackedWire(PlainWire(near), "off").send([b"once"])
    PackedWire(PlainWire(near), "off").send([b"once"])
    assert receiver.receive_into(memoryview(bytearray(10))) == 4
    with pytest.raises(WireError):
        receiver.receive_into(memoryview(bytearray(10)))


def test_close_wakes_whoever_waits(pair: tuple[Wire, Wire]) -> None:
    ended = threading.Event()

    def wait() -> None:
        with contextlib.suppress(OSError):
            pair[1].receive_into(memoryview(bytearray(1)))
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    pair[1].close()
    thread.join(10)
    assert ended.is_set()
    pair[1].close()


def test_a_cut_connection_is_no_end_under_tls(certificates: Path) -> None:
    near, accepted = tls_pair(certificates)
    accepted.result().close()  # without TLS's good-bye, as a cut
    with pytest.raises(WireError, match="good-bye"):
        near.receive_into(memoryview(bytearray(1)))


def test_a_damaged_byte_is_noticed_under_tls(certificates: Path) -> None:
    sockets = connected(), connected()
    with ThreadPoolExecutor(3) as pool:
        flip = threading.Event()

        def carry(source: socket.socket, sink: socket.socket) -> None:
            while chunk := source.recv(MIB):
                if flip.is_set():
                    chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
                sink.sendall(chunk)

        (near, middle), (other, far) = sockets
        there, back = pool.submit(carry, middle, other), pool.submit(carry, other, middle)
        accepted = pool.submit(make_tls, far, certificates / "b", "a", server_side=True)
        client = make_tls(near, certificates / "a", "b", server_side=False)
        server = accepted.result()
        flip.set()
        client.send([b"page"])
        with pytest.raises(WireError, match="TLS"):
            server.receive_into(memoryview(bytearray(4)))
        for sock in (near, middle, other, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for task in (there, back):
            with contextlib.suppress(OSError):
                task.result()


@pytest.mark.parametrize(
    ("client", "server"),
    [
        ("rogue", {}),
        ("expired", {}),
        ("a", {"name": "c"}),  # a good certificate, but not the one that opened the session
        ("b", {}),
        ("a", {"expects": "c"}),
    ],
)
def test_nobody_else_is_let_in(certificates: Path, client: str, server: dict[str, object]) -> None:
    near, far = connected()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(make_tls, far, certificates / "b", str(server.get("name", "a")), server_side=True)
        with pytest.raises(OSError, match=r".+"):
            make_tls(near, certificates / client, str(server.get("expects", "b")), server_side=False)
        if "expects" not in server:  # else it is the client that goes away
            with pytest.raises(WireError):
                accepted.result(10)
        else:
            with contextlib.suppress(OSError):
                accepted.result(10).receive_into(memoryview(bytearray(1)))


def test_a_revoked_certificate_is_not_let_in(certificates: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert((certificates / "a/node.crt").read_text())
    with pytest.raises(WireError, match="does not take this node"):
        tls_pair(certificates, revoked={hashlib.sha256(der).hexdigest()})


@pytest.mark.parametrize("greeting", [b"", b"PHAULPG\x01 garbage", b"\x16\x03\x01\x00\x05hello"])
def test_whoever_does_not_speak_tls_is_refused(certificates: Path, greeting: bytes) -> None:
    near, far = connected()
    with near:
        near.sendall(greeting)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError, match="TLS"):
            make_tls(far, certificates / "b", "a", server_side=True)


def test_no_version_but_1_3(certificates: Path) -> None:
    near, far = connected()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates / "a/ca.crt")
    context.load_cert_chain(certificates / "a/node.crt", certificates / "a/node.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(make_tls, far, certificates / "b", "a", server_side=True)
        with near, pytest.raises(ssl.SSLError):
            context.wrap_socket(near)
        with pytest.raises(WireError):
            accepted.result(10)


@settings(max_examples=30, deadline=None)
@given(garbage=st.binary(min_size=1, max_size=2000))
def test_garbage_in_a_session_is_an_error(certificates: Path, garbage: bytes) -> None:
    near, accepted = tls_pair(certificates)
    far = accepted.result()
    assert isinstance(near, TlsWire)
    near._socket.sendall(garbage)
    near.close()
    with pytest.raises(WireError):
        far.receive_into(memoryview(bytearray(4)))
