"""Checks of one node against another: CPU, kernel, criu, room (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from phaul_client.preflight import capabilities
from phaul_client.preflight.check_sysctls import POST_COPY_PIPE_BYTES
from phaul_client.preflight.cpu_flags import SPEED_ONLY, program_flags
from phaul_client.preflight.model import NodeFacts
from phaul_client.preflight.problems import Problem, error, info, warning
from phaul_client.preflight.requirements import Requirements
from phaul_client.preflight.wishes import Wishes

_RSEQ_GLIBC: Final = (2, 35)
_RSEQ_KERNEL: Final = (5, 13)


def check_nodes(needs: Requirements, source: NodeFacts, here: NodeFacts, wishes: Wishes) -> Iterator[Problem]:
    """What must fit between the two nodes whatever the tree."""
    yield from _architecture(source, here)
    yield from check_cpu(needs.cpu_flags, source, here)
    yield from _versions(source, here)
    yield from _capabilities(needs, here)
    yield from _room(needs, here)
    if wishes.post_copy and here.lazy_pages is False:
        message = "this node's criu or kernel cannot do lazy pages, which post-copy needs"
        yield error("lazy-pages", here.name, message, "use a kernel with CONFIG_USERFAULTFD, or another mode")
    if wishes.post_copy and 0 < here.pipe_max_bytes < POST_COPY_PIPE_BYTES and here.sys_resource is False:
        message = f"is {here.pipe_max_bytes} bytes on {here.name}, and post-copy needs {POST_COPY_PIPE_BYTES}"
        yield error("pipe-size", "fs.pipe-max-size", message, f"sysctl -w fs.pipe-max-size={POST_COPY_PIPE_BYTES}")


def check_cpu(needed: frozenset[str], source: NodeFacts, here: NodeFacts) -> Iterator[Problem]:
    """Flags of the source's CPU that are missing here, and the other way round."""
    if not needed or not here.cpu_flags:
        return
    direction = f"from {source.name or 'the source'} to {here.name or 'the destination'}"
    missing, more = needed - here.cpu_flags, program_flags(here.cpu_flags) - needed - SPEED_ONLY
    if hard := " ".join(sorted(missing - SPEED_ONLY)):
        message = f"going {direction} the CPU loses instructions that the program may be using"
        remedy = "move to a node whose CPU has them, or hide them at the program's start (GLIBC_TUNABLES)"
        yield error("cpu-flags", hard, message, remedy)
    if soft := " ".join(sorted(missing & SPEED_ONLY)):
        yield info("cpu-speed", soft, f"going {direction} some instructions become slower", "nothing to do")
    if back := " ".join(sorted(more)):
        message = f"the CPU has more going {direction}: a program restarted there may not come back"
        yield info("cpu-way-back", back, message, "nothing to do")


def _architecture(source: NodeFacts, here: NodeFacts) -> Iterator[Problem]:
    if source.architecture and here.architecture and source.architecture != here.architecture:
        message = f"the tree runs on {source.architecture}, {here.name} is {here.architecture}"
        yield error("architecture", here.architecture, message, "move to a node of the same architecture")
    if source.page_size_bytes and here.page_size_bytes and source.page_size_bytes != here.page_size_bytes:
        message = f"the page size is {source.page_size_bytes} bytes there and {here.page_size_bytes} here"
        yield error("page-size", str(here.page_size_bytes), message, "move to a node with the same page size")


def _versions(source: NodeFacts, here: NodeFacts) -> Iterator[Problem]:
    if here.criu_version and source.criu_version // 100 > here.criu_version // 100:
        theirs, ours = _criu(source.criu_version), _criu(here.criu_version)
        message = f"criu is {theirs} on the source and only {ours} here, which cannot restore its images"
        yield error("criu-older", f"criu {ours}", message, f"install criu {theirs} or newer on {here.name}")
    ours_kernel, theirs_kernel = kernel_version(here.kernel_release), kernel_version(source.kernel_release)
    if ours_kernel and theirs_kernel and ours_kernel < theirs_kernel:
        message = f"the kernel is {source.kernel_release} on the source: the program may use what this one lacks"
        yield warning("kernel-older", here.kernel_release, message, "use the same kernel or a newer one")
    if ours_kernel and ours_kernel < _RSEQ_KERNEL and _pair(source.glibc_version) >= _RSEQ_GLIBC:
        message = f"glibc {source.glibc_version} uses rseq, which criu can restore only from Linux 5.13 on"
        yield error(
            "rseq", here.kernel_release, message, "use Linux 5.13 or newer, or GLIBC_TUNABLES=glibc.pthread.rseq=0"
        )


def _capabilities(needs: Requirements, here: NodeFacts) -> Iterator[Problem]:
    if here.capabilities is None:
        return
    criu = capabilities.to_restore(here.criu_version)
    own = needs.capabilities & ~criu
    for needed, whose, or_else in ((criu, "criu needs", ""), (own, "the tree has or needs", ", or start it without")):
        if missing := " ".join(capabilities.names_of(needed & ~here.capabilities)):
            message = f"{whose} what phauld of {here.name} lacks: it could not be restored there"
            remedy = f"let phauld of {here.name} have it (CapabilityBoundingSet){or_else}"
            yield error("capabilities", missing, message, remedy)


def _room(needs: Requirements, here: NodeFacts) -> Iterator[Problem]:
    if 0 < here.memory_available_bytes < needs.memory_bytes:
        message = f"{needs.memory_bytes} bytes are needed and {here.memory_available_bytes} are available"
        yield error("memory", here.name, message, "free memory there, or choose another node")
    if 0 < here.images_free_bytes < needs.memory_bytes:
        message = f"the images take {needs.memory_bytes} bytes and {here.images_free_bytes} are free"
        yield error("disk", here.name, message, "make room for images there, or put them elsewhere")


def kernel_version(release: str) -> tuple[int, int] | None:
    """(6, 12) of "6.12.3-amd64"; None if it is no such text."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else None


def _pair(version: str) -> tuple[int, int]:
    return kernel_version(version) or (0, 0)


def _criu(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}"
