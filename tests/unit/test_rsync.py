"""What rsync is told, what it may be told by another node, and what it says."""

from __future__ import annotations

import pytest

from phaul_client.errors import InvalidRequest
from phaul_client.rsync import (
    Copied,
    Pass,
    client_arguments,
    is_below,
    parse_directories,
    parse_directory,
    parse_output,
    parse_server_arguments,
    shared_writable,
)

#: As rsync 3.2.7 asks for it, for the two kinds of passes.
ASKED = tuple(
    text.split()
    for text in (
        "--server -lHogDtpAXrcxSe.iLsfxCIvu --log-format=X --bwlimit=100 --delete --force -@-1 --numeric-ids . .",
        "--server -lHogDtpAXIRSe.LsfxCIvu --log-format=%i --force -@-1 --numeric-ids . .",
    )
)


@pytest.mark.parametrize("words", ASKED)
def test_what_phaul_asks_for_is_let_through_without_its_path(words: list[str]) -> None:
    assert parse_server_arguments(words) == words[:-1]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--server", "."],
        ["--server", "-re.", ".", "/etc"],
        ["--server", "-re.", ".", "../etc"],
        ["--server", "-rLe.", ".", "."],
        ["--server", "-rKe.", ".", "."],
        ["--server", "--sender", "-re.", ".", "."],
        ["--server", "-re.", "--remove-source-files", ".", "."],
        ["--server", "-re.", "--log-file=/etc/passwd", ".", "."],
        ["--server", "-re.", "--backup-dir=/", ".", "."],
        ["--server", "-re.", "--temp-dir=/tmp", ".", "."],
        ["--daemon", "-re.", ".", "."],
        ["--server", "-re.", "/etc", ".", "."],
    ],
)
def test_anything_else_is_not_started(words: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        parse_server_arguments(words)


def test_deleting_and_a_list_exclude_each_other() -> None:
    for wanted in (Pass(), Pass(checksum=True), Pass(listed=True), Pass(in_place=False)):
        words = client_arguments(["/a b/python", "x"], wanted)
        assert ("--delete" in words) != wanted.listed
        assert ("--ignore-times" in words) == wanted.listed
        assert ("--inplace" in words) == wanted.in_place
        assert '--rsh="/a b/python" "x"' in words


def test_output() -> None:
    assert parse_output("46 f\n0 sub/\n7 a name\nrubbish\n") == Copied(2, 53, ("f", "a name"))
    assert Copied(1, 2, ("a",)) + Copied(1, 3, ("a",)) == Copied(2, 5, ("a",))


def test_directories() -> None:
    assert parse_directory("/srv//data/") == "/srv/data"
    for bad in ("", "/", "//", "srv", "/srv/../etc", "/a\0b"):
        with pytest.raises(InvalidRequest):
            parse_directory(bad)
    assert parse_directories(["/a", "/ab", "/a"]) == ("/a", "/ab")
    with pytest.raises(InvalidRequest):
        parse_directories(["/a/b", "/a"])
    assert is_below("/a/b", "/a")
    assert not is_below("/ab", "/a")


def test_files_that_are_changed_through_memory() -> None:
    maps = """\
7f00-7f01 rw-s 00000000 00:1f 12 /srv/data/mapped file
7f01-7f02 r--s 00000000 00:1f 13 /srv/data/read
7f02-7f03 rw-p 00000000 00:1f 14 /srv/data/private
7f03-7f04 rw-s 00000000 00:1f 15 /srv/data/gone (deleted)
7f04-7f05 rw-s 00000000 00:1f 16 /srv/other
7f05-7f06 rw-s 00000000 00:00 0
"""
    assert shared_writable(maps, "/srv/data") == {"/srv/data/mapped file"}
