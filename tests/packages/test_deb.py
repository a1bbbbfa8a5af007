"""The Debian package: what lintian says, a process that it moves in a clean Debian, and what is left without it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from phaul_client.cli.app import phaul
from phauld.version import phaul_version
from tests.packages.builds import ROOT, TREES, VICTIM, build, run
from tests.packages.clean import background, clean_debian, cut_off, files, typed
from tests.systemd.machines import SHARED, Machine, boot, missing, until
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.timeout(600), pytest.mark.criu]

HEART: Final = ("/usr/bin/python3", SHARED / VICTIM.name, SHARED / "heart", "--mib", "8")
UNIX_B: Final = "/run/phaul/b.sock"
SECOND: Final = (
    *("--listen", "127.0.0.1:7717", "--data-port", "7718"),
    *("--unix", UNIX_B, "--state-dir", "/var/lib/phaul/b"),
)
#: What other packages write when any package comes or goes.
OF_OTHERS: Final = (
    "/run/systemd",
    "/run/criu.kdat",
    "/var/cache",
    "/var/lib/apt",
    "/var/lib/dpkg",
    "/var/log/apt",
    "/var/log/dpkg.log",
)


@pytest.fixture(scope="session")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package."""
    if reason := missing():
        pytest.skip(reason)
    return build("deb", tmp_path_factory.mktemp("deb"), "phaul_*.deb")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory with the victim in it; a machine's /shared."""
    directory = tmp_path / "shared"
    directory.mkdir()
    shutil.copy(VICTIM, directory)
    return directory


@pytest.mark.seldom
def test_lintian_finds_nothing(deb: Path) -> None:
    words = ["lintian", "--allow-root", "--fail-on", "error,warning", f"/deb/{deb.name}"]
    said = run(TREES, "run", "lint", "--bind", f"{deb.parent}:/deb", "--", *words, timeout_seconds=400)
    assert not [line for line in said.splitlines() if line.startswith(("E:", "W:"))]


@pytest.mark.seldom
def test_man_finds_and_reads_every_page(deb: Path) -> None:
    script = """
    dpkg --force-depends --unpack /deb/*.deb >/dev/null 2>&1
    for page in "$@"; do
        man -w "$page"
        MANWIDTH=80 man --warnings "$page" 2>&1 >/dev/null
    done"""
    pages = ["phaul", *(f"phaul-{name}" for name in phaul.commands), "phauld"]
    inside = ["sh", "-ec", script, "sh", *pages]
    said = run(TREES, "run", "lint", "--bind", f"{deb.parent}:/deb", "--", *inside, timeout_seconds=400).splitlines()
    assert [Path(line).name.split(".")[0] for line in said] == pages, said  # and no warning


def test_a_process_is_moved_in_a_clean_debian(deb: Path, shared: Path, json_report: dict[str, Any]) -> None:
    with clean_debian(shared) as machine:
        machine.run("apt-get", "update", timeout_seconds=120)
        for needed in ("python3", "criu", "tini", "nft", "pip"):
            assert not machine.run("sh", "-c", f"command -v {needed}", check=False), f"{needed} is in a clean Debian"
        shutil.copy(deb, shared)
        machine.run(
            *("apt-get", "install", "--yes", "--no-install-recommends", SHARED / deb.name, "bash-completion"),
            timeout_seconds=300,
        )
        with cut_off(machine) as alone:
            for name in ("phaul", "phauld"):
                assert alone.run(name, "--version").split()[-1] == phaul_version()
            json_report["package_deb"] = move(alone)
            completes(alone)
        listed = machine.run("dpkg", "-L", "phaul").splitlines()
        pages = {f"/usr/share/man/man1/phaul-{name}.1.gz" for name in phaul.commands}
        assert {*pages, "/usr/share/man/man1/phaul.1.gz", "/usr/share/man/man8/phauld.8.gz"} <= set(listed)


def move(machine: Machine) -> dict[str, Any]:
    """A process moves from one phauld of the package to another on the same machine; the report."""
    background(machine, "phauld", "--node-name", "a")
    background(machine, "phauld", "--node-name", "b", *SECOND)
    for target in ("unix:/run/phaul/phauld.sock", f"unix:{UNIX_B}"):
        until(partial(serves, machine, target), "phauld serves")
    machine.run("phaul", "run", "--name", "heart", "--", *HEART)
    heart = machine.shared / "heart"
    until(lambda: read_beats(heart).count, "it beats")
    output = machine.run("phaul", "--json", "migrate", "-q", "heart", "--to", "127.0.0.1:7717")
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert report["outcome"] == "moved", report
    assert not machine.running()
    (there,) = machine.json("--daemon", f"unix:{UNIX_B}", "ps")["workloads"]
    machine.run("sh", "-c", f"kill -USR1 {there['pid']}")  # there is no program of that name
    until(lambda: read_beats(heart).checks, "it checks its memory")
    assert read_beats(heart).failures == 0
    return {"pause_ms": report["pause_ms"], "mode": report["mode"]}


