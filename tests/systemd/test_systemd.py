"""phauld as a unit of a real systemd: what a restart, a crash, a hang and an upgrade do to it, and not to its trees."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from phauld.trees.cgroup_limits import controls, scope_properties
from phauld.trees.workload_spec import CgroupLimits
from tests.systemd.machines import NETWORK, NEWER, ROOT, Machine, newer_package, until
from tests.victims.heartbeat import Beats, read_beats

pytestmark = pytest.mark.timeout(300)

HARDENING: Final = ROOT / "deploy/phauld-hardening.conf"
CAP_MKNOD: Final = 27
LIMITS: Final = CgroupLimits(memory_bytes=64 << 20, cpu_millis=500, pids=20)
TREES: Final = 20
QUIET_SECONDS: Final = 1.0
SLOW_MIB: Final = 3  #: a second on the link: 64 MiB take 20 s
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


def move(source: Machine, destination: Machine, name: str, *options: str) -> dict[str, Any]:
    """Move a workload; the report."""
    output = source.run("phaul", "--json", "migrate", "-q", name, "--to", destination.address, *options)
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


def test_limits_hold_in_a_scope_or_are_refused(machines: Pair) -> None:
    """Which of them depends on the controllers that this machine's cgroup version 2 has."""
    a, _ = machines
    properties = [word for each in scope_properties(LIMITS) for word in ("--property", each)]
    a.run("systemd-run", "--scope", "--quiet", *properties, "true")
    words = ("phaul", "run", "--name", "limited", "--memory", "64M", "--cpus", "0.5", "--pids", "20")
    said = a.run(*words, "--", "sleep", "100", check=False)
    if "this node cannot limit" in said:
        assert a.json("ps", "--all")["workloads"] == []
        return
    place = cgroup(a, a.running()["limited"]).removeprefix("0::/")
    assert "phaul-tree-limited-" in place
    held = {name: a.run("cat", f"/sys/fs/cgroup/{place}/{name}").strip() for name in controls(LIMITS)}
    assert held == controls(LIMITS)


def test_a_restart_touches_none_of_twenty_restored_trees(machines: Pair, json_report: dict[str, Any]) -> None:
    a, b = machines
    names = [f"tree{number}" for number in range(TREES)]
    for name in names:
        a.start_workload(name, "--interval", "0.01")
        move(a, b, name)
    assert set(names) <= set(b.running())
    pids, phauld = b.running(), b.main_pid
    forget_gaps(b, names)
    time.sleep(QUIET_SECONDS)  # to compare with: what the machine does to them anyway
    quiet_ms = longest_gap_ms(b, names)
    forget_gaps(b, names)
    b.run("systemctl", "restart", "phauld")
    b.until_serving(not_pid=phauld)
    restart_ms = longest_gap_ms(b, names)
    assert {name: b.running().get(name) for name in names} == {name: pids[name] for name in names}
    assert_beats(b, *names)
    figures = {"longest_gap_ms": restart_ms, "longest_gap_without_restart_ms": quiet_ms}
    json_report["systemd_restart"] = {"trees": TREES, "interval_ms": 10, **figures}


def forget_gaps(machine: Machine, names: list[str]) -> None:
    """From now on the hearts measure their longest gap anew."""
    before = {name: beats(machine, name).longest_gap_ns for name in names}

    def have_forgotten() -> bool:
        machine.run("pkill", "-USR2", "-f", "--", "^/usr/bin/python3 .*shared/tree")
        return all(beats(machine, name).longest_gap_ns < before[name] for name in names)

    until(have_forgotten, "the hearts forget their gaps")


def longest_gap_ms(machine: Machine, names: list[str]) -> float:
    """The longest time between two beats of any of them, by their own clocks."""
    return round(max(beats(machine, name).longest_gap_ns for name in names) / 1e6, 1)


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


@pytest.mark.parametrize(
    ("end", "command"),
    [("a", "kill -9 {phauld}"), ("b", "kill -9 {phauld}"), ("a", "systemctl restart phauld")],
    ids=["killed at a", "killed at b", "restarted at a"],
)
def test_a_phauld_that_goes_in_the_freeze_leaves_the_tree_at_its_source(machines: Pair, end: str, command: str) -> None:
    a, b = machines
    going = a if end == "a" else b
    a.start_workload("midway", "--mib", "64")
    phauld = going.main_pid
    with a.slow_link(SLOW_MIB):
        migration = a.start("phaul", "migrate", "midway", "--to", b.address)
        a.until_phase("freezing", "midway")
        going.run(*command.format(phauld=phauld).split())
        migration.communicate(timeout=60)
        going.until_serving(not_pid=phauld)
    until(lambda: "midway" not in b.running(), "no copy at the destination")
    assert_beats(a, "midway")
    move(a, b, "midway")
    assert_beats(b, "midway")


def test_a_phauld_that_hangs_is_replaced_by_the_watchdog(machines: Pair) -> None:
    _, b = machines
    with b.drop_in("[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n"):
        b.start_workload("hung")
        pid, phauld = b.running()["hung"], b.main_pid
        b.run("kill", "-STOP", str(phauld))
        b.until_serving(not_pid=phauld)
        assert b.running()["hung"] == pid
        assert_beats(b, "hung")
        assert "Watchdog timeout" in b.run("journalctl", "--unit", "phauld", "--no-pager")


def exposure(machine: Machine) -> float:
    """What `systemd-analyze security` says of the unit: 10 is worst."""
    said = machine.run("systemd-analyze", "security", "phauld", "--no-pager", check=False)
    found = re.search(r"Overall exposure level for phauld.service: ([0-9.]+)", said)
    assert found is not None, said
    return float(found[1])


def test_trees_move_under_the_hardening_drop_in(machines: Pair, json_report: dict[str, Any]) -> None:
    a, b = machines
    plain = exposure(a)
    hardening = HARDENING.read_text().replace("192.0.2.0/24", NETWORK)
    with_addresses = re.sub(r"^#(IPAddress)", r"\1", hardening, flags=re.MULTILINE)
    with a.drop_in(hardening), b.drop_in(with_addresses):
        for machine in machines:
            status = (machine.root / f"proc/{machine.main_pid}/status").read_text()
            assert not int(re.findall(r"CapBnd:\s+(\w+)", status)[0], 16) >> CAP_MKNOD & 1
        scores = {"unit": plain, "hardened": exposure(a), "hardened_with_addresses": exposure(b)}
        a.start_workload("hardened", "--mib", "16")
        for source, destination, *options in (
            (a, b, "--restore", "eager"),
            (b, a, "--restore", "lazy"),
            (a, b, "--mode", "post-copy"),
            (b, a, "--mode", "post-copy"),
        ):
            move(source, destination, "hardened", *options)
            assert_beats(destination, "hardened")
    assert scores["hardened"] < plain
    json_report["systemd_exposure"] = scores


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
