"""Addresses that move: how they are written, and what is sent and loaded for them."""

from __future__ import annotations

import pytest

from phaul_client.addresses import (
    arp_announcements,
    neighbour_advertisement,
    parse_address,
)
from phaul_client.errors import InvalidRequest

MAC = bytes.fromhex("020000000001")


@pytest.mark.parametrize("text", ["10.0.0.9", "10.0.0.9/24", "10.0.0.9/24@eth0.5", "fd00::9/64@lan0", "fd00::9"])
def test_what_is_written_is_read_again(text: str) -> None:
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "node-b", "10.0.0.9/33", "10.0.0.9/x", "10.0.0.9@", "10.0.0.9@a b", "10.0.0.9@-x", "127.0.0.1", "::",
     "224.0.0.1", "fe80::1%eth0", "10.0.0.9@eth0;drop", "10.0.0.9/+1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_address(text)


def test_a_gratuitous_arp_names_the_address_as_sender_and_target() -> None:
    request, reply = arp_announcements("10.0.0.9", MAC)
    assert (len(request), len(reply)) == (42, 42)
    assert request[:14] == b"\xff" * 6 + MAC + b"\x08\x06"
    assert (request[20:22], reply[20:22]) == (b"\0\x01", b"\0\x02")
    assert request[22:32] == MAC + bytes([10, 0, 0, 9])
    assert request[38:] == reply[38:] == bytes([10, 0, 0, 9])


def test_an_unsolicited_advertisement_overrides_what_neighbours_know() -> None:
    packet = neighbour_advertisement("fd00::9", MAC)
    assert packet[0] == 136
    assert packet[4] == 0x20
    assert packet[8:24].hex() == "fd000000000000000000000000000009"
    assert packet[24:] == b"\x02\x01" + MAC
