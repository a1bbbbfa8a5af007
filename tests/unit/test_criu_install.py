"""criu is looked for in the right places, and an unusable one is refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul_criu import install
from phaul_criu.errors import CriuMissing, CriuTooOld
from phaul_criu.version import Version, parse_version


def program(path: Path, output: str, status: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version: 4.1.1\nGitID: 0\n", Version(4, 1, 1)),
        ("Version: 3.17\n", Version(3, 17)),
        ("criu\n", None),
    ],
)
def test_versions_are_read(text: str, version: Version | None) -> None:
    assert parse_version(text) == version


def test_versions_compare_by_number() -> None:
    assert Version(4, 10) > Version(4, 9, 9) > Version(3, 99)
    assert Version(4, 1, 1).number == 40101
    assert (str(Version(4, 2)), str(Version(4, 1, 1))) == ("4.2", "4.1.1")


async def test_the_variable_is_obeyed(tmp_path: Path) -> None:
    criu = program(tmp_path / "my-criu", "Version: 4.2")
    found = await install.find({"PHAUL_CRIU": str(criu)})
    assert found == install.Installation(binary=criu, version=Version(4, 2))


def test_a_variable_that_names_nothing_is_an_error_not_a_search(tmp_path: Path) -> None:
    with pytest.raises(CriuMissing, match="PHAUL_CRIU names") as caught:
        install.find_binary({"PHAUL_CRIU": str(tmp_path / "none"), "PATH": "/usr/sbin"})
    assert caught.value.remedy


async def test_an_old_one_is_refused(tmp_path: Path) -> None:
    criu = program(tmp_path / "criu", "Version: 3.17.1")
    with pytest.raises(CriuTooOld, match=r"3\.17\.1, older than 4\.1") as caught:
        await install.find({"PHAUL_CRIU": str(criu)})
    assert caught.value.remedy


@pytest.mark.parametrize(("output", "status"), [("hello", 0), ("Version: 4.2", 1)])
async def test_something_else_is_refused(tmp_path: Path, output: str, status: int) -> None:
    criu = program(tmp_path / "criu", output, status)
    with pytest.raises(CriuMissing, match="is no criu"):
        await install.find({"PHAUL_CRIU": str(criu)})


def test_the_path_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criu = program(tmp_path / "criu", "Version: 4.2")
    monkeypatch.setattr(install, "_beside_pycriu", lambda: None)
    assert install.find_binary({"PATH": str(tmp_path)}) == criu
    with pytest.raises(CriuMissing):
        install.find_binary({"PATH": str(tmp_path / "empty")})
