"""How rsync is told to make one directory the same as another, and what it says (pure).

Both ends are checked by this file: the destination starts only what `parse_server_arguments` lets through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from phaul_client.errors import InvalidRequest

PROGRAM: Final = "rsync"
PACKAGE_REMEDY: Final = "apt-get install rsync"
SHOWN_PATHS: Final = 20
#: 23: something was not transferred, 24: files vanished. Both are to be expected while the tree runs.
NOT_COMPLETE: Final = frozenset({23, 24})
_BOTH: Final = (
    *("--links", "--hard-links", "--owner", "--group", "--devices", "--specials", "--times", "--perms", "--acls"),
    *("--xattrs", "--sparse", "--numeric-ids", "--force", "--modify-window=-1", "--8-bit-output"),
    "--out-format=%b %n",
)
#: Letters of the options above, and R, I, r, c, x of those below; what follows `e` are abilities of a version.
_LETTERS: Final = re.compile(r"-[lHogDtpAXrcxSIR]*e[A-Za-z.0-9]*")
_LONG: Final = re.compile(
    r"--(server|force|delete|numeric-ids|inplace|log-format=[Xi%]*|bwlimit=\d+)|-@-1|--modify-window=-1"
)
_OUTPUT: Final = re.compile(r"(\d+) (.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run of rsync over a directory."""

    #: Compare what is the same by size and time by content, too.
    checksum: bool = False
    #: Only the files of a list (its standard input), whatever their times say. Else all, and what is not here goes.
    listed: bool = False
    #: Write into files that are there. Not into files of somebody else: they may have other names.
    in_place: bool = True
    bandwidth_bytes_per_second: int = 0


@dataclass(frozen=True, slots=True)
class Copied:
    """What a run copied."""

    files: int = 0
    bytes: int = 0
    paths: tuple[str, ...] = field(default=())

    def __add__(self, other: Copied) -> Copied:
        paths = tuple(dict.fromkeys((*self.paths, *other.paths)))[:SHOWN_PATHS]
        return Copied(self.files + other.files, self.bytes + other.bytes, paths)


def client_arguments(shell: Sequence[str], wanted: Pass) -> list[str]:
    """The rsync of the source, to be started in the directory. `shell` is the program that reaches the other one."""
    quoted = " ".join(f'"{word}"' for word in shell)
    words = [PROGRAM, *_BOTH, f"--rsh={quoted}"]
    if wanted.listed:
        words += ["--ignore-times", "--files-from=-", "--from0"]
    else:
        words += ["--recursive", "--delete", "--one-file-system"]
    if wanted.checksum:
        words.append("--checksum")
    if wanted.in_place:
        words.append("--inplace")
    if wanted.bandwidth_bytes_per_second:
        words.append(f"--bwlimit={max(1, wanted.bandwidth_bytes_per_second // 1024)}")
    return [*words, "./", "phaul:."]


def parse_server_arguments(words: Sequence[str]) -> list[str]:
    """What the source's rsync wants to be started here, without program and path. Raises `InvalidRequest`.

    The path is not its to choose: it says ".", and whoever starts rsync puts the directory in its place.
    """
    *options, dot, path = words if len(words) > 2 else ("", "", "")
    good = dot == path == "." and options[0] == "--server"
    if not good or not all(_LETTERS.fullmatch(word) or _LONG.fullmatch(word) for word in options):
        raise InvalidRequest(f"rsync is not started with {list(words)}")
    return [*options, dot]


def parse_output(text: str) -> Copied:
    """What `--out-format` made of a run; directories do not count."""
    found = [match.groups() for line in text.splitlines() if (match := _OUTPUT.fullmatch(line))]
    files = [(int(size), name) for size, name in found if not name.endswith("/")]
    return Copied(len(files), sum(size for size, _ in files), tuple(name for _, name in files[:SHOWN_PATHS]))


def parse_directory(text: str) -> str:
    """A directory that can be synchronised. Raises `InvalidRequest`."""
    path = PurePosixPath(text)
    if not path.is_absolute() or str(path) in ("/", "//") or ".." in path.parts or "\0" in text:
        raise InvalidRequest(f"{text!r} is not an absolute path of a directory below /")
    return str(path)


def parse_directories(texts: Iterable[str]) -> tuple[str, ...]:
    """Several, none inside another. Raises `InvalidRequest`."""
    found = tuple(dict.fromkeys(map(parse_directory, texts)))
    for one in found:
        if any(other != one and is_below(one, other) for other in found):
            raise InvalidRequest(f"{one!r} is inside of another directory that is synchronised")
    return found


def is_below(path: str, directory: str) -> bool:
    """Whether a path is a directory or in it."""
    return PurePosixPath(path).is_relative_to(directory)


def shared_writable(maps: str, directory: str) -> frozenset[str]:
    """Files below `directory` that a process has mapped so that it changes them, from /proc/PID/maps.

    Such a change may leave a file's times as they were.
    """
    found = set()
    for line in maps.splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[1][1:2] == "w" and words[1][3:4] == "s":
            path = words[5].replace("\\012", "\n")
            if is_below(path, directory) and not path.endswith(" (deleted)"):
                found.add(path)
    return frozenset(found)
