"""What all tests share: skipping what this machine cannot run, and the `--json` report."""

import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest

from phaul_criu.errors import CriuMissing
from phaul_criu.install import find_binary

Report = dict[str, Any]
#: A machine that is busy is no fault of what is tested, and a run that fails does so each time: the examples are always
#: the same ones, but for a run with `--new-examples`.
SLOW: Final = (hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large)
hypothesis.settings.register_profile(
    "phaul", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW
)
hypothesis.settings.register_profile("new", deadline=None, print_blob=True, suppress_health_check=SLOW)
hypothesis.settings.load_profile("phaul")
REPORT: Final = pytest.StashKey[Report]()
_config: pytest.Config | None = None  # pytest does not tell it at the end of a test


@functools.cache
def criu_missing() -> str | None:
    """Why tests with the marker `criu` cannot run here; `None` if they can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        criu = find_binary()
    except CriuMissing as exc:
        return str(exc)
    check = subprocess.run([criu, "check"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check.returncode != 0:
        return f"criu check failed: {check.stdout.strip().splitlines()[-1:]}"
    unshare = subprocess.run(["unshare", "--fork", "--pid", "--mount", "--net", "true"], capture_output=True, text=True)
    return f"no namespaces: {unshare.stderr.strip()}" if unshare.returncode != 0 else None


#: why tests with this marker cannot run here
MISSING: Final[dict[str, Callable[[], str | None]]] = {"criu": criu_missing}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--json`, `--quick`, `--all`, `--dir`, `--only`, `--mode`, `--minutes` and `--new-examples`."""
    parser.addoption("--all", action="store_true", help="faults: each point; workloads: each mode; packages: each")
    parser.addoption("--dir", metavar="DIR", help="zdtm: a directory of built zdtm tests to move")
    parser.addoption("--json", metavar="FILE", help="write what the tests measured to FILE")
    parser.addoption("--only", metavar="PATTERNS", default="*", help="zdtm: of these names, such as 'tty*,fifo'")
    parser.addoption("--mode", choices=("auto", "eager", "lazy", "post-copy"), default="auto", help="zdtm: phaul's")
    parser.addoption("--minutes", type=float, default=0.0, help="fuzz: so long, with new examples each time")
    parser.addoption("--new-examples", action="store_true", help="unit: hypothesis makes others than those of each run")
    parser.addoption("--quick", action="store_true", help="smaller sizes and fewer repetitions")


def pytest_configure(config: pytest.Config) -> None:
    """Start an empty report."""
    global _config
    if config.getoption("--new-examples"):
        hypothesis.settings.load_profile("new")
    config.stash[REPORT] = {}
    _config = config


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--all`, or a test that was asked for, none of those that are seldom run."""
    if config.getoption("--all") or config.getoption("-k") or any("::" in argument for argument in config.args):
        return
    left = [item for item in items if item.get_closest_marker("seldom")]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what this machine cannot run."""
    for marker, missing in MISSING.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, if one was asked for and something was measured."""
    _write_report(session.config)


def pytest_runtest_logfinish() -> None:
    """The report so far, after each test: a long run that is ended has told what it knows."""
    if _config is not None:
        _write_report(_config)


def _write_report(config: pytest.Config) -> None:
    path, report = config.getoption("--json"), config.stash[REPORT]
    if path and report:
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


@pytest.fixture(scope="session")
def json_report(pytestconfig: pytest.Config) -> Report:
    """A dictionary of the whole run that `--json FILE` writes out."""
    return pytestconfig.stash[REPORT]


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether `--quick` was given."""
    return bool(pytestconfig.getoption("--quick"))
