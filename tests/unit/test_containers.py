"""Names of containers, records of their runtimes, their mounts, and what has changed in their roots."""

from __future__ import annotations

import stat

import pytest

from phaul.v1 import types_pb2
from phaul_client.containers.baggage import batches, is_change
from phaul_client.containers.changes import Entry, changes
from phaul_client.containers.mounts import dump_externals, outside, parse_mounts, restore_externals
from phaul_client.containers.runtimes import RUNTIMES, ContainerName, parse_container, runtime_of
from phaul_client.errors import InvalidRequest, PhaulError

RUNC = {
    "id": "web",
    "init_process_pid": 60,
    "init_process_start": 7,
    "created": "2026-11-27T14:53:54Z",
    "namespace_paths": {"NEWNET": "/proc/60/ns/net", "NEWUSER": "/proc/1/ns/user"},
    "config": {"rootfs": "/srv/web/rootfs", "labels": ["bundle=/srv/web"], "cgroups": {"systemd": False}},
}
CRUN = {
    "pid": 64,
    "process-start-time": 9,
    "cgroup-path": "/web",
    "rootfs": "rootfs",
    "systemd-cgroup": False,
    "bundle": "/srv/web",
    "created": "2026-11-27T14:56:56Z",
}
MOUNTS = """\
91 67 254:0 /srv/rootfs / rw,relatime - ext4 /dev/vda rw
92 91 0:43 / /proc rw,relatime - proc proc rw
93 91 0:44 / /dev rw,nosuid - tmpfs tmpfs rw,mode=755
97 91 0:47 / /sys ro - sysfs sysfs ro
99 97 0:29 /web /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct
100 97 0:38 /web /sys/fs/cgroup/unified ro - cgroup2 cgroup rw,nsdelegate
68 92 0:43 /bus /proc/bus ro,relatime - proc proc rw
73 92 0:44 /null /proc/keys rw,nosuid - tmpfs tmpfs rw,mode=755
74 92 0:6 /null /proc/timer_list ro - devtmpfs devtmpfs rw
75 91 0:71 /my\\040data /data rw - tmpfs tmpfs rw
"""
CONFIG = {"mounts": [{"destination": "/data/", "type": "bind", "source": "/srv/my data", "options": ["rbind"]}]}


def test_names() -> None:
    assert parse_container("web") is None
    assert parse_container("runc:web-1") == ContainerName("runc", "web-1")
    for text in ("docker:web", "runc:", "runc:a/b", "crun:..", "runc:a:b"):
        with pytest.raises(InvalidRequest):
            parse_container(text)
    with pytest.raises(PhaulError) as refused:
        runtime_of(ContainerName("podman", "web"))
    assert (refused.value.reason, "no records" in refused.value.message) == ("UNSUPPORTED", True)


def test_a_record_names_another_init() -> None:
    runc, crun = RUNTIMES["runc"], RUNTIMES["crun"]
    assert runc.init is not None
    assert runc.with_init is not None
    assert crun.init is not None
    assert crun.with_init is not None
    init = runc.init(RUNC)
    assert (init.pid, init.start_ticks, init.bundle, init.cgroup_manager) == (60, 7, "/srv/web", "cgroupfs")
    changed = runc.with_init(RUNC, 77, 8)
    assert runc.init(changed).pid == 77
    assert changed["namespace_paths"] == {"NEWNET": "/proc/77/ns/net", "NEWUSER": "/proc/1/ns/user"}
    assert RUNC["init_process_pid"] == 60
    assert crun.init(crun.with_init(CRUN, 77, 8)).start_ticks == 8
    assert crun.init({**CRUN, "cgroup-path": ""}).cgroup_manager == "disabled"
    assert crun.manager("disabled") == ("--cgroup-manager=disabled",)


def test_mounts_from_outside() -> None:
    found = outside(CONFIG, parse_mounts(MOUNTS))
    volume, cgroup = types_pb2.CONTAINER_MOUNT_KIND_VOLUME, types_pb2.CONTAINER_MOUNT_KIND_CGROUP
    assert [(each.mountpoint, each.kind, each.source) for each in found] == [
        ("/sys/fs/cgroup/cpu", cgroup, "cpu,cpuacct"),
        ("/sys/fs/cgroup/unified", cgroup, "cgroup2"),
        ("/proc/timer_list", volume, "/dev/null"),
        ("/data", volume, "/srv/my data"),
    ]
    whole = types_pb2.Container(mounts=found, log="file[8c:5]")
    assert list(dump_externals(whole))[-2:] == ["mnt[/data]:phaul75", "file[8c:5]"]
    link = types_pb2.ContainerLink(name="eth0", outer="vweb", bridge="br0")
    container = types_pb2.Container(mounts=found, links=[link])
    paths = {"cpu,cpuacct": "/sys/fs/cgroup/cpu/x", "cgroup2": "/sys/fs/cgroup/unified/x"}
    assert list(restore_externals(container, paths)) == [
        "mnt[phaul99]:/sys/fs/cgroup/cpu/x",
        "mnt[phaul100]:/sys/fs/cgroup/unified/x",
        "mnt[phaul74]:/dev/null",
        "mnt[phaul75]:/srv/my data",
        "veth[eth0]:vweb",
    ]
    with pytest.raises(PhaulError, match="cpu,cpuacct"):
        list(restore_externals(container, {"cgroup2": "/x"}))


@pytest.mark.parametrize(
    "line",
    ["80 91 254:0 /x /unknown rw - ext4 /dev/vda rw", "80 75 0:99 / /data/below rw - tmpfs tmpfs rw"],
    ids=["not in config.json", "came along with a volume"],
)
def test_a_mount_that_nobody_could_make_there_is_refused(line: str) -> None:
    with pytest.raises(PhaulError) as refused:
        outside(CONFIG, parse_mounts(MOUNTS + line))
    assert refused.value.reason == "UNSUPPORTED"


def entry(number: int, *, mode: int = stat.S_IFREG) -> Entry:
    return Entry(number, mode, 0, number, number)


def test_changes() -> None:
    before = {"a": entry(1), "b": entry(2), "c": entry(3), "d": entry(4, mode=stat.S_IFDIR), "d/e": entry(5)}
    now = {"a": entry(1), "b": entry(9), "c": entry(8, mode=stat.S_IFDIR), "n": entry(7)}
    found = changes(before, now)
    assert found.deleted == ("d/e", "d", "c")  # what is in a directory before the directory
    assert found.changed == ("b", "c", "n")
    assert changes(now, now) == ((), ())


def test_what_tar_says_of_files_that_change_is_no_failure() -> None:
    assert is_change("")
    assert is_change("tar: a/b: file changed as we read it\ntar: x y: Cannot stat: No such file or directory")
    assert not is_change("tar: a: Read error at byte 0, while reading 512 bytes: Input/output error")
    assert not is_change("tar: a: file changed as we read it\n" * 5000)  # the beginning is lost


def test_names_in_messages() -> None:
    names = [f"{number:09}" * 1000 for number in range(200)]
    found = list(batches(names))
    assert [name for batch in found for name in batch] == names
    assert len(found) > 1
