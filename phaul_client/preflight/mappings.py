"""Reads which files a process has mapped."""

from __future__ import annotations

import stat
from dataclasses import replace

from phaul_client.preflight.model import FileKind, MappedFile
from phaul_client.preflight.proc_files import build_id, try_stat, try_text
from phaul_client.preflight.proc_text import MapsLine, parse_maps, strip_deleted

#: Mappings that every process has and criu knows.
_ORDINARY = frozenset(
    {"[heap]", "[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[vectors]", "[sigpage]"}
)

BuildIds = dict[tuple[int, int], bytes | None]


def read_mappings(pid: int, build_ids: BuildIds) -> tuple[list[MappedFile], list[str]]:
    """The mapped files, each once, and the names of the special mappings. `build_ids` remembers what was read."""
    files: dict[tuple[str, bool], MappedFile] = {}
    special: set[str] = set()
    for line in parse_maps(try_text(f"/proc/{pid}/maps")):
        if line.path.startswith("["):
            if line.path not in _ORDINARY and not line.path.startswith("[anon"):
                special.add(line.path)
            continue
        key = (line.path, line.permissions[3] == "s")
        files[key] = _joined(files[key], line) if key in files else _read(pid, line, build_ids)
    return list(files.values()), sorted(special)


def _joined(file: MappedFile, line: MapsLine) -> MappedFile:
    return replace(
        file,
        length_bytes=file.length_bytes + line.end - line.start,
        writable=file.writable or line.permissions[1] == "w",
        executable=file.executable or line.permissions[2] == "x",
    )


def _read(pid: int, line: MapsLine, build_ids: BuildIds) -> MappedFile:
    path, deleted = strip_deleted(line.path)
    # map_files leads to the very file, also when it was deleted or covered by a mount
    link = f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}"
    status = try_stat(link)
    file = MappedFile(
        pid=pid,
        path=path,
        kind=_kind(path, status.st_mode if status else 0),
        deleted=deleted,
        shared=line.permissions[3] == "s",
        writable=line.permissions[1] == "w",
        executable=line.permissions[2] == "x",
        length_bytes=line.end - line.start,
        inode=line.inode,
    )
    if status is None:
        return file
    identity = (status.st_dev, status.st_ino)
    if identity not in build_ids and file.kind is FileKind.REGULAR:
        build_ids[identity] = build_id(link)
    return replace(
        file,
        inode=status.st_ino,
        mode=status.st_mode,
        device_number=status.st_rdev,
        size_bytes=status.st_size,
        allocated_bytes=status.st_blocks * 512,
        links=status.st_nlink,
        build_id=build_ids.get(identity),
    )


def _kind(path: str, mode: int) -> FileKind:
    if path.startswith("/memfd:"):
        return FileKind.MEMFD
    if path.startswith(("anon_inode:", "socket:", "/secretmem")):
        return FileKind.ANONYMOUS
    if stat.S_ISCHR(mode):
        return FileKind.CHARACTER_DEVICE
    return FileKind.REGULAR if stat.S_ISREG(mode) else FileKind.OTHER
