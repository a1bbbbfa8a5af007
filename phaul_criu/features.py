"""What this node's criu and kernel can do, for `phaul doctor` and the preflight: one Finding for each question.

Needs neither root nor criu nor pycriu: what cannot be asked is a finding too.
"""

from __future__ import annotations

import asyncio
import enum
import importlib.util
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul_criu import child, install
from phaul_criu.errors import CriuError
from phaul_criu.version import OLDEST, Version

_CHECK_SECONDS: Final = 30.0
_REQUIRED_PIPE_BYTES: Final = 4 << 20
_OLDEST_FOR_LINUX_6_16: Final = Version(4, 2)
_INSTALL_REMEDY: Final = "run scripts/setup"


class Severity(enum.Enum):
    """What it means if a finding is not ok."""

    #: Nothing can be moved.
    REQUIRED = "required"
    #: A mode or a kind of workload is not available.
    FEATURE = "feature"
    #: It works, but slower or less conveniently.
    ADVICE = "advice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to one question about this node."""

    #: Short stable name.
    name: str
    ok: bool
    severity: Severity
    #: What was found, and what it is good for.
    detail: str
    #: What to do about it; empty if ok.
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _CriuFeature:
    name: str
    purpose: str
    remedy: str


#: Names of `criu check --feature`.
_CRIU_FEATURES: Final = (
    _CriuFeature(
        "mem_dirty_track",
        "memory tracking, for pre-copy and hybrid mode",
        "use a kernel with CONFIG_MEM_SOFT_DIRTY (Debian's on x86-64 has it); the other modes work without it",
    ),
    _CriuFeature(
        "uffd-noncoop",
        "userfaultfd with fork events, for lazy restore and post-copy",
        "use a kernel with CONFIG_USERFAULTFD and run as root",
    ),
    _CriuFeature("pidfd_store", "pidfd_getfd, which tells a reused PID from the old one", "use Linux 5.6 or newer"),
    _CriuFeature(
        "network_lock_nftables",
        "nftables lock, for established TCP connections",
        "load the kernel modules nf_tables and nf_conntrack, and install a criu built with libnftables",
    ),
    _CriuFeature("get_rseq_conf", "rseq, which glibc 2.35 and newer use", "use Linux 5.13 or newer"),
    _CriuFeature("clone3_set_tid", "restoring PIDs without a race", "use Linux 5.5 or newer"),
    _CriuFeature("pagemap_scan", "quicker scan of the memory", "use Linux 6.7 or newer"),
)
#: Those without which it works, only less well.
_ADVISORY_FEATURES: Final = frozenset({"pidfd_store", "clone3_set_tid", "pagemap_scan"})

#: Numbers of the capabilities in the mask of /proc/self/status (linux/capability.h).
_CAPABILITIES: Final = {
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_TIME": 25,
}
_CAP_SYS_RESOURCE: Final = 24


async def findings(binary: Path | None = None) -> list[Finding]:
    """Everything about this node that decides what phaul can do here. `binary` replaces the criu that is found."""
    return [
        _kernel(),
        _capabilities(),
        *await _criu_findings(binary),
        _pycriu(),
        _pipe_limit(),
        _userfaultfd(),
        _ptrace_scope(),
        _criu_cache(),
        _program("nft", "showing and clearing what a killed criu left of its network lock", "nftables"),
        _program("tini", "a reaping init for PID namespaces made by hand", "tini"),
    ]


def missing(found: Iterable[Finding]) -> list[Finding]:
    """Those without which nothing can be moved."""
    return [finding for finding in found if not finding.ok and finding.severity is Severity.REQUIRED]


async def _criu_findings(binary: Path | None) -> list[Finding]:
    try:
        binary = binary or install.find_binary()
        version = await install.ask_version(binary)
    except CriuError as exc:
        return [_finding("criu", False, Severity.REQUIRED, exc.message, exc.remedy)]
    new_enough = _finding(
        "criu", version >= OLDEST, Severity.REQUIRED, f"{binary} is criu {version}", f"install criu {OLDEST} or newer"
    )
    checks = [_criu_check(binary), *(_criu_feature(binary, feature) for feature in _CRIU_FEATURES)]
    return [new_enough, _inet_sockets(version), *await asyncio.gather(*checks)]


async def _criu_check(binary: Path) -> Finding:
    ok, output = await _ask_criu(binary)
    remedy = "run as root; modprobe unix_diag inet_diag tcp_diag; otherwise a newer criu or kernel is needed"
    return _finding("criu-check", ok, Severity.REQUIRED, f"criu check: {output}", remedy)


async def _criu_feature(binary: Path, feature: _CriuFeature) -> Finding:
    ok, _output = await _ask_criu(binary, "--feature", feature.name)
    severity = Severity.ADVICE if feature.name in _ADVISORY_FEATURES else Severity.FEATURE
    return _finding(feature.name.replace("_", "-"), ok, severity, feature.purpose, feature.remedy)


