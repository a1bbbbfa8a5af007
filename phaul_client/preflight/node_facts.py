"""Reads what this node is."""

from __future__ import annotations

import os
import platform
import shutil

from phaul_client.preflight.model import NodeFacts
from phaul_client.preflight.proc_files import try_text
from phaul_client.preflight.proc_text import parse_cpu_flags, parse_fields

_CAP_SYS_RESOURCE = 24


def read_node(
    images_dir: str = "", *, name: str = "", criu_version: int = 0, lazy_pages: bool | None = None
) -> NodeFacts:
    """This node. What only criu knows is handed in; `images_dir` is where images are put, or empty."""
    memory = parse_fields(try_text("/proc/meminfo")).get("MemAvailable", "0 kB")
    capabilities = int(parse_fields(try_text("/proc/self/status")).get("CapPrm", "0"), 16)
    return NodeFacts(
        name=name or platform.node(),
        architecture=platform.machine(),
        kernel_release=platform.release(),
        glibc_version=platform.libc_ver()[1],
        page_size_bytes=os.sysconf("SC_PAGE_SIZE"),
        criu_version=criu_version,
        lazy_pages=lazy_pages,
        cpu_flags=parse_cpu_flags(try_text("/proc/cpuinfo")),
        memory_available_bytes=int(memory.split()[0]) * 1024,
        images_free_bytes=shutil.disk_usage(images_dir).free if images_dir else 0,
        pipe_max_bytes=int(try_text("/proc/sys/fs/pipe-max-size") or 0),
        capabilities=capabilities,
        sys_resource=bool(capabilities >> _CAP_SYS_RESOURCE & 1),
    )
