"""Two machines with systemd for all tests of this directory; each test ends what it started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages.builds import build
from tests.systemd.machines import Machine, missing, two_machines


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this checkout."""
    if reason := missing():
        pytest.skip(reason)
    return build("deb", tmp_path_factory.mktemp("dist"), "phaul_*.deb")


@pytest.fixture(scope="session")
def booted(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """Two machines, booted once."""
    with two_machines(tmp_path_factory.mktemp("machines"), package) as machines:
        yield machines


@pytest.fixture
def machines(booted: tuple[Machine, Machine]) -> Iterator[tuple[Machine, Machine]]:
    """The two machines, with a phauld that serves and no workload."""
    for machine in booted:
        machine.run("systemctl", "reset-failed", "phauld", check=False)
        machine.run("systemctl", "start", "phauld")
    yield booted
    for machine in booted:
        machine.run("systemctl", "start", "phauld", check=False)
        for name in machine.running():
            machine.run("phaul", "stop", name, check=False)
        for each in machine.json("ps", "--all")["workloads"]:
            machine.run("phaul", "rm", each["name"], check=False)