async def _ask_criu(binary: Path, *arguments: str) -> tuple[bool, str]:
    try:
        ended = await child.run([binary, "check", *arguments], timeout_seconds=_CHECK_SECONDS)
    except TimeoutError:
        return False, f"no answer in {_CHECK_SECONDS:g} s"
    except OSError as exc:
        return False, str(exc)
    return ended.returncode == 0, ended.output.splitlines()[-1] if ended.output else "no output"


def _kernel() -> Finding:
    release = platform.release()
    ok = Path("/proc/self/map_files").is_dir() and Path(f"/proc/self/task/{os.getpid()}/children").exists()
    remedy = "use a kernel with CONFIG_CHECKPOINT_RESTORE"
    return _finding("kernel", ok, Severity.REQUIRED, f"Linux {release} on {platform.machine()}", remedy)


def _capabilities() -> Finding:
    held = _effective_capabilities()
    absent = [name for name, number in _CAPABILITIES.items() if not held >> number & 1]
    detail = f"missing: {', '.join(absent)}" if absent else "all that criu needs"
    return _finding("capabilities", not absent, Severity.REQUIRED, detail, "run as root")


def _inet_sockets(version: Version) -> Finding:
    """Linux 6.16 refuses SO_PASSCRED on TCP and UDP sockets; criu before 4.2 cannot dump any of them there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
            refused = False
        except OSError:
            refused = True
    return _finding(
        "inet-sockets",
        not refused or version >= _OLDEST_FOR_LINUX_6_16,
        Severity.FEATURE,
        f"dumping TCP and UDP sockets with criu {version} on Linux {platform.release()}",
        f"install criu {_OLDEST_FOR_LINUX_6_16} or newer",
    )


def _pycriu() -> Finding:
    spec = importlib.util.find_spec("pycriu")
    detail = "pycriu is missing" if spec is None else f"pycriu in {spec.origin}"
    remedy = f"{_INSTALL_REMEDY}, or install python3-pycriu of the same version as criu"
    return _finding("pycriu", spec is not None, Severity.REQUIRED, detail, remedy)


def _pipe_limit() -> Finding:
    limit_bytes = _read_number("/proc/sys/fs/pipe-max-size")
    free_of_limit = bool(_effective_capabilities() >> _CAP_SYS_RESOURCE & 1)
    return _finding(
        "pipe-max-size",
        free_of_limit or limit_bytes >= _REQUIRED_PIPE_BYTES,
        Severity.FEATURE,
        f"fs.pipe-max-size is {limit_bytes} bytes{' (no limit for us)' if free_of_limit else ''}, for post-copy",
        f"sysctl -w fs.pipe-max-size={_REQUIRED_PIPE_BYTES}",
    )


def _userfaultfd() -> Finding:
    privileged = bool(_effective_capabilities() >> _CAPABILITIES["CAP_SYS_PTRACE"] & 1)
    allowed = _read_number("/proc/sys/vm/unprivileged_userfaultfd") == 1
    return _finding(
        "userfaultfd",
        privileged or allowed,
        Severity.FEATURE,
        f"vm.unprivileged_userfaultfd is {int(allowed)}{' (root may anyway)' if privileged else ''}, for lazy pages",
        "run as root, or sysctl -w vm.unprivileged_userfaultfd=1",
    )


def _ptrace_scope() -> Finding:
    scope = _read_number("/proc/sys/kernel/yama/ptrace_scope")
    remedy = "3 cannot be undone at run time: set kernel.yama.ptrace_scope to 2 or less and restart the machine"
    return _finding("ptrace-scope", scope < 3, Severity.REQUIRED, f"kernel.yama.ptrace_scope is {scope}", remedy)


def _criu_cache() -> Finding:
    kind = _file_system("/run")
    detail = f"/run is {kind}; on tmpfs criu keeps there what it knows of the kernel and starts some 20 ms sooner"
    return _finding("run-tmpfs", kind == "tmpfs", Severity.ADVICE, detail, "mount a tmpfs on /run")


def _program(name: str, purpose: str, package: str) -> Finding:
    path = shutil.which(name)
    return _finding(name, path is not None, Severity.ADVICE, f"{path or 'missing'}: {purpose}", f"install {package}")


def _finding(name: str, ok: bool, severity: Severity, detail: str, remedy: str) -> Finding:
    return Finding(name=name, ok=ok, severity=severity, detail=detail, remedy="" if ok else remedy)


def _effective_capabilities() -> int:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1], 16) if match else 0


def _read_number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return 0


def _file_system(mount_point: str) -> str:
    """The type of the file system that is mounted on a path or holds it."""
    path, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mounted_on, mounted_kind = line.split()[1:3]
        holds = mounted_on in ("/", mount_point) or mount_point.startswith(mounted_on + "/")
        if holds and len(mounted_on) >= len(path):
            path, kind = mounted_on, mounted_kind
    return kind
