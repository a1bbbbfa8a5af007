"""Findings about a node without criu, or with a broken one: no crash, and a remedy for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul_criu import features
from phaul_criu.features import Severity


async def test_without_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHAUL_CRIU", str(tmp_path / "none"))
    found = {finding.name: finding for finding in await features.findings()}
    assert not found["criu"].ok
    assert found["criu"] in features.missing(found.values())
    assert all(bool(finding.remedy) is not finding.ok for finding in found.values())


async def test_with_a_criu_that_fails_every_check(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "Version: 4.2"; exit 0; }\necho "Error: no" >&2; exit 1\n'
    )
    criu.chmod(0o755)
    found = {finding.name: finding for finding in await features.findings(criu)}
    assert found["criu"].ok
    assert not found["criu-check"].ok
    assert found["criu-check"].detail == "criu check: Error: no"
    assert found["criu-check"].severity is Severity.REQUIRED
    assert not found["mem-dirty-track"].ok
    assert found["mem-dirty-track"].severity is Severity.FEATURE


async def test_with_a_criu_that_is_too_old(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text('#!/bin/sh\necho "Version: 3.17.1"\n')
    criu.chmod(0o755)
    (finding,) = (finding for finding in await features.findings(criu) if finding.name == "criu")
    assert not finding.ok
    assert "4.1" in finding.remedy
