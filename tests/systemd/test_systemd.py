"""phauld as a unit of a real systemd: what a restart, a crash, a hang and an upgrade do to it, and not to its trees."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.systemd.machines import NEWER, Machine, newer_package, until
from tests.victims.heartbeat import Beats, read_beats

pytestmark = pytest.mark.timeout(300)

TREES: Final = 20
Pair = tuple[Machine, Machine]


def beats(machine: Machine, name: str) -> Beats:
    return read_beats(machine.shared / name)


def assert_beats(machine: Machine, *names: str) -> None:
    """They run, and their memory is intact."""
    before = {name: beats(machine, name) for name in names}
    for name in names:
        machine.run("pkill", "-USR1", "-f", "--", f"^/usr/bin/python3 .*shared/{name}( |$)")
    assert set(names) <= set(machine.running())
    for name in names:
        until(partial(_has_checked, machine, name, before[name].checks), f"{name} beats and checks itself")
        assert beats(machine, name).failures == 0


def _has_checked(machine: Machine, name: str, before: int) -> bool:
    return beats(machine, name).checks > before


def move(source: Machine, destination: Machine, name: str) -> dict[str, Any]:
    """Move a workload; the report."""
    output = source.run("phaul", "--json", "migrate", "-q", name, "--to", destination.address)
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert report["outcome"] == "moved", report
    return report


def cgroup(machine: Machine, pid: int) -> str:
    return (machine.root / f"proc/{pid}/cgroup").read_text().strip().splitlines()[-1]


def test_it_says_when_it_serves_and_what_it_does(machines: Pair) -> None:
    a, _ = machines
    seen = a.show("Type", "ActiveState", "StatusText", "WatchdogUSec", "NotifyAccess")
    assert (seen["Type"], seen["ActiveState"], seen["WatchdogUSec"]) == ("notify", "active", "30s")
    assert seen["StatusText"].startswith(f"serving insecure {a.address}:7707: 0 migrations out, 0 in")
    assert 'Status: "serving' in a.run("systemctl", "status", "phauld")


def test_a_restored_tree_is_in_a_scope_of_its_own(machines: Pair, json_report: dict[str, Any]) -> None:
    a, b = machines
    a.start_workload("scoped")
    report = move(a, b, "scoped")
    json_report["systemd_pause_ms"] = report["pause_ms"]
    assert_beats(b, "scoped")
    assert "scoped" not in a.running()
    assert "/phaul.slice/phaul-tree-scoped-" in cgroup(b, b.running()["scoped"])
    assert "phauld.service" in cgroup(b, b.main_pid)


def test_a_restart_touches_none_of_twenty_restored_trees(machines: Pair, json_report: dict[str, Any]) -> None:
    a, b = machines
    names = [f"tree{number}" for number in range(TREES)]
    for name in names:
        a.start_workload(name, "--interval", "0.01")
        move(a, b, name)
    assert set(names) <= set(b.running())
    pids, phauld = b.running(), b.main_pid
    longest = watch_gaps(b, names, lambda: b.run("systemctl", "restart", "phauld"))
    b.until_serving(not_pid=phauld)
    assert {name: b.running().get(name) for name in names} == {name: pids[name] for name in names}
    assert_beats(b, *names)
    json_report["systemd_restart"] = {"trees": TREES, "interval_ms": 10, "longest_gap_ms": round(longest, 1)}


def watch_gaps(machine: Machine, names: list[str], act: Callable[[], object]) -> float:
    """The longest time, in milliseconds, between two beats of any tree while `act` is done."""
    end, longest = None, 0.0
    last: dict[str, Beats] = {name: beats(machine, name) for name in names}
    actor = threading.Thread(target=act)
    actor.start()
    while end is None or time.monotonic() < end:
        for name in names:
            now = beats(machine, name)
            if now.count == last[name].count + 1:  # both were seen: their times are the heart's own
                longest = max(longest, (now.at_ns - last[name].at_ns) / 1e6)
            elif now.count > last[name].count + 1:
                longest = max(longest, (now.at_ns - last[name].at_ns) / 1e6 / (now.count - last[name].count))
            if now.count:
                last[name] = now
        if end is None and not actor.is_alive():
            end = time.monotonic() + 0.5
    actor.join()
    return longest


def test_a_phauld_killed_with_9_comes_back_and_its_trees_never_knew(machines: Pair) -> None:
    a, b = machines
    a.start_workload("killed")
    move(a, b, "killed")
    pid, phauld = b.running()["killed"], b.main_pid
    restarts = int(b.show("NRestarts")["NRestarts"])
    b.run("kill", "-9", str(phauld))
    b.until_serving(not_pid=phauld)
    assert int(b.show("NRestarts")["NRestarts"]) == restarts + 1
    assert b.running()["killed"] == pid
    assert_beats(b, "killed")
    move(b, a, "killed")
    assert_beats(a, "killed")


def assert_one_copy_beats(machines: Pair, name: str) -> None:
    a, b = machines
    until(lambda: (name in a.running()) != (name in b.running()), "exactly one copy")
    assert_beats(a if name in a.running() else b, name)


@pytest.mark.parametrize("end", ["a", "b"])
def test_a_phauld_killed_in_a_migration_leaves_one_tree(machines: Pair, end: str) -> None:
    a, b = machines
    dying = a if end == "a" else b
    a.start_workload("midway", "--mib", "128")
    phauld = dying.main_pid
    migration = a.start("phaul", "migrate", "midway", "--to", b.address)
    time.sleep(0.3)  # wherever it is then
    dying.run("kill", "-9", str(phauld), check=False)
    migration.communicate(timeout=60)
    dying.until_serving(not_pid=phauld)
    assert_one_copy_beats(machines, "midway")


def test_a_restart_during_a_migration_leaves_one_tree(machines: Pair) -> None:
    a, b = machines
    a.start_workload("restarted", "--mib", "128")
    phauld = a.main_pid
    migration = a.start("phaul", "migrate", "restarted", "--to", b.address)
    time.sleep(0.2)
    a.run("systemctl", "restart", "phauld")
    migration.communicate(timeout=60)
    a.until_serving(not_pid=phauld)
    assert_one_copy_beats(machines, "restarted")


def test_a_phauld_that_hangs_is_replaced_by_the_watchdog(machines: Pair) -> None:
    _, b = machines
    directory = b.root / "run/systemd/system/phauld.service.d"
    directory.mkdir(parents=True)
    (directory / "quick.conf").write_text("[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n")
    try:
        b.run("systemctl", "daemon-reload")
        b.run("systemctl", "restart", "phauld")
        b.start_workload("hung")
        pid, phauld = b.running()["hung"], b.main_pid
        b.run("kill", "-STOP", str(phauld))
        b.until_serving(not_pid=phauld)
        assert b.running()["hung"] == pid
        assert_beats(b, "hung")
        assert "Watchdog timeout" in b.run("journalctl", "--unit", "phauld", "--no-pager")
    finally:
        (directory / "quick.conf").unlink()
        directory.rmdir()
        b.run("systemctl", "daemon-reload")
        b.run("systemctl", "restart", "phauld")


def test_a_stop_ends_phauld_well_and_no_tree(machines: Pair) -> None:
    _, b = machines
    b.start_workload("left")
    pid = b.running()["left"]
    b.run("systemctl", "stop", "phauld")
    seen = b.show("ActiveState", "Result", "ExecMainStatus")
    assert seen == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    count = beats(b, "left").count
    until(lambda: beats(b, "left").count > count, "it beats without phauld")
    b.run("systemctl", "start", "phauld")
    assert b.running()["left"] == pid


def test_a_wrong_setting_is_not_tried_again(machines: Pair) -> None:
    _, b = machines
    file = b.root / "etc/phaul/phauld.toml"
    good = file.read_text()
    try:
        file.write_text("lease_seconds = -1\n")
        b.run("systemctl", "restart", "phauld", check=False)
        seen = b.show("ActiveState", "ExecMainStatus", "NRestarts")
        assert seen == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    finally:
        file.write_text(good)
        b.run("systemctl", "reset-failed", "phauld")
        b.run("systemctl", "start", "phauld")


def test_an_upgrade_restarts_phauld_and_no_tree(machines: Pair, package: Path, tmp_path: Path) -> None:
    a, b = machines
    a.start_workload("upgraded")
    move(a, b, "upgraded")
    pid, phauld = b.running()["upgraded"], b.main_pid
    b.install(newer_package(package, tmp_path))
    b.until_serving(not_pid=phauld)
    assert NEWER in b.run("phauld", "--version")
    assert b.running()["upgraded"] == pid
    assert_beats(b, "upgraded")
    move(b, a, "upgraded")  # from the newer to the older
    assert_beats(a, "upgraded")
