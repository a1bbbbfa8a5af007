"""The preamble of a page stream: what is one, and that nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_client.errors import RemoteProtocolError
from phaul_client.stream import MAGIC, PREAMBLE_BYTES, TOKEN_BYTES, Preamble, StreamKind, Verdict, decode_preamble

TOKEN = bytes(range(TOKEN_BYTES))
GOOD = Preamble(StreamKind.PAGES, TOKEN).encode()


def test_the_layout_is_what_the_docstring_says() -> None:
    assert bytes.fromhex("504841554c504701 0001 0001 00000000") + TOKEN == GOOD
    assert len(GOOD) == PREAMBLE_BYTES == 48
    assert (Verdict.ACCEPTED, Verdict.REFUSED) == (0, 1)


@given(st.sampled_from(StreamKind), st.binary(min_size=TOKEN_BYTES, max_size=TOKEN_BYTES))
def test_what_is_encoded_is_decoded(kind: StreamKind, token: bytes) -> None:
    assert decode_preamble(Preamble(kind, token).encode()) == Preamble(kind, token)


@pytest.mark.parametrize("size", [*range(PREAMBLE_BYTES), PREAMBLE_BYTES + 1, 4096])
def test_any_other_size_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"48 bytes, not {size}"):
        decode_preamble((GOOD * 100)[:size])


@pytest.mark.parametrize("position", range(PREAMBLE_BYTES - TOKEN_BYTES))
@pytest.mark.parametrize("bit", range(8))
def test_one_wrong_bit_before_the_token_is_refused(position: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[position] ^= 1 << bit
    try:
        decoded = decode_preamble(bytes(data))
    except RemoteProtocolError:
        return
    assert decoded.kind is not StreamKind.PAGES  # another kind that exists


@pytest.mark.parametrize("position", range(PREAMBLE_BYTES - TOKEN_BYTES, PREAMBLE_BYTES))
def test_a_wrong_bit_in_the_token_makes_another_token(position: int) -> None:
    data = bytearray(GOOD)
    data[position] ^= 1
    assert decode_preamble(bytes(data)).token != TOKEN


@given(st.binary(max_size=2 * PREAMBLE_BYTES) | st.binary(min_size=40, max_size=40).map(MAGIC.__add__))
def test_garbage_is_refused_as_a_breach_of_the_protocol(data: bytes) -> None:
    try:
        decoded = decode_preamble(data)
    except RemoteProtocolError:
        return
    assert decoded.encode() == data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: node-b:7708\r\nAccept: */*\r\n\r\n"[:48], "not a phaul page stream"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".ljust(48, b"\0"), "not a phaul page stream"),
        (GOOD[:8] + b"\0\2" + GOOD[10:], "version 2 is not spoken here, only 1"),
        (GOOD[:10] + b"\xff\xff" + GOOD[12:], "stream kind 65535 is unknown"),
        (GOOD[:12] + b"\0\0\0\1" + GOOD[16:], "not a phaul page stream"),
    ],
)
def test_the_error_says_what_is_wrong(data: bytes, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        decode_preamble(data)


@pytest.mark.parametrize("size", [0, TOKEN_BYTES - 1, TOKEN_BYTES + 1])
def test_a_token_of_another_size_is_a_defect(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Preamble(StreamKind.PAGES, bytes(size))
