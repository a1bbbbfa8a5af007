"""The parsers of /proc's texts."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from phaul_client.preflight import proc_text
from phaul_client.preflight.check_terminals import is_terminal
from phaul_client.preflight.destination_facts import _is_locked
from phaul_client.preflight.unix_diag import parse_unix_diag

STAT = "7 (a) (b)) S 1 7 7 34816 7 4194304 1 0 0 0 0 0 0 0 20 0 1 0 5 1000 25 18446744073709551615 1 1 0 0\n"


def test_a_name_with_parentheses() -> None:
    stat = proc_text.parse_stat(STAT)
    assert (stat.name, stat.state, stat.parent_pid, stat.terminal, stat.resident_pages) == ("a) (b)", "S", 1, 34816, 25)
    assert not stat.is_kernel_thread


def test_mappings_with_spaces_and_without_names() -> None:
    text = (
        "7f00-7f01 r-xp 00000000 fe:00 12   /usr/lib/a b.so (deleted)\n"
        "7f01-7f02 rw-p 00000000 00:00 0 \n"
        "7f02-7f03 rw-s 00000000 00:01 9 /memfd:x (deleted)\n"
    )
    found = list(proc_text.parse_maps(text))
    assert [(line.path, line.permissions, line.inode) for line in found] == [
        ("/usr/lib/a b.so (deleted)", "r-xp", 12),
        ("/memfd:x (deleted)", "rw-s", 9),
    ]
    assert proc_text.strip_deleted(found[0].path) == ("/usr/lib/a b.so", True)


def test_tcp_tables_of_both_families() -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    four = "0: 0100007F:1F90 00000000:0000 0A 00000000:00000003 00:00000000 00000000 0 0 4242 1 0 100 0 0 10 0\n"
    six = (
        "0: 0000000000000000FFFF00000100007F:1F90 00000000000000000000000001000000:0050 01 "
        "00000000:00000000 00:00000000 00000000 0 0 7 1 0 100 0 0 10 0\n"
    )
    (listener,) = proc_text.parse_inet(head + four)
    assert (listener.local_address, listener.local_port, listener.state) == ("127.0.0.1", 8080, 10)
    assert (listener.waiting, listener.inode) == (3, 4242)
    (connection,) = proc_text.parse_inet(head + six)
    assert (connection.local_address, connection.remote_address) == ("::ffff:127.0.0.1", "::1")


def test_fdinfo_of_locks_and_epoll() -> None:
    text = "pos:\t0\nflags:\t0100002\nmnt_id:\t27\nlock:\t1: FLOCK  ADVISORY  WRITE 12 fe:00:9 0 EOF\n"
    assert proc_text.parse_locks(text) == ("FLOCK WRITE 0-EOF",)
    assert proc_text.parse_fields(text)["mnt_id"] == "27"
    epoll = "pos:\t0\ntfd:        5 events:       19 data:                5  pos:0 ino:1a2b sdev:d\n"
    assert proc_text.parse_epoll(epoll) == (5,)


def test_flags_that_every_cpu_has() -> None:
    text = "processor : 0\nflags\t\t: fpu sse avx\n\nprocessor : 1\nflags\t\t: fpu sse\n"
    assert proc_text.parse_cpu_flags(text) == {"fpu", "sse"}
    assert proc_text.parse_cpu_flags("") == frozenset()


@given(st.binary(min_size=1, max_size=40), st.integers(0, 3))
def test_the_build_id_is_found_after_other_notes(build_id: bytes, others: int) -> None:
    def note(name: bytes, kind: int, value: bytes) -> bytes:
        padded = [part + bytes(-len(part) % 4) for part in (name, value)]
        return struct.pack("<III", len(name), len(value), kind) + b"".join(padded)

    notes = note(b"Other\0", 3, b"12345") * others + note(b"GNU\0", 3, build_id)
    assert proc_text.build_id_in_notes(notes) == build_id


@given(st.binary(max_size=200))
def test_any_bytes_are_no_elf_file_or_have_segments(data: bytes) -> None:
    list(proc_text.note_segments(b"\x7fELF\x02\x01" + data))
    list(proc_text.note_segments(data))


def test_a_message_of_the_kernel_about_a_unix_socket() -> None:
    peer = struct.pack("=HHI", 8, 2, 77)
    name = struct.pack("=HH", 4 + 3, 0) + b"\0ab" + b"\0"
    found = parse_unix_diag(struct.pack("=BBBxI8x", 1, 1, 10, 42) + name + peer)
    assert (found.inode, found.type, found.listening, found.name, found.peer_inode) == (42, 1, True, "@ab", 77)


def test_terminals_by_number() -> None:
    assert all(is_terminal(major << 8 | minor) for major, minor in ((4, 1), (5, 0), (5, 2), (136, 3), (143, 9)))
    assert not is_terminal(1 << 8 | 3)


def test_a_lock_that_somebody_holds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    with path.open("rb+") as held:
        assert not any(_is_locked(str(path), each) for each in ("FLOCK WRITE 0-EOF", "OFDLCK READ 0-EOF"))
        fcntl.flock(held, fcntl.LOCK_SH)
        assert _is_locked(str(path), "FLOCK WRITE 0-EOF")
        assert not _is_locked(str(path), "FLOCK READ 0-EOF")
        fcntl.fcntl(held, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 4, 2, 0))  # F_OFD_SETLK
        assert _is_locked(str(path), "POSIX READ 0-EOF")
        assert _is_locked(str(path), "POSIX READ 5-5")
        assert not _is_locked(str(path), "POSIX WRITE 0-3")
        for nonsense in ("", "LEASE WRITE 0-EOF", "POSIX WRITE x-y", "POSIX"):
            assert not _is_locked(str(path), nonsense)
