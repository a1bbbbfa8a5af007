"""Imports point one way: phauld → phaul_client → phaul_criu → phaul.v1, and pure modules touch nothing outside.

Read from the source, so that imports inside functions and under `TYPE_CHECKING` count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]

#: lowest first: a package may import itself and those before it
LAYERS: Final = ("phaul", "phaul_criu", "phaul_client", "phauld")

#: what a pure module may not import: input and output, clocks, randomness, concurrency, and what drives them
IMPURE: Final = frozenset(
    """asyncio click concurrent contextvars fcntl grpc grpc_channelz grpc_health grpc_reflection grpc_status io logging
    mmap multiprocessing os pathlib prometheus_client psutil random rich secrets select selectors shutil signal socket
    sqlite3 ssl subprocess tempfile termios threading time urllib uuid""".split()  # noqa: SIM905 (else forty lines)
)

#: the pure modules; they may import each other, phaul.v1, pycriu's messages, and what is not in IMPURE
PURE: Final = frozenset(
    {
        "phaul_criu.chains",
        "phaul_criu.errors",
        "phaul_criu.logs",
        "phaul_criu.nft_messages",
        "phaul_criu.pagemaps",
        "phaul_criu.requests",
        "phaul_criu.rpc",
        "phaul_criu.stats",
        "phaul_criu.version",
        "phaul_client.commit",
        "phaul_client.containers.changes",
        "phaul_client.containers.mounts",
        "phaul_client.containers.runtimes",
        "phaul_client.cli.visible",
        "phaul_client.compatibility",
        "phaul_client.compression_policy",
        "phaul_client.errors",
        "phaul_client.forecast",
        "phaul_client.hooks",
        "phaul_client.modes",
        "phaul_client.page_frames",
        "phaul_client.pipe_choice",
        "phaul_client.policy",
        "phaul_client.same_pages",
        "phaul_client.preflight.checks",
        "phaul_client.relay_courtesy",
        "phaul_client.relay_frames",
        "phaul_client.rounds",
        "phaul_client.stream",
        "phaul_client.throttle",
        "phauld.access",
        "phauld.costs",
        "phauld.decision",
        "phauld.errors",
        "phauld.journal_sql",
        "phauld.restart_policy",
        "phauld.seldom",
        "phauld.session",
        "phauld.workload_spec",
    }
)

#: packages of phauld, and what else of phauld each may import
SELF_CONTAINED: Final = {"phauld.containers": frozenset({"phauld.proc", "phauld.whole_files"})}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    return {module_name(path): path for package in LAYERS[1:] for path in sorted((ROOT / package).rglob("*.py"))}


def imported(module: str, text: str, is_package: bool = False) -> Iterator[str]:
    """The absolute names that a module imports; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, base] if base else parts)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def upward_edges(module: str, names: Iterator[str]) -> list[str]:
    layer = LAYERS.index(module.split(".")[0])
    return [name for name in names if name.split(".")[0] in LAYERS[layer + 1 :]]


def impure_edges(names: Iterator[str], modules: frozenset[str]) -> list[str]:
    """Imports of I/O modules, and of modules of ours that are not pure themselves."""
    names_seen = list(names)
    ours = [name for name in names_seen if name in modules and "." in name]
    return [name for name in names_seen if name.split(".")[0] in IMPURE] + [name for name in ours if name not in PURE]


SOURCES: Final = sources()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    path = SOURCES[module]
    assert upward_edges(module, imported(module, path.read_text(), path.name == "__init__.py")) == []


@pytest.mark.parametrize("package", SELF_CONTAINED)
def test_packages_of_the_daemon_know_little_of_it(package: str) -> None:
    inside = {name for name in SOURCES if name == package or name.startswith(f"{package}.")}
    names = {name for module in inside for name in imported(module, SOURCES[module].read_text())}
    others = {name for name in names & SOURCES.keys() - inside if name.startswith("phauld.")}
    assert inside
    assert others <= SELF_CONTAINED[package]


@pytest.mark.parametrize("module", sorted(PURE & SOURCES.keys()))
def test_pure_modules_touch_nothing(module: str) -> None:
    path = SOURCES[module]
    names = imported(module, path.read_text(), path.name == "__init__.py")
    assert impure_edges(names, frozenset(SOURCES)) == []


def test_packages_are_where_they_should_be() -> None:
    assert {name.split(".")[0] for name in SOURCES} == set(LAYERS[1:])


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("phaul_criu.swrk", "import phauld", ["phauld"]),
        ("phaul_criu.swrk", "def f():\n    from phaul_client.policy import decide", 2),
        ("phaul_client.client", "from phauld import server", 2),
        ("phaul_client.client", "from phaul_criu import Criu\nfrom phaul.v1 import a_pb2\nfrom . import policy", []),
        ("phauld.server", "import phaul_client, phaul_criu, phaul.v1", []),
    ],
)
def test_the_edge_check_sees(module: str, text: str, wrong: list[str] | int) -> None:
    found = upward_edges(module, imported(module, text))
    assert len(found) == wrong if isinstance(wrong, int) else found == wrong


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("import os.path", ["os.path"]),
        ("from time import monotonic", ["time", "time.monotonic"]),
        ("from .errors import PolicyError", []),
        ("from . import client", ["phaul_client.client"]),
        ("import dataclasses, math", []),
    ],
)
def test_the_purity_check_sees(text: str, wrong: list[str]) -> None:
    modules = frozenset({"phaul_client", "phaul_client.client", "phaul_client.errors"})
    assert impure_edges(imported("phaul_client.policy", text), modules) == wrong
