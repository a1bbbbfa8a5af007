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
        "phaul_client.preflight.address_space_model",
        "phaul_client.preflight.cpu_flags",
        "phaul_client.preflight.model",
        "phaul_client.preflight.problems",
        "phaul_client.preflight.proc_text",
        "phaul_client.preflight.wishes",
        "phaul_client.relay_courtesy",
        "phaul_client.relay_frames",
        "phaul_client.rounds",
        "phaul_client.same_pages",
        "phaul_client.stream",
        "phaul_client.throttle",
        "phauld.access",
        "phauld.costs",
        "phauld.errors",
        "phauld.guarding.criu_memory",
        "phauld.journal_sql",
        "phauld.seldom",
        "phauld.session",
        "phauld.source.decision",
        "phauld.trees.restart_policy",
        "phauld.trees.workload_spec",
    }
)

#: the packages of phauld, and of which others each may import; all may import modules that are in none
PACKAGES: Final[dict[str, frozenset[str]]] = {
    "phauld.containers": frozenset(),
    "phauld.guarding": frozenset(),
    "phauld.lazy_pages": frozenset(),
    "phauld.trees": frozenset(),
    "phauld.destination": frozenset({"phauld.containers", "phauld.guarding", "phauld.lazy_pages", "phauld.trees"}),
    "phauld.source": frozenset({"phauld.containers", "phauld.guarding", "phauld.lazy_pages", "phauld.trees"}),
    "phauld.observing": frozenset({"phauld.destination", "phauld.source", "phauld.trees"}),
}

#: those of them that know little of the daemon, and what else of phauld each may import
SELF_CONTAINED: Final = {
    "phauld.containers": frozenset({"phauld.proc", "phauld.whole_files"}),
    "phauld.guarding": frozenset({"phauld.bare", "phauld.proc"}),
    "phauld.lazy_pages": frozenset({"phauld.bare", "phauld.scope", "phauld.whole_files"}),
}


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


def imported_at_start(path: Path, module: str) -> set[str]:
    """Modules of ours that an import of this one imports: neither in functions, nor for the type checker alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = ast.unparse(node)
            found |= set(imported(module, text, path.name == "__init__.py")) & SOURCES.keys()
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_for_types(node):
            waiting += ast.iter_child_nodes(node)
    return found


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def circles(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when each that imports nothing but what is gone already goes: circles, and what leads there."""
    left = {module: set(names) for module, names in edges.items()}
    while gone := {module for module, names in left.items() if not names}:
        left = {module: names - gone for module, names in left.items() if module not in gone}
    return left


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


def inside(package: str) -> set[str]:
    return {name for name in SOURCES if name == package or name.startswith(f"{package}.")}


def imports_of_package(package: str) -> set[str]:
    """Modules of phauld outside a package of it that those inside import."""
    names = {name for module in inside(package) for name in imported(module, SOURCES[module].read_text())}
    return {name for name in names & SOURCES.keys() - inside(package) if name.startswith("phauld.")}


@pytest.mark.parametrize("package", SELF_CONTAINED)
def test_packages_of_the_daemon_know_little_of_it(package: str) -> None:
    assert inside(package)
    assert imports_of_package(package) <= SELF_CONTAINED[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_of_the_daemon_know_those_below(package: str) -> None:
    allowed = PACKAGES[package]
    for name in imports_of_package(package):
        owner = next((each for each in PACKAGES if name in inside(each)), None)
        assert owner is None or owner in allowed, name


def test_every_package_of_the_daemon_has_its_row() -> None:
    found = {module_name(path) for path in (ROOT / "phauld").glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_nothing_imports_in_a_circle() -> None:
    edges = {module: imported_at_start(path, module) - {module} for module, path in SOURCES.items()}
    packages = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    # `from a import b` names a as well, whose own module may import what is in it
    assert circles({module: names - packages for module, names in edges.items()}) == {}


def test_the_circle_check_sees() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"e"}, "e": set()}) == {"a": {"b"}, "b": {"c"}, "c": {"b"}}


@pytest.mark.parametrize("module", sorted(PURE))
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
