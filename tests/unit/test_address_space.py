"""The address space of a process, of this very one."""

import mmap
import os

import pytest

from phaul_client.preflight.address_space import largest, mapping_limit_bytes, read_address_space
from phaul_client.preflight.address_space_model import AddressSpace

SIZE_BYTES = 64 << 30
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
NO_RESERVE = 0x4000


@pytest.mark.parametrize(
    ("flags", "grows", "counted"),
    [
        (PRIVATE, True, True),
        (PRIVATE | NO_RESERVE, True, False),
        (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NO_RESERVE, False, False),
    ],
    ids=["reserved", "without MAP_NORESERVE", "shared"],
)
def test_a_mapping_that_nothing_is_in(flags: int, grows: bool, counted: bool) -> None:
    before = read_address_space(os.getpid())
    with mmap.mmap(-1, SIZE_BYTES, flags, 0):
        found = read_address_space(os.getpid())
    assert (found.private_bytes - before.private_bytes >= SIZE_BYTES) is grows
    assert (found.counted_bytes >= SIZE_BYTES) is counted


def test_the_most_of_several_processes() -> None:
    spaces = [AddressSpace(private_bytes=1, counted_bytes=4), AddressSpace(private_bytes=2, counted_bytes=3)]
    assert largest(spaces) == AddressSpace(private_bytes=2, counted_bytes=4)
    assert largest([]) == AddressSpace()


def test_a_process_that_is_gone() -> None:
    assert read_address_space(2**22 + 1) == AddressSpace()


def test_the_limit_of_this_kernel() -> None:
    assert mapping_limit_bytes() >= 0
