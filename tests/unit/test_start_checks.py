"""A wrong configuration ends phauld with 78, in one line that names the cause and one with the remedy."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul_client.certs import issue, make_ca
from phaul_client.errors import InvalidRequest
from phaul_client.tls import Tls
from phaul_criu.errors import CriuMissing
from phauld import start_checks
from phauld.__main__ import EXIT_CONFIGURATION, EXIT_FAILURE
from phauld.config import BadSetting, Config

PHAULD = Path(sys.executable).parent / "phauld"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("certificates")
    make_ca(root / "ca")
    return root / "ca"


@pytest.fixture
def tls(tmp_path: Path, authority: Path) -> Path:
    issue(authority, "a", tmp_path / "tls")
    (tmp_path / "tls/policy.toml").write_text("[peers.b]\nadminister = true\n")
    return tmp_path / "tls"


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    names = ("state_dir", "images_dir", "memory_images_dir", "log_dir", "hooks_dir")
    return {"unix": tmp_path / "s.sock", **{name: tmp_path / name for name in names}}


def replaced(name: str, text: str) -> Callable[[Path], object]:
    return lambda tls: (tls / name).write_text(text)


def another_key(tls: Path) -> None:
    make_ca(tls / "other")
    issue(tls / "other", "a", tls / "another")
    (tls / "another/node.key").replace(tls / "node.key")


ENCRYPTED = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMII=\n-----END ENCRYPTED PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tls: tls.rename(tls.with_name("gone")), "there is no directory"),
        (lambda tls: (tls / "ca.crt").unlink(), "ca.crt: No such file"),
        (lambda tls: (tls / "node.crt").unlink(), "node.crt: No such file"),
        (lambda tls: (tls / "node.key").unlink(), "node.key: No such file"),
        (lambda tls: (tls / "policy.toml").unlink(), "policy.toml: No such file"),
        (replaced("ca.crt", "x"), "ca.crt: no certificate in it"),
        (replaced("node.crt", ""), "node.crt: no certificate in it"),
        (replaced("node.key", "x"), "node.key: no key of .*node.crt in it"),
        (replaced("node.key", ENCRYPTED), "node.key is encrypted"),
        (another_key, "node.key is not the key of .*node.crt"),
        (replaced("policy.toml", "x = ["), "policy.toml: policy: Invalid value"),
        (replaced("policy.toml", "[peers.b]\nsendto = true\n"), r"\[peers.b\]: sendto is unknown; there are receive"),
        (replaced("policy.toml", "[peer.b]\n"), "policy.toml: policy: peer is unknown"),
        (replaced("policy.toml", '[peers.b]\nsend_to = "yes"\n'), "b: send_to is neither true nor false"),
    ],
)
def test_certificates_that_cannot_be_used(tls: Path, spoil: Callable[[Path], object], says: str) -> None:
    start_checks.check_tls(Tls(tls))
    spoil(tls)
    with pytest.raises(BadSetting, match=f"^tls_dir: .*{says}") as caught:
        start_checks.check_tls(Tls(tls))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("setting", "place", "says"),
    [
        ("state_dir", "file", "cannot make .*file: it is no directory"),
        ("images_dir", "file/below", "cannot make .*below: Not a directory"),
        ("log_dir", "/proc/nowhere", "cannot make /proc/nowhere: No such file"),
        ("memory_images_dir", "/proc/1/x/y", "cannot make /proc/1/x/y: "),
        ("unix", "file", "is there, and is no socket"),
        ("unix", "directory", "is there, and is no socket"),
        ("unix", "x" * 108, "is longer than 107 bytes"),
        ("hooks_dir", "file", "is no directory"),
    ],
)
def test_places_that_cannot_be_used(
    directories: dict[str, Path], tmp_path: Path, setting: str, place: str, says: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    settings = directories | {setting: tmp_path / place}
    with pytest.raises(BadSetting, match=f"^{setting}: .*{says}"):
        start_checks.prepare(Config(**settings))  # type: ignore[arg-type]


def test_a_full_disk_may_have_room_later(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        start_checks.prepare(Config(**directories))  # type: ignore[arg-type]


def test_a_socket_at_which_another_answers_is_left_alone(directories: dict[str, Path]) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(directories["unix"]))
        other.listen(1)
        with pytest.raises(InvalidRequest, match="another phauld serves there") as caught:
            start_checks.prepare(Config(**directories))  # type: ignore[arg-type]
        assert not isinstance(caught.value, BadSetting)
    start_checks.prepare(Config(**directories))  # type: ignore[arg-type]  # its end has left the file


@pytest.mark.parametrize(
    ("error", "says", "is_wrong"),
    [
        (OSError(errno.EADDRINUSE, "error while attempting to bind"), "Address already in use", False),
        (OSError(errno.EADDRNOTAVAIL, "x"), "no address of this machine", False),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "no such name", False),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", True),
    ],
)
def test_addresses_that_cannot_be_listened_on(error: OSError, says: str, is_wrong: bool) -> None:
    found = start_checks.cannot_listen("data_port", "192.0.2.1 port 1", error)
    assert says in found.message
    assert "192.0.2.1 port 1" in found.message
    assert found.remedy
    assert isinstance(found, BadSetting) is is_wrong


def test_why_an_address_cannot_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert start_checks.why_not(taken.getsockname()).errno == errno.EADDRINUSE  # type: ignore[union-attr]
    assert start_checks.why_not(("127.0.0.1", 0)) is None
    assert start_checks.why_not(("192.0.2.1", 0)).errno == errno.EADDRNOTAVAIL  # type: ignore[union-attr]


def test_only_a_criu_that_was_named_is_a_setting() -> None:
    error = CriuMissing("start", "there is no criu")
    assert start_checks.bad_criu(Config(), error) is error
    assert isinstance(start_checks.bad_criu(Config(criu=Path("/x")), error), BadSetting)


def phauld(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PHAULD, *map(str, arguments)], capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )


def flags(directories: dict[str, Path]) -> list[object]:
    given: list[object] = ["--listen", "127.0.0.1:0", "--data-port", 0]
    for name, path in directories.items():
        given += [f"--{name.replace('_', '-')}", path]
    return given


def test_phauld_ends_with_78_and_no_traceback(directories: dict[str, Path], tls: Path) -> None:
    (tls / "policy.toml").unlink()
    ended = phauld(*flags(directories), "--tls-dir", tls)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, len(lines)) == (EXIT_CONFIGURATION, 2), ended.stderr
    assert lines[0] == f"phauld: error: tls_dir: policy {tls}/policy.toml: No such file or directory"
    assert lines[1].startswith("  remedy: it needs [peers.NAME]")


def test_phauld_ends_with_78_if_the_criu_that_it_was_told_is_none(directories: dict[str, Path]) -> None:
    ended = phauld(*flags(directories), "--criu", "/nonexistent/criu")
    assert ended.returncode == EXIT_CONFIGURATION, ended.stderr
    assert "criu: /nonexistent/criu is of no use: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_phauld_without_pycriu_says_so(directories: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pycriu.py").write_text("raise ImportError\n")  # stands before the real one
    without = {"PYTHONPATH": str(tmp_path)}
    ended = phauld(*flags(directories), **without)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (EXIT_FAILURE, 2), ended.stderr
    assert "pycriu) are missing" in ended.stderr
    assert "remedy: run scripts/setup" in ended.stderr
    assert phauld("--version", **without).returncode == phauld("--help", **without).returncode == 0


def test_phauld_ends_with_1_if_its_port_is_taken(directories: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = phauld(*flags(directories), "--data-port", taken.getsockname()[1])
    assert ended.returncode == EXIT_FAILURE, ended.stderr
    assert "Address already in use" in ended.stderr
