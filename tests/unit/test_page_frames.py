"""The frames of the page pipe: what goes in comes out, and whatever else arrives is noticed."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from phaul_client.errors import ImageCorrupt, PhaulError, RemoteProtocolError
from phaul_client.page_frames import (
    HEAD_BYTES,
    MAX_FAIL_BYTES,
    MAX_FRAME_BYTES,
    Codec,
    Head,
    Kind,
    Numbers,
    check_content,
    decode_failure,
    decode_head,
    encode_failure,
)

sizes = st.integers(1, MAX_FRAME_BYTES)


@st.composite
def data_heads(draw: st.DrawFn) -> Head:
    raw = draw(sizes)
    codec = draw(st.sampled_from(Codec)) if raw > 1 else Codec.NONE
    return Head(
        kind=Kind.DATA,
        codec=codec,
        wire_bytes=draw(st.integers(0, raw - 1)) if codec else raw,
        raw_bytes=raw,
        sequence=draw(st.integers(1, 2**64 - 1)),
        digest=draw(st.integers(0, 2**64 - 1)),
    )


@given(data_heads())
def test_a_head_comes_out_as_it_went_in(head: Head) -> None:
    encoded = head.encode()
    assert len(encoded) == HEAD_BYTES == 32
    assert decode_head(encoded) == head


@given(data_heads(), st.integers(0, HEAD_BYTES * 8 - 1))
def test_every_flipped_bit_of_a_head_is_noticed(head: Head, bit: int) -> None:
    damaged = bytearray(head.encode())
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ImageCorrupt):
        decode_head(damaged)


@given(st.binary(max_size=2 * HEAD_BYTES))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises((ImageCorrupt, RemoteProtocolError)):
        decode_head(garbage)


def head(**changed: int) -> Head:
    values = {"kind": Kind.DATA, "wire_bytes": 4, "raw_bytes": 4, "sequence": 1, "digest": 0} | changed
    return Head(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": 9},
        {"codec": 9},
        {"wire_bytes": 5},
        {"wire_bytes": 0, "raw_bytes": 0},
        {"codec": Codec.LZ4},  # not smaller: it is not sent compressed
        {"wire_bytes": MAX_FRAME_BYTES + 1, "raw_bytes": MAX_FRAME_BYTES + 1},
        {"codec": Codec.ZSTD, "raw_bytes": 2**32 - 1},  # a small frame that would fill memory
        {"kind": Kind.END},
        {"kind": Kind.FAIL, "wire_bytes": MAX_FAIL_BYTES + 1, "raw_bytes": MAX_FAIL_BYTES + 1},
    ],
)
def test_a_head_that_lies_is_refused(changed: dict[str, int]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_head(head(**changed).encode())


@given(st.lists(st.integers(0, 5), max_size=6))
def test_only_the_next_frame_is_taken(arrivals: list[int]) -> None:
    numbers = Numbers()
    for sequence in arrivals:
        before = numbers.last
        try:
            numbers.expect(head(sequence=sequence))
        except ImageCorrupt:
            assert sequence != before + 1
            assert numbers.last == before
        else:
            assert sequence == numbers.last == before + 1


def test_nothing_comes_after_the_end() -> None:
    numbers, sender = Numbers(), Numbers()
    numbers.expect(head(kind=Kind.END, wire_bytes=0, raw_bytes=0, sequence=sender.next()))
    with pytest.raises(ImageCorrupt):
        numbers.expect(head(sequence=sender.next()))


@given(st.binary(min_size=1, max_size=5000), st.data())
def test_a_flipped_bit_of_the_content_is_noticed(content: bytes, data: st.DataObject) -> None:
    sent = head(wire_bytes=len(content), raw_bytes=len(content), digest=xxhash.xxh3_64_intdigest(content))
    check_content(sent, len(content), xxhash.xxh3_64_intdigest(content))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ImageCorrupt):
        check_content(sent, len(damaged), xxhash.xxh3_64_intdigest(damaged))
    with pytest.raises(ImageCorrupt):
        check_content(sent, len(content) - 1, sent.digest)


@given(st.text(max_size=3000))
def test_a_failure_comes_out_as_it_went_in(message: str) -> None:
    content = encode_failure("IMAGE_CORRUPT", message.encode(errors="replace").decode())
    assert len(content) <= MAX_FAIL_BYTES
    reason, found = decode_failure(content)
    assert reason == "IMAGE_CORRUPT"
    assert found.rstrip("\ufffd") in message.encode(errors="replace").decode()


@given(st.binary(max_size=MAX_FAIL_BYTES))
def test_any_failure_has_a_reason(content: bytes) -> None:
    reason, _ = decode_failure(content)
    assert reason
    assert PhaulError("", reason=reason).reason == reason