def serves(machine: Machine, target: str) -> bool:
    """Whether a phauld answers there."""
    return machine.run("phaul", "--json", "--daemon", target, "ps", check=False).startswith('{"workloads"')


def completes(machine: Machine) -> None:
    """A person's bash knows phaul's words by what the package brought."""
    assert "phaul resolve" in typed(machine, "phaul reso\t", "phaul resolve")
    assert "--move-address" in typed(machine, "phaul migrate heart --move-a\t", "--move-address")
    script = ". /usr/share/bash-completion/bash_completion; _comp_load phaul; complete -p phaul"
    assert "_phaul_completion" in machine.run("bash", "-c", script)


def test_a_tree_outlives_the_package_and_nothing_else_is_left(deb: Path, shared: Path) -> None:
    machine = boot("a", shared)
    try:
        before = files(machine)
        machine.install(deb)
        machine.start_workload("heart")
        pid = machine.running()["heart"]
        said = machine.run("apt-get", "remove", "--yes", "phaul")
        assert "phaul: these run on" in said
        assert "heart" in said.partition("these run on")[2]
        beats_on(machine)
        assert any(name.startswith("/var/lib/phaul/") for name in files(machine))
        machine.install(deb)
        machine.until_serving()
        assert machine.running() == {"heart": pid}
        machine.run("apt-get", "purge", "--yes", "phaul")
        beats_on(machine)
        left = {name for name in files(machine) - before if not name.startswith(OF_OTHERS)}
        assert not left
        assert not {name for name in files(machine) if "phaul" in name and not name.startswith("/run/systemd")}
        machine.run("kill", str(pid))
        until(lambda: not Path(f"{machine.root}/proc/{pid}").exists(), "it ends as it is told")
    finally:
        machine.end()


def beats_on(machine: Machine) -> None:
    seen = read_beats(machine.shared / "heart").count
    until(lambda: read_beats(machine.shared / "heart").count > seen, "it beats on")


def test_images_that_a_process_has_open_outlive_a_purge(tmp_path: Path) -> None:
    """The package's own script, in this machine's files but for those directories, which are its own."""
    script = (ROOT / "debian/postrm").read_text().replace("#DEBHELPER#", "")
    inside = """
    mount -t tmpfs none /dev/shm; mount -t tmpfs none /var/lib; mount -t tmpfs none /run; mount -t tmpfs none /var/log
    mkdir -p /dev/shm/phaul/one /var/lib/phaul/images/two /var/lib/phaul/b /var/log/phaul /run/phaul
    echo pages >/dev/shm/phaul/one/pages-1.img
    exec 9</dev/shm/phaul/one/pages-1.img
    sh "$0" purge
    find /dev/shm/phaul /var/lib/phaul /var/log/phaul /run/phaul -type f 2>/dev/null || true
    exec 9<&-
    sh "$0" purge
    find /dev/shm /var/lib /var/log /run -name '*phaul*'"""
    (tmp_path / "postrm").write_text(script)
    said = run("unshare", "--mount", "--propagation", "private", "sh", "-ec", inside, tmp_path / "postrm").splitlines()
    assert said[0].startswith("phaul: /dev/shm/phaul stays")
    assert said[1:] == ["/dev/shm/phaul/one/pages-1.img"]


def test_what_is_another_phaulds_outlives_a_purge(tmp_path: Path) -> None:
    """One that was installed otherwise has the same directories; and a mount in them does not make the purge fail."""
    script = (ROOT / "debian/postrm").read_text().replace("#DEBHELPER#", "")
    inside = """
    mount -t tmpfs none /dev/shm; mount -t tmpfs none /var/lib; mount -t tmpfs none /run; mount -t tmpfs none /var/log
    mkdir -p /dev/shm/phaul /var/lib/phaul/images /var/lib/phaul/workloads /var/log/phaul /run/phaul
    echo log >/var/log/phaul/web.log
    exec 9>/var/lib/phaul/journal.sqlite-wal
    sh "$0" purge
    find /var/lib/phaul /var/log/phaul /run/phaul /dev/shm/phaul | sort
    exec 9>&-
    mount -t tmpfs none /var/lib/phaul/images
    sh "$0" purge 2>/dev/null
    find /dev/shm /var/lib /var/log /run -name '*phaul*'"""
    (tmp_path / "postrm").write_text(script)
    said = run("unshare", "--mount", "--propagation", "private", "sh", "-ec", inside, tmp_path / "postrm").splitlines()
    assert "a phauld of another installation works there" in said[0]
    kept = ["/dev/shm/phaul", "/run/phaul", "/var/lib/phaul", "/var/lib/phaul/images"]
    kept += [
        "/var/lib/phaul/journal.sqlite-wal",
        "/var/lib/phaul/workloads",
        "/var/log/phaul",
        "/var/log/phaul/web.log",
    ]
    assert said[1 : 1 + len(kept)] == kept
    assert said[1 + len(kept) :] == ["/var/lib/phaul"]  # with the mount
